"""What surrounds a loop: seeds, run folder, progress, checkpoints, interrupts, trackers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from trueup.errors import CheckpointError, NonFiniteError
from trueup.records import CompletionGroup
from trueup.runs.checkpoint import checkpoint_step, latest_checkpoint, load_latest, save_checkpoint
from trueup.runs.folder import RunFolder, read_metrics
from trueup.runs.interrupt import Interrupt, Stopped, interrupts
from trueup.runs.lock import release
from trueup.runs.progress import RunProgress
from trueup.runs.seeds import restore_rng_state, rng_state, seed_everything
from trueup.runs.trackers import open_trackers, require_trackers
from trueup.trainers.fingerprint import check_unchanged
from trueup.trainers.memory import memory_errors
from trueup.trainers.settings import MAY_CHANGE, TrainSettings
from trueup.trainers.stepping import Stepper


@dataclass(frozen=True)
class RunResult:
    """Where a run lies and what its last evaluation (without held-out data: its last step) measured."""

    folder: Path
    model_folder: Path
    """The trained model in Hugging Face layout."""
    metrics: dict[str, Any]


@dataclass
class Counters:
    """What a run has added up so far; part of every checkpoint."""

    num_tokens: int = 0
    """Tokens that went through the model in training, every prompt counted once."""
    skipped_steps: int = 0


@dataclass
class Session:
    """An open run."""

    kind: str
    settings: TrainSettings
    folder: RunFolder
    interrupt: Interrupt
    track: Callable[[Mapping[str, Any], int], None] = lambda metrics, step: None
    """Sends a record to the trackers; set while the run is under way."""
    fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What the run was started with, see ``fingerprint``; part of every checkpoint."""

    def say(self, text: str) -> None:
        """One line for the user, unless the run is quiet."""
        if not self.settings.quiet:
            print(text, flush=True)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """One record, to ``metrics.jsonl`` and the trackers."""
        self.folder.log(metrics, step)
        self.track(metrics, step)

    def restore(
        self,
        stepper: Stepper,
        fingerprints: Mapping[str, str],
        take_over: Callable[[Mapping[str, Any]], None] = lambda state: None,
    ) -> tuple[int, Counters]:
        """The step to go on from, with parameters, optimiser and random states set to what they were then.

        ``take_over`` is given what else was saved (``save``'s ``more``); a ``KeyError``, ``ValueError`` or
        ``RuntimeError`` of it means that it does not fit.
        No record is cut back before everything was found to fit. Raises ``CheckpointError`` where data,
        tokenizer or starting weights are not those of the ``fingerprints`` that the run began with.
        """
        self.fingerprints = fingerprints
        found = load_latest(self.folder) if self.settings.resume != "no" else None
        if found is None:
            self.folder.truncate_after(-1)
            return 0, Counters()
        checkpoint, state = found
        step = checkpoint_step(checkpoint)
        if state["kind"] != self.kind:
            raise CheckpointError(
                f"this is a run of '{state['kind']}', not of '{self.kind}'",
                where=str(self.folder.path),
                way_out="name another folder with --output",
            )
        check_unchanged(state.get("fingerprints", {}), fingerprints, str(self.folder.path))
        try:
            stepper.load_state_dict(state["stepper"])
            take_over(state)
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"it does not fit this model and optimiser: {error}",
                where=str(checkpoint),
                way_out="resume with the settings in config.yaml, or start anew in another folder",
            ) from error
        restore_rng_state(state["rng"])
        self.folder.truncate_after(step)
        self.say(f"going on from {checkpoint}")
        return step, Counters(**state["counters"])

    @contextmanager
    def running(self, done: int, num_steps: int) -> Iterator[RunProgress]:
        """Progress on the screen, trackers, and interrupts held back until a step is over."""
        settings = self.settings
        progress = RunProgress(num_steps, title=self.kind, done=done, quiet=settings.quiet)
        trackers = open_trackers(
            settings.tracker,
            self.folder,
            project=settings.tracker_project,
            settings={"kind": self.kind} | {name: plain(value) for name, value in vars(settings).items()},
            step=done,
        )
        with interrupts() as self.interrupt, trackers as self.track, progress:
            yield progress

    def stopped(self, step: int) -> Stopped:
        """What to raise after an interrupt, once ``step`` is saved."""
        return self.interrupt.stop(
            f"interrupted after step {step}, which is saved\n  → --resume auto goes on in {self.folder.path}"
        )

    def save(
        self,
        step: int,
        stepper: Stepper,
        counters: Counters,
        save_model: Callable[[Path], None],
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint: the model for others, the state for going on; ``more`` of it where a loop has more."""
        if not stepper.is_finite():
            raise NonFiniteError(
                f"after step {step} the parameters are not finite numbers any more, so they are not saved",
                where=str(self.folder.path),
                way_out=f"start a new run with a lower --learning-rate{self._last_whole()}",
            )
        self.folder.sync()
        state = {
            "kind": self.kind,
            "fingerprints": dict(self.fingerprints),
            "stepper": stepper.state_dict(),
            "rng": rng_state(),
            "counters": vars(counters),
            **(more or {}),
        }
        save_checkpoint(self.folder, step, save_model=save_model, state=state, keep_last=self.settings.keep_checkpoints)

    def after_step(
        self, done: int, num_steps: int, *, evaluate: Callable[[int], None], save: Callable[[int], None]
    ) -> None:
        """What comes after each optimiser step: evaluate and save where it is time, and stop where the user wants it.

        Raises ``KeyboardInterrupt`` after an interrupt, once the step is saved.
        """
        last = done == num_steps
        if last or due(done, self.settings.eval_every):
            evaluate(done)
        if last or due(done, self.settings.save_every) or self.interrupt.requested:
            save(done)
        if self.interrupt.requested:
            raise self.stopped(done)

    def lacks_evaluation(self, step: int, num_steps: int) -> bool:
        """Whether the run was saved at a step that was to be evaluated, and the evaluation failed."""
        return (step == num_steps or due(step, self.settings.eval_every)) and not any(
            line["step"] == step and any(name.startswith("eval_") for name in line)
            for line in read_metrics(self.folder.metrics)
        )

    def skipped(self, groups: Sequence[CompletionGroup], step: int, counters: Counters) -> None:
        """Keep the tokens of a batch whose loss or gradient was not finite, for a look at them.

        Raises ``NonFiniteError`` once there were too many.
        """
        rows = [
            {
                "where": group.where,
                "prompt": group.prompt.tolist(),
                "completions": [completion.tokens.tolist() for completion in group.completions],
            }
            for group in groups
        ]
        self.folder.log_bad_batch(rows, step)
        if counters.skipped_steps >= self.settings.max_skipped_steps:
            raise NonFiniteError(
                f"{counters.skipped_steps} steps had a loss or gradient that is not finite; their batches are kept",
                where=str(self.folder.bad_batches),
                way_out="look at these rows; start a new run with a lower --learning-rate or --dtype float32"
                f"{self._last_whole()}; or go on with --resume auto and a larger --max-skipped-steps",
            )

    def _last_whole(self) -> str:
        last = latest_checkpoint(self.folder)
        return f", from --model {last / 'model'} if you like" if last else ""

    def result(self, metrics: Mapping[str, Any]) -> RunResult:
        """The finished run. A run that had nothing left to do says what its last lines say."""
        checkpoint = latest_checkpoint(self.folder)
        assert checkpoint is not None  # the last step always writes one
        if not metrics:
            metrics = {name: value for line in read_metrics(self.folder.metrics)[-2:] for name, value in line.items()}
        return RunResult(folder=self.folder.path, model_folder=checkpoint / "model", metrics=dict(metrics))


def due(step: int, every: int | None) -> bool:
    """Is it time for what happens every ``every`` steps?"""
    return every is not None and step % every == 0


Given = TypeVar("Given", bound=TrainSettings)
Objects = ParamSpec("Objects")


def guarded(
    train: Callable[Concatenate[Given, Objects], RunResult],
) -> Callable[Concatenate[Given, Objects], RunResult]:
    """Decorates a loop: memory that runs out is explained, and when it ends, however it ends, other processes may write
    into its run folder."""

    @functools.wraps(train)
    def trained(settings: Given, *arguments: Objects.args, **objects: Objects.kwargs) -> RunResult:
        try:
            with memory_errors(settings):
                return train(settings, *arguments, **objects)
        finally:
            release(Path(settings.output))

    return trained


def open_session(kind: str, settings: TrainSettings) -> Session:
    """Seed everything and open the run folder.

    Raises ``MissingExtraError`` for a tracker that is not installed, ``SettingsError`` for a folder in use,
    ``CheckpointError`` for one of other settings, or without checkpoint under ``--resume yes``.
    """
    require_trackers(settings.tracker)
    if settings.resume == "yes" and latest_checkpoint(Path(settings.output)) is None:
        raise CheckpointError(
            "there is no checkpoint to resume", where=settings.output, way_out="--resume auto starts anew then"
        )
    folder = RunFolder.create(settings.output, settings, resume=settings.resume != "no", may_change=MAY_CHANGE)
    seed_everything(settings.seed)
    return Session(kind=kind, settings=settings, folder=folder, interrupt=Interrupt())


def plain(value: Any) -> Any:
    """A setting as trackers can store it: lists in place of tuples."""
    return list(value) if isinstance(value, tuple) else value

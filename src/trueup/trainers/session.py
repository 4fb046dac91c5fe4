"""What surrounds a loop: seeds, run folder, progress, checkpoints, interrupts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trueup.errors import CheckpointError, NonFiniteError
from trueup.records import CompletionGroup
from trueup.runs.checkpoint import checkpoint_step, latest_checkpoint, load_state, save_checkpoint
from trueup.runs.folder import RunFolder, read_metrics
from trueup.runs.interrupt import Interrupt, interrupts
from trueup.runs.progress import RunProgress
from trueup.runs.seeds import restore_rng_state, rng_state, seed_everything
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

    def say(self, text: str) -> None:
        """One line for the user, unless the run is quiet."""
        if not self.settings.quiet:
            print(text, flush=True)

    def restore(self, stepper: Stepper) -> tuple[int, Counters]:
        """The step to go on from, with parameters, optimiser and random states set to what they were then."""
        checkpoint = latest_checkpoint(self.folder) if self.settings.resume != "no" else None
        if checkpoint is None:
            self.folder.truncate_after(-1)
            return 0, Counters()
        state, step = load_state(checkpoint), checkpoint_step(checkpoint)
        if state["kind"] != self.kind:
            raise CheckpointError(
                f"this is a run of '{state['kind']}', not of '{self.kind}'",
                where=str(self.folder.path),
                way_out="name another folder with --output",
            )
        try:
            stepper.load_state_dict(state["stepper"])
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
        """Progress on the screen, and interrupts held back until a step is over."""
        with interrupts() as self.interrupt, self._progress(done, num_steps) as progress:
            yield progress

    def _progress(self, done: int, num_steps: int) -> RunProgress:
        return RunProgress(num_steps, title=self.kind, done=done, quiet=self.settings.quiet)

    def save(self, step: int, stepper: Stepper, counters: Counters, save_model: Callable[[Path], None]) -> None:
        """Write a checkpoint: the model for others, the state for going on."""
        if not stepper.is_finite():
            raise NonFiniteError(
                f"after step {step} the parameters are not finite numbers any more, so they are not saved",
                where=str(self.folder.path),
                way_out="lower --learning-rate, and go on from the last checkpoint with --resume auto",
            )
        state = {"kind": self.kind, "stepper": stepper.state_dict(), "rng": rng_state(), "counters": vars(counters)}
        save_checkpoint(self.folder, step, save_model=save_model, state=state, keep_last=self.settings.keep_checkpoints)

    def skipped(self, groups: Sequence[CompletionGroup], step: int, counters: Counters) -> None:
        """Keep the tokens of a batch whose loss or gradient was not finite, for a look at them.

        Raises ``NonFiniteError`` once there were too many.
        """
        bad_batches = self.folder.path / "bad_batches.jsonl"
        with bad_batches.open("a", encoding="utf-8") as file:
            for group in groups:
                completions = [completion.tokens.tolist() for completion in group.completions]
                row = {"step": step, "where": group.where, "prompt": group.prompt.tolist(), "completions": completions}
                file.write(json.dumps(row) + "\n")
        if counters.skipped_steps >= self.settings.max_skipped_steps:
            raise NonFiniteError(
                f"{counters.skipped_steps} steps had a loss or gradient that is not finite; their batches are kept",
                where=str(bad_batches),
                way_out="lower --learning-rate, use --dtype float32, or look at these rows of the data",
            )

    def result(self, metrics: Mapping[str, Any]) -> RunResult:
        """The finished run. A run that had nothing left to do says what its last lines say."""
        checkpoint = latest_checkpoint(self.folder)
        assert checkpoint is not None  # the last step always writes one
        if not metrics:
            metrics = {name: value for line in read_metrics(self.folder.metrics)[-2:] for name, value in line.items()}
        return RunResult(folder=self.folder.path, model_folder=checkpoint / "model", metrics=dict(metrics))


def open_session(kind: str, settings: TrainSettings) -> Session:
    """Seed everything and open the run folder.

    Raises ``SettingsError`` for a folder in use, ``CheckpointError`` for one of other settings, or without checkpoint
    under ``--resume yes``.
    """
    if settings.resume == "yes" and latest_checkpoint(Path(settings.output)) is None:
        raise CheckpointError(
            "there is no checkpoint to resume", where=settings.output, way_out="--resume auto starts anew then"
        )
    folder = RunFolder.create(settings.output, settings, resume=settings.resume != "no", may_change=MAY_CHANGE)
    seed_everything(settings.seed)
    return Session(kind=kind, settings=settings, folder=folder, interrupt=Interrupt())

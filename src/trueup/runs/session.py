"""What surrounds a loop: run folder, progress, checkpoints, interrupts, trackers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from trueup.errors import CheckpointError
from trueup.runs.checkpoint import checkpoint_step, latest_checkpoint, load_latest, save_checkpoint
from trueup.runs.folder import RunFolder
from trueup.runs.interrupt import Interrupt, Stopped, interrupts
from trueup.runs.progress import RunProgress
from trueup.runs.record_settings import RecordSettings
from trueup.runs.seeds import restore_rng_state, rng_state
from trueup.runs.trackers import open_trackers, require_trackers

Given = TypeVar("Given", bound=RecordSettings)


@dataclass
class Session(Generic[Given]):
    """An open run."""

    kind: str
    settings: Given
    folder: RunFolder
    interrupt: Interrupt
    track: Callable[[Mapping[str, Any], int], None] = lambda metrics, step: None
    """Sends a record to the trackers; set while the run is under way."""

    def say(self, text: str) -> None:
        """One line for the user, unless the run is quiet."""
        if not self.settings.quiet:
            print(text, flush=True)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """One record, to ``metrics.jsonl`` and the trackers."""
        self.folder.log(metrics, step)
        self.track(metrics, step)

    def go_on(self, take_over: Callable[[Mapping[str, Any]], None]) -> int:
        """The step to go on from; 0 for a run that begins.

        ``take_over`` is given what was saved; a ``KeyError``, ``ValueError`` or ``RuntimeError`` of it means that it
        does not fit. No record is cut back before everything was found to fit. The global random generators are set to
        what they were then. Raises ``CheckpointError`` where the run can't go on.
        """
        found = load_latest(self.folder) if self.settings.resume != "no" else None
        if found is None:
            self.folder.truncate_after(-1)
            return 0
        checkpoint, state = found
        if state["kind"] != self.kind:
            raise CheckpointError(
                f"this is a run of '{state['kind']}', not of '{self.kind}'",
                where=str(self.folder.path),
                way_out="name another folder with --output",
            )
        try:
            take_over(state)
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"it does not fit this model and optimiser: {error}",
                where=str(checkpoint),
                way_out="resume with the settings in config.yaml, or start anew in another folder",
            ) from error
        restore_rng_state(state["rng"])
        step = checkpoint_step(checkpoint)
        self.folder.truncate_after(step)
        self.say(f"going on from {checkpoint}")
        return step

    @contextmanager
    def running(self, done: int, num_steps: int, *, unit: str = "tok") -> Iterator[RunProgress]:
        """Progress on the screen, trackers, and interrupts held back until a step is over."""
        settings = self.settings
        progress = RunProgress(num_steps, title=self.kind, done=done, quiet=settings.quiet, unit=unit)
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

    def write_checkpoint(self, step: int, save_model: Callable[[Path], object], state: Mapping[str, Any]) -> None:
        """The model for others, ``state`` for going on."""
        self.folder.sync()
        whole = {"kind": self.kind, "rng": rng_state(), **state}
        save_checkpoint(self.folder, step, save_model=save_model, state=whole, keep_last=self.settings.keep_checkpoints)

    def after_step(
        self,
        done: int,
        num_steps: int,
        *,
        evaluate: Callable[[int], None],
        save: Callable[[int], None],
        before: int | None = None,
    ) -> None:
        """What comes after each step: evaluate and save where it is time, and stop where the user wants it.

        ``before``: the number of the last step, where it isn't the one before ``done``. Raises ``KeyboardInterrupt``
        after an interrupt, once the step is saved.
        """
        last = done == num_steps
        if last or due(done, self.settings.eval_every, before):
            evaluate(done)
        if last or due(done, self.settings.save_every, before) or self.interrupt.requested:
            save(done)
        if self.interrupt.requested:
            raise self.stopped(done)


def open_folder(path: str, settings: RecordSettings, *, may_change: Iterable[str]) -> RunFolder:
    """The run folder, made or opened as ``settings`` say.

    Raises ``MissingExtraError`` for a tracker that is not installed, ``SettingsError`` for a folder in use,
    ``CheckpointError`` for one of other settings, or without checkpoint under ``--resume yes``.
    """
    require_trackers(settings.tracker)
    if settings.resume == "yes" and latest_checkpoint(Path(path)) is None:
        raise CheckpointError("there is no checkpoint to resume", where=path, way_out="--resume auto starts anew then")
    return RunFolder.create(path, settings, resume=settings.resume != "no", may_change=may_change)


def due(step: int, every: int | None, before: int | None = None) -> bool:
    """Is it time for what happens every ``every`` steps: has a multiple been reached since step ``before``?"""
    return every is not None and step // every > (step - 1 if before is None else before) // every


def plain(value: Any) -> Any:
    """A setting as trackers can store it: lists in place of tuples."""
    return list(value) if isinstance(value, tuple) else value

"""What surrounds the loops beside ``runs.session``: seeds, counters, what skipped steps leave, memory that runs out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from trueup.errors import NonFiniteError
from trueup.records import CompletionGroup
from trueup.runs import session as runs
from trueup.runs.checkpoint import latest_checkpoint
from trueup.runs.folder import read_metrics
from trueup.runs.interrupt import Interrupt
from trueup.runs.lock import release
from trueup.runs.seeds import seed_everything
from trueup.runs.session import due, open_folder
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
class Session(runs.Session[TrainSettings]):
    """An open run of one of the loops."""

    fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What the run was started with, see ``fingerprint``; part of every checkpoint."""

    def restore(
        self,
        stepper: Stepper,
        fingerprints: Mapping[str, str],
        take_over: Callable[[Mapping[str, Any]], None] = lambda state: None,
    ) -> tuple[int, Counters]:
        """The step to go on from, with parameters, optimiser and random states set to what they were then.

        ``take_over`` is given what else was saved (``save``'s ``more``), as ``go_on`` does. Raises ``CheckpointError``
        where data, tokenizer or starting weights are not those of the ``fingerprints`` that the run began with.
        """
        self.fingerprints = fingerprints
        counters = Counters()

        def take(state: Mapping[str, Any]) -> None:
            check_unchanged(state.get("fingerprints", {}), fingerprints, str(self.folder.path))
            stepper.load_state_dict(state["stepper"])
            take_over(state)
            vars(counters).update(state["counters"])

        return self.go_on(take), counters

    def save(
        self,
        step: int,
        stepper: Stepper,
        counters: Counters,
        save_model: Callable[[Path], None],
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint; ``more`` is what else a loop needs for going on."""
        if not stepper.is_finite():
            raise NonFiniteError(
                f"after step {step} the parameters are not finite numbers any more, so they are not saved",
                where=str(self.folder.path),
                way_out=f"start a new run with a lower --learning-rate{self._last_whole()}",
            )
        state = {
            "fingerprints": dict(self.fingerprints),
            "stepper": stepper.state_dict(),
            "counters": vars(counters),
            **(more or {}),
        }
        self.write_checkpoint(step, save_model, state)

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
    """Open the run folder, as ``open_folder`` does, and seed everything."""
    folder = open_folder(settings.output, settings, may_change=MAY_CHANGE)
    seed_everything(settings.seed)
    return Session(kind=kind, settings=settings, folder=folder, interrupt=Interrupt())

"""Settings that every kind of run has; free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trueup.runs.settings import check_range, check_used


@dataclass(frozen=True, kw_only=True)
class RecordSettings:
    """What a run writes, and how it goes on."""

    eval_every: int | None = None
    """Evaluate every this many steps; with something to evaluate by, always at step 0 and at the end."""
    save_every: int | None = None
    """Write a checkpoint every this many steps; always at the end."""
    keep_checkpoints: int = 2
    """Keep this many of the newest checkpoints."""
    resume: Literal["no", "auto", "yes"] = "no"
    """Go on from the newest checkpoint in --output: auto if there is one, yes insists on it."""
    tracker: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Send the metrics to these trackers too; each needs its package, trueup[NAME]. One that fails is switched off."""
    tracker_project: str = "trueup"
    """Project (MLflow: experiment) that a tracker files the run under."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        for name in ("eval_every", "save_every", "keep_checkpoints"):
            check_range(self, name, at_least=1)
        check_used(self, bool(self.tracker), "--tracker", "tracker_project")

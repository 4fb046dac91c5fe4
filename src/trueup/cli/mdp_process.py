"""What the commands of ``trueup mdp`` share: the process and its settings, progress and files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueup.errors import DataError, SettingsError, check_extra, require_extra
from trueup.runs.settings import check_choices, check_range

if TYPE_CHECKING:
    import numpy as np

    from trueup.mdp import TabularMDP
    from trueup.mdp.estimation import Look
    from trueup.runs.progress import RunProgress

BUILT_IN = ("chain", "random-walk", "cliff")
GYMNASIUM = "gymnasium:"
PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """Which process, and a picture of what comes out."""

    process: str = ""
    """A file (.npz or .json), gymnasium:NAME for a toy-text environment such as gymnasium:FrozenLake-v1, or a classic:
    chain (seven states of Easy-RL), random-walk, cliff (both of Sutton & Barto)."""
    gamma: float | None = None
    """Discount; by default the file's, for a classic its own, for Gymnasium 0.99."""
    figure: str = ""
    """File for a picture (.png, .svg or .pdf), by matplotlib; none by default."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, "gamma", at_least=0, at_most=1)
        if not self.process:
            raise SettingsError("which process?", where="--process", way_out=f"a file, or {', '.join(BUILT_IN)}")
        if self.figure and Path(self.figure).suffix not in PICTURES:
            raise SettingsError(
                f"unknown ending {Path(self.figure).suffix!r}",
                where="--figure",
                way_out=f"one of {', '.join(PICTURES)}",
            )


@dataclass(frozen=True, kw_only=True)
class ExperienceSettings(ProcessSettings):
    """How much is experienced, and how far each step moves what is known."""

    num_steps: int = 10_000
    """Steps of each run."""
    num_runs: int = 20
    """Independent runs: what the standard errors and intervals are of."""
    step_size: float = 1.0
    """Temporal differences move towards their target by step-size · n^(−step-size-power) at a state's n-th update."""
    step_size_power: float = 0.7
    """How fast steps get smaller: 0 for a constant; above 0.5 and up to 1 what is learned converges."""
    seed: int = 0
    """Seed of everything random."""
    quiet: bool = False
    """Show no progress, only the result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "num_steps", at_least=1)
        check_range(self, "num_runs", at_least=2)
        check_range(self, "step_size", above=0, at_most=1)
        check_range(self, "step_size_power", at_least=0, at_most=1)
        check_range(self, "seed", at_least=0)


def begin(settings: ProcessSettings) -> TabularMDP:
    """The process, after a line that says what it is. What a picture needs is missed now, not when all is computed."""
    if settings.figure:
        check_extra("matplotlib", "plots")
    mdp = process_of(settings.process, settings.gamma)
    print(
        f"{settings.process}: {mdp.num_states:,} states, {mdp.num_actions} actions, "
        f"{mdp.transitions.nnz:,} transitions, gamma {mdp.gamma:g}"
    )
    return mdp


def process_of(name: str, gamma: float | None) -> TabularMDP:
    """What ``--process`` means. Raises ``DataError`` for what is none, ``MissingExtraError`` without Gymnasium."""
    from trueup.mdp import generators
    from trueup.mdp.files import load_mdp

    if name.startswith(GYMNASIUM):
        return gymnasium_process(name.removeprefix(GYMNASIUM), 0.99 if gamma is None else gamma)
    if name == "chain":
        return generators.chain([5, 0, 0, 0, 0, 0, 10], left=0.4, right=0.4, gamma=0.5 if gamma is None else gamma)
    if name == "random-walk":
        return generators.random_walk(gamma=1.0 if gamma is None else gamma)
    if name == "cliff":
        return generators.grid_world(generators.CLIFF, gamma=1.0 if gamma is None else gamma)
    if not Path(name).suffix:
        raise DataError(
            f"there is no process {name!r}", way_out=f"a file (.npz, .json), {GYMNASIUM}NAME, or {', '.join(BUILT_IN)}"
        )
    return load_mdp(name, gamma=gamma)


def gymnasium_process(name: str, gamma: float) -> TabularMDP:
    from trueup.mdp.outcomes import from_gymnasium

    gymnasium: Any = require_extra("gymnasium", "control")
    try:
        environment: Any = gymnasium.make(name)
    except gymnasium.error.Error as error:
        raise DataError(str(error), where=f"{GYMNASIUM}{name}") from error
    return from_gymnasium(environment, gamma=gamma)


def uniform(mdp: TabularMDP) -> np.ndarray:
    """Acting at random: [S, A]."""
    import numpy as np

    return np.full((mdp.num_states, mdp.num_actions), 1 / mdp.num_actions)


NUM_PILOTS = 50
"""Episodes that are drawn to see how long they are."""


def episode_length(
    mdp: TabularMDP, policy: np.ndarray, horizon: int, seed: int, *, whole_for: str = "", otherwise: str = ""
) -> float:
    """Mean steps of an episode, by a few of them. ``whole_for``: a method that needs their ends; raises
    ``SettingsError``, which tells of what to take ``otherwise``, where one of them is cut off at the horizon."""
    from trueup.mdp.sampling import sample_trajectories

    pilots = sample_trajectories(mdp, policy, num_trajectories=NUM_PILOTS, horizon=horizon, seed=seed)
    if whole_for and (cut := int(pilots.truncated.sum())):
        raise SettingsError(
            f"{cut} of {NUM_PILOTS} episodes were cut off at {horizon:,} steps, and {whole_for} needs their ends",
            where="--horizon",
            way_out=f"raise it; where no episode ends, take {otherwise}",
        )
    return float(pilots.mask.sum(-1).mean())


SAID = (1 / 8, 1 / 4, 1 / 2)
"""Where on the way a line of its own says how far a run is from the truth."""


def watching(progress: RunProgress, total: int, measured: Callable[[np.ndarray], Mapping[str, float]]) -> Look:
    """Shows at every look what is ``measured`` of what runs have; ``total``: of what the looks count."""
    milestones = [share * total for share in SAID]

    def look(done: int, now: np.ndarray) -> None:
        metrics = measured(now)
        progress.step(num_steps=round(done / total * progress.num_steps) - progress.done, metrics=metrics)
        if milestones and done >= milestones[0]:
            while milestones and done >= milestones[0]:
                milestones.pop(0)
            shown = " · ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            progress.say(f"{progress.title}: {done / total:.0%} · {shown}")

    return look


def write(file: str, content: bytes, setting: str) -> None:
    """The whole file or none of it, its folder with it. Raises ``SettingsError`` where that can't be."""
    from trueup.runs.files import write_atomic

    path = Path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        raise SettingsError(f"{path} can't be written: {error.strerror}", where=setting) from error

"""``trueup mdp estimate``: values of a policy from sampled experience, beside the exact ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from trueup.cli import mdp_figures
from trueup.cli.mdp_estimated import Estimated, Report
from trueup.cli.mdp_process import ExperienceSettings, begin, episode_length, uniform, watching
from trueup.errors import SettingsError
from trueup.runs.settings import check_range, check_used

if TYPE_CHECKING:
    import numpy as np

    from trueup.mdp import TabularMDP
    from trueup.mdp.estimation import Learned, Look

Method = Literal[
    "monte-carlo-first",
    "monte-carlo-every",
    "td",
    "n-step",
    "td-lambda",
    "ordinary",
    "weighted",
    "per-decision",
    "doubly-robust",
]
MONTE_CARLO = ("monte-carlo-first", "monte-carlo-every")
TEMPORAL = ("td", "n-step", "td-lambda")
OFF_POLICY = ("ordinary", "weighted", "per-decision", "doubly-robust")


@dataclass(frozen=True, kw_only=True)
class EstimateSettings(ExperienceSettings):
    """Values of a policy from sampled experience: how far from the exact ones, and how sure."""

    method: tuple[Method, ...] = ("monte-carlo-first", "td")
    """Values of states by Monte Carlo (first or every visit), td (TD(0)), n-step TD, td-lambda. The return from the
    start by importance sampling of another policy's episodes: ordinary, weighted, per-decision, doubly-robust."""
    policy: Literal["uniform", "optimal", "epsilon-greedy"] = "uniform"
    """Whose values: acting at random, the best policy, or the best one with some actions at random."""
    epsilon: float = 0.1
    """With --policy epsilon-greedy: share of actions that are taken at random."""
    n: int = 4
    """With n-step: rewards in a target."""
    trace_decay: float = 0.8
    """With td-lambda: λ, how far back along its way a surprise is felt."""
    traces: Literal["accumulating", "replacing"] = "accumulating"
    """With td-lambda: what a second visit does to a state's trace."""
    behaviour: Literal["uniform", "epsilon-greedy"] = "uniform"
    """With importance sampling: who acts, at random or like the best policy with some actions at random."""
    behaviour_epsilon: float = 0.5
    """With --behaviour epsilon-greedy: share of actions that are taken at random."""
    horizon: int = 10_000
    """Most steps of an episode. Only doubly-robust can do with one that was cut off."""
    rows: int = 20
    """Most states whose values are listed one by one; with more only the distance is shown."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.method:
            raise SettingsError("which methods?", where="--method", way_out="one or several, td for one")
        check_range(self, "epsilon", at_least=0, at_most=1)
        check_range(self, "n", at_least=1)
        check_range(self, "trace_decay", at_least=0, at_most=1)
        check_range(self, "behaviour_epsilon", at_least=0, at_most=1)
        check_range(self, "horizon", at_least=1)
        check_range(self, "rows", at_least=0)

        def used_by(methods: Sequence[str]) -> bool:
            return bool(set(methods) & set(self.method))

        check_used(self, self.policy == "epsilon-greedy", "--policy epsilon-greedy", "epsilon")
        check_used(self, used_by(["n-step"]), "--method n-step", "n")
        check_used(self, used_by(["td-lambda"]), "--method td-lambda", "trace_decay", "traces")
        check_used(self, used_by(TEMPORAL), f"--method {', '.join(TEMPORAL)}", "step_size", "step_size_power")
        check_used(self, used_by(OFF_POLICY), f"--method {', '.join(OFF_POLICY)}", "behaviour")
        check_used(self, self.behaviour == "epsilon-greedy", "--behaviour epsilon-greedy", "behaviour_epsilon")
        check_used(self, used_by(MONTE_CARLO + OFF_POLICY), "a method that takes whole episodes", "horizon")

    @property
    def target_name(self) -> str:
        return policy_name(self.policy, self.epsilon)

    @property
    def behaviour_name(self) -> str:
        return policy_name(self.behaviour, self.behaviour_epsilon)


def policy_name(policy: str, epsilon: float) -> str:
    names = {"uniform": "the uniform policy", "optimal": "the best policy"}
    return names.get(policy, f"the ε-greedy policy (ε = {epsilon:g})")


@dataclass(frozen=True, eq=False, kw_only=True)
class Question:
    """What every method is asked: the target's values [S], of the states that it ever ``acted`` in, or their mean over
    the start, by the target's experience or that of the behaviour policy."""

    mdp: TabularMDP
    target: np.ndarray
    behaviour: np.ndarray
    values: np.ndarray
    acted: np.ndarray

    @property
    def expected_return(self) -> float:
        return float(self.mdp.start @ self.values)


def estimate(settings: EstimateSettings) -> None:
    """Run the methods, and print what they say beside the truth. Raises ``DataError`` where a method can't work, before
    any is run."""
    question = asked(settings)
    episodes = {method: num_episodes(method, question, settings) for method in settings.method}
    print(
        f"{settings.target_name}: expected return from the start {question.expected_return:.6g}, exactly\n", flush=True
    )
    found = {method: run(method, question, number, settings) for method, number in episodes.items()}
    report = Report(
        of_states={method: each for method, each in found.items() if method not in OFF_POLICY},
        of_returns={method: each for method, each in found.items() if method in OFF_POLICY},
        num_runs=settings.num_runs,
        by_whom=f"from episodes of {settings.behaviour_name}",
        of_whom=settings.target_name,
    )
    report.show(question.acted, settings.rows)
    if settings.figure:
        title = f"{settings.process}, γ = {question.mdp.gamma:g}: {settings.target_name}"
        mdp_figures.save(report.figure(title), settings.figure)


def asked(settings: EstimateSettings) -> Question:
    from trueup.mdp import exact
    from trueup.mdp.off_policy import covered

    mdp = begin(settings)
    target = policy_of(mdp, settings.policy, settings.epsilon)
    behaviour = policy_of(mdp, settings.behaviour, settings.behaviour_epsilon)
    if set(OFF_POLICY) & set(settings.method):
        covered(behaviour, target)
    values = exact.values(mdp, target)
    return Question(mdp=mdp, target=target, behaviour=behaviour, values=values, acted=exact.visited(mdp, target))


def policy_of(mdp: TabularMDP, name: str, epsilon: float) -> np.ndarray:
    """[S] or [S, A] of what ``--policy`` and ``--behaviour`` mean."""
    import numpy as np

    from trueup.mdp.planning import modified_policy_iteration

    if name == "uniform":
        return uniform(mdp)
    best = modified_policy_iteration(mdp).policy
    if name == "optimal":
        return best
    return epsilon * uniform(mdp) + (1 - epsilon) * np.eye(mdp.num_actions)[best]


def num_episodes(method: str, question: Question, settings: EstimateSettings) -> int | None:
    """As many episodes as take about ``--num-steps``, for a method that takes whole ones. Their number is fixed
    beforehand: to stop by steps would favour short ones. Raises ``SettingsError`` for fewer than two, or where a method
    needs ends that don't come."""
    if method in TEMPORAL:
        return None
    length = episode_length(
        question.mdp,
        question.behaviour if method in OFF_POLICY else question.target,
        settings.horizon,
        settings.seed,
        whole_for="" if method == "doubly-robust" else method,
        otherwise=f"{', '.join(TEMPORAL)} or doubly-robust",
    )
    if settings.num_steps < 2 * length:
        raise SettingsError(
            f"{settings.num_steps:,} are too few for {method}: an episode takes about {length:,.0f}",
            where="--num-steps",
            way_out=f"at least {math.ceil(2 * length):,}; or lower --horizon, where episodes may be cut off",
        )
    return int(settings.num_steps / max(1.0, length))


def run(method: str, question: Question, num_episodes: int | None, settings: EstimateSettings) -> Estimated:
    """All runs of one method, with progress."""
    import numpy as np

    from trueup.runs.progress import RunProgress

    off_policy = method in OFF_POLICY
    kept = slice(None) if off_policy else question.acted
    truth = np.array([question.expected_return]) if off_policy else question.values[kept]

    def measured(now: np.ndarray) -> Mapping[str, float]:
        return {"distance": float(np.sqrt(((now[:, kept] - truth) ** 2).mean(-1)).mean())}

    with RunProgress(settings.num_steps, title=method, quiet=settings.quiet) as progress:
        look = watching(progress, num_episodes or settings.num_steps, measured)
        learned = estimator(method, question, num_episodes, settings, look)
    return Estimated(learned=replace(learned, curve=learned.curve[:, :, kept]), truth=truth, num_episodes=num_episodes)


def estimator(
    method: str, question: Question, num_episodes: int | None, settings: EstimateSettings, look: Look
) -> Learned:
    """What the library has of this name, run."""
    from trueup.mdp import convergence, estimation

    mdp, target = question.mdp, question.target
    options: dict[str, Any] = {"num_runs": settings.num_runs, "seed": settings.seed, "look": look}
    if method in TEMPORAL:
        step_size = estimation.StepSize(initial=settings.step_size, power=settings.step_size_power)
        options |= {"num_steps": settings.num_steps, "step_size": step_size}
        if method == "n-step":
            return estimation.n_step_td(mdp, target, n=settings.n, **options)
        lambda_ = settings.trace_decay if method == "td-lambda" else 0.0
        return estimation.td_lambda(mdp, target, lambda_=lambda_, traces=settings.traces, **options)
    options |= {"num_episodes": num_episodes, "horizon": settings.horizon}
    if method in MONTE_CARLO:
        visits: Any = method.removeprefix("monte-carlo-")
        return convergence.monte_carlo_runs(mdp, target, visits=visits, **options)
    kind: Any = method.replace("-", "_")
    return convergence.off_policy_runs(mdp, question.behaviour, target, estimator=kind, **options)

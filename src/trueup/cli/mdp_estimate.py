"""``trueup mdp estimate``: values of a policy from sampled experience, beside the exact ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from trueup.cli import mdp_figures
from trueup.cli.mdp_process import ExperienceSettings, begin, rounded, show, table_of, uniform, watching
from trueup.errors import SettingsError
from trueup.runs.settings import check_range, check_used

if TYPE_CHECKING:
    import numpy as np

    from trueup.mdp import TabularMDP
    from trueup.mdp.estimation import Learned

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
NUM_PILOTS = 50
"""Episodes that are drawn to see how long they are."""


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
class Estimated:
    """What the runs of one method say of [K] numbers, and what these are."""

    learned: Learned
    truth: np.ndarray
    num_episodes: int | None = None
    """Of each run, where a method takes whole ones."""

    @property
    def distances(self) -> np.ndarray:
        """Root mean squared over the numbers, at each look in each run: [E, R]."""
        return self.learned.distances(self.truth)


def estimate(settings: EstimateSettings) -> None:
    """Run the methods, and print what they say beside the truth. Raises ``DataError`` where a method can't work."""
    from trueup.mdp import exact

    mdp = begin(settings)
    target = policy_of(mdp, settings.policy, settings.epsilon)
    values, acted = exact.values(mdp, target), exact.visited(mdp, target)
    print(f"{settings.target_name}: expected return from the start {mdp.start @ values:.6g}, exactly\n", flush=True)
    found = {method: run(method, mdp, target, values, acted, settings) for method in settings.method}
    of_states = {method: each for method, each in found.items() if method not in OFF_POLICY}
    of_returns = {method: each for method, each in found.items() if method in OFF_POLICY}
    if of_states:
        show_distances(of_states, settings.num_runs)
        if acted.sum() <= settings.rows:
            show_values(of_states, acted)
    if of_returns:
        show_returns(of_returns, settings)
    if settings.figure:
        mdp_figures.save(figure_of(mdp, of_states, of_returns, settings), settings.figure)


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


def run(
    method: str, mdp: TabularMDP, target: np.ndarray, values: np.ndarray, acted: np.ndarray, settings: EstimateSettings
) -> Estimated:
    """All runs of one method, with progress."""
    import numpy as np

    from trueup.mdp import convergence, estimation
    from trueup.runs.progress import RunProgress

    options: dict[str, Any] = {"num_runs": settings.num_runs, "seed": settings.seed}
    behaviour = policy_of(mdp, settings.behaviour, settings.behaviour_epsilon) if method in OFF_POLICY else target
    whole: dict[str, Any] = {}
    if method not in TEMPORAL:
        whole = {"num_episodes": num_episodes(method, mdp, behaviour, settings), "horizon": settings.horizon}
    kept = slice(None) if method in OFF_POLICY else acted
    truth = np.array([mdp.start @ values]) if method in OFF_POLICY else values[acted]

    def measured(now: np.ndarray) -> Mapping[str, float]:
        return {"distance": float(np.sqrt(((now[:, kept] - truth) ** 2).mean(-1)).mean())}

    with RunProgress(settings.num_steps, title=method, quiet=settings.quiet) as progress:
        total = whole.get("num_episodes", settings.num_steps)
        options["look"] = watching(progress, total, measured)
        if method in OFF_POLICY:
            estimator: Any = method.replace("-", "_")
            learned = convergence.off_policy_runs(mdp, behaviour, target, estimator=estimator, **whole, **options)
        elif method in MONTE_CARLO:
            visits: Any = method.removeprefix("monte-carlo-")
            learned = convergence.monte_carlo_runs(mdp, target, visits=visits, **whole, **options)
        else:
            step_size = estimation.StepSize(initial=settings.step_size, power=settings.step_size_power)
            options |= {"num_steps": settings.num_steps, "step_size": step_size}
            if method == "n-step":
                learned = estimation.n_step_td(mdp, target, n=settings.n, **options)
            else:
                lambda_ = settings.trace_decay if method == "td-lambda" else 0.0
                learned = estimation.td_lambda(mdp, target, lambda_=lambda_, traces=settings.traces, **options)
    return Estimated(
        learned=replace(learned, curve=learned.curve[:, :, kept]),
        truth=truth,
        num_episodes=whole.get("num_episodes"),
    )


def num_episodes(method: str, mdp: TabularMDP, policy: np.ndarray, settings: EstimateSettings) -> int:
    """As many episodes as take about ``--num-steps``. Their number is fixed beforehand: to stop by steps would favour
    short ones. Raises ``SettingsError`` for fewer than two, or where a method needs ends that don't come."""
    from trueup.mdp.sampling import sample_trajectories

    pilots = sample_trajectories(mdp, policy, num_trajectories=NUM_PILOTS, horizon=settings.horizon, seed=settings.seed)
    if method != "doubly-robust" and (cut := int(pilots.truncated.sum())):
        raise SettingsError(
            f"{cut} of {NUM_PILOTS} episodes were cut off at {settings.horizon:,} steps, and {method} needs their ends",
            where="--horizon",
            way_out=f"raise it; where no episode ends, take {', '.join(TEMPORAL)} or doubly-robust",
        )
    length = max(1.0, pilots.mask.sum(-1).mean())
    if settings.num_steps < 2 * length:
        raise SettingsError(
            f"{settings.num_steps:,} are too few for {method}: an episode takes about {length:,.0f}",
            where="--num-steps",
            way_out=f"at least {math.ceil(2 * length):,}; or lower --horizon, where episodes may be cut off",
        )
    return int(settings.num_steps / length)


def show_distances(found: Mapping[str, Estimated], num_runs: int) -> None:
    import numpy as np

    (num_states,) = next(iter(found.values())).truth.shape
    table = table_of(
        *("method", "steps", "episodes", "one run", f"mean of {num_runs} runs", "its standard error"),
        title=f"distance to the exact values of {num_states} states, root mean square",
    )
    for method, each in found.items():
        of_runs = each.distances[-1]
        table.add_row(
            *spent(method, each),
            f"{of_runs.mean():.4g} ± {rounded(of_runs.std(ddof=1) / math.sqrt(num_runs))}",
            f"{np.sqrt(((each.learned.mean - each.truth) ** 2).mean()):.4g}",
            f"{np.sqrt((each.learned.errors**2).mean()):.4g}",
        )
    show(table)
    print(
        "±: standard error. A mean further from the truth than its standard error says: the method is biased so far.\n"
    )


def show_values(found: Mapping[str, Estimated], acted: np.ndarray) -> None:
    import numpy as np

    table = table_of("state", "exact", *found, title="values, ± standard error of the mean over runs")
    columns = [each.learned for each in found.values()]
    truth = next(iter(found.values())).truth
    for place, state in enumerate(np.flatnonzero(acted)):
        estimates = (f"{each.mean[place]:.4f} ± {each.errors[place]:.4f}" for each in columns)
        table.add_row(str(state), f"{truth[place]:.4f}", *estimates)
    show(table)


def show_returns(found: Mapping[str, Estimated], settings: EstimateSettings) -> None:
    from trueup.mdp.convergence import LearnedReturns

    table = table_of(
        *("method", "steps", "episodes", "estimate", "one run's distance", "effective episodes"),
        title=f"expected return of {settings.target_name}, from episodes of {settings.behaviour_name}",
    )
    for method, each in found.items():
        learned = each.learned
        effective = learned.effective_episodes.mean() if isinstance(learned, LearnedReturns) else math.nan
        table.add_row(
            *spent(method, each),
            f"{learned.mean[0]:.5g} ± {rounded(learned.errors[0])}",
            f"{each.distances[-1].mean():.4g}",
            f"{effective:.3g}",
        )
    table.add_row("exact", "", "", f"{next(iter(found.values())).truth[0]:.5g}")
    show(table)
    print("±: standard error of the mean over runs, far too small where there are next to no effective episodes")


def spent(method: str, each: Estimated) -> tuple[str, str, str]:
    episodes = "" if each.num_episodes is None else f"{each.num_episodes:,}"
    return method, f"{each.learned.steps[-1]:,}", episodes


def figure_of(
    mdp: TabularMDP, of_states: Mapping[str, Estimated], of_returns: Mapping[str, Estimated], settings: EstimateSettings
) -> Any:
    def curves(found: Mapping[str, Estimated], values: Callable[[Estimated], np.ndarray]) -> list[mdp_figures.Curve]:
        return [
            mdp_figures.Curve(label=method, place=place, steps=each.learned.steps, values=values(each))
            for place, (method, each) in enumerate(found.items())
        ]

    panels = []
    if of_states:
        panels.append(
            mdp_figures.Panel(
                title="Values of states",
                y_label="distance to the exact values (RMS)",
                curves=curves(of_states, lambda each: each.distances),
                linear_up_to=0,
            )
        )
    if of_returns:
        panels.append(
            mdp_figures.Panel(
                title=f"Return from the start, estimated from episodes of {settings.behaviour_name}",
                y_label="estimated return",
                curves=curves(of_returns, lambda each: each.learned.curve[:, :, 0]),
                exact=float(next(iter(of_returns.values())).truth[0]),
            )
        )
    return mdp_figures.convergence(
        panels, title=f"{settings.process}, γ = {mdp.gamma:g}: {settings.target_name}", num_runs=settings.num_runs
    )

"""``trueup mdp learn``: good behaviour from sampled experience, beside the best there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trueup.cli import mdp_figures
from trueup.cli.mdp_process import ExperienceSettings, begin, episode_length, uniform, watching
from trueup.cli.tables import rounded, show, table_of
from trueup.errors import DataError, SettingsError
from trueup.runs.settings import check_range, check_used

if TYPE_CHECKING:
    import numpy as np

    from trueup.mdp import TabularMDP
    from trueup.mdp.estimation import Look

Method = Literal["sarsa", "expected-sarsa", "q-learning", "double-q-learning", "reinforce", "actor-critic"]
ON_POLICY = ("sarsa", "expected-sarsa")
BY_VALUES = (*ON_POLICY, "q-learning", "double-q-learning")
NEARLY = 0.01
"""Runs are counted whose policy is worth the best one's return but for this share."""

FAR = 20
"""Returns so many times as low as the best are shown on a logarithmic axis."""


@dataclass(frozen=True, kw_only=True)
class LearnSettings(ExperienceSettings):
    """Policies learned from sampled experience: their exact return beside the best, and how far values are off."""

    method: tuple[Method, ...] = ("q-learning", "sarsa")
    """By values of actions: sarsa, expected-sarsa, q-learning, double-q-learning. By the policy's own gradient:
    reinforce (whole episodes), actor-critic (step by step)."""
    num_steps: int = 20_000
    """Steps of each run."""
    step_size_power: float = 0.5
    """Values of actions move towards their target by step-size · n^(−step-size-power) at the n-th update of one."""
    epsilon: float = 1.0
    """What learns by values takes this share of its actions at random, at first."""
    epsilon_last: float = 0.05
    """Share of actions taken at random in the end. SARSA learns the values of a policy that does so."""
    epsilon_share: float = 0.5
    """Part of the run over which the share falls from one to the other."""
    learning_rate: float | None = None
    """How far reinforce and actor-critic move their policy's logits along a gradient; by default 0.5 and 0.1."""
    critic_step_size: float = 0.1
    """How far values move towards what was seen: those of actor-critic, and of reinforce with --baseline value."""
    baseline: Literal["none", "mean", "value"] = "value"
    """What reinforce compares returns with: nothing, the mean of the update's other episodes, a value of each state."""
    num_updates: int = 500
    """Updates of reinforce."""
    episodes_per_update: int = 8
    """Episodes in an update of reinforce."""
    horizon: int = 1000
    """Most steps of an episode of reinforce. Without a discount, returns are those of so many steps: a policy may never
    end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.method:
            raise SettingsError("which methods?", where="--method", way_out="one or several, q-learning for one")
        for name in ("epsilon", "epsilon_last", "epsilon_share"):
            check_range(self, name, at_least=0, at_most=1)
        check_range(self, "learning_rate", above=0)
        check_range(self, "critic_step_size", above=0, at_most=1)
        for name in ("num_updates", "episodes_per_update", "horizon"):
            check_range(self, name, at_least=1)
        by_values = bool(set(self.method) & set(BY_VALUES))
        reinforce, actor_critic = "reinforce" in self.method, "actor-critic" in self.method
        needs = f"--method {', '.join(BY_VALUES)}"
        check_used(self, by_values, needs, "epsilon", "epsilon_last", "epsilon_share", "step_size", "step_size_power")
        check_used(self, by_values or actor_critic, f"{needs} or actor-critic", "num_steps")
        check_used(self, reinforce or actor_critic, "--method reinforce or actor-critic", "learning_rate")
        check_used(self, reinforce or actor_critic, "--method reinforce or actor-critic", "critic_step_size")
        check_used(self, reinforce, "--method reinforce", "num_updates", "episodes_per_update", "baseline")


@dataclass(frozen=True, eq=False, kw_only=True)
class Found:
    """What the runs of one method came to, [E, R] at each look."""

    steps: np.ndarray
    returns: np.ndarray
    """Exact, of the greedy policy; of the learned one where a policy is learned."""
    distances: np.ndarray | None
    """Of Q to what it converges to, root mean squared."""


def learn(settings: LearnSettings) -> None:
    """Run the methods, and print what they learned beside the best. Raises ``DataError`` where there is no choice,
    ``SettingsError`` where episodes are too long for reinforce, before any method is run."""
    from trueup.mdp import exact
    from trueup.mdp.planning import modified_policy_iteration

    mdp = begin(settings)
    if mdp.num_actions == 1:
        raise DataError("there is nothing to decide: one action", where=settings.process, way_out="trueup mdp estimate")
    if "reinforce" in settings.method:
        episode_length(
            mdp, uniform(mdp), settings.horizon, settings.seed, whole_for="reinforce", otherwise="actor-critic"
        )
    best = modified_policy_iteration(mdp).policy
    (highest,) = exact.expected_returns(mdp, best[None], horizon=settings.horizon)
    (lowest,) = exact.expected_returns(mdp, uniform(mdp)[None], horizon=settings.horizon)
    within = f" of the first {settings.horizon:,} steps" if mdp.gamma == 1 else ""
    print(f"exact return{within} from the start: {highest:.6g} at best, {lowest:.6g} at random\n", flush=True)
    found = {method: run(method, mdp, settings) for method in settings.method}
    show_found(found, highest, settings)
    if settings.figure:
        mdp_figures.save(figure_of(mdp, found, highest, lowest, settings), settings.figure)


def run(method: str, mdp: TabularMDP, settings: LearnSettings) -> Found:
    """All runs of one method, with progress."""
    import numpy as np

    from trueup.mdp import exact
    from trueup.mdp.planning import best_exploring
    from trueup.runs.progress import RunProgress

    acted = exact.visited(mdp, uniform(mdp))
    limit = None
    if method in BY_VALUES:
        limit = best_exploring(mdp, settings.epsilon_last if method in ON_POLICY else 0.0)[acted]
    returns: list[np.ndarray] = []
    distances: list[np.ndarray] = []

    def measured(now: np.ndarray) -> Mapping[str, float]:
        policies = now if limit is None else now.argmax(-1)
        returns.append(exact.expected_returns(mdp, policies, horizon=settings.horizon))
        if limit is None:
            return {"return": returns[-1].mean()}
        distances.append(np.sqrt(((now[:, acted] - limit) ** 2).mean((1, 2))))
        return {"return": returns[-1].mean(), "distance": distances[-1].mean()}

    total = settings.num_updates if method == "reinforce" else settings.num_steps
    with RunProgress(total, title=method, quiet=settings.quiet) as progress:
        learned = learner(method, mdp, settings, watching(progress, total, measured))
    return Found(steps=learned.steps, returns=np.stack(returns), distances=np.stack(distances) if distances else None)


def learner(method: str, mdp: TabularMDP, settings: LearnSettings, look: Look) -> Any:
    """What the library has of this name, run."""
    from trueup.mdp import learning, policy_learning
    from trueup.mdp.estimation import StepSize

    options: dict[str, Any] = {"num_runs": settings.num_runs, "seed": settings.seed, "look": look}
    if method in BY_VALUES:
        kind: Any = method.replace("-", "_")
        return learning.learn_action_values(
            mdp,
            method=kind,
            num_steps=settings.num_steps,
            step_size=StepSize(initial=settings.step_size, power=settings.step_size_power),
            exploration=learning.Exploration(
                first=settings.epsilon, last=settings.epsilon_last, share=settings.epsilon_share
            ),
            **options,
        )
    if settings.learning_rate is not None:
        options["learning_rate"] = settings.learning_rate
    if method == "actor-critic":
        return policy_learning.actor_critic(
            mdp, num_steps=settings.num_steps, critic_step_size=settings.critic_step_size, **options
        )
    return policy_learning.reinforce(
        mdp,
        num_updates=settings.num_updates,
        episodes_per_update=settings.episodes_per_update,
        horizon=settings.horizon,
        baseline=settings.baseline,
        baseline_step_size=settings.critic_step_size,
        **options,
    )


def show_found(found: Mapping[str, Found], highest: float, settings: LearnSettings) -> None:
    table = table_of("method", "steps", "return", f"within {100 * NEARLY:g} % of best", "distance of Q")
    for method, each in found.items():
        last = each.returns[-1]
        reached = f"{(last >= highest - NEARLY * abs(highest)).sum()} of {len(last)} runs"
        away = "" if each.distances is None else interval(each.distances[-1])
        table.add_row(method, f"{each.steps[-1]:,}", interval(last), reached, away)
    table.add_row("the best", "", f"{highest:.5g}")
    show(table)
    notes = ["return: exact, of the greedy policy; of reinforce and actor-critic, of the policy that they have"]
    if any(each.distances is not None for each in found.values()):
        notes.append("distance: to Q*, root mean square")
    if set(ON_POLICY) & set(found):
        notes[-1] += f"; SARSA learns how a policy that explores fares: to the best such, ε = {settings.epsilon_last:g}"
    print("\n".join([*notes, "±: 95 % interval of the mean over runs"]))


def interval(sample: np.ndarray) -> str:
    """The mean with its 95 % interval."""
    from trueup.runs.sampled import mean_interval

    mean, _, high = mean_interval(sample)
    return f"{mean:.5g} ± {rounded(high - mean)}"


def figure_of(
    mdp: TabularMDP, found: Mapping[str, Found], highest: float, lowest: float, settings: LearnSettings
) -> Any:
    def curves(of: Mapping[str, np.ndarray]) -> list[mdp_figures.Curve]:
        return [
            mdp_figures.Curve(label=method, place=place, steps=found[method].steps, values=of[method])
            for place, method in enumerate(found)
            if method in of
        ]

    returns = mdp_figures.Panel(
        title="What the learned policy is worth",
        y_label="exact return from the start",
        curves=curves({method: each.returns for method, each in found.items()}),
        exact=highest,
        exact_label="the best policy",
        linear_up_to=-highest if lowest < FAR * highest < 0 else None,
    )
    distances = {method: each.distances for method, each in found.items() if each.distances is not None}
    sarsa = f" (SARSA's: to the best with ε = {settings.epsilon_last:g})" * bool(set(ON_POLICY) & set(found))
    off = mdp_figures.Panel(
        title=f"Distance of the learned Q to Q*{sarsa}",
        y_label="distance (RMS)",
        curves=curves(distances),
        linear_up_to=0,
    )
    return mdp_figures.convergence(
        [returns, off] if distances else [returns],
        title=f"{settings.process}, γ = {mdp.gamma:g}",
        num_runs=settings.num_runs,
    )

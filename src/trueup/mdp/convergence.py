"""How estimates from whole episodes close in on the truth: R independent runs, look by look. NumPy.

What ``estimation.td_lambda`` and its like give of step-by-step methods, for Monte Carlo and off-policy estimators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from jaxtyping import Float

from trueup.errors import DataError
from trueup.mdp import exact
from trueup.mdp.estimation import Learned, Look, Looks, Visits, monte_carlo
from trueup.mdp.off_policy import Estimator, OffPolicyValue, off_policy_value
from trueup.mdp.outcomes import from_observed
from trueup.mdp.sampling import sample_trajectories
from trueup.mdp.tabular import Policy, TabularMDP, as_probabilities
from trueup.mdp.trajectories import Trajectories

MODEL_GAMMA = 0.99
"""The most by which a learned model discounts: under another policy its episodes may never end."""


def monte_carlo_runs(
    mdp: TabularMDP,
    policy: Policy,
    *,
    num_episodes: int,
    num_runs: int = 20,
    visits: Visits = "first",
    horizon: int = 10_000,
    num_looks: int = 50,
    seed: int = 0,
    look: Look | None = None,
) -> Learned:
    """``estimation.monte_carlo`` in R runs of so many episodes each: values [S] at each look.

    A state not visited yet has the value 0, where temporal differences begin as well. Raises ``DataError`` as
    ``monte_carlo``: for an episode that is cut off at ``horizon``.
    """
    looks = Looks(num_episodes, num_looks, look)
    counts = sums = np.zeros((num_runs, mdp.num_states))
    steps, done = [0.0], 0
    rng = np.random.default_rng(seed)
    for number in looks.at:
        paths = sample_trajectories(
            mdp,
            policy,
            num_trajectories=num_runs * (number - done),
            horizon=horizon,
            seed=int(rng.integers(2**63)),
        )
        # Run r's state s is number r·S + s: one call counts for all runs.
        owner = np.repeat(np.arange(num_runs), number - done)[:, None]
        apart = replace(paths, states=paths.states + owner * mdp.num_states)
        found = monte_carlo(apart, mdp.gamma, counts.size, visits=visits)
        counts = counts + found.counts.reshape(counts.shape)
        sums = sums + np.nan_to_num(found.values * found.counts).reshape(sums.shape)
        steps.append(steps[-1] + paths.mask.sum() / num_runs)
        done = number
        looks.take(sums / np.maximum(counts, 1))
    return replace(looks.learned(), steps=np.round(steps[1:]).astype(int))


@dataclass(frozen=True, eq=False, kw_only=True)
class LearnedReturns(Learned):
    """What R runs say of a target policy's return, in a ``curve`` [E, R, 1]."""

    effective_episodes: Float[np.ndarray, " r"]
    """Of each run at its end, see ``OffPolicyValue``."""


def off_policy_runs(
    mdp: TabularMDP,
    behaviour: Policy,
    target: Policy,
    *,
    estimator: Estimator,
    num_episodes: int,
    num_runs: int = 20,
    horizon: int = 10_000,
    num_looks: int = 20,
    seed: int = 0,
    look: Look | None = None,
) -> LearnedReturns:
    """``off_policy.off_policy_value`` in R runs of so many episodes of the behaviour policy each.

    At each look a run takes all its episodes so far. doubly_robust gets its Q from a model of one half of them and is
    asked of the other, both ways round, and the two are averaged: Q must not have seen the episodes that it is held
    against. Raises ``DataError`` as ``off_policy_value``, and for fewer than two episodes.
    Source: Jiang & Li 2016, §4; crossing over: Chernozhukov et al. 2018, definition 3.1.
    """
    if num_episodes < 2:
        raise DataError(f"{num_episodes} episodes", way_out="at least two")
    paths = sample_trajectories(mdp, behaviour, num_trajectories=num_runs * num_episodes, horizon=horizon, seed=seed)
    looks = Looks(num_episodes, min(num_looks, num_episodes // 2), look)
    steps: list[float] = []
    found: list[OffPolicyValue] = []
    for number in looks.at:
        found = []
        for run in range(num_runs):
            own = np.arange(number) + run * num_episodes
            if estimator == "doubly_robust":
                found.append(_doubly_robust(mdp, chosen(paths, own[::2]), chosen(paths, own[1::2]), behaviour, target))
            else:
                found.append(off_policy_value(chosen(paths, own), behaviour, target, mdp.gamma, estimator=estimator))
        steps.append(paths.mask.reshape(num_runs, num_episodes, -1)[:, :number].sum() / num_runs)
        looks.take(np.array([[each.value] for each in found]))
    return LearnedReturns(
        curve=looks.learned().curve,
        steps=np.round(steps).astype(int),
        effective_episodes=np.array([each.effective_episodes for each in found]),
    )


def chosen(trajectories: Trajectories, rows: Sequence[int] | np.ndarray) -> Trajectories:
    """Some of the trajectories, equally probable."""
    parts = {field.name: getattr(trajectories, field.name)[rows] for field in fields(trajectories)}
    return Trajectories(**parts | {"probabilities": np.full(len(rows), 1 / len(rows))})


def _doubly_robust(
    mdp: TabularMDP, one: Trajectories, other: Trajectories, behaviour: Policy, target: Policy
) -> OffPolicyValue:
    """Each half with the Q of a model of the other: the mean of two estimates, as if they were independent."""
    halves = [
        off_policy_value(asked, behaviour, target, mdp.gamma, estimator="doubly_robust", q=_modelled(mdp, seen, target))
        for asked, seen in ((one, other), (other, one))
    ]
    first, second = halves
    return OffPolicyValue(
        value=(first.value + second.value) / 2,
        variance=(first.variance + second.variance) / 2,
        error=float(np.hypot(first.error, second.error)) / 2,
        effective_episodes=first.effective_episodes + second.effective_episodes,
    )


def _modelled(mdp: TabularMDP, seen: Trajectories, target: Policy) -> Float[np.ndarray, "s a"]:
    """The target's Q in the likeliest process behind what was seen, in which what was not seen earns nothing."""
    steps = (seen.states, seen.actions, seen.rewards, seen.next_states, seen.terminated)
    model = from_observed(
        *(each[seen.mask] for each in steps),
        gamma=min(mdp.gamma, MODEL_GAMMA),
        num_states=mdp.num_states,
        num_actions=mdp.num_actions,
        unseen_reward=0.0,
    )
    policy = as_probabilities(target, mdp.num_actions)
    return exact.action_values(model, np.vstack([policy, policy[:1]]))[:-1]

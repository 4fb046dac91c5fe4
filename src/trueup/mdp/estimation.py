"""Values from experience: Monte Carlo, temporal differences, and what another policy's experience says. NumPy.

Returns come from ``trueup.objectives.returns``, importance weights from the policies' probabilities: the very functions
that language models are trained with, on problems whose answers are known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from trueup.errors import DataError
from trueup.mdp.sampling import Runs
from trueup.mdp.tabular import Policy, TabularMDP, check_choice, check_policy
from trueup.mdp.trajectories import Trajectories
from trueup.objectives.returns import discounted_returns, discounts_from
from trueup.objectives.value import td_target

Visits = Literal["first", "every"]
Traces = Literal["accumulating", "replacing"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Estimate:
    """A value for each state, and how sure it is."""

    values: Float[np.ndarray, " s"]
    """NaN for a state that was never visited."""
    errors: Float[np.ndarray, " s"]
    """Standard errors of the values; NaN with fewer than two visits."""
    counts: Int[np.ndarray, " s"]
    """Visits that were averaged over."""


def monte_carlo(trajectories: Trajectories, gamma: float, num_states: int, *, visits: Visits = "first") -> Estimate:
    """Mean return that followed a state's first or every visit in an episode.

        V(s) ← mean of G_t over visits s_t = s

    First visits are independent, and the estimate is unbiased. Every visit's is biased (a little, vanishing with more
    episodes) where states recur, and its standard error, which takes visits for independent, is then too small.
    Raises ``DataError`` if an episode was cut off: its returns are unknown. Source: Sutton & Barto 2018, §5.1.
    """
    check_choice("visits", visits, Visits)
    if trajectories.truncated.any():
        raise DataError(
            f"{int(trajectories.truncated.sum())} episodes were cut off at the horizon: their returns are unknown",
            way_out="raise the horizon; where no episode ends, learn by temporal differences",
        )
    returns = _returns(trajectories, gamma)
    counted = trajectories.mask
    if visits == "first":
        counted = counted & _first_visits(trajectories)
    states, sample = trajectories.states[counted], returns[counted]
    counts = np.bincount(states, minlength=num_states)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.bincount(states, sample, minlength=num_states) / counts
        spread = np.bincount(states, (sample - means[states]) ** 2, minlength=num_states)
        errors = np.where(counts > 1, np.sqrt(spread / (counts - 1) / counts), np.nan)
    return Estimate(values=means, errors=errors, counts=counts)


def _returns(trajectories: Trajectories, gamma: float) -> np.ndarray:
    """G_t of every step, [N, T], 0 after the end."""
    rewards, mask, terminated = map(tensor, (trajectories.rewards, trajectories.mask, trajectories.terminated))
    return discounted_returns(rewards, discounts_from(terminated, gamma, dtype=rewards.dtype), mask=mask).numpy()


def _first_visits(trajectories: Trajectories) -> np.ndarray:
    """Whether a step's state hasn't come before in its episode: bool [N, T]."""
    states = np.where(trajectories.mask, trajectories.states, -1)
    order = np.argsort(states, axis=1, kind="stable")  # equal states in the order of time
    ordered = np.take_along_axis(states, order, 1)
    first = np.ones_like(states, dtype=bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    unordered = np.empty_like(first)
    np.put_along_axis(unordered, order, first, 1)
    return unordered


# --- temporal differences


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """α of a state's (or a state and action's) n-th update:  α_n = initial · n^(−power).

    ``power`` 0 is a constant; above ½ and up to 1 the estimates converge (Robbins & Monro 1951), and 1 with ``initial``
    1 makes of TD's targets their plain mean. Raises ``DataError`` unless initial lies in (0, 1] and power in [0, 1].
    """

    initial: float = 1.0
    power: float = 0.7

    def __post_init__(self) -> None:
        if not 0 < self.initial <= 1 or not 0 <= self.power <= 1:
            raise DataError(f"{self}", way_out="choose initial in (0, 1] and power in [0, 1]")

    def at(self, count: np.ndarray) -> np.ndarray:
        return self.initial * count**-self.power


@dataclass(frozen=True, eq=False, kw_only=True)
class Learned:
    """What R independent runs arrived at, and how they got there: values [S], values of actions or policies [S, A]."""

    curve: Float[np.ndarray, "e r s ..."]
    """What each run had at each of E looks, the last of them at the end."""
    steps: Int[np.ndarray, " e"]
    """Steps that each run had made by then; where runs go by whole episodes, on average."""

    @property
    def final(self) -> Float[np.ndarray, "r s ..."]:
        return self.curve[-1]

    @property
    def mean(self) -> Float[np.ndarray, "s ..."]:
        return self.final.mean(0)

    @property
    def errors(self) -> Float[np.ndarray, "s ..."]:
        """Standard errors of the mean over runs."""
        return self.final.std(0, ddof=1) / np.sqrt(len(self.final))

    def distances(self, truth: Float[np.ndarray, "s ..."]) -> Float[np.ndarray, "e r"]:
        """Root mean squared distance to the truth, at each look in each run."""
        return np.sqrt(((self.curve - truth) ** 2).reshape(*self.curve.shape[:2], -1).mean(-1))


Look = Callable[[int, np.ndarray], None]
"""Told at every look: steps (or episodes, or updates) made, and what the runs have, [R, S] or [R, S, A]."""


def td_lambda(
    mdp: TabularMDP,
    policy: Policy,
    *,
    num_steps: int,
    num_runs: int = 20,
    lambda_: float = 0.0,
    traces: Traces = "accumulating",
    step_size: StepSize | None = None,
    num_looks: int = 50,
    seed: int = 0,
    look: Look | None = None,
) -> Learned:
    """TD(λ) with eligibility traces, in R runs at once; λ = 0 is TD(0).

        δ_t = r_t + γ·V(s_{t+1}) − V(s_t),    e ← γλ·e,  e(s_t) += 1 (or = 1, replacing),    V ← V + α·δ_t·e

    The value of a terminal state is 0, and traces begin anew after it. α is that of the state whose trace it is for.
    Raises ``DataError`` for a policy that isn't one, λ outside [0, 1], or no steps.
    Source: Sutton & Barto 2018, eq. 6.2 and §12.2; replacing traces: Singh & Sutton 1996.
    """
    check_policy(mdp, policy)
    check_choice("traces", traces, Traces)
    if not 0 <= lambda_ <= 1:
        raise DataError(f"lambda is {lambda_}", way_out="choose it in [0, 1]")
    step_size = step_size or StepSize()
    runs, every = Runs(mdp, num_runs, seed), np.arange(num_runs)
    values, counts, trace = (np.zeros((num_runs, mdp.num_states)) for _ in range(3))
    looks = Looks(num_steps, num_looks, look)
    for number in range(1, num_steps + 1):
        taken = runs.step(runs.sampler.actions(policy, runs.states))
        discounts = tensor(mdp.gamma * ~taken.terminated)
        target = td_target(tensor(taken.rewards), discounts, tensor(values[every, taken.next_states])).numpy()
        delta = target - values[every, taken.states]
        counts[every, taken.states] += 1
        if lambda_:
            trace *= mdp.gamma * lambda_
            kept = trace[every, taken.states] if traces == "accumulating" else 0.0
            trace[every, taken.states] = kept + 1
            values += step_size.at(np.maximum(counts, 1)) * delta[:, None] * trace
            trace[taken.terminated] = 0
        else:  # the same, without an operation on all states
            values[every, taken.states] += step_size.at(counts[every, taken.states]) * delta
        if looks.due(number):
            looks.take(values)
    return looks.learned()


def n_step_td(
    mdp: TabularMDP,
    policy: Policy,
    *,
    num_steps: int,
    n: int,
    num_runs: int = 20,
    step_size: StepSize | None = None,
    num_looks: int = 50,
    seed: int = 0,
    look: Look | None = None,
) -> Learned:
    """TD whose targets are n rewards and the value behind them, in R runs at once; n = 1 is TD(0).

        V(s_t) ← V(s_t) + α·(r_t + … + γ^{n−1}·r_{t+n−1} + γ^n·V(s_{t+n}) − V(s_t)),    shorter where the episode ends

    Raises ``DataError`` for a policy that isn't one, n below 1, or no steps. Source: Sutton & Barto 2018, §7.1.
    """
    check_policy(mdp, policy)
    if n < 1:
        raise DataError(f"n is {n}", way_out="it has to be at least 1 step")
    step_size = step_size or StepSize()
    runs, every = Runs(mdp, num_runs, seed), np.arange(num_runs)
    values, counts = (np.zeros((num_runs, mdp.num_states)) for _ in range(2))
    # Row k of a run holds what stands open since k steps: its state, its rewards so far, whether it is there at all.
    states = np.zeros((n, num_runs), dtype=np.int64)
    sums, is_open = np.zeros((n, num_runs)), np.zeros((n, num_runs), dtype=bool)
    powers = mdp.gamma ** np.arange(n)[:, None]
    looks = Looks(num_steps, num_looks, look)
    for number in range(1, num_steps + 1):
        taken = runs.step(runs.sampler.actions(policy, runs.states))
        states, sums, is_open = (np.roll(each, 1, axis=0) for each in (states, sums, is_open))
        states[0], sums[0], is_open[0] = taken.states, 0.0, True
        sums += powers * taken.rewards
        # Ready: n steps old, or all that are open where the episode ends. The value of a terminal state is 0.
        bootstrap = values[every, taken.next_states]
        for age in range(n - 1, -1, -1):
            ready = is_open[age] & (taken.terminated | (age == n - 1))
            rows, here = every[ready], states[age, ready]
            counts[rows, here] += 1
            target = sums[age, ready] + powers[age] * mdp.gamma * bootstrap[ready]
            values[rows, here] += step_size.at(counts[rows, here]) * (target - values[rows, here])
        is_open[:, taken.terminated] = False
        if looks.due(number):
            looks.take(values)
    return looks.learned()


class Looks:
    """Values at evenly spaced steps."""

    def __init__(self, num_steps: int, num_looks: int, look: Look | None) -> None:
        if num_steps < 1 or num_looks < 1:
            raise DataError(f"{num_steps} steps and {num_looks} looks", way_out="at least one of each")
        self.at = np.unique(np.linspace(num_steps / num_looks, num_steps, num_looks).round().astype(int).clip(min=1))
        self.curve: list[np.ndarray] = []
        self.told = look

    def due(self, number: int) -> bool:
        """Whether it is time to look after so many steps."""
        return len(self.curve) < len(self.at) and number == self.at[len(self.curve)]

    def take(self, values: np.ndarray) -> None:
        self.curve.append(values.copy())
        if self.told is not None:
            self.told(int(self.at[len(self.curve) - 1]), self.curve[-1])

    def learned(self) -> Learned:
        return Learned(curve=np.stack(self.curve), steps=self.at)


def tensor(array: np.ndarray) -> Tensor:
    """For the functions of ``trueup.objectives``."""
    return torch.from_numpy(np.ascontiguousarray(array))

"""Every estimator against the exact values, by its own standard error; identities between them; refusals."""

from __future__ import annotations

import numpy as np
import pytest

from trueup.errors import DataError
from trueup.mdp import TabularMDP, enumerate_trajectories, exact
from trueup.mdp.estimation import StepSize, monte_carlo, n_step_td, td_lambda
from trueup.mdp.generators import chain, random_mdp, random_walk
from trueup.mdp.sampling import sample_trajectories

STANDARD_ERRORS = 4.5
WALK = random_walk(5)
NOTHING_TO_DECIDE = np.zeros(7, dtype=int)
TRUTH = exact.values(WALK, NOTHING_TO_DECIDE)


@pytest.mark.parametrize("visits", ["first", "every"])
def test_monte_carlo(visits) -> None:
    drawn = sample_trajectories(WALK, NOTHING_TO_DECIDE, num_trajectories=20_000, horizon=1000)
    found = monte_carlo(drawn, WALK.gamma, 7, visits=visits)
    inner = slice(1, 6)
    assert (np.abs(found.values - TRUTH)[inner] <= STANDARD_ERRORS * found.errors[inner]).all()
    assert (found.errors[inner] < 0.02).all()
    assert np.isnan(found.values[[0, 6]]).all()  # nobody decides anything there
    assert found.counts[3] == 20_000 if visits == "first" else found.counts[3] > 20_000


def test_first_and_every_visit_by_hand() -> None:
    """State 0 stays, earning 1, or ends, earning 3, either by a half; γ = ½."""
    stay = np.zeros((2, 1, 2))
    stay[0, 0] = [0.5, 0.5]
    mdp = TabularMDP(
        transitions=stay,
        rewards=np.array([[[1.0, 3.0]], [[0.0, 0.0]]]),
        start=np.array([1.0, 0.0]),
        gamma=0.5,
        terminal=np.array([False, True]),
    )
    paths = enumerate_trajectories(mdp, np.zeros(2, dtype=int), horizon=2)
    ended = np.flatnonzero(~paths.truncated.any(-1))
    whole = type(paths)(**{name: getattr(paths, name)[ended] for name in paths.__dataclass_fields__})
    # Two kinds of episodes end within two steps: 3 at once, and 1, then 3, with returns of 1 + 1.5 and 3.
    first, every = (monte_carlo(whole, 0.5, 2, visits=visits) for visits in ("first", "every"))
    assert (first.values[0], first.counts[0]) == (pytest.approx((3 + 2.5) / 2), 2)
    assert (every.values[0], every.counts[0]) == (pytest.approx((3 + 2.5 + 3) / 3), 3)
    assert first.errors[0] == pytest.approx(np.std([3, 2.5], ddof=1) / np.sqrt(2))
    with pytest.raises(DataError, match="were cut off at the horizon"):
        monte_carlo(paths, 0.5, 2)


EASY = chain([5, 0, 0, 0, 0, 0, 10], left=0.4, right=0.4, gamma=0.5)
BRANCHING = random_mdp(6, num_states=4, num_actions=2, gamma=0.9, episodic=True)
CASES = {
    "walk": (WALK, NOTHING_TO_DECIDE),
    "chain": (EASY, NOTHING_TO_DECIDE),
    "branching": (BRANCHING, np.random.default_rng(0).dirichlet(np.ones(2), size=4)),
}
LEARNERS = {
    "td(0)": lambda *case, **options: td_lambda(*case, **options),
    "td(0.8)": lambda *case, **options: td_lambda(*case, lambda_=0.8, **options),
    "td(0.8), replacing": lambda *case, **options: td_lambda(*case, lambda_=0.8, traces="replacing", **options),
    "2 steps": lambda *case, **options: n_step_td(*case, n=2, **options),
    "5 steps": lambda *case, **options: n_step_td(*case, n=5, **options),
}


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("case", CASES)
def test_temporal_differences_converge(learner: str, case: str) -> None:
    """The mean over runs is within its own standard error, and that is small."""
    mdp, policy = CASES[case]
    truth = exact.values(mdp, policy)
    found = LEARNERS[learner](mdp, policy, num_steps=2_000, num_runs=40, step_size=StepSize(power=0.6), seed=1)
    visited = exact.occupancy(mdp, policy) > 0
    off = np.abs(found.mean - truth)[visited & ~mdp.terminal]
    assert (off <= STANDARD_ERRORS * found.errors[visited & ~mdp.terminal] + 0.01 * np.abs(truth).max()).all()
    distances = found.distances(truth)
    assert distances.shape == (50, 40)
    assert distances[-1].mean() < 0.15 * np.abs(truth).max()
    assert distances[-1].mean() < distances[0].mean()
    assert found.steps[-1] == 2_000
    np.testing.assert_array_equal(found.curve[-1], found.final)


def test_one_step_is_td_0() -> None:
    options = {"num_steps": 500, "num_runs": 3, "seed": 2}
    np.testing.assert_allclose(
        n_step_td(*CASES["branching"], n=1, **options).final, td_lambda(*CASES["branching"], **options).final
    )


def test_by_hand() -> None:
    """0 → 1 → end, rewards 1 and 2, γ = ½, constant α = ½: the same two steps again and again."""
    transitions = np.zeros((3, 1, 3))
    transitions[0, 0, 1] = transitions[1, 0, 2] = 1
    mdp = TabularMDP(
        transitions=transitions,
        rewards=np.array([[1.0], [2.0], [0.0]]),
        start=np.array([1.0, 0, 0]),
        gamma=0.5,
        terminal=np.arange(3) == 2,
    )
    options = {"num_runs": 1, "step_size": StepSize(initial=0.5, power=0)}
    policy = np.zeros(3, dtype=int)
    assert td_lambda(mdp, policy, num_steps=2, **options).final.tolist() == [[0.5, 1, 0]]
    # δ of the second step, 2, reaches back with γλ = ½·½ to the first state: ½ + ½·2·¼
    assert td_lambda(mdp, policy, num_steps=2, lambda_=0.5, **options).final.tolist() == [[0.75, 1, 0]]
    # two steps: 1 + ½·2 = 2 from the first state, halved; nothing is known before the episode's end
    assert n_step_td(mdp, policy, num_steps=1, n=2, **options).final.tolist() == [[0, 0, 0]]
    assert n_step_td(mdp, policy, num_steps=2, n=2, **options).final.tolist() == [[1, 1, 0]]
    assert n_step_td(mdp, policy, num_steps=2, n=9, **options).final.tolist() == [[1, 1, 0]]


def test_progress_is_told() -> None:
    told = []
    td_lambda(WALK, NOTHING_TO_DECIDE, num_steps=10, num_runs=2, num_looks=5, look=lambda *now: told.append(now[0]))
    assert told == [2, 4, 6, 8, 10]


def test_refusals() -> None:
    with pytest.raises(DataError, match="lambda is"):
        td_lambda(WALK, NOTHING_TO_DECIDE, num_steps=1, lambda_=1.5)
    with pytest.raises(DataError, match="n is 0"):
        n_step_td(WALK, NOTHING_TO_DECIDE, num_steps=1, n=0)
    with pytest.raises(DataError, match="0 steps"):
        td_lambda(WALK, NOTHING_TO_DECIDE, num_steps=0)
    for wrong in ({"initial": 0.0}, {"initial": 1.5}, {"power": -0.1}, {"power": 1.1}):
        with pytest.raises(DataError, match="choose initial"):
            StepSize(**wrong)

"""Estimators on whole episodes, run by run: the very estimates of one run, their spread, the truth within it."""

from __future__ import annotations

import numpy as np
import pytest

from trueup.errors import DataError
from trueup.mdp import exact
from trueup.mdp.convergence import chosen, monte_carlo_runs, off_policy_runs
from trueup.mdp.estimation import monte_carlo
from trueup.mdp.generators import chain, random_mdp, random_walk
from trueup.mdp.off_policy import off_policy_value
from trueup.mdp.outcomes import from_observed
from trueup.mdp.sampling import sample_trajectories

STANDARD_ERRORS = 4.5
WALK, NOTHING_TO_DECIDE = random_walk(5), np.zeros(7, dtype=int)
BRANCHING = random_mdp(6, num_states=5, num_actions=2, gamma=0.9, episodic=True)
UNIFORM, TARGET = np.full((5, 2), 0.5), np.array([[0.9, 0.1]] * 5)
ESTIMATORS = ["ordinary", "weighted", "per_decision", "doubly_robust"]


@pytest.mark.parametrize("visits", ["first", "every"])
def test_monte_carlo_in_many_runs(visits) -> None:
    truth = exact.values(WALK, NOTHING_TO_DECIDE)
    found = monte_carlo_runs(WALK, NOTHING_TO_DECIDE, num_episodes=400, num_runs=30, visits=visits, num_looks=4, seed=1)
    assert found.curve.shape == (4, 30, 7)
    inner = slice(1, 6)
    assert (np.abs(found.mean - truth)[inner] <= STANDARD_ERRORS * found.errors[inner]).all()
    assert (found.errors[inner] < 0.01).all()
    assert not found.final[:, [0, 6]].any()
    assert (np.diff(found.distances(truth).mean(-1)) < 0).all()
    # An episode from the middle of five takes 9 steps on average.
    assert found.steps == pytest.approx(np.array([100, 200, 300, 400]) * 9, rel=0.05)


def test_one_run_is_monte_carlo() -> None:
    found = monte_carlo_runs(WALK, NOTHING_TO_DECIDE, num_episodes=7, num_runs=3, num_looks=1, seed=2)
    drawn = sample_trajectories(
        WALK,
        NOTHING_TO_DECIDE,
        num_trajectories=21,
        horizon=10_000,
        seed=int(np.random.default_rng(2).integers(2**63)),
    )
    for run in range(3):
        alone = monte_carlo(chosen(drawn, np.arange(7 * run, 7 * run + 7)), WALK.gamma, 7)
        np.testing.assert_allclose(found.final[run], np.nan_to_num(alone.values))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_off_policy_in_many_runs(estimator) -> None:
    told = []
    found = off_policy_runs(
        BRANCHING,
        UNIFORM,
        TARGET,
        estimator=estimator,
        num_episodes=200,
        num_runs=40,
        num_looks=4,
        seed=3,
        look=lambda *now: told.append(now[0]),
    )
    assert told == [50, 100, 150, 200]
    truth = np.array([exact.expected_return(BRANCHING, TARGET)])
    assert found.curve.shape == (4, 40, 1)
    assert np.abs(found.mean - truth) <= STANDARD_ERRORS * found.errors
    assert found.errors < 0.05
    assert found.distances(truth)[-1].mean() < found.distances(truth)[0].mean()
    assert ((found.effective_episodes > 20) & (found.effective_episodes < 200)).all()


def test_one_run_is_the_estimator() -> None:
    options = {"num_episodes": 30, "num_runs": 2, "num_looks": 1, "seed": 4}
    drawn = sample_trajectories(BRANCHING, UNIFORM, num_trajectories=60, horizon=10_000, seed=4)
    found = off_policy_runs(BRANCHING, UNIFORM, TARGET, estimator="weighted", **options)
    alone = off_policy_value(chosen(drawn, range(30, 60)), UNIFORM, TARGET, 0.9, estimator="weighted")
    assert found.final[1, 0] == pytest.approx(alone.value)
    assert found.effective_episodes[1] == pytest.approx(alone.effective_episodes)
    assert found.steps.tolist() == [round(drawn.mask.sum() / 2)]


def test_doubly_robust_models_what_it_is_not_asked_of() -> None:
    """Each half of the episodes with the Q of a process observed in the other, and the mean of the two."""
    drawn = sample_trajectories(BRANCHING, UNIFORM, num_trajectories=40, horizon=10_000, seed=4)
    halves = chosen(drawn, range(0, 40, 2)), chosen(drawn, range(1, 40, 2))
    values = []
    for held, seen in (halves, halves[::-1]):
        columns = (seen.states, seen.actions, seen.rewards, seen.next_states, seen.terminated)
        model = from_observed(
            *(each[seen.mask] for each in columns), gamma=0.9, num_states=5, num_actions=2, unseen_reward=0.0
        )
        q = exact.action_values(model, np.array([[0.9, 0.1]] * 6))[:5]
        values.append(off_policy_value(held, UNIFORM, TARGET, 0.9, estimator="doubly_robust", q=q).value)
    found = off_policy_runs(
        BRANCHING, UNIFORM, TARGET, estimator="doubly_robust", num_episodes=40, num_runs=1, num_looks=1, seed=4
    )
    assert found.final[0, 0] == pytest.approx(np.mean(values), rel=1e-12)
    assert abs(values[0] - values[1]) > 0.01


def test_a_model_lowers_the_spread() -> None:
    options = {"num_episodes": 200, "num_runs": 100, "num_looks": 1, "seed": 5}
    spread = {
        estimator: off_policy_runs(BRANCHING, UNIFORM, TARGET, estimator=estimator, **options).errors[0]
        for estimator in ESTIMATORS
    }
    assert spread["doubly_robust"] < 0.8 * min(spread["ordinary"], spread["per_decision"])


def test_where_no_episode_ends() -> None:
    """Doubly robust goes on from the horizon by its Q; nothing else can."""
    endless = chain([5, 0, 0, 0, 0, 0, 10], left=0.4, right=0.4, gamma=0.5)
    nothing = np.zeros(7, dtype=int)
    options = {"num_episodes": 20, "num_runs": 10, "horizon": 40}
    found = off_policy_runs(endless, nothing, nothing, estimator="doubly_robust", **options)
    truth = exact.expected_return(endless, nothing)
    assert abs(found.mean[0] - truth) <= STANDARD_ERRORS * found.errors[0]
    with pytest.raises(DataError, match="cut off"):
        off_policy_runs(endless, nothing, nothing, estimator="ordinary", **options)
    with pytest.raises(DataError, match="cut off"):
        monte_carlo_runs(endless, nothing, **options)
    with pytest.raises(DataError, match="at least two"):
        off_policy_runs(WALK, NOTHING_TO_DECIDE, NOTHING_TO_DECIDE, estimator="weighted", num_episodes=1)

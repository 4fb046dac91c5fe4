"""Exact means and variances over every episode; drawn episodes within their own standard errors; refusals."""

from __future__ import annotations

import numpy as np
import pytest

from trueup.errors import DataError
from trueup.mdp import enumerate_trajectories, exact
from trueup.mdp.generators import random_mdp
from trueup.mdp.off_policy import off_policy_value
from trueup.mdp.sampling import sample_trajectories

MDP = random_mdp(4, num_states=4, num_actions=3, gamma=0.9, episodic=True)
# Far from 0, so that no single episode outweighs all others.
BEHAVIOUR, TARGET = (0.5 / 3 + 0.5 * np.random.default_rng(seed).dirichlet(np.ones(3), size=4) for seed in (0, 1))
PATHS = enumerate_trajectories(MDP, BEHAVIOUR, horizon=3)
TRUTH = exact.expected_return(MDP, TARGET)
ROUGH_Q = exact.action_values(MDP, TARGET) + np.random.default_rng(2).normal(size=(4, 3)) * ~MDP.terminal[:, None]
ESTIMATORS = [("ordinary", None), ("per_decision", None), ("doubly_robust", ROUGH_Q)]


@pytest.mark.parametrize(("estimator", "q"), ESTIMATORS, ids=[name for name, _ in ESTIMATORS])
@pytest.mark.parametrize("target", [TARGET, np.array([2, 0, 1, 0])], ids=["random", "of actions"])
def test_the_mean_over_all_episodes_is_the_targets_return(estimator, q, target: np.ndarray) -> None:
    truth = exact.expected_return(MDP, target)
    found = off_policy_value(PATHS, BEHAVIOUR, target, 0.9, estimator=estimator, q=q)
    assert found.value == pytest.approx(truth, abs=1e-12)


def test_weights_add_up_to_one_so_that_the_weighted_mean_is_exact_too() -> None:
    assert off_policy_value(PATHS, BEHAVIOUR, TARGET, 0.9, estimator="weighted").value == pytest.approx(TRUTH)


def test_one_s_own_episodes_need_no_weights() -> None:
    own = enumerate_trajectories(MDP, TARGET, horizon=3)
    returns = (own.rewards * 0.9 ** np.arange(3)).sum(-1)
    for estimator in ("ordinary", "weighted", "per_decision"):
        found = off_policy_value(own, TARGET, TARGET, 0.9, estimator=estimator)
        assert found.value == pytest.approx(TRUTH)
        assert found.variance == pytest.approx(own.probabilities @ (returns - TRUTH) ** 2)
        assert found.effective_episodes == pytest.approx(len(own))


def test_variance_grows_as_the_policies_part_and_falls_with_what_is_known() -> None:
    def variance(mixed: float, estimator, q=None) -> float:
        target = (1 - mixed) * BEHAVIOUR + mixed * np.eye(3)[[2, 0, 1, 0]]
        return off_policy_value(PATHS, BEHAVIOUR, target, 0.9, estimator=estimator, q=q).variance

    for estimator in ("ordinary", "per_decision"):
        grown = [variance(mixed, estimator) for mixed in (0.0, 0.3, 0.6, 1.0)]
        assert grown == sorted(grown)
        assert grown[-1] > 2 * grown[0]
    with_q = off_policy_value(
        PATHS, BEHAVIOUR, TARGET, 0.9, estimator="doubly_robust", q=exact.action_values(MDP, TARGET)
    )
    assert with_q.variance < off_policy_value(PATHS, BEHAVIOUR, TARGET, 0.9, estimator="per_decision").variance


@pytest.mark.parametrize(
    ("estimator", "q"), [*ESTIMATORS, ("weighted", None)], ids=[*(name for name, _ in ESTIMATORS), "weighted"]
)
def test_drawn_episodes_are_within_their_own_errors(estimator, q) -> None:
    drawn = sample_trajectories(MDP, BEHAVIOUR, num_trajectories=20_000, horizon=3, seed=5)
    found = off_policy_value(drawn, BEHAVIOUR, TARGET, 0.9, estimator=estimator, q=q)
    assert abs(found.value - TRUTH) <= 4.5 * found.error
    over_all = off_policy_value(PATHS, BEHAVIOUR, TARGET, 0.9, estimator=estimator, q=q)
    assert found.variance == pytest.approx(over_all.variance, rel=0.3)
    assert 0 < found.effective_episodes < 20_000


def test_what_q_says_stands_for_what_was_cut_off() -> None:
    endless = random_mdp(4, num_states=3, num_actions=2, gamma=0.8, episodic=False)
    behaviour, target = (np.random.default_rng(seed).dirichlet(np.ones(2), size=3) for seed in (0, 1))
    paths = enumerate_trajectories(endless, behaviour, horizon=3)
    q = exact.action_values(endless, target)
    found = off_policy_value(paths, behaviour, target, 0.8, estimator="doubly_robust", q=q)
    assert found.value == pytest.approx(exact.expected_return(endless, target))
    with pytest.raises(DataError, match="episodes were cut off"):
        off_policy_value(paths, behaviour, target, 0.8)


def test_refusals() -> None:
    with pytest.raises(DataError, match="state 0, action 1: the target takes an action"):
        off_policy_value(PATHS, np.array([0, 1, 2, 0]), TARGET, 0.9)
    with pytest.raises(DataError, match="doubly_robust needs q"):
        off_policy_value(PATHS, BEHAVIOUR, TARGET, 0.9, estimator="doubly_robust")
    with pytest.raises(DataError, match="doubly_robust needs q"):
        off_policy_value(PATHS, BEHAVIOUR, TARGET, 0.9, q=ROUGH_Q)


@pytest.mark.parametrize("estimator", ["ordinary", "weighted", "per_decision"])
def test_episodes_that_the_target_never_has_say_nothing(estimator) -> None:
    never = random_mdp(4, num_states=2, num_actions=2, gamma=0.9, episodic=True)
    paths = enumerate_trajectories(never, np.array([1, 1]), horizon=1)
    mixed = np.full((2, 2), 0.5)
    found = off_policy_value(paths, mixed, np.array([0, 0]), 0.9, estimator=estimator)
    assert (found.value, found.effective_episodes) == (0, 0)

"""Processes with known answers: Easy-RL's chain, Sutton & Barto's random walk and cliff; garnets; maps by hand."""

from __future__ import annotations

import numpy as np
import pytest

from trueup.errors import DataError
from trueup.mdp import exact
from trueup.mdp.generators import CLIFF, chain, garnet, grid_world, random_walk
from trueup.mdp.planning import modified_policy_iteration

UP, RIGHT, DOWN, LEFT = range(4)


def test_the_chain_of_easy_rl() -> None:
    mdp = chain([5, 0, 0, 0, 0, 0, 10], left=0.4, right=0.4, gamma=0.5)
    values = exact.values(mdp, np.zeros(7, dtype=int))
    np.testing.assert_allclose(values, [7.6588, 1.8057, 0.4670, 0.2959, 0.8647, 3.5950, 15.3129], atol=5e-5)
    np.testing.assert_allclose(mdp.transition_array[[0, 3, 6], 0].max(-1), [0.6, 0.4, 0.6])


def test_the_random_walk() -> None:
    mdp = random_walk(5)
    np.testing.assert_allclose(exact.values(mdp, np.zeros(7, dtype=int)), [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 0])
    assert mdp.start[3] == 1


def test_the_cliff_is_best_passed_at_its_edge() -> None:
    mdp = grid_world(CLIFF, gamma=1.0)
    found = modified_policy_iteration(mdp)
    route, cell = [], 36
    while not mdp.terminal[cell]:
        route.append(int(found.policy[cell]))
        cell = int(mdp.transition_array[cell, route[-1]].argmax())
    assert route == [UP] + [RIGHT] * 11 + [DOWN]
    over_the_edge = exact.values_of_actions(mdp, found.values)[36, RIGHT]
    assert over_the_edge == pytest.approx(-100 - 13)  # and back to the start


def test_a_map_by_hand() -> None:
    mdp = grid_world(["S#", ".G"], gamma=0.5, step_reward=-1.0, rewards={"G": 10.0}, slip=0.1)
    moves = mdp.transition_array
    # from the start: up is off the map, right a wall, so only down leads anywhere
    np.testing.assert_allclose(moves[0, UP], [1, 0, 0, 0])
    np.testing.assert_allclose(moves[0, DOWN], [0.2, 0, 0.8, 0])
    np.testing.assert_allclose(moves[0, LEFT], [0.9, 0, 0.1, 0])  # a left turn from left is down
    np.testing.assert_allclose(mdp.reward_array[2, RIGHT], [-1, 0, -1, 10])
    assert mdp.terminal.tolist() == [False, True, False, True]
    assert mdp.start.tolist() == [1, 0, 0, 0]
    assert grid_world(["..", ".G"], gamma=0.5).start.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "differ in length"),
        (["..", "."], {}, "differ in length"),
        (["C.", ".G"], {}, "the map has 0 of them"),
        (["S.", ".G"], {"slip": 0.6}, "slip is 0.6"),
    ],
)
def test_what_is_no_map(rows: list[str], options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        grid_world(rows, gamma=0.9, **options)


def test_garnets() -> None:
    mdp = garnet(3, num_states=40, num_actions=3, num_successors=7, gamma=0.9)
    rows = mdp.transition_array.reshape(120, 40)
    assert ((rows > 0).sum(-1) == 7).all()
    np.testing.assert_allclose(rows.sum(-1), 1)
    np.testing.assert_allclose(mdp.rewards, np.repeat(mdp.expected_rewards.ravel(), 7))
    assert (garnet(3, num_states=40, num_actions=3, num_successors=7, gamma=0.9).rewards == mdp.rewards).all()
    assert garnet(0, num_states=3, num_actions=1, num_successors=3, gamma=0.9).transition_array.all()
    with pytest.raises(DataError, match="4 successors among 3 states"):
        garnet(0, num_states=3, num_actions=1, num_successors=4, gamma=0.9)

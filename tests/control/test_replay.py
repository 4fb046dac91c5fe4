"""What is kept and what is drawn: a ring, spans of n steps against n-step returns, priorities by formula and by χ²."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from trueup.control.agent import Agent
from trueup.control.environments import Step
from trueup.control.presets import ALGORITHMS
from trueup.control.replay import Priorities, Replay, Spans, following_observation
from trueup.control.settings import ControlSettings
from trueup.control.train import train
from trueup.objectives.returns import n_step_returns

INPUTS = 2


def transition(number: int) -> tuple[Any, ...]:
    """One that can be told from every other in each of its fields."""
    return np.full(INPUTS, number), number, 10.0 * number, 0.5 * number, np.full(INPUTS, -number)


def filled(counts: tuple[int, ...], capacity: int) -> Replay:
    """Run r has been given the transitions 100·r, 100·r + 1, …"""
    replay = Replay(len(counts), capacity, INPUTS)
    for run, count in enumerate(counts):
        for number in range(count):
            replay.add(run, transition(100 * run + number))
    return replay


def assert_transitions(found: Any, numbers: list[list[int]]) -> None:
    expected = np.array(numbers)
    assert found.actions.tolist() == numbers
    np.testing.assert_array_equal(found.rewards, 10.0 * expected)
    np.testing.assert_array_equal(found.discounts, 0.5 * expected)
    np.testing.assert_array_equal(found.observations, np.stack([expected] * INPUTS, -1))
    np.testing.assert_array_equal(found.next_observations, -np.stack([expected] * INPUTS, -1))


def test_the_oldest_makes_room_for_the_newest() -> None:
    replay = Replay(1, 3, INPUTS)
    places = [replay.add(0, transition(number)) for number in range(5)]
    assert places == [0, 1, 2, 0, 1]
    assert_transitions(replay.at(np.array([[0, 1, 2]])), [[3, 4, 2]])
    assert replay.size.tolist() == [3]


def test_runs_have_what_is_theirs() -> None:
    assert filled((5, 2, 0), capacity=4).size.tolist() == [4, 2, 0]
    replay = filled((5, 2), capacity=4)
    assert_transitions(replay.at(np.array([[0, 3, 3], [1, 0, 1]])), [[4, 3, 3], [101, 100, 101]])


def test_a_transition_is_copied() -> None:
    replay, seen = Replay(1, 3, INPUTS), np.ones(INPUTS)
    replay.add(0, (seen, 0, 0.0, 0.0, seen))
    seen[:] = 7
    assert (replay.at(np.array([[0]])).observations == 1).all()


@pytest.mark.parametrize("counts", [(5, 2), (9, 9), (1, 0)], ids=str)
def test_replay_restored_goes_on_as_if_never_stopped(counts: tuple[int, ...]) -> None:
    replay = filled(counts, capacity=4)
    state = replay.state()
    assert state["arrays"]["rewards"].shape == (2, min(4, max(counts)))
    other = Replay(2, 4, INPUTS)
    other.restore(state)
    for number in range(3):
        for run in (0, 1):
            assert replay.add(run, transition(50 + number)) == other.add(run, transition(50 + number))
            np.testing.assert_array_equal(other.size, replay.size)
            for array, expected in zip(other.arrays, replay.arrays, strict=True):
                np.testing.assert_array_equal(array, expected)
    assert (state["arrays"]["actions"] < 50).logical_or(state["arrays"]["actions"] >= 100).all()  # not a view


def walk(spans: Spans, rewards: list[float], *, end: str | None, row: int = 0, first: int = 0) -> list[tuple[Any, ...]]:
    """An episode through the states first, first + 1, …; the actions are ten times as large."""
    found = []
    for step, reward in enumerate(rewards):
        last = step == len(rewards) - 1
        here = first + step
        found += spans.add(
            row,
            np.array([here]),
            10 * here,
            reward,
            np.array([here + 1]),
            terminated=last and end == "terminated",
            truncated=last and end == "truncated",
        )
    return [(int(seen[0]), action, total, discount, int(then[0])) for seen, action, total, discount, then in found]


def test_spans_golden() -> None:
    """γ = ½ and rewards 1, 2, 4, 8: any three in a row are worth three times the first, and the last ones less."""
    whole = (0, 0, 3.0, 0.125, 3)
    assert walk(Spans(1, 3, 0.5), [1, 2, 4, 8], end=None) == [whole, (1, 10, 6, 0.125, 4)]
    found = walk(Spans(1, 3, 0.5), [1, 2, 4, 8], end="terminated")
    assert found == [whole, (1, 10, 6, 0, 4), (2, 20, 8, 0, 4), (3, 30, 8, 0, 4)]
    # cut off: the state that was left has a value, seen from as many steps away as there were
    found = walk(Spans(1, 3, 0.5), [1, 2, 4, 8], end="truncated")
    assert found == [whole, (1, 10, 6, 0.125, 4), (2, 20, 8, 0.25, 4), (3, 30, 8, 0.5, 4)]
    assert walk(Spans(1, 3, 0.5), [1, 2], end="terminated") == [(0, 0, 2, 0, 2), (1, 10, 2, 0, 2)]


def test_spans_of_one_step() -> None:
    found = walk(Spans(1, 1, 0.9), [1, 2], end="terminated")
    assert found == [(0, 0, 1, 0.9, 1), (1, 10, 2, 0, 2)]


def test_spans_end_with_their_episode() -> None:
    """What the next episode earns is none of theirs."""
    spans = Spans(1, 3, 0.5)
    walk(spans, [1, 2], end="truncated")
    assert not spans.open[0]
    assert walk(spans, [4, 8, 16], end=None, first=50) == [(50, 500, 12, 0.125, 53)]


def stream(seed: int, length: int = 40) -> dict[str, np.ndarray]:
    """Steps of a row, with episodes that end in both ways."""
    rng = np.random.default_rng(seed)
    ends = rng.random(length)
    return {
        "rewards": rng.standard_normal(length),
        "terminated": ends < 0.1,
        "truncated": (ends > 0.1) & (ends < 0.2),
        "values": rng.standard_normal(length),  # of what each step leads to
    }


def add(spans: Spans, row: int, steps: dict[str, np.ndarray], time: int) -> list[tuple[Any, ...]]:
    return spans.add(
        row,
        np.array([time]),
        time,
        float(steps["rewards"][time]),
        np.array([steps["values"][time]]),
        terminated=bool(steps["terminated"][time]),
        truncated=bool(steps["truncated"][time]),
    )


@pytest.mark.parametrize("n", [1, 2, 5])
def test_targets_of_spans_are_n_step_returns(n: int) -> None:
    """Total + discount · V(behind) of every step, in order, in two rows whose steps come in turn."""
    spans, rows = Spans(2, n, 0.9), [stream(n), stream(n + 10)]
    found: list[list[tuple[Any, ...]]] = [[], []]
    for time in range(40):
        for row in (0, 1):
            found[row] += add(spans, row, rows[row], time)
    for row in (0, 1):
        tensors = {name: torch.from_numpy(array) for name, array in rows[row].items()}
        expected = n_step_returns(
            tensors["rewards"],
            0.9 * (~tensors["terminated"]).double(),
            tensors["values"],
            num_steps=n,
            truncated=tensors["truncated"],
        )
        assert [action for _, action, *_ in found[row]] == list(range(40 - len(spans.open[row])))
        assert len(spans.open[row]) < n
        targets = [total + discount * behind[0] for _, _, total, discount, behind in found[row]]
        np.testing.assert_allclose(targets, expected[: len(targets)], rtol=1e-12)


def test_spans_restored_go_on_as_if_never_stopped() -> None:
    steps = stream(0)
    spans, other = Spans(1, 4, 0.9), Spans(1, 4, 0.9)
    for time in range(20):
        add(spans, 0, steps, time)
        if len(spans.open[0]) == 3 and time > 5:
            break
    other.restore(spans.state())
    later = range(time + 1, 40)
    assert [add(other, 0, steps, t) for t in later] == [add(spans, 0, steps, t) for t in later]


def prioritized(alpha: float = 0.6, capacity: int = 5, seed: int = 0) -> tuple[Priorities, np.ndarray]:
    """Two full runs with TD errors of all sizes and both signs, and what they come to."""
    priorities = Priorities(2, capacity, alpha)
    for run in (0, 1):
        for place in range(capacity):
            priorities.add(run, place)
    errors = np.random.default_rng(seed).standard_normal((2, capacity)) * np.array([[1.0], [20.0]])
    priorities.change(np.tile(np.arange(capacity), (2, 1)), errors)
    powers = (np.abs(errors) + 1e-6) ** alpha
    return priorities, powers / powers.sum(1, keepdims=True)


def assert_sums(priorities: Priorities) -> None:
    """Every node of the tree is the sum of the two below it."""
    tree, leaves = priorities.tree, priorities.leaves
    np.testing.assert_allclose(tree[:, 1:leaves], tree[:, 2::2] + tree[:, 3::2], rtol=1e-12)


def test_priorities_golden() -> None:
    """α = 2. New ones count 1; after errors of 3 and −2 new ones count as the largest, 9. Each run by itself."""
    priorities = Priorities(2, 4, 2.0)
    for place in range(3):
        priorities.add(0, place)
    assert priorities.tree[:, 1].tolist() == [3, 0]
    priorities.add(1, 0)
    priorities.change(np.array([[0, 2], [0, 0]]), np.array([[3.0, -2.0], [0.5, 0.5]]))
    leaves = priorities.tree[:, priorities.leaves :]
    np.testing.assert_allclose(leaves, [[9, 1, 4, 0], [0.25, 0, 0, 0]], rtol=1e-5)
    priorities.add(0, 3)
    priorities.add(1, 1)
    np.testing.assert_allclose(leaves, [[9, 1, 4, 9], [0.25, 1, 0, 0]], rtol=1e-5)
    # smaller errors later: the largest so far remains, and takes the place of what was there
    priorities.change(np.array([[0], [0]]), np.array([[1.0], [1.0]]))
    priorities.add(0, 1)
    np.testing.assert_allclose(leaves[0], [1, 9, 4, 9], rtol=1e-5)
    assert_sums(priorities)


@pytest.mark.parametrize("capacity", [1, 2, 5, 8, 9])
def test_sums_stand_in_the_tree_whatever_was_changed(capacity: int) -> None:
    """A place that comes twice in a batch too: it has one of its two priorities, and the sums know which."""
    rng = np.random.default_rng(capacity)
    priorities = Priorities(2, capacity, 0.7)
    assert priorities.leaves >= capacity
    for place in range(capacity):
        for run in (0, 1):
            priorities.add(run, place)
    for _ in range(20):
        priorities.change(rng.integers(capacity, size=(2, 6)), rng.standard_normal((2, 6)))
        assert_sums(priorities)
    assert (priorities.tree[:, priorities.leaves : priorities.leaves + capacity] > 0).all()
    assert (priorities.tree[:, priorities.leaves + capacity :] == 0).all()


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_draws_come_as_often_as_their_priority_says(alpha: float) -> None:
    """χ² of independent draws, in each run; p-values of 1 in 1000 fail. α = 0 draws evenly."""
    number = 20_000
    priorities, expected = prioritized(alpha)
    uniforms = np.random.default_rng(3).random((2, number))
    # draw() takes one from each of as many parts of the total: this undoes it.
    places, _ = priorities.draw(number * uniforms - np.arange(number), np.array([5, 5]), beta=0.5)
    for run in (0, 1):
        counts = np.bincount(places[run], minlength=5)
        assert stats.chisquare(counts, number * expected[run]).pvalue > 1e-3
    if alpha == 0:
        np.testing.assert_allclose(expected, 0.2)


def test_a_batch_is_spread_over_all_of_the_total() -> None:
    """One from each of B equal parts: no place comes two times more, or less, often than in proportion."""
    priorities, expected = prioritized()
    places, _ = priorities.draw(np.random.default_rng(0).random((2, 64)), np.array([5, 5]), beta=0.5)
    for run in (0, 1):
        assert (np.abs(np.bincount(places[run], minlength=5) - 64 * expected[run]) < 2).all()
        assert (np.diff(places[run]) >= 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_weights_are_the_papers(beta: float) -> None:
    """w = (N·P)^−β over the largest of the batch. With β = 1 they undo the priorities: w·P is the same everywhere."""
    priorities, chances = prioritized()
    places, weights = priorities.draw(np.random.default_rng(0).random((2, 16)), np.array([5, 5]), beta=beta)
    drawn = np.take_along_axis(chances, places, 1)
    expected = (5 * drawn) ** -beta
    np.testing.assert_allclose(weights, expected / expected.max(1, keepdims=True), rtol=1e-10)
    assert (weights.max(1) == 1).all()
    if beta == 1:
        products = weights * drawn
        np.testing.assert_allclose(products, np.broadcast_to(products[:, :1], products.shape), rtol=1e-10)


def test_the_mean_of_weighted_draws_is_the_plain_mean() -> None:
    """β = 1: Σ_i P(i)·w_i·x_i is proportional to Σ_i x_i, exactly, over all places."""
    priorities, chances = prioritized()
    x = np.random.default_rng(1).standard_normal(5)
    cumulated = np.cumsum(chances, 1) - chances / 2  # the middle of each place's part
    places, weights = priorities.draw(5 * cumulated - np.arange(5), np.array([5, 5]), beta=1.0)
    assert places.tolist() == [[0, 1, 2, 3, 4]] * 2
    np.testing.assert_allclose((chances * weights * x).sum(1) / (chances * weights).sum(1), x.mean(), rtol=1e-10)


def test_nothing_is_drawn_that_is_not_there() -> None:
    """At the very ends of the total, in half empty memories whose runs have different numbers of places."""
    priorities = Priorities(2, 9, 0.6)
    sizes = np.array([7, 3])
    rng = np.random.default_rng(0)
    for run, size in enumerate(sizes):
        for place in range(size):
            priorities.add(run, place)
    for _ in range(200):
        priorities.change(rng.integers(sizes[:, None], size=(2, 8)), rng.standard_normal((2, 8)))
        for uniform in (0.0, np.nextafter(1.0, 0.0)):
            places, weights = priorities.draw(np.full((2, 4), uniform), sizes, beta=0.5)
            assert ((places >= 0) & (places < sizes[:, None])).all()
            assert np.isfinite(weights).all()


def test_learning_waits_for_the_first_transition(tmp_path: Path) -> None:
    """Spans of three steps are complete after the third; updates may begin at once. Drawing from nothing gives NaN."""
    settings = ControlSettings(
        **{
            **ALGORITHMS["dqn"],
            "env": "CartPole-v1",
            "algorithm": "dqn",
            "output": str(tmp_path / "run"),
            "seeds": (0, 1),
            "total_steps": 20,
            "n_step": 3,
            "prioritized": True,
            "learning_starts": 0,
            "train_every": 1,
            "hidden": (8,),
            "eval_episodes": 0,
            "quiet": True,
        }
    )
    assert Agent.load(train(settings).agent_folder).network.flat.isfinite().all()


def test_priorities_restored_are_the_same() -> None:
    priorities, _ = prioritized()
    state = priorities.state()
    other = Priorities(2, 5, 0.6)
    other.restore(state)
    np.testing.assert_allclose(other.tree[:, 1:], priorities.tree[:, 1:], rtol=1e-15)
    assert_sums(other)
    kept = state["leaves"].clone()
    for each in (priorities, other):
        each.add(0, 2)
        each.change(np.array([[1], [4]]), np.array([[0.1], [50.0]]))
        each.add(1, 0)
    np.testing.assert_array_equal(other.tree[:, other.leaves :], priorities.tree[:, priorities.leaves :])
    np.testing.assert_array_equal(other.largest, priorities.largest)
    assert torch.equal(state["leaves"], kept)


def test_the_observation_that_a_step_led_to() -> None:
    """Not the one that the next episode begins with, which is what is acted on next."""
    step = Step(
        observations=np.array([[1.0], [2.0]]),
        rewards=np.zeros(2),
        terminated=np.array([False, True]),
        truncated=np.zeros(2, bool),
        final_observations={1: np.array([9.0])},
    )
    assert following_observation(step, 0).tolist() == [1]
    assert following_observation(step, 1).tolist() == [9]

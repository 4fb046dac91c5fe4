"""Stepping many environments: what ends an episode, what comes behind it, and going on where a run was stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from trueup.control.actions import Choices, Gaussian
from trueup.control.environments import (
    Environments,
    LocalEnvironments,
    SeededLater,
    VectorEnvironments,
    make_environments,
)
from trueup.errors import CheckpointError, DataError


def ways(make: Callable[[], Any], num_rows: int) -> dict[str, Environments]:
    """The same environments, stepped in each way."""
    makers = [make] * num_rows
    return {
        "local": LocalEnvironments(make, num_rows),
        "same step": VectorEnvironments(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)),
        "next step": VectorEnvironments(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)),
    }


@pytest.mark.parametrize("way", ["local", "same step"])
@pytest.mark.parametrize("truncates", [False, True])
def test_the_next_episode_begins_in_the_same_step(counter: Any, way: str, truncates: bool) -> None:
    rows = ways(counter(3, truncates=truncates), 2)[way]
    assert rows.reset([0, 1]).tolist() == [[0], [0]]
    for time in (1, 2):
        step = rows.step(np.array([[0], [1]]))
        assert step.observations.tolist() == [[time], [time]]
        assert step.rewards.tolist() == [10 * time, 10 * time + 1]
        assert not step.terminated.any()
        assert not step.truncated.any()
        assert not step.final_observations
    step = rows.step(np.array([[0], [1]]))
    assert step.observations.tolist() == [[0], [0]]
    assert {row: final.tolist() for row, final in step.final_observations.items()} == {0: [3], 1: [3]}
    assert step.terminated.tolist() == [not truncates] * 2
    assert step.truncated.tolist() == [truncates] * 2


def test_a_step_that_only_resets_is_no_transition(counter: Any) -> None:
    rows = ways(counter(2), 1)["next step"]
    rows.reset([0])
    first, second, reset, third = (rows.step(np.zeros((1, 1))) for _ in range(4))
    assert [bool(step.is_reset[0]) for step in (first, second, reset, third)] == [False, False, True, False]
    assert second.terminated.tolist() == [True]
    assert second.observations.tolist() == [[2]]  # its own last one
    assert reset.observations.tolist() == [[0]]
    assert reset.rewards.tolist() == [0]
    assert third.rewards.tolist() == [10]


def test_an_episode_that_ends_both_ways_has_terminated() -> None:
    class Both(gym.Env):
        observation_space, action_space = gym.spaces.Discrete(2), gym.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict]:
            super().reset(seed=seed)
            return 0, {}

        def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
            return 1, 1.0, True, True, {}

    for rows in ways(Both, 1).values():
        assert rows.reset([0]).tolist() == [[1, 0]]  # one-hot
        step = rows.step(np.zeros((1, 1)))
        assert step.terminated.tolist() == [True]
        assert step.truncated.tolist() == [False]


@pytest.mark.parametrize("way", ["local", "same step", "next step"])
def test_rows_that_are_not_active_say_nothing(counter: Any, way: str) -> None:
    rows = ways(counter(2), 2)[way]
    rows.reset([0, 1])
    step = rows.step(np.zeros((2, 1)), np.array([True, False]))
    assert step.is_reset.tolist() == [False, True]
    assert step.rewards.tolist() == [10, 0]
    step = rows.step(np.zeros((2, 1)), np.array([True, False]))
    assert step.terminated.tolist() == [True, False]
    assert set(step.final_observations) <= {0}


def test_a_local_row_that_is_not_active_stays_where_it_is(counter: Any) -> None:
    rows = LocalEnvironments(counter(5), 2)
    rows.reset([0, 1])
    rows.step(np.zeros((2, 1)), np.array([True, False]))
    assert rows.step(np.zeros((2, 1))).observations.tolist() == [[2], [1]]


@pytest.mark.parametrize("name", ["CartPole-v1", "LunarLander-v3", "Hopper-v5", "Taxi-v4"])
def test_going_on_is_exact(name: str) -> None:
    def actions(rows: Environments, rng: np.random.Generator) -> np.ndarray:
        outputs = np.zeros((rows.num_rows, rows.actions.num_outputs), np.float32)
        noise = rows.actions.noise(rng, (rows.num_rows,))
        return rows.actions.act(outputs, noise, np.zeros(rows.actions.size, np.float32))

    whole, resumed = (make_environments(name, 3) for _ in range(2))
    whole.reset([5, 6, 7])
    rng = np.random.default_rng(0)
    for _ in range(120):  # episodes end in between
        whole.step(actions(whole, rng))
    state = whole.state()
    resumed.reset([1, 2, 3])
    assert resumed.restore(state).tolist() == state["observations"].tolist()
    draws = rng.bit_generator.state
    for _ in range(120):
        rng.bit_generator.state = draws
        chosen = actions(whole, rng)
        draws = rng.bit_generator.state
        one, other = whole.step(chosen), resumed.step(chosen)
        for field in ("observations", "rewards", "terminated", "truncated"):
            assert np.array_equal(getattr(one, field), getattr(other, field))


def test_what_does_not_do_the_same_thing_twice_is_refused() -> None:
    class Fickle(gym.Env):
        observation_space, action_space = gym.spaces.Box(0, 100, (1,)), gym.spaces.Discrete(2)
        made = 0.0

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
            super().reset(seed=seed)
            Fickle.made += 1
            return np.full(1, Fickle.made, np.float32), {}

        def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
            return np.zeros(1, np.float32), 0.0, False, False, {}

    rows = LocalEnvironments(Fickle, 1)
    rows.reset([0])
    with pytest.raises(CheckpointError, match="same thing twice"):
        rows.restore(rows.state())


def test_spaces_are_found_out() -> None:
    assert make_environments("CartPole-v1", 1).num_inputs == 4
    taxi = make_environments("Taxi-v4", 1)
    assert taxi.num_inputs == 500
    assert isinstance(taxi.actions, Choices)
    assert isinstance(make_environments("Pendulum-v1", 1).actions, Gaussian)


@pytest.mark.parametrize("vectorization", ["async", "gymnasium"])
def test_gymnasiums_vector_environments(vectorization: Any) -> None:
    rows = make_environments("CartPole-v1", 2, vectorization)
    try:
        first = rows.reset([3, 4])
        local = make_environments("CartPole-v1", 2)
        if vectorization == "async":
            np.testing.assert_array_equal(first, local.reset([3, 4]))
        ended = 0
        for _ in range(60):
            step = rows.step(np.ones((2, 1)))
            ended += int(step.terminated.sum())
            assert step.observations.shape == (2, 4)
        assert ended >= 6  # always to the right falls over in about ten steps
    finally:
        rows.close()


def test_seeds_that_are_given_at_the_making() -> None:
    """envpool's way: the seeds of ``reset`` reach what makes the environments, actions come in its own type."""

    class Pool:
        observation_space, action_space = gym.spaces.Box(0, 1, (1,), np.float32), gym.spaces.Discrete(2)

        def __init__(self, seeds: list[int]) -> None:
            self.seeds = seeds

        def reset(self) -> tuple[np.ndarray, dict]:
            return np.array(self.seeds, np.float32)[:, None], {}

        def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
            assert actions.dtype == np.int32
            nothing = np.zeros(2, bool)
            return np.zeros((2, 1), np.float32), actions.astype(float), nothing, nothing, {}

        def close(self) -> None: ...

    rows = VectorEnvironments(SeededLater(Pool, 2))
    assert rows.reset([7, 2**31 + 9]).tolist() == [[7], [9]]
    assert rows.step(np.array([[1], [0]])).rewards.tolist() == [1, 0]


def test_envpool() -> None:
    pytest.importorskip("envpool")
    rows = make_environments("CartPole-v1", 2, "envpool")
    first = rows.reset([3, 2**32 - 1])
    assert rows.reset([3, 2**32 - 1]).tolist() == first.tolist()
    steps = [rows.step(np.ones((2, 1))) for _ in range(40)]
    assert sum(int(step.terminated.sum()) for step in steps) >= 4
    assert sum(int(step.is_reset.sum()) for step in steps) >= 4
    rows.close()


def test_a_module_may_bring_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_tasks.py").write_text(
        "import gymnasium\nfrom gymnasium.envs.classic_control import CartPoleEnv\n"
        "gymnasium.register('MyPole-v0', entry_point=CartPoleEnv, max_episode_steps=9)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = make_environments("my_tasks:MyPole-v0", 1)
    assert rows.num_inputs == 4
    gym.registry.pop("MyPole-v0")


def test_mujocos_warnings_are_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="MuJoCo: .*settotalmass"):
        make_environments("HalfCheetah-v5", 1).close()
    assert "settotalmass" not in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_mistakes() -> None:
    with pytest.raises(DataError, match="doesn't exist"):
        make_environments("Nothing-v0", 1)
    with pytest.raises(DataError, match="no_such_module"):
        make_environments("no_such_module:Thing-v0", 1)
    disabled = SyncVectorEnv([lambda: gym.make("CartPole-v1")], autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(DataError, match="doesn't reset itself"):
        VectorEnvironments(disabled)
    with pytest.raises(CheckpointError):
        VectorEnvironments(gym.make_vec("CartPole-v1", 1)).restore({})

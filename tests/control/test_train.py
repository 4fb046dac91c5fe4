"""Whole runs: what they leave, going on exactly, several seeds beside one, refusals."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trueup.control.agent import Agent
from trueup.control.environments import make_environments
from trueup.control.evaluation import evaluate
from trueup.control.learner import Training
from trueup.control.on_policy import policy_network
from trueup.control.presets import preset
from trueup.control.settings import ControlSettings
from trueup.control.train import train
from trueup.errors import CheckpointError, DataError, NonFiniteError, SettingsError
from trueup.runs.folder import read_metrics

SHORT: dict[str, dict[str, Any]] = {
    "ppo": {
        "num_envs": 2,
        "rollout_steps": 64,
        "num_epochs": 2,
        "normalize_rewards": True,
        "normalize_observations": True,
    },
    "a2c": {"num_envs": 4, "rollout_steps": 8},
    "reinforce": {"num_envs": 2},
    "dqn": {"learning_starts": 100, "prioritized": True, "n_step": 2, "duelling": True, "target_every": 50},
}
TIMES = {"steps_per_second"}


def settings(folder: Path, algorithm: str = "ppo", **changes: Any) -> ControlSettings:
    values = preset(algorithm, "") | SHORT[algorithm]
    fixed = {"env": "CartPole-v1", "algorithm": algorithm, "total_steps": 640, "eval_episodes": 2, "quiet": True}
    return ControlSettings(**values | fixed | {"output": str(folder), "seeds": (3, 5), "log_every": 1} | changes)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.mark.parametrize("algorithm", SHORT)
def test_a_run_that_was_stopped_goes_on_exactly(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped twice, in the middle of episodes, by a signal: the same lines and the same parameters, to the bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(settings(whole, algorithm))
    stops = iter([200, 400])
    after, stop = Training.after, [next(stops)]

    def interrupted(training: Training, before: int, step: int) -> None:
        if stop and step >= stop[0]:
            stop[:] = [next(stops, 10**9)]
            os.kill(os.getpid(), signal.SIGINT)
        after(training, before, step)

    monkeypatch.setattr(Training, "after", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt, match="which is saved"):
            train(settings(parts, algorithm, resume="auto"))
    train(settings(parts, algorithm, resume="auto"))
    assert lines(parts) == lines(whole)
    one, other = (Agent.load(max((run / "checkpoints").iterdir()) / "model") for run in (whole, parts))
    assert np.array_equal(one.network.flat.numpy(), other.network.flat.numpy())


@pytest.mark.parametrize("algorithm", ["ppo", "a2c", "dqn"])  # reinforce's steps are those of the longest run
def test_seeds_side_by_side_are_seeds_alone(algorithm: str, tmp_path: Path) -> None:
    """What a run draws and learns doesn't depend on the runs beside it: its parameters are equal but for rounding."""
    short = {"total_steps": 256, "eval_episodes": 0}
    both = train(settings(tmp_path / "both", algorithm, **short))
    alone = train(settings(tmp_path / "alone", algorithm, seeds=(5,), **short))
    beside, single = (Agent.load(result.agent_folder).network for result in (both, alone))
    for name, array in single.arrays.items():
        np.testing.assert_allclose(beside.arrays[name][1::2], array, rtol=1e-3, atol=1e-4, err_msg=name)


def test_environments_that_can_not_be_saved_begin_anew(tmp_path: Path) -> None:
    vector = {"vectorization": "gymnasium", "eval_episodes": 0}
    train(settings(tmp_path / "run", total_steps=256, **vector))
    with pytest.raises(CheckpointError, match="total_steps"):
        train(settings(tmp_path / "run", total_steps=512, resume="auto", **vector))
    # A run that ended at a checkpoint in the middle: the last one is taken away.
    run = tmp_path / "two"
    train(settings(run, total_steps=512, save_every=256, **vector))
    last = max((run / "checkpoints").iterdir())
    shutil.rmtree(last)
    with pytest.warns(UserWarning, match="new episodes begin"):
        train(settings(run, total_steps=512, save_every=256, resume="yes", **vector))
    assert lines(run)[-1]["step"] == 512


def test_what_a_run_leaves(tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(settings(run, save_every=256, eval_every=256, keep_checkpoints=9))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-000256",
        "step-000512",
        "step-000640",
    ]
    recorded = lines(run)
    assert [line["step"] for line in recorded if "eval_return" in line] == [0, 256, 512, 640]
    last = [line for line in recorded if "policy_loss" in line][-1]
    assert {
        "return_100",
        "return_100_low",
        "return_100_high",
        "return_100/3",
        "return_100/5",
        "kl",
        "entropy",
        "clip_fraction",
    } <= set(last)
    assert result.metrics["eval_return"] == pytest.approx(
        (result.metrics["eval_return/3"] + result.metrics["eval_return/5"]) / 2
    )
    agent = Agent.load(result.agent_folder)
    assert agent.scale is not None
    before = agent.scale.state()["mean"].clone()
    outcome = evaluate(agent, lambda rows: make_environments("CartPole-v1", rows), 2, seed=1_000_000)
    assert outcome.returns.mean(1).tolist() == [result.metrics["eval_return/3"], result.metrics["eval_return/5"]]
    assert agent.scale.state()["mean"].equal(before)  # frozen
    assert float(agent.scale.state()["count"].max()) == 640


def test_a_short_episode_counts_no_more_than_a_long_one() -> None:
    """25 episodes in slots of 20: each is played once, whatever its length, and begins with its own seed."""
    rows: list[int] = []

    def make(num_rows: int) -> Any:
        rows.append(num_rows)
        return make_environments("CartPole-v1", num_rows)

    env = make_environments("CartPole-v1", 1)
    chosen = ControlSettings(env="CartPole-v1", seeds=(0, 1))
    agent = Agent("CartPole-v1", "ppo", (0, 1), env.actions, policy_network(chosen, env), None)
    many = evaluate(agent, make, 25, seed=7)
    assert rows == [40, 10]
    assert many.returns.shape == (2, 25)
    few = evaluate(agent, make, 3, seed=29)  # episodes 22 to 24 of those above
    assert few.returns.tolist() == many.returns[:, 22:].tolist()
    assert (many.returns == many.lengths).all()


def test_epochs_are_left_out_once_the_policy_has_moved_far(tmp_path: Path) -> None:
    """With a bound that the first epoch breaks, ten epochs move the policy no further than one."""

    def moved(name: str, **changes: Any) -> list[float]:
        result = train(settings(tmp_path / name, seeds=(3,), learning_rate=3e-3, eval_episodes=0, **changes))
        return [line["kl"] for line in lines(result.folder)]

    one, ten, stopped = moved("1", num_epochs=1), moved("10", num_epochs=10), moved("s", num_epochs=10, kl_stop=1e-9)
    assert stopped == one
    assert ten[0] > 2 * one[0]


def test_what_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="not a finite number"):
        train(settings(tmp_path / "run", learning_rate=1e30, max_grad_norm=None))
    assert (
        "NaN" in (tmp_path / "run" / "metrics.jsonl").read_text()
        or "Infinity" in (tmp_path / "run" / "metrics.jsonl").read_text()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": ""}, "--env: which environment"),
        ({"seeds": ()}, "--seeds"),
        ({"seeds": (1, 1)}, "--seeds"),
        ({"hidden": ()}, "--hidden"),
        ({"gamma": 1.5}, "--gamma"),
        ({"algorithm": "a2c"}, "--surrogate"),
        ({"surrogate": "reinforce"}, "--surrogate"),
        ({"baseline": False}, "--baseline"),
        ({"kl_stop": 0.02, "seeds": (0, 1)}, "--kl-stop"),
        ({"kl_target": 0.5}, "--kl-target"),
        ({"surrogate": "none", "clip": 0.3}, "--clip"),
        ({"n_step": 3}, "--n-step"),
        ({"algorithm": "dqn", "gae_lambda": 0.5}, "--gae-lambda"),
        ({"reward_clip": 5.0}, "--reward-clip"),
        ({"vectorization": "threads"}, "--vectorization"),
        ({"clip": 1.5}, "--clip"),
        ({"algorithm": "a2c", "surrogate": "reinforce", "num_epochs": 2}, "--num-epochs"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ControlSettings(**{"env": "CartPole-v1"} | changes)


@pytest.mark.parametrize("algorithm", ["ppo", "a2c", "reinforce", "dqn"])
@pytest.mark.parametrize("env", ["CartPole-v1", "LunarLander-v3", "HalfCheetah-v5", "Unknown-v0", "ALE/Pong-v5", ""])
def test_every_preset_is_valid(algorithm: Any, env: str) -> None:
    assert ControlSettings(**{"env": "X-v0", "algorithm": algorithm} | preset(algorithm, env)).algorithm == algorithm


@pytest.mark.parametrize("env", ["CartPole-v1", "LunarLander-v3", "HalfCheetah-v5"])
@pytest.mark.parametrize("surrogate", ["none", "clip", "kl", "adaptive_kl"])
def test_every_surrogate_goes_with_every_preset(surrogate: Any, env: str) -> None:
    assert ControlSettings(**preset("ppo", env) | {"env": env, "surrogate": surrogate}).surrogate == surrogate


def test_mistakes_leave_no_run_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Nowhere"):
        train(settings(tmp_path / "run", env="Nowhere-v0"))
    with pytest.raises(SettingsError, match="Discrete"):
        train(settings(tmp_path / "run", "dqn", env="Pendulum-v1"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    train(settings(tmp_path / "run", total_steps=128, eval_episodes=0))
    with pytest.raises(SettingsError, match="not empty"):
        train(settings(tmp_path / "run", total_steps=128))
    with pytest.raises(CheckpointError, match="other settings"):
        train(settings(tmp_path / "run", "a2c", resume="auto"))

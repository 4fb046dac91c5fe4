"""DQN against exact action values, and what its parts do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trueup.control.agent import Agent
from trueup.control.dqn import action_values, by_heads, exploration
from trueup.control.presets import preset
from trueup.control.settings import ControlSettings
from trueup.control.train import train
from trueup.mdp import exact, planning
from trueup.mdp.generators import garnet


def learned_values(process: Any, folder: Path, mdp: Any, **changes: Any) -> np.ndarray:
    """Q of both runs, [2, S, A]."""
    settings = preset("dqn", "") | {
        "env": "process",
        "algorithm": "dqn",
        "gamma": mdp.gamma,
        "total_steps": 5_000,
        "seeds": (0, 1),
        "output": str(folder / "run"),
        "hidden": (64,),
        "learning_rate": 5e-3,
        "lr_schedule": "linear",
        "learning_starts": 500,
        "train_every": 4,
        "updates_per_round": 2,
        "target_every": 40,
        "exploration_last": 1.0,  # every action goes on being tried
        "eval_episodes": 0,
        "quiet": True,
    }
    result = train(ControlSettings(**settings | changes), make=process(mdp))
    network = Agent.load(result.agent_folder).network
    states = np.eye(mdp.num_states, dtype=np.float32)
    return action_values(network.forward(np.stack([states, states])).outputs)


VARIANTS: dict[str, dict[str, Any]] = {
    "double": {},
    "plain": {"double": False},
    "duelling": {"duelling": True},
    "prioritised": {"prioritized": True},
    "huber": {"huber_delta": 1.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_become_those_of_the_best_policy(process: Any, tmp_path: Path, variant: str) -> None:
    """On a process without chance, whose targets have no noise, every Q(s, a) becomes Q*(s, a)."""
    mdp = garnet(3, num_states=6, num_actions=3, num_successors=1, gamma=0.9)
    truth = exact.values_of_actions(mdp, planning.policy_iteration(mdp).values)
    values = learned_values(process, tmp_path, mdp, **VARIANTS[variant])
    assert np.abs(values - truth).max() < 0.02 * truth.std()


def test_n_steps_without_exploration_find_the_best_policy(process: Any, tmp_path: Path) -> None:
    """The rewards between are the behaviour's: with the greedy one, and 5 % of chance, the best policy is found."""
    mdp = garnet(3, num_states=6, num_actions=3, num_successors=1, gamma=0.9)
    best = planning.policy_iteration(mdp)
    values = learned_values(process, tmp_path, mdp, n_step=3, exploration_last=0.05, total_steps=8_000)
    for of_run in values:
        greedy = exact.expected_return(mdp, of_run.argmax(-1))
        assert greedy == pytest.approx(mdp.start @ best.values, rel=0.02)


@pytest.mark.parametrize("num_heads", [1, 2])
def test_derivatives_by_heads_are_autograds(num_heads: int) -> None:
    torch.manual_seed(0)
    outputs = [torch.randn(2, 5, width, dtype=torch.float64, requires_grad=True) for width in (3, 1)[:num_heads]]
    values = outputs[0]
    if num_heads == 2:
        values = outputs[1] + outputs[0] - outputs[0].mean(-1, keepdim=True)
    np.testing.assert_allclose(action_values([output.detach().numpy() for output in outputs]), values.detach())
    weights = torch.randn_like(values)
    (values * weights).sum().backward()
    for output, derivative in zip(outputs, by_heads(weights.numpy(), num_heads), strict=True):
        np.testing.assert_allclose(derivative, output.grad, atol=1e-12)


def test_exploration_falls_along_a_line() -> None:
    settings = ControlSettings(
        **preset("dqn", "")
        | {
            "env": "x",
            "algorithm": "dqn",
            "total_steps": 1000,
            "learning_starts": 50,
            "exploration_share": 0.4,
            "exploration_last": 0.1,
            "exploration_first": 0.9,
        }
    )
    # Before learning begins all is chance; then from 0.9 at step 0 to 0.1 at step 400.
    assert [exploration(settings, step) for step in (0, 49, 100, 200, 400, 999)] == pytest.approx(
        [1.0, 1.0, 0.7, 0.5, 0.1, 0.1]
    )

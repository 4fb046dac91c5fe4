"""DQN against exact action values, and what its parts do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trueup.control.agent import Agent
from trueup.control.dqn import action_values
from trueup.control.presets import preset
from trueup.control.settings import ControlSettings
from trueup.control.train import train
from trueup.mdp import exact, planning
from trueup.mdp.generators import garnet


@pytest.mark.parametrize(
    "variant",
    [{}, {"double": False}, {"duelling": True}, {"n_step": 3}, {"prioritized": True}],
    ids=["double", "plain", "duelling", "three steps", "prioritised"],
)
def test_values_become_those_of_the_best_policy(process: Any, tmp_path: Path, variant: dict[str, Any]) -> None:
    """On a process of six states every Q(s, a) comes near Q*, whatever the variant. A small step at the end makes the
    rest of the noise small: 3 % of the values' spread."""
    mdp = garnet(3, num_states=6, num_actions=3, num_successors=1, gamma=0.9)
    truth = exact.values_of_actions(mdp, planning.policy_iteration(mdp).values)[~mdp.terminal]
    settings = ControlSettings(
        **preset("dqn", "")
        | {
            "env": "process",
            "algorithm": "dqn",
            "gamma": 0.9,
            "total_steps": 12_000,
            "seeds": (0, 1),
            "output": str(tmp_path / "run"),
            "hidden": (64,),
            "learning_rate": 3e-3,
            "lr_schedule": "linear",
            "learning_starts": 500,
            "train_every": 4,
            "updates_per_round": 2,
            "target_every": 100,
            "exploration_last": 1.0,  # every action goes on being tried: n-step targets are then the behaviour's
            "buffer_size": 10_000,
            "eval_episodes": 0,
            "quiet": True,
        }
        | variant
    )
    result = train(settings, make=process(mdp))
    network = Agent.load(result.agent_folder).network
    states = np.eye(mdp.num_states, dtype=np.float32)[~mdp.terminal]
    values = action_values(network.forward(np.stack([states] * 2)).outputs)
    error = np.sqrt(((values - truth) ** 2).mean((1, 2)))
    print(variant, error, truth.std())

"""Settings to begin with: for each algorithm, and for environments where others are known to be good."""

from __future__ import annotations

from typing import Any

ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "a2c": {
        "num_envs": 8,
        "rollout_steps": 5,
        "gae_lambda": 1.0,
        "num_epochs": 1,
        "minibatch_size": 0,
        "surrogate": "reinforce",
        "normalize_advantages": "none",
        "learning_rate": 7e-4,
        "optimizer": "rmsprop",
        "log_every": 20,
    },
    "reinforce": {
        "num_envs": 8,
        "rollout_steps": 1000,
        "gae_lambda": 1.0,
        "num_epochs": 1,
        "minibatch_size": 0,
        "surrogate": "reinforce",
        "normalize_advantages": "rollout",
        "learning_rate": 3e-3,
    },
    "dqn": {
        "learning_rate": 5e-4,
        "lr_schedule": "constant",
        "hidden": (128, 128),
        "activation": "relu",
        "minibatch_size": 128,
        "max_grad_norm": 10.0,
    },
}
"""By algorithm. A2C: Mnih et al. 2016 (arXiv 1602.01783), with the settings of OpenAI's baselines."""

MUJOCO = {
    "rollout_steps": 2048,
    "minibatch_size": 64,
    "num_epochs": 10,
    "normalize_observations": True,
    "normalize_rewards": True,
}
"""PPO on MuJoCo: Schulman et al. 2017 (arXiv 1707.06347), table 3, with the running normalisation of later versions."""

ENVIRONMENTS: dict[tuple[str, str], dict[str, Any]] = {
    ("ppo", "CartPole"): {
        "num_envs": 8,
        "rollout_steps": 32,
        "minibatch_size": 256,
        "num_epochs": 20,
        "gamma": 0.98,
        "gae_lambda": 0.8,
        "learning_rate": 1e-3,
        "total_steps": 100_000,
    },
    ("ppo", "LunarLander"): {
        "num_envs": 16,
        "rollout_steps": 1024,
        "minibatch_size": 64,
        "num_epochs": 8,
        "gamma": 0.999,
        "gae_lambda": 0.98,
        "entropy_coef": 0.01,
    },
    **{
        ("ppo", name): MUJOCO
        for name in (
            *("HalfCheetah", "Hopper", "InvertedDoublePendulum", "InvertedPendulum", "Reacher", "Swimmer"),
            *("Ant", "Humanoid", "HumanoidStandup", "Pusher"),
        )
    },
    # λ as Andrychowicz et al. 2021 advise (arXiv 2006.05990); HalfCheetah does better with the paper's 0.95.
    ("ppo", "Walker2d"): MUJOCO | {"gae_lambda": 0.9},
    ("dqn", "CartPole"): {
        "total_steps": 100_000,
        "learning_rate": 1e-3,
        "lr_schedule": "linear",
        "minibatch_size": 64,
        "n_step": 3,
        "exploration_last": 0.04,
        "exploration_share": 0.16,
    },
    ("dqn", "LunarLander"): {
        "total_steps": 300_000,
        "learning_rate": 5e-4,
        "lr_schedule": "linear",
        "minibatch_size": 64,
        "n_step": 3,
        "updates_per_round": 4,
        "buffer_size": 100_000,
        "exploration_share": 0.1,
    },
}
"""By algorithm and the environment's name without its version."""


def preset(algorithm: str, env: str) -> dict[str, Any]:
    """Field values of ``ControlSettings``; later ones win: the algorithm's, the environment's."""
    name = env.rpartition("/")[2].rpartition(":")[2].partition("-v")[0]
    settings = ALGORITHMS.get(algorithm, {}) | ENVIRONMENTS.get((algorithm, name), {})
    return settings | {"output": f"runs/{algorithm}-{name}"} if name else settings

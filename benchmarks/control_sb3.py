"""PPO by Stable-Baselines3 with CleanRL's settings: one run, its steps per second and returns as JSON on stdout.

    python benchmarks/control_sb3.py ENV TOTAL_STEPS SEED

Total steps are whole rollouts, and the learning rate of update i of n is lr·(1 − (i − 1)/n), as CleanRL has both;
SB3 reads its progress after the rollout, hence the shift.
"""

from __future__ import annotations

import json
import sys
import time

import gymnasium
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize


class Episodes(BaseCallback):
    """Keeps the returns of episodes."""

    def __init__(self) -> None:
        super().__init__()
        self.returns: list[float] = []

    def _on_step(self) -> bool:
        self.returns += [float(info["episode"]["r"]) for info in self.locals["infos"] if "episode" in info]
        return True


def main() -> None:
    env, total, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    discrete = isinstance(gymnasium.make(env).action_space, gymnasium.spaces.Discrete)
    num_envs, rollout, minibatch, epochs, entropy, rate = (
        (4, 128, 128, 4, 0.01, 2.5e-4) if discrete else (1, 2048, 64, 10, 0.0, 3e-4)
    )
    vector = DummyVecEnv([lambda: Monitor(gymnasium.make(env)) for _ in range(num_envs)])
    if not discrete:
        vector = VecNormalize(vector, clip_obs=10.0, clip_reward=10.0, gamma=0.99)
    total -= total % (num_envs * rollout)
    spread = {} if discrete else {"log_std_init": 0.0}
    model = PPO(
        "MlpPolicy",
        vector,
        learning_rate=lambda left: rate * min(1.0, left + num_envs * rollout / total),
        n_steps=rollout,
        batch_size=minibatch,
        n_epochs=epochs,
        gamma=0.99,
        gae_lambda=0.95,
        clip_range=0.2,
        clip_range_vf=0.2,
        ent_coef=entropy,
        vf_coef=0.5,
        max_grad_norm=0.5,
        policy_kwargs={
            "net_arch": {"pi": [64, 64], "vf": [64, 64]},
            "activation_fn": torch.nn.Tanh,
            "optimizer_kwargs": {"eps": 1e-5},
            **spread,
        },
        seed=seed,
        device="cpu",
    )
    episodes = Episodes()
    began = time.perf_counter()
    model.learn(total, callback=episodes)
    seconds = time.perf_counter() - began
    print(json.dumps({"steps_per_second": model.num_timesteps / seconds, "returns": episodes.returns}))


if __name__ == "__main__":
    main()

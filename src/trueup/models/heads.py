"""Reward models: a causal language model's trunk with a linear score head in place of its vocabulary.

The layout is ``AutoModelForSequenceClassification`` with one label, so a saved reward model is an ordinary checkpoint.
``transformers`` reads the score at the last token that is not the padding token. A model that pads with its end token
would thus be read one token too early wherever a sequence ends properly. So the two are kept apart here, in the config
and in the tokenizer, before anything is trained.
"""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trueup.errors import ModelError
from trueup.models.adapters import has_adapter, is_reward_model
from trueup.models.load import (
    DtypeName,
    LoadedModel,
    check_vocabulary,
    embedding_rows,
    load_model,
    loading_errors,
    model_source,
    read_tokenizer,
    read_weights,
    resolve_device,
    resolve_dtype,
    stored_architecture,
    train_padding_row,
)

SUGGESTED = "Llama, Qwen, Mistral, Gemma, OLMo, SmolLM and GPT-2 can be reward models"


def load_reward_model(
    name: str | Path | LoadedModel,
    *,
    dtype: DtypeName = "auto",
    device: str = "auto",
    seed: int = 0,
    scores_each: Literal["completion", "step"] = "completion",
) -> LoadedModel:
    """A saved reward model as it is, or a new one on the trunk of a causal language model.

    ``name``: what ``load_model`` takes, or a model that is loaded already and keeps its precision and device (of a
    causal language model the weights are copied). A new head is drawn as ``new_score_head`` says. Padding and end token
    are kept apart (see ``separate_padding``). ``scores_each``: what the head is to judge; a saved model's config says
    what its head was trained to judge, if it was trained here.

    Raises ``ModelError`` as ``load_model`` does, for more than one label, and for a model that judges the other.
    """
    loaded = _saved_or_new(name, dtype=dtype, device=device, seed=seed)
    trained = getattr(loaded.model.config, "scores_each", None)
    if trained not in (None, scores_each):
        raise ModelError(
            f"is a reward model that scores each {trained}, not each {scores_each}",
            where=loaded.name,
            way_out="trueup reward --process goes on with models that score steps, all else takes the others",
        )
    loaded.model.config.scores_each = scores_each  # pyright: ignore[reportAttributeAccessIssue]
    return loaded


def _saved_or_new(name: str | Path | LoadedModel, *, dtype: DtypeName, device: str, seed: int) -> LoadedModel:
    if isinstance(name, LoadedModel):
        return checked_reward_model(name) if is_reward_model(name.model) else reward_model_on(name, seed=seed)
    target = resolve_device(device)
    source = model_source(name)
    architecture = stored_architecture(source) or ""
    if not architecture.endswith("ForSequenceClassification"):
        return reward_model_on(load_model(name, dtype=dtype, device=device), seed=seed, copy_trunk=False)
    model = read_weights(AutoModelForSequenceClassification, source, name, dtype=resolve_dtype(dtype, target))
    return checked_reward_model(LoadedModel(model.to(target), read_tokenizer(source, name), str(name)))


def checked_reward_model(loaded: LoadedModel) -> LoadedModel:
    """A reward model that exists already, with its padding set apart from its end token. Raises ``ModelError``."""
    model, tokenizer = loaded.model, loaded.tokenizer
    if model.config.num_labels != 1:
        raise ModelError(
            f"gives {model.config.num_labels} scores per sequence",
            where=loaded.name,
            way_out="a reward model has one label: start from the causal language model instead",
        )
    check_vocabulary(model, tokenizer, loaded.name)
    before = padding_token_id(model)
    separate_padding(model, tokenizer)
    if padding_token_id(model) != before:
        warnings.warn(
            f"{loaded.name}: its padding token was an end token or missing; it pads with {tokenizer.pad_token!r} now, "
            "so that scores are read at the end token",
            stacklevel=4,
        )
    return LoadedModel(train_padding_row(model).eval(), tokenizer, loaded.name)


def reward_model_on(loaded: LoadedModel, *, seed: int = 0, copy_trunk: bool = True) -> LoadedModel:
    """A new reward model on the trunk of a causal language model, on the same device and in the same precision.

    ``copy_trunk=False`` takes the trunk over instead of copying it. Raises ``ModelError`` if ``transformers`` has no
    sequence-classification layout for the architecture, or a different trunk in it.
    """
    causal = loaded.model
    config = copy.deepcopy(causal.config)
    config.num_labels = 1
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(
            f"transformers has no sequence classification for {config.model_type}, so there is no layout to save it in",
            where=loaded.name,
            way_out=f"take another architecture; {SUGGESTED}",
        )
    with loading_errors(loaded.name), torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, dtype=causal.dtype, trust_remote_code=False)
    trunk = causal.base_model
    if type(model.base_model) is not type(trunk) or not isinstance(getattr(model, "score", None), nn.Linear):
        raise ModelError(
            f"{type(model).__name__} is not {type(trunk).__name__} with a score head on top",
            where=loaded.name,
            way_out=f"take a text-only decoder; {SUGGESTED}",
        )
    if has_adapter(trunk):
        raise ModelError(
            "its trunk carries an adapter", where=loaded.name, way_out="merge it first with merge_and_save, then load"
        )
    trunk = (copy.deepcopy(trunk) if copy_trunk else trunk).requires_grad_(True)
    setattr(model, model.base_model_prefix, trunk)
    # One config object for the whole model, as `from_pretrained` has it: layers read their attention from the trunk's.
    model.config = config = trunk.config  # pyright: ignore[reportAttributeAccessIssue]
    config.update({"num_labels": 1, "architectures": [type(model).__name__]})  # pyright: ignore
    weight = next(trunk.parameters())
    model.score = new_score_head(model.score, weight.device, weight.dtype, seed)
    tokenizer = copy.deepcopy(loaded.tokenizer)
    separate_padding(model, tokenizer, ends=end_token_ids(causal, tokenizer))
    return LoadedModel(train_padding_row(model).eval(), tokenizer, loaded.name)


def new_score_head(like: nn.Linear, device: torch.device, dtype: torch.dtype, seed: int) -> nn.Linear:
    """A head with weights from N(0, 1/(D+1)), D = hidden size, and no bias (zero where the layout has one).

    Drawn in float32 on the CPU from ``seed`` alone, so the same on every device.
    Source: Stiennon et al. 2020 (arXiv 2009.01325), appendix on reward-model training.
    """
    head = nn.Linear(like.in_features, 1, bias=like.bias is not None, device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(head.weight, std=1.0 / math.sqrt(like.in_features + 1), generator=generator)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    return head.to(device=device, dtype=dtype)


def separate_padding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, ends: set[int] | None = None
) -> None:
    """Give ``model`` and ``tokenizer`` one padding token that ends no sequence, in place.

    A padding token that is none of the end tokens stays. Otherwise an existing special token takes its place (see
    ``spare_token``); if there is none, ``<|pad|>`` is added, which adds a row to the embedding only where the model has
    no unused one.
    """
    ends = end_token_ids(model, tokenizer) if ends is None else ends
    current = [padding_token_id(model), tokenizer.pad_token_id]
    kept = next((index for index in current if index is not None and index >= 0 and index not in ends), None)
    if kept is not None:
        token = tokenizer.convert_ids_to_tokens(kept)
    else:
        token = spare_token(tokenizer, ends) or "<|pad|>"
    tokenizer.add_special_tokens({"pad_token": token})
    if len(tokenizer) > embedding_rows(model):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id


def spare_token(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> str | None:
    """An existing special token fit for padding: one that ends nothing, begins nothing and is not in the chat template.

    Names that say so come first (``<|finetune_right_pad_id|>``), then unknown-word, end-of-text and reserved tokens.
    """
    template = str(tokenizer.chat_template or "")
    vocabulary = tokenizer.get_vocab()
    specials = [entry.content for entry in tokenizer.added_tokens_decoder.values() if entry.special]
    fit = [
        token
        for token in dict.fromkeys(specials + list(tokenizer.all_special_tokens))
        if vocabulary[token] not in ends and token not in template and token != tokenizer.bos_token
    ]
    for word in ("pad", "unk", "endoftext", "end_of_text", "reserved"):
        for token in fit:
            if word in token.lower():
                return token
    return None


def padding_token_id(model: PreTrainedModel) -> int | None:
    """What ``transformers`` takes for padding when it looks for the last token."""
    return model.config.get_text_config().pad_token_id


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends a completion: the tokenizer's, the config's and the generation config's."""
    generation = getattr(model, "generation_config", None)
    named: list[Any] = [
        tokenizer.eos_token_id,
        model.config.get_text_config().eos_token_id,
        getattr(generation, "eos_token_id", None),
    ]
    flat = [index for entry in named for index in (entry if isinstance(entry, list | tuple) else [entry])]
    return {int(index) for index in flat if index is not None}

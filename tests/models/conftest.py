"""Tiny random models of many architectures, with weights large enough that a mistake shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from trueup.models.tree import TreeBatch
from trueup.records import Completion, CompletionGroup

VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
WINDOW = 5

EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen3": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral": {"sliding_window": WINDOW},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": 5.0,
    },
    "gemma2": {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
    },
    "phi3": {"sliding_window": WINDOW},
    "olmo2": {},
    "smollm3": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "no_rope_layers": [1, 0],
    },
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48},
    "granite": {
        "logits_scaling": 2.5,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 1.5,
        "attention_multiplier": 0.4,
    },
    "cohere": {"logit_scale": 0.4},
    "starcoder2": {"sliding_window": WINDOW, "use_bias": True},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 24},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1},
    "phi": {"partial_rotary_factor": 0.5},
    "gpt_oss": {
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "qwen3_next": {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "falcon_h1": {"head_dim": 8, "mamba_d_ssm": 64, "lm_head_multiplier": 0.6, **MAMBA},
    "bamba": {"attn_layer_indices": [1], "mamba_expand": 2, **MAMBA},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48, "rotary_dim": 4},
}


def enlarge(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw matrices anew and wide, shift vectors (norms, biases, sinks) by much: nothing stays close to 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.25 * noise if parameter.ndim > 1 else parameter + 0.25 * noise)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``tiny_model("qwen2")``: a random causal LM of two layers; with ``num_labels=1`` the reward model of that kind.

    ``fresh`` leaves the weights as they are initialised; further keywords go to the config.
    """

    def make(
        family: str, *, num_labels: int | None = None, seed: int = 0, fresh: bool = False, **changes: Any
    ) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **(SIZES | EXTRA[family] | changes))
        if num_labels is None:
            model = AutoModelForCausalLM.from_config(config)
        else:
            config.num_labels = num_labels
            model = AutoModelForSequenceClassification.from_config(config)
        if not fresh:
            enlarge(model, seed)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_groups() -> Callable[..., list[CompletionGroup]]:
    """``make_groups([(6, (5, 3)), …])``: groups of random tokens with these lengths of prompt and completions."""

    def make(shapes: list[tuple[int, tuple[int, ...]]], *, seed: int = 0, vocab: int = VOCAB) -> list[CompletionGroup]:
        rng = np.random.default_rng(seed)

        def draw(length: int) -> np.ndarray:
            return rng.integers(3, vocab, length)

        return [
            CompletionGroup(prompt=draw(prompt), completions=tuple(Completion(tokens=draw(n)) for n in lengths))
            for prompt, lengths in shapes
        ]

    return make


@pytest.fixture(scope="session")
def plain_logprobs() -> Callable[[Any, TreeBatch], torch.Tensor]:
    """The truth, [S]: each completion alone behind its prompt through the model's own forward pass, eager attention."""

    def score(model: Any, batch: TreeBatch) -> torch.Tensor:
        config = (model.get_base_model() if hasattr(model, "get_base_model") else model).config
        implementation, config._attn_implementation = config._attn_implementation, "eager"
        rows, logprobs = batch.padded(), []
        for tokens, real, length in zip(rows.tokens, rows.attention_mask.sum(-1), batch.lengths, strict=True):
            logits = model(input_ids=tokens[None, :real], use_cache=False).logits[0].float()
            every = logits[:-1].log_softmax(-1).gather(-1, tokens[1:real, None])[:, 0]
            logprobs.append(every[-length:])
        config._attn_implementation = implementation
        return torch.cat(logprobs)

    return score

"""On TRL's inputs our losses are TRL's: ``trl_values.json`` holds what TRL 1.16 computed (``trl_values.py``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from trueup.models.noise import embedding_noise
from trueup.models.tree import tree_batch
from trueup.objectives import preference as p
from trueup.objectives.logprobs import label_smoothed_nll, linear_logprobs, sequence_logprobs
from trueup.objectives.pointwise import apo_zero, bco, kto, kto_kl, nca, sppo
from trueup.objectives.reduce import token_mean
from trueup.objectives.reference_free import cpo, odds_ratio_loss, simpo
from trueup.records import Completion, CompletionGroup

VALUES = json.loads(Path(__file__).with_name("trl_values.json").read_text(encoding="utf-8"))
BETA = 0.7


def table(name: str) -> Tensor:
    return torch.tensor(VALUES[name], dtype=torch.float64)


TOKENS, REF_TOKENS = table("token_logprobs"), table("ref_token_logprobs")
LENGTHS = torch.tensor(VALUES["lengths"])
MASK = torch.arange(TOKENS.shape[1]) < LENGTHS[:, None]
LOGPROBS = sequence_logprobs(TOKENS, MASK)
LOG_RATIOS = LOGPROBS - sequence_logprobs(REF_TOKENS, MASK)
SUMS, PER_TOKEN = LOG_RATIOS.chunk(2), (LOG_RATIOS / LENGTHS).chunk(2)
CHOSEN_LENGTHS, REJECTED_LENGTHS = LENGTHS.chunk(2)
BOTH_LENGTHS = {"chosen_lengths": CHOSEN_LENGTHS, "rejected_lengths": REJECTED_LENGTHS}
DESIRABLE = torch.tensor(VALUES["desirable"])
TRUE, ZERO = torch.ones(4, dtype=torch.bool), torch.zeros((), dtype=torch.float64)


def weighted_dpo() -> Tensor:
    weights = p.wpo_weights(TOKENS, MASK, table("log_collisions")).chunk(2)
    return weights[0] * weights[1] * p.dpo(*SUMS, beta=BETA)


def length_desensitized_dpo() -> Tensor:
    shared = torch.minimum(CHOSEN_LENGTHS, REJECTED_LENGTHS).repeat(2)
    policy, reference = (
        p.length_desensitized_logprobs(tokens, MASK, shared, alpha=0.4) for tokens in (TOKENS, REF_TOKENS)
    )
    return p.dpo(*(policy - reference).chunk(2), beta=BETA)


def f_dpo(divergence: p.Divergence, alpha: float = 0.5) -> Tensor:
    return p.dpo(*p.divergence_rewards(LOG_RATIOS, divergence, alpha=alpha).chunk(2), beta=BETA)


def paired_aot() -> Tensor:
    margins, ref_margins = (x[:4] - x[4:] for x in (LOGPROBS, LOGPROBS - LOG_RATIOS))
    return p.aot(margins, p.match_ranks(margins, ref_margins), beta=BETA, label_smoothing=0.2).mean()


def unpaired_aot() -> Tensor:
    chosen, rejected = SUMS
    return p.aot(chosen, p.match_ranks(chosen, rejected), beta=BETA, label_smoothing=0.2).mean()


def reference_point() -> Tensor:
    kl = kto_kl(
        sequence_logprobs(table("mismatched_token_logprobs"), MASK)
        - sequence_logprobs(table("ref_mismatched_token_logprobs"), MASK)
    )
    assert kl > 0  # so that the test sees it
    return kl


def unpaired_kto(kl: Tensor) -> Tensor:
    return kto(LOG_RATIOS, DESIRABLE, kl=kl, beta=BETA, desirable_weight=1.2, undesirable_weight=0.8).mean()


def both_sides(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return loss(SUMS[0], TRUE) + loss(SUMS[1], ~TRUE)


OURS: dict[str, Callable[[], Tensor]] = {
    "sigmoid": lambda: p.dpo(*SUMS, beta=BETA),
    "sigmoid_norm": lambda: p.dpo(*PER_TOKEN, beta=BETA),
    "hinge": lambda: p.hinge(*SUMS, beta=BETA),
    "ipo": lambda: p.ipo(*PER_TOKEN, beta=BETA),
    "robust": lambda: p.robust_dpo(*SUMS, beta=BETA, label_smoothing=0.2),
    "exo_pair": lambda: p.exo(*SUMS, beta=BETA, label_smoothing=0.2),
    "nca_pair": lambda: both_sides(lambda u, good: nca(u, good, beta=BETA)),
    "bco_pair": lambda: both_sides(lambda u, good: bco(u, good, beta=BETA, shift=ZERO)),
    "sppo_hard": lambda: both_sides(lambda u, good: sppo(u, good.to(u.dtype), beta=BETA)),
    "aot": paired_aot,
    "aot_unpaired": unpaired_aot,
    "apo_zero": lambda: both_sides(lambda u, good: apo_zero(u, good, beta=BETA)),
    "apo_down": lambda: p.apo_down(*SUMS, beta=BETA),
    "discopop": lambda: p.discopop(*SUMS, beta=BETA),
    "sigmoid + 0.3 sft": lambda: p.rpo(*SUMS, (LOGPROBS / LENGTHS)[:4], beta=BETA, alpha=0.3),
    "0.8 sigmoid + 0.2 hinge": lambda: 0.8 * p.dpo(*SUMS, beta=BETA) + 0.2 * p.hinge(*SUMS, beta=BETA),
    "sigmoid, ld_alpha 0.4": length_desensitized_dpo,
    "sigmoid, use_weighting": weighted_dpo,
    "sigmoid, forward_kl": lambda: f_dpo("forward_kl"),
    "sigmoid, js_divergence": lambda: f_dpo("jensen_shannon"),
    "sigmoid, alpha_divergence 0.3": lambda: f_dpo("alpha", alpha=1 - 0.3),
    "kto": lambda: unpaired_kto(reference_point()),
    "apo_zero_unpaired": lambda: unpaired_kto(ZERO),
    "cpo": lambda: cpo(*LOGPROBS.chunk(2), beta=BETA, label_smoothing=0.2, nll_coef=0.0, chosen_lengths=CHOSEN_LENGTHS),
    "simpo": lambda: simpo(*LOGPROBS.chunk(2), beta=BETA, margin=0.5, **BOTH_LENGTHS),
    "orpo": lambda: 0.4 * odds_ratio_loss(*LOGPROBS.chunk(2), **BOTH_LENGTHS),
}
FLOAT32 = {"exo_pair", "sigmoid, alpha_divergence 0.3", "orpo"}
"""TRL makes ε float32, takes float32 only, makes the log-probs float32."""


@pytest.mark.parametrize("name", VALUES["losses"])
def test_our_loss_is_that_of_trl(name: str) -> None:
    theirs = torch.tensor(VALUES["losses"][name], dtype=torch.float64)
    torch.testing.assert_close(OURS[name]().reshape(-1), theirs, rtol=1e-5 if name in FLOAT32 else 1e-12, atol=0)


# --- supervised fine-tuning: a model that knows a place by its token and its number, six rows of several lengths


class Trained(NamedTuple):
    """What of a row is trained, where it is cut, and how its labels are smoothed."""

    mask: Callable[[dict[str, list[int]]], list[int]]
    max_length: int | None = None
    label_smoothing: float = 0.0


def whole_completion(row: dict[str, list[int]]) -> list[int]:
    return row["completion_mask"]


def own_turns(row: dict[str, list[int]]) -> list[int]:
    return row["assistant_masks"]


def all_tokens(row: dict[str, list[int]]) -> list[int]:
    return [1] * len(row["input_ids"])


SFT = {
    "completion": Trained(whole_completion),
    "all tokens": Trained(all_tokens),
    "own turns": Trained(own_turns),
    "own turns of the completion": Trained(own_turns),
    "completion, at most 6 tokens": Trained(whole_completion, max_length=6),
    "completion, label smoothing 0.1": Trained(whole_completion, label_smoothing=0.1),
    "all tokens, label smoothing 0.3": Trained(all_tokens, label_smoothing=0.3),
}


def sft_terms(indices: Sequence[int], trained: Trained, head: Tensor) -> tuple[Tensor, Tensor]:
    """−log p of every token but the first (smoothed) of these rows, one after the other, and which are trained."""
    rows = [VALUES["rows"][index] for index in indices]
    tokens = [torch.tensor(row["input_ids"][: trained.max_length]) for row in rows]
    masks = [torch.tensor(trained.mask(row)[: trained.max_length]) for row in rows]
    hidden = torch.cat([(table("embeddings")[each] + table("positions")[: len(each)])[:-1] for each in tokens])
    targets = torch.cat([each[1:] for each in tokens])
    scores = linear_logprobs(hidden, head, targets, want=["vocab_mean_logprobs"])
    assert scores.vocab_mean_logprobs is not None
    terms = label_smoothed_nll(scores.logprobs, scores.vocab_mean_logprobs, label_smoothing=trained.label_smoothing)
    return terms, torch.cat([each[1:] for each in masks]).bool()


def test_every_case_of_sft_is_held() -> None:
    assert list(SFT) == list(VALUES["sft"])


@pytest.mark.parametrize("name", SFT)
@pytest.mark.parametrize("cut", ["one batch", "micro-batches"])
def test_our_sft_loss_and_gradient_are_those_of_trl(name: str, cut: str) -> None:
    """TRL's fused head computes in float32. Its micro-batches are divided by the trained tokens of the whole step."""
    trained, (theirs, gradient) = SFT[name], VALUES["sft"][name][cut]
    head = table("head").requires_grad_()
    rows = range(len(VALUES["rows"]))
    num_tokens = sft_terms(rows, trained, head)[1].sum()
    parts = [rows] if cut == "one batch" else VALUES["micro_batches"]
    loss = torch.stack([token_mean(*sft_terms(part, trained, head), denominator=num_tokens) for part in parts]).sum()
    assert loss.item() == pytest.approx(theirs, rel=1e-6)
    (ours,) = torch.autograd.grad(loss, head)
    torch.testing.assert_close(ours, torch.tensor(gradient, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SFT)
def test_our_sft_loss_of_a_row_is_that_of_trl(name: str) -> None:
    losses = [token_mean(*sft_terms([index], SFT[name], table("head"))) for index in range(len(VALUES["rows"]))]
    assert [loss.item() for loss in losses] == pytest.approx(VALUES["sft"][name]["rows"], rel=1e-6)


def test_neftune_s_noise_is_that_of_trl_on_a_row_alone() -> None:
    """The same random numbers, scaled by α/√(L·D). (In a padded batch TRL's L is that of the longest row.)"""
    group = CompletionGroup(prompt=np.arange(3), completions=(Completion(tokens=np.arange(4)),))
    torch.manual_seed(0)
    torch.testing.assert_close(embedding_noise(tree_batch([group]), 4, 5.0), torch.tensor(VALUES["neftune"]))


# --- the reward model

REWARD: dict[str, dict[str, Any]] = {
    "plain": {},
    "margin": {"margin": table("margins")},
    "centred 0.01": {"centering_coef": 0.01},
    "margin, centred 0.3": {"margin": table("margins"), "centering_coef": 0.3},
}


def test_every_case_of_the_reward_model_is_held() -> None:
    assert list(REWARD) == list(VALUES["reward"])


@pytest.mark.parametrize("name", REWARD)
def test_our_reward_model_loss_is_that_of_trl(name: str) -> None:
    scores = table("scores").requires_grad_()
    losses = p.reward_model_loss(torch.stack(scores.chunk(2), -1), **REWARD[name])
    each, mean, gradient = VALUES["reward"][name]
    assert losses.tolist() == pytest.approx(each, rel=1e-12)
    assert losses.mean().item() == pytest.approx(mean, rel=1e-12)
    (ours,) = torch.autograd.grad(losses.mean(), scores)
    torch.testing.assert_close(ours, torch.tensor(gradient, dtype=torch.float64), rtol=1e-12, atol=1e-15)

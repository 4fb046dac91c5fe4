"""The table of preference losses, trained for real: alone, together, on pairs and on unpaired data."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trueup import preference
from trueup.errors import DataError, SettingsError
from trueup.models.tree import tree_batch
from trueup.objectives.logprobs import TokenStatistics
from trueup.records import Completion, CompletionGroup
from trueup.runs.folder import read_metrics
from trueup.trainers.losses import LOSSES, STATISTICS, compare, joined
from trueup.trainers.preference import mismatched, partners_within
from trueup.trainers.settings import POINTWISE, PreferenceLoss, PreferenceSettings

ALL = typing.get_args(PreferenceLoss)
NEEDED: dict[str, dict[str, Any]] = {
    "exo": {"label_smoothing": 0.01},
    "nca": {"beta": 1.0},
    "discopop": {"discopop_tau": 1.0},  # with the paper's 0.05 the loss rises from a margin of 0 at first
}


def train(model: str, data: Any, output: Path | str, **settings: Any) -> list[dict[str, Any]]:
    defaults = {"quiet": True, "batch_size": 8, "learning_rate": 1e-2, "num_samples": 0}
    preference(model=model, data=data, output=str(output), **(defaults | settings))
    return read_metrics(Path(output) / "metrics.jsonl")


def unpaired(pairs: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs
        for side in ("chosen", "rejected")
    ]


def numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in {"step_seconds", "tokens_per_second"}}


def test_the_table_of_losses_is_the_setting():
    assert set(LOSSES) == set(ALL)
    assert set(STATISTICS) < set(ALL)


@pytest.mark.parametrize("loss", ALL)
def test_every_loss_learns_its_pairs(loss: str, tiny_model: str, pairs: list, output: str):
    lines = train(tiny_model, pairs, output, loss=loss, eval_data=pairs, num_epochs=4, **NEEDED.get(loss, {}))
    first, last = (line for line in lines if "eval_loss" in line)
    assert last["eval_loss"] < first["eval_loss"]
    if loss != "nll":
        assert last["eval_logps/chosen"] - last["eval_logps/rejected"] > (
            first["eval_logps/chosen"] - first["eval_logps/rejected"]
        )


VARIANTS: dict[str, dict[str, Any]] = {
    **{loss: {"loss": loss, **NEEDED.get(loss, {})} for loss in ("dpo", "rpo", "plackett_luce", *STATISTICS)},
    "several": {"loss": ("dpo", "bco", "nll"), "loss_weights": (0.8, 0.2, 1.0)},
    "divergence": {"divergence": "alpha", "divergence_alpha": 0.3},
    "by length": {"normalize_lengths": True, "beta": 2.0},
    "length alpha": {"length_alpha": 0.4},
    "weighted": {"weight_by_policy": True},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_micro_batches_change_nothing(settings: dict[str, Any], tiny_model: str, pairs: list, tmp_path: Path):
    """What couples a batch is computed over the whole step, however it is cut."""
    shared = {"eval_data": pairs[:7], "dtype": "float32"}  # bfloat16 rounds a batch of another shape otherwise
    runs = [
        train(tiny_model, pairs, tmp_path / str(tokens), tokens_per_batch=tokens, **shared, **settings)
        for tokens in (16, 10_000)
    ]
    for small, big in zip(*runs, strict=True):
        assert numbers(small) == pytest.approx(numbers(big), rel=3e-4, abs=3e-5)


@pytest.mark.parametrize("loss", POINTWISE)
def test_unpaired_data_teaches_what_is_desirable(loss: str, tiny_model: str, pairs: list, output: str):
    rows = unpaired(pairs)
    lines = train(tiny_model, rows, output, loss=loss, eval_data=rows, num_epochs=6, **NEEDED.get(loss, {}))
    first, last = (line for line in lines if "eval_loss" in line)
    assert first["eval_rewards/chosen"] == pytest.approx(first["eval_rewards/rejected"], abs=1e-5)
    assert last["eval_rewards/chosen"] > last["eval_rewards/rejected"] + 0.01
    assert "eval_rewards/accuracies" not in last  # nothing is compared
    if loss == "kto":
        assert first["eval_kl"] == pytest.approx(0, abs=1e-5)
        assert last["eval_kl"] >= 0


def test_a_pair_is_two_labelled_completions(tiny_model: str, pairs: list, tmp_path: Path):
    """The mean over pairs of the sum of both sides is twice the mean over completions."""
    both = {"num_epochs": 1, "max_steps": 1, "loss": "apo_zero", "dtype": "float32"}
    (paired,) = train(tiny_model, pairs[:8], tmp_path / "pairs", **both)
    (single,) = train(tiny_model, unpaired(pairs[:8]), tmp_path / "single", batch_size=16, **(both))
    assert paired["loss"] == pytest.approx(2 * single["loss"], rel=1e-5)
    assert paired["grad_norm"] == pytest.approx(2 * single["grad_norm"], rel=1e-4)


def test_weights_of_losses_add_up(tiny_model: str, pairs: list, tmp_path: Path):
    def first_step(name: str, **settings: Any) -> float:
        return train(tiny_model, pairs[:8], tmp_path / name, max_steps=1, num_epochs=1, **settings)[0]["loss"]

    parts = [first_step(loss, loss=loss) for loss in ("dpo", "ipo", "nll")]
    together = first_step("together", loss=("dpo", "ipo", "nll"), loss_weights=(0.5, 2.0, 0.1))
    assert together == pytest.approx(0.5 * parts[0] + 2 * parts[1] + 0.1 * parts[2], rel=1e-5)
    rpo = first_step("rpo", loss="rpo", alpha=0.3)
    assert rpo == pytest.approx(parts[0] + 0.3 * parts[2], rel=1e-5)


def test_pairs_are_asked_for_where_pairs_are_compared(tiny_model: str, pairs: list, output: str):
    with pytest.raises(DataError, match=r"nothing to compare it with(.|\n)*kto"):
        train(tiny_model, unpaired(pairs), output)
    ranked = [{"prompt": "1+1=", "completions": ["2", "3", "4"]}] * 4
    with pytest.raises(SettingsError, match="more than two completions"):
        train(tiny_model, ranked, output + "2", loss="kto")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": ()}, "needs one loss or more"),
        ({"loss": ("dpo", "dpo")}, "each once"),
        ({"loss": ("dpo", "ipo"), "loss_weights": (1.0,)}, "1 weights for 2 losses"),
        ({"loss": ("plackett_luce", "dpo")}, "stands alone"),
        ({"loss": ("exo",)}, "above 0"),
        ({"divergence": "alpha", "divergence_alpha": 1.0}, "below 1"),
        ({"length_alpha": 1.5}, "at most 1"),
    ],
)
def test_losses_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(SettingsError, match=message):
        PreferenceSettings(**settings)


# --- what a step is compared by


def group(prompt: int, *lengths: int, **labels: Any) -> CompletionGroup:
    def tokens(start: int, length: int) -> np.ndarray:
        return np.arange(start, start + length, dtype=np.int64)

    return CompletionGroup(
        prompt=tokens(0, prompt), completions=tuple(Completion(tokens=tokens(9, n)) for n in lengths), **labels
    )


def laid_out(groups: list[CompletionGroup], settings: PreferenceSettings, **statistics: Any):
    batch = tree_batch(groups)
    policy = -0.1 * torch.arange(1, len(batch.targets) + 1, dtype=torch.float32)
    return compare(groups, batch, TokenStatistics(policy, **statistics), 0.5 * policy, settings, {})


def test_rows_of_pairs_and_labels():
    groups = [group(2, 1, 2), group(1, 1, desirable=(False,)), group(1, 2, desirable=(True,))]
    x = laid_out(groups, PreferenceSettings())
    assert x.logprobs == pytest.approx(torch.tensor([[-0.1, -0.5], [-0.4, 0], [-1.1, 0]]))
    assert x.log_ratios == pytest.approx(x.logprobs / 2)
    assert x.lengths.tolist() == [[1, 2], [1, 0], [2, 0]]
    assert x.desirable.tolist() == [[True, False], [False, False], [True, False]]
    assert x.ranked.tolist() == [True, False, False]
    by_length = laid_out(groups, PreferenceSettings(normalize_lengths=True))
    assert by_length.log_ratios == pytest.approx(torch.tensor([[-0.05, -0.125], [-0.2, 0], [-0.275, 0]]))
    # LD-DPO: the second token of the rejected completion counts half; the policy's sums in the metrics are whole
    desensitized = laid_out(groups[:1], PreferenceSettings(length_alpha=0.5))
    assert desensitized.log_ratios == pytest.approx(torch.tensor([[-0.05, -0.175]]))
    assert desensitized.logprobs == pytest.approx(x.logprobs[:1])


def test_a_pair_s_weight_is_the_product_of_its_sides():
    collision = torch.zeros(3)
    x = laid_out([group(2, 1, 2)], PreferenceSettings(weight_by_policy=True), log_collision=collision)
    assert x.weights == pytest.approx(torch.tensor([-0.1 - 0.25]).exp())


def test_micro_batches_are_joined_in_the_order_of_the_step():
    settings = PreferenceSettings()
    parts = [laid_out([group(1, 1, 2, 3)], settings), laid_out([group(1, 4, 1), group(2, 2, 2)], settings)]
    whole = joined(parts, order=[1, 2, 0])
    assert whole.lengths.tolist() == [[2, 2, 0], [1, 2, 3], [4, 1, 0]]
    assert whole.mask.tolist() == [[True, True, False], [True, True, True], [True, True, False]]
    assert whole.weights.tolist() == [1, 1, 1]


def test_mismatched_completions_are_those_of_the_next_prompt():
    groups = [group(3, 2), group(1, 5, 1), group(2, 4)]
    other = mismatched(groups, max_length=6)
    assert [len(each.prompt) for each in other] == [3, 1, 2]
    assert [[len(c.tokens) for c in each.completions] for each in other] == [[3, 1], [4], [2]]
    assert mismatched(groups[:1], max_length=6) == []
    partners = partners_within([groups, groups[:1]], max_length=6)
    assert [len(each.completions) for each in partners([groups[2], groups[0]])] == [1, 2]

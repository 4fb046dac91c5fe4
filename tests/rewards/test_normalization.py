"""Scores of mean 0 on given completions: exact, kept by save and load, and the weights as they were."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trueup.errors import DataError, ModelError
from trueup.models.adapters import add_lora, load_adapter, merge_and_save, save_adapter
from trueup.models.heads import load_reward_model
from trueup.models.score_scale import ScoreScale
from trueup.rewards.normalization import normalized_on, read_groups, save_scaled
from trueup.rewards.reward_model import RewardModel

ANSWERS = ["4", "it is four", "5"]


@pytest.mark.parametrize("scale", [False, True])
def test_mean_and_spread_on_the_given_completions(reward_models, pairs, scale):
    model = RewardModel.load(reward_models[0], dtype="float32")
    groups, report = read_groups(model, pairs)
    assert report.num_kept == len(groups) == len(pairs)
    raw = np.concatenate(model.score_groups(groups))
    shifted = normalized_on(model, groups, scale=scale)
    found = np.concatenate(shifted.score_groups(groups))
    assert abs(raw.mean()) > 1e-3
    assert found.mean() == pytest.approx(0, abs=1e-9)
    assert found.std() == pytest.approx(1 if scale else raw.std(), rel=1e-6)
    assert found * shifted.scale.score_std == pytest.approx(raw - raw.mean(), abs=1e-6)
    again = normalized_on(shifted, groups, scale=scale)
    assert again.scale.fields() == pytest.approx(shifted.scale.fields(), abs=1e-9)
    back = normalized_on(again, groups[:3], scale=scale)
    assert np.concatenate(back.score_groups(groups[:3])).mean() == pytest.approx(0, abs=1e-9)


def test_demonstrations_will_do(reward_models, pairs):
    model = RewardModel.load(reward_models[0], dtype="float32")
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    groups, _ = read_groups(model, rows, limit=5)
    assert [len(group.completions) for group in groups] == [1] * 5
    shifted = normalized_on(model, groups)
    scores = [shifted.score(row["prompt"], [row["completion"]])[0] for row in rows[:5]]
    assert np.mean(scores) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_it_survives_save_and_load(reward_models, tmp_path, lora):
    source = reward_models[2]
    if lora:
        loaded = load_reward_model(source, dtype="float32")
        add_lora(loaded.model, rank=2)
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
                    parameter.add_(noise, alpha=0.2)
        merge_and_save(loaded.model, tmp_path / "merged")
        loaded.tokenizer.save_pretrained(tmp_path / "merged")
        source = str(tmp_path / "merged")
    scale = ScoreScale(score_mean=-1.7, score_std=0.3)
    folder = save_scaled(source, tmp_path / "deep" / "scaled", scale)

    before = RewardModel.load(source, dtype="float32").score("2+2=", ANSWERS)
    after = RewardModel.load(folder, dtype="float32")
    assert after.scale == scale
    assert after.score("2+2=", ANSWERS) == pytest.approx((before + 1.7) / 0.3, abs=1e-5)

    # the same by hand from plain transformers, as the docs say
    plain, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = [*tokenizer("2+2=4", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logit = plain(torch.tensor([tokens])).logits.item()
    assert (logit - plain.config.score_mean) / plain.config.score_std == pytest.approx(
        after.score("2+2=", ["4"])[0], abs=1e-4
    )

    for path in Path(source).iterdir():
        if path.name != "config.json":
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    configs = [json.loads((Path(each) / "config.json").read_text()) for each in (source, folder)]
    assert configs[1] == configs[0] | scale.fields()

    # and a training run that goes on from it keeps it
    loaded = load_reward_model(folder)
    merge_and_save(loaded.model, tmp_path / "again")
    loaded.tokenizer.save_pretrained(tmp_path / "again")
    assert RewardModel.load(tmp_path / "again").scale == scale


def test_an_adapter_alone_brings_its_scale(reward_models, tmp_path):
    scale = ScoreScale(score_mean=0.1, score_std=2.5)
    tuned = load_reward_model(save_scaled(reward_models[0], tmp_path / "scaled", scale), dtype="float32")
    save_adapter(add_lora(tuned.model, rank=2), tmp_path / "adapter")
    base = load_reward_model(reward_models[0], dtype="float32")
    assert RewardModel.load(base).scale == ScoreScale()
    load_adapter(base.model, tmp_path / "adapter")
    assert RewardModel.load(base).scale == scale


def test_equal_scores_have_no_scale(reward_models, pairs):
    loaded = load_reward_model(reward_models[0])
    torch.nn.init.zeros_(loaded.model.score.weight)
    model = RewardModel.load(loaded)
    groups, _ = read_groups(model, pairs)
    assert normalized_on(model, groups).scale == ScoreScale()
    with pytest.raises(DataError, match="scores are equal"):
        normalized_on(model, groups, scale=True)
    with pytest.raises(DataError, match="no completion"):
        normalized_on(model, [])


def test_nothing_to_score_is_an_error(reward_models, pairs):
    model = RewardModel.load(reward_models[0])
    model = replace(model, settings=replace(model.settings, max_length=3))
    with pytest.raises(DataError, match="no row is left to score"):
        read_groups(model, pairs)


def test_a_folder_in_use_is_left_alone(reward_models, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ModelError, match="in use"):
        save_scaled(reward_models[0], tmp_path / "mine", ScoreScale())
    with pytest.raises(ModelError, match="no score head"):
        save_scaled(Path(reward_models[0]).with_name("trunk"), tmp_path / "new", ScoreScale())
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]

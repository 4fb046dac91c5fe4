"""Text in, scores out: the scores of plain transformers, whatever the batch and the order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trueup.data.report import ReadReport
from trueup.data.settings import TokenizeSettings
from trueup.errors import DataError, ModelError, OutOfMemoryError
from trueup.models.heads import load_reward_model
from trueup.models.load import LoadedModel, load_model
from trueup.rewards.reward_model import RewardModel, as_example

ANSWERS = ["4", "it is four", "5", "4", "2+2"]


def plain_score(folder: str, text: str) -> float:
    """What anybody would get: tokens of the text, the end token, the model's own forward pass."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokens = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits.item()


@pytest.mark.parametrize("tokens_per_batch", [1, 4096])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_scores_are_those_of_plain_transformers(reward_models, index, tokens_per_batch):
    folder = reward_models[index]
    model = RewardModel.load(folder, dtype="float32", tokens_per_batch=tokens_per_batch)
    scores = model.score("2+2=", ANSWERS)
    assert scores == pytest.approx([plain_score(folder, f"2+2={answer}") for answer in ANSWERS], abs=1e-5)
    assert scores[0] == pytest.approx(scores[3], abs=1e-6)
    assert np.ptp(scores) > 0.05, "scores that are all alike show nothing"


def test_a_conversation_and_its_next_turn(reward_models):
    settings = TokenizeSettings(chat_template="plain")
    model = RewardModel.load(reward_models[0], dtype="float32", settings=settings)
    question = [{"role": "user", "content": "2+2=?"}]
    scores = model.score(question, ["4", [{"role": "assistant", "content": "5"}]])
    assert scores == pytest.approx(
        [model.score(question, [[{"role": "assistant", "content": answer}]])[0] for answer in "45"], abs=1e-6
    )
    assert scores[0] != pytest.approx(scores[1], abs=1e-4)


def test_no_completion_has_no_score(reward_models):
    assert RewardModel.load(reward_models[0]).score("2+2=", []).shape == (0,)


def test_groups_keep_their_order(reward_models):
    model = RewardModel.load(reward_models[0], dtype="float32", tokens_per_batch=20)
    prompts = ["1+1=", "a much longer prompt than the others, 2+2=", "3="]
    groups = [model.tokenized(as_example(prompt, "4"), ReadReport()) for prompt in prompts]
    assert None not in groups
    found = model.score_groups([group for group in groups if group is not None])
    assert [each.item() for each in found] == pytest.approx(
        [model.score(prompt, ["4"])[0] for prompt in prompts], abs=1e-5
    )


def test_a_model_in_memory_scores_like_its_folder(reward_models):
    loaded = load_reward_model(reward_models[0], dtype="float32")
    assert RewardModel.load(loaded).score("1+1=", ANSWERS) == pytest.approx(
        RewardModel.load(reward_models[0], dtype="float32").score("1+1=", ANSWERS), abs=1e-6
    )


def test_the_context_is_the_limit(reward_models):
    model = RewardModel.load(reward_models[0])
    assert model.settings.max_length == 96
    with pytest.raises(DataError, match="completion 1: can't be scored: prompt longer than 95 tokens"):
        model.score("1" * 96, ["2"])


@pytest.mark.parametrize(("num_prompts", "lower"), [(2, "--tokens-per-batch 10"), (1, "--max-length 5")])
def test_out_of_memory_says_what_to_lower(reward_models, num_prompts, lower, monkeypatch):
    def full(self, batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    model = RewardModel.load(reward_models[0])
    monkeypatch.setattr(type(model.scorer), "forward", full)
    groups = [model.tokenized(as_example(f"{number}+2=", "12345"), ReadReport()) for number in range(num_prompts)]
    with pytest.raises(OutOfMemoryError, match=f"{10 * num_prompts} tokens in one pass") as caught:
        model.score_groups([group for group in groups if group is not None])
    assert str(caught.value).endswith(lower)


def test_a_language_model_is_no_reward_model(reward_models):
    trunk = str(Path(reward_models[0]).with_name("trunk"))
    for name in (trunk, load_model(trunk)):
        with pytest.raises(ModelError, match="has no score head") as caught:
            RewardModel.load(name)
        assert "trueup reward --model" in str(caught.value)


def test_a_model_that_scores_steps_is_refused(reward_models):
    loaded = load_reward_model(reward_models[0])
    loaded.model.config.scores_each = "step"
    with pytest.raises(ModelError, match="scores each step"):
        RewardModel.load(LoadedModel(loaded.model, loaded.tokenizer, "steps"))

"""Trained models as rewards: the scores of the models themselves, and where steps end in the policy's tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trueup.data.settings import TextSettings, TokenizeSettings
from trueup.errors import RewardError, SettingsError
from trueup.models.load import load_model
from trueup.rewards.process_reward_model import steps_of
from trueup.rewards.reward_model import RewardModel
from trueup.rewards.reward_model_function import token_ends
from trueup.rewards.rewards import Rewards
from trueup.rewards.samples import Samples


@pytest.fixture(scope="module")
def process_model(reward_models, tmp_path_factory) -> str:
    """A model of the same weights that says that it scores steps."""
    folder = tmp_path_factory.mktemp("process") / "judge"
    folder.mkdir()
    for path in Path(reward_models[0]).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"scores_each": "step"}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_reward_model_scores_as_it_does_alone(reward_models, samples):
    prompts = ["2+2=", "2+2=", "1+1=", "2+2="]
    given = samples(["4", "5", "2", "it is four"], prompts=prompts)
    scores = Rewards.load([reward_models[0], "length:target=1"], [1, 0], dtype="float32").score(given)
    model = RewardModel.load(reward_models[0], dtype="float32")
    alone = [model.score(prompt, [each])[0] for prompt, each in zip(prompts, given.completions, strict=True)]
    assert scores.each["reward"] == pytest.approx(alone, abs=1e-5)
    assert scores.total == pytest.approx(alone, abs=1e-5)
    assert np.ptp(alone) > 0.01


def test_equal_completions_of_one_prompt_each_have_their_score(reward_models, samples):
    given = samples(["4", "4", "5", "4"], prompts=["2+2="] * 4)
    scores = Rewards.load([reward_models[0]], dtype="float32").score(given).total
    assert scores[0] == pytest.approx(scores[1], abs=1e-6) == pytest.approx(scores[3], abs=1e-6)
    assert scores[2] != pytest.approx(scores[0], abs=1e-4)


def test_a_reward_model_reads_conversations_with_its_template(reward_models, samples):
    settings = TextSettings(chat_template="plain")
    turns = ({"role": "user", "content": "2+2=?"},)
    given = samples([({"role": "assistant", "content": "4"},)], prompts=[turns])
    found = Rewards.load([reward_models[0]], text=settings, dtype="float32").score(given).total
    model = RewardModel.load(reward_models[0], dtype="float32", settings=TokenizeSettings.of(settings))
    assert found == pytest.approx(model.score(turns, ["4"]), abs=1e-6)


def test_a_sample_that_the_model_cannot_read_is_named(reward_models, samples):
    given = samples(["4", "4"], prompts=["1", "1" * 96])
    with pytest.raises(RewardError, match=r"reward 'reward', sample 1 \(data.jsonl:2, .*prompt longer than 95 tokens"):
        Rewards.load([reward_models[0]]).score(given)


def policy_samples(tokenizer, prompts: list[str], texts: list[str]) -> Samples:
    tokens = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
    return Samples(
        prompts=list(prompts),
        completions=list(texts),
        completion_ids=[np.array(each) for each in tokens],
        truncated=[False] * len(texts),
    )


def test_a_process_reward_model_scores_every_step(process_model, reward_models):
    """Against the plain forward pass, read at the tokens where the steps end; the policy's tokens are others."""
    policy = load_model(str(Path(reward_models[1]).with_name("trunk"))).tokenizer
    texts = ["a=1 b=2 c=3", "a=2", "  a=1  b "]
    rewards = Rewards.load([process_model], dtype="float32", tokenizer=policy)
    # the letters of these models hold no line break, so a space divides the steps
    judge = rewards.rewards[0].function.model  # type: ignore[union-attr]
    object.__setattr__(judge, "settings", TokenizeSettings(step_separator=" ", max_length=96))
    scores = rewards.score(policy_samples(policy, ["1+1=", "2+2=", "3="], texts))

    tokenizer = AutoTokenizer.from_pretrained(process_model)
    plain = AutoModelForSequenceClassification.from_pretrained(process_model)
    assert scores.steps is not None
    assert scores.step_ends is not None
    rows = [("1+1=", ["a=1", "b=2", "c=3"]), ("2+2=", ["a=2"]), ("3=", ["a=1", "b"])]
    for (prompt, steps), found in zip(rows, scores.steps, strict=True):
        expected = []
        for count in range(1, len(steps) + 1):
            tokens = tokenizer(prompt + " ".join(steps[:count]), add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                hidden = plain.model(torch.tensor([tokens])).last_hidden_state[0, -1]
                expected.append(expit(plain.score(hidden).item()))
        assert found == pytest.approx(expected, abs=1e-5)
    assert scores.total == pytest.approx([each.min() for each in scores.steps])
    assert [ends.tolist() for ends in scores.step_ends] == [[2, 6, 10], [2], [4, 7]]


def test_a_process_reward_model_needs_the_policys_tokenizer(process_model):
    with pytest.raises(SettingsError, match="policy's tokenizer"):
        Rewards.load([process_model])


def test_only_one_may_score_steps(process_model):
    tokenizer = AutoTokenizer.from_pretrained(process_model)
    with pytest.raises(SettingsError, match="judge and judge_2 are both process reward models"):
        Rewards.load([process_model, process_model], tokenizer=tokenizer)


def test_a_completion_without_steps_scores_nothing(process_model):
    tokenizer = AutoTokenizer.from_pretrained(process_model)
    rewards = Rewards.load([process_model], dtype="float32", tokenizer=tokenizer)
    scores = rewards.score(policy_samples(tokenizer, ["1", "1"], ["  ", "a"]))
    assert scores.steps is not None
    assert [len(each) for each in scores.steps] == [0, 1]
    assert scores.total[0] == 0
    assert scores.total[1] == scores.steps[1][0]


def test_steps_and_where_they_end():
    text = "\none \n\n  two\nthree"
    steps, ends = steps_of(text, "\n")
    assert steps == ["one", "two", "three"]
    assert [text[:end] for end in ends] == ["\none", "\none \n\n  two", text]
    assert steps_of("", "\n") == ([], [])


def test_a_step_ends_with_the_token_that_completes_its_last_character(tmp_path):
    """Byte-level pieces: a character may be spread over several tokens, and a token hold several characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {each: index for index, each in enumerate(alphabet)} | {"Ċa": len(alphabet), "ab": len(alphabet) + 1}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "a"), ("a", "b")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    text = "é\nab\n日"
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(tokens)[:4] == ["Ã", "©", "Ċa", "b"]
    assert token_ends(tokenizer, tokens, text, [1, 4, 6]).tolist() == [1, 3, 7]

"""Supervised fine-tuning's options: shared prompts, all tokens, label smoothing, noise. Each against a plain loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from trueup import sft
from trueup.data.chat import load_groups
from trueup.data.collate import merge_prompts, train_all_tokens
from trueup.data.settings import TokenizeSettings
from trueup.errors import SettingsError
from trueup.models.load import load_model, load_tokenizer
from trueup.models.scorer import prepare_scorer
from trueup.models.tree import tree_batch
from trueup.objectives.reduce import token_mean
from trueup.records import CompletionGroup
from trueup.runs.folder import read_metrics
from trueup.trainers.inputs import load_inputs
from trueup.trainers.session import Session
from trueup.trainers.settings import SFTSettings

TIMES = {"step_seconds", "tokens_per_second"}
ANSWERS = ["1", "12", "123", "1", "42", "7+7"]
ROWS = [{"prompt": f"{a}+{b}=", "completion": answer} for a in range(3) for b in range(2) for answer in ANSWERS]
"""Six prompts with six demonstrations each, two of them the same."""


def train(model: str, output: str | Path, data: Any = ROWS, **settings: Any) -> list[dict[str, Any]]:
    """The metrics of a run in float32, times apart."""
    defaults = {"quiet": True, "batch_size": 12, "learning_rate": 1e-2, "num_samples": 0, "sample_tokens": 4}
    sft(model=model, data=data, output=str(output), **(defaults | {"dtype": "float32"} | settings))
    lines = read_metrics(Path(output) / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def groups_of(model: str, rows: Any = ROWS) -> list[CompletionGroup]:
    tokenizer: Any = load_tokenizer(model)
    return load_groups(rows, tokenizer, task="sft", settings=TokenizeSettings())[0]


def plain_nll(model: str, groups: list[CompletionGroup], *, all_tokens: bool = False, label_smoothing: float = 0.0):
    """The mean over tokens, row by row through the model's own forward pass and torch's cross-entropy."""
    loaded, losses = load_model(model, dtype="float32"), []
    for group in groups:
        for completion in group.completions:
            tokens = torch.tensor([*group.prompt, *completion.tokens])
            with torch.no_grad():
                logits = loaded.model(tokens[None]).logits[0, :-1]
            nll = cross_entropy(logits, tokens[1:], reduction="none", label_smoothing=label_smoothing)
            written = torch.from_numpy(completion.completion_mask)
            losses.append(nll if all_tokens else nll[len(group.prompt) - 1 :][written])
    return float(torch.cat(losses).mean())


# --- shared prompts


def test_rows_that_share_their_prompt_have_the_loss_and_gradient_of_rows_apart(tiny_model: str) -> None:
    loaded = load_model(tiny_model, dtype="float32")
    scorer = prepare_scorer(loaded.model)
    apart = groups_of(tiny_model)
    shared = merge_prompts(apart, 10_000)
    assert len(apart) == 36
    assert [len(group.completions) for group in shared] == [6] * 6
    assert sum(group.num_tokens for group in shared) < 0.7 * sum(group.num_tokens for group in apart)
    results = []
    for groups in (apart, shared):
        loss = token_mean(-scorer(tree_batch(groups)).logprobs)
        results.append((loss, *torch.autograd.grad(loss, list(loaded.model.parameters()))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    assert results[0][0].item() == pytest.approx(plain_nll(tiny_model, apart), rel=1e-5)


def test_a_run_on_full_batches_is_the_same_but_reads_prompts_once(tiny_model: str, tmp_path: Path) -> None:
    settings = {"batch_size": 36, "num_epochs": 3, "eval_data": ROWS[:13]}
    shared = train(tiny_model, tmp_path / "shared", **settings)
    apart = train(tiny_model, tmp_path / "apart", share_prompts=False, **settings)
    for one, other in zip(shared, apart, strict=True):
        fewer, more = one.pop("num_tokens", 0), other.pop("num_tokens", 1)
        assert fewer < more
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_step_has_batch_size_rows_and_each_prompt_once(tiny_model: str, streaming: bool) -> None:
    settings = SFTSettings(batch_size=10, streaming=streaming, max_steps=4 if streaming else None)
    inputs = load_inputs(
        settings, load_tokenizer(tiny_model), task="sft", data=ROWS, say=lambda _: None, share_prompts=True
    )
    assert inputs.num_steps == 4
    steps = [groups for *_, groups in inputs.steps(0)]
    seen = []
    for groups in steps:
        prompts = [tuple(group.prompt) for group in groups]
        assert len(set(prompts)) == len(prompts) <= 3
        seen += [(*group.prompt, -1, *each.tokens) for group in groups for each in group.completions]
    sizes = [sum(len(group.completions) for group in groups) for groups in steps]
    assert sizes == ([10, 10, 10, 10] if streaming else [10, 10, 10, 6])
    rows = [(*group.prompt, -1, *each.tokens) for group in groups_of(tiny_model) for each in group.completions]
    assert sorted(seen[:36]) == sorted(rows)  # what is said twice stays said twice
    again = [groups for *_, groups in inputs.steps(2)]
    assert [[g.where for g in groups] for groups in again] == [[g.where for g in groups] for groups in steps[2:]]


def test_what_is_sampled_is_one_prompt_each_row(tiny_model: str) -> None:
    inputs = load_inputs(
        SFTSettings(num_samples=3),
        load_tokenizer(tiny_model),
        task="sft",
        data=ROWS,
        eval_data=ROWS,
        say=lambda _: None,
        share_prompts=True,
    )
    assert [len(group.completions) for group in inputs.held_out] == [6] * 6
    assert [len(group.completions) for group in inputs.sampled] == [1] * 3


# --- all tokens


TALKS = [
    {
        "messages": [
            {"role": "system", "content": "1+"},
            {"role": "user", "content": "2+2="},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": "4+4"},
            {"role": "assistant", "content": "8"},
        ]
    },
    {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]},
]
MARKED = (
    "{% for m in messages %}={{ m.role[0] | replace('s', '7') | replace('u', '8') | replace('a', '9') }}"
    "{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}=9{% endif %}"
)


@pytest.mark.parametrize("rows", [ROWS, TALKS, [{"text": "1+1=2"}, {"text": "2+2=4"}]], ids=["rows", "talks", "text"])
def test_all_tokens_are_trained_but_the_first(tiny_model: str, tmp_path: Path, rows: Any) -> None:
    settings: dict[str, Any] = {"chat_template": MARKED} if rows is TALKS else {}
    tokenizer: Any = load_tokenizer(tiny_model)
    groups, _ = load_groups(rows, tokenizer, task="sft", settings=TokenizeSettings(**settings))
    lines = train(tiny_model, tmp_path / "all", rows, train_on="all", eval_data=rows, **settings)
    assert lines[0]["eval_loss"] == pytest.approx(plain_nll(tiny_model, groups, all_tokens=True), rel=1e-5)
    lines = train(tiny_model, tmp_path / "completion", rows, eval_data=rows, **settings)
    assert lines[0]["eval_loss"] == pytest.approx(plain_nll(tiny_model, groups), rel=1e-5)


def test_every_token_of_a_conversation_stays_in_its_place(tiny_model: str) -> None:
    tokenizer: Any = load_tokenizer(tiny_model)
    groups, _ = load_groups(TALKS, tokenizer, task="sft", settings=TokenizeSettings(chat_template=MARKED))
    end = tokenizer.eos_token
    whole = train_all_tokens(groups[0])
    assert tokenizer.decode([*whole.prompt, *whole.completions[0].tokens]) == (
        f"=71+{end}=82+2={end}=94{end}=84+4{end}=98{end}"
    )
    trained = groups[0].completions[0]
    assert tokenizer.decode(trained.tokens[trained.completion_mask]) == f"4{end}8{end}"


def test_samples_answer_the_whole_prompt_whatever_is_trained(tiny_model: str, tmp_path: Path) -> None:
    prompts = {}
    for train_on in ("completion", "all"):
        train(tiny_model, tmp_path / train_on, eval_data=ROWS[::6], num_samples=3, train_on=train_on)
        lines = (tmp_path / train_on / "samples.jsonl").read_text().splitlines()
        prompts[train_on] = [json.loads(line)["prompt"] for line in lines]
    assert prompts["all"] == prompts["completion"]
    assert set(prompts["all"]) == {row["prompt"] for row in ROWS[:18:6]}


# --- label smoothing


def test_label_smoothing_is_torch_s(tiny_model: str, tmp_path: Path) -> None:
    lines = train(tiny_model, tmp_path / "run", label_smoothing=0.2, eval_data=ROWS, num_epochs=20)
    groups = groups_of(tiny_model)
    assert lines[0]["eval_loss"] == pytest.approx(plain_nll(tiny_model, groups, label_smoothing=0.2), rel=1e-5)
    assert lines[0]["eval_nll"] == pytest.approx(plain_nll(tiny_model, groups), rel=1e-5)
    plain = train(tiny_model, tmp_path / "plain", eval_data=ROWS, num_epochs=20)
    assert "eval_nll" not in plain[0]
    assert plain[-1]["eval_loss"] < lines[-1]["eval_nll"]  # smoothing costs likelihood
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]


def test_label_smoothing_keeps_a_share_for_everything(tiny_model: str, tmp_path: Path) -> None:
    """One answer, learnt to the end: the model gives it 1 − ε + ε/V, and every other token ε/V."""
    rows = [{"prompt": "1+1=", "completion": "2"}]
    settings = {"label_smoothing": 0.3, "num_epochs": 300, "lr_schedule": "linear"}
    result = sft(
        model=tiny_model, data=rows, output=str(tmp_path), quiet=True, num_samples=0, learning_rate=1e-2, **settings
    )
    (group,) = groups_of(tiny_model, rows)
    with torch.no_grad():
        model = load_model(result.model_folder, dtype="float32").model
        probs = model(torch.tensor([*group.prompt])[None]).logits[0, -1].softmax(-1)
    expected = torch.full_like(probs, 0.3 / len(probs))
    expected[group.completions[0].tokens[0]] += 0.7
    torch.testing.assert_close(probs, expected, rtol=0, atol=0.02)


# --- noise


def test_noise_is_in_training_only(tiny_model: str, tmp_path: Path) -> None:
    noisy = train(tiny_model, tmp_path / "noisy", neftune_alpha=5.0, eval_data=ROWS, num_samples=2)
    quiet = train(tiny_model, tmp_path / "quiet", eval_data=ROWS, num_samples=2)
    assert noisy[0] == quiet[0]  # the evaluation at step 0
    assert noisy[1]["loss"] != pytest.approx(quiet[1]["loss"], rel=1e-4)
    samples = [(tmp_path / name / "samples.jsonl").read_text().splitlines()[:2] for name in ("noisy", "quiet")]
    assert samples[0] == samples[1]


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_run_with_every_option_resumes_to_the_bit(tiny_model: str, tmp_path: Path, lora_rank: int, monkeypatch):
    settings = {
        "lora_rank": lora_rank,
        "gradient_checkpointing": lora_rank > 0,
        "neftune_alpha": 5.0,
        "label_smoothing": 0.1,
        "eval_data": ROWS[:7],
        "eval_every": 2,
        "save_every": 2,
        "num_epochs": 2,
        "tokens_per_batch": 40,
    }
    whole = train(tiny_model, tmp_path / "whole", **settings)
    save = Session.save

    def die_at_step_4(self: Session, step: int, *args: Any) -> None:
        if step == 4:
            raise RuntimeError("the machine went away")
        save(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "save", die_at_step_4)
        with pytest.raises(RuntimeError, match="went away"):
            train(tiny_model, tmp_path / "died", **settings)
    assert train(tiny_model, tmp_path / "died", resume="auto", **settings) == whole


# --- settings


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing": 1.0},
        {"label_smoothing": -0.1},
        {"neftune_alpha": -1.0},
        {"train_on": "prompt"},
        {"train_turns": "last", "train_on": "all"},
        {"share_prompts": False, "train_on": "all"},
    ],
)
def test_a_setting_that_means_nothing_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=f"--{next(iter(settings)).replace('_', '-')}: "):
        SFTSettings(**settings)

"""The three loops, whole: what they leave, invariance to micro-batches, exact resume, faults."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trueup import dpo, preference, reward, sft
from trueup.data.chat import load_groups
from trueup.data.settings import TokenizeSettings
from trueup.errors import CheckpointError, DataError, ModelError, NonFiniteError, SettingsError
from trueup.models.load import load_model, load_tokenizer
from trueup.models.scratch import make_model
from trueup.records import Completion, CompletionGroup
from trueup.runs.folder import read_metrics
from trueup.trainers.session import Session
from trueup.trainers.settings import PreferenceSettings, RewardSettings, SFTSettings

TIMES = {"step_seconds", "tokens_per_second"}
LOOPS = {"sft": sft, "reward": reward, "preference": preference}


def train(loop: str, model: str, data: Any, output: str, **settings: Any):
    defaults = {"quiet": True, "batch_size": 8, "num_epochs": 2, "learning_rate": 1e-2, "num_samples": 2}
    return LOOPS[loop](model=model, data=data, output=output, **(defaults | {"sample_tokens": 4} | settings))


def metrics(folder: str | Path) -> list[dict[str, Any]]:
    lines = read_metrics(Path(folder) / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


@pytest.mark.parametrize("loop", LOOPS)
def test_micro_batches_change_nothing(loop: str, tiny_model: str, pairs: list, tmp_path: Path):
    runs = {}
    for tokens in (16, 10_000):
        output = str(tmp_path / str(tokens))
        train(loop, tiny_model, pairs, output, tokens_per_batch=tokens, holdout=0.3, num_epochs=1, dtype="float32")
        runs[tokens] = metrics(output)
    assert len(runs[16]) == len(runs[10_000])
    for small, big in zip(runs[16], runs[10_000], strict=True):
        assert small == pytest.approx(big, rel=2e-4, abs=2e-5)


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("loop", LOOPS)
def test_resume_is_exact(loop: str, lora_rank: int, tiny_model: str, pairs: list, tmp_path: Path, monkeypatch):
    """A run that dies between two checkpoints and goes on writes what a run left alone writes, to the bit."""
    settings = {
        "lora_rank": lora_rank,
        "lora_dropout": 0.2 * (lora_rank > 0),
        "holdout": 0.3,
        "eval_every": 2,
        "save_every": 2,
    }
    whole = train(loop, tiny_model, pairs, str(tmp_path / "whole"), **settings)

    died, log = str(tmp_path / "died"), Session.save

    def die_at_step_4(self: Session, step: int, *args: Any) -> None:
        if step == 4:
            raise RuntimeError("the machine went away")
        log(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "save", die_at_step_4)
        with pytest.raises(RuntimeError, match="went away"):
            train(loop, tiny_model, pairs, died, **settings)
    resumed = train(loop, tiny_model, pairs, died, resume="auto", **settings)

    assert metrics(died) == metrics(tmp_path / "whole")
    assert {k: v for k, v in whole.metrics.items() if k not in TIMES} == {
        k: v for k, v in resumed.metrics.items() if k not in TIMES
    }
    if loop != "reward":
        assert (tmp_path / "whole" / "samples.jsonl").read_text() == (Path(died) / "samples.jsonl").read_text()
    weights = [torch_weights(result.model_folder) for result in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def torch_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_streaming_resumes_where_it_was(tiny_model: str, pairs: list, tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    settings = {"streaming": True, "save_every": 1, "num_samples": 0, "num_epochs": 1}
    train("preference", tiny_model, str(file), str(tmp_path / "whole"), max_steps=5, **settings)
    result = train("preference", tiny_model, str(file), str(tmp_path / "whole"), max_steps=5, resume="yes", **settings)
    steps = [line["step"] for line in metrics(tmp_path / "whole")]
    assert steps == [1, 2, 3, 4, 5]
    assert result.metrics["epoch"] == 1.0  # 24 rows, 8 a step: the fourth step begins again


def test_what_a_run_leaves(tiny_model: str, pairs: list, output: str):
    settings = {"holdout": 0.3, "batch_size": 8, "quiet": True, "sample_tokens": 4, "dtype": "float32"}
    result = dpo(model=tiny_model, data=pairs, output=output, **settings)
    folder = Path(output)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl", "checkpoints"}
    loaded = AutoModelForCausalLM.from_pretrained(result.model_folder)
    assert loaded.generate(torch.tensor([[4, 5, 6]]), max_new_tokens=3, do_sample=False).shape[1] > 3
    evaluations = [line for line in metrics(folder) if "eval_loss" in line]
    assert evaluations[0]["step"] == 0
    assert evaluations[0]["eval_loss"] == pytest.approx(0.6931472, abs=1e-6)  # log 2: policy = reference
    assert {"eval_rewards/accuracies_low", "eval_rewards/accuracies_length_matched"} <= set(evaluations[0])
    first = next(line for line in metrics(folder) if "loss" in line)
    assert first["learning_rate"] == pytest.approx(1e-6 / 150)
    assert "optimizer: rmsprop" in (folder / "config.yaml").read_text()


def test_saved_reward_model_scores_alike_in_transformers(tiny_model: str, pairs: list, output: str):
    from trueup.models.heads import load_reward_model
    from trueup.models.scorer import prepare_reward_scorer
    from trueup.models.tree import tree_batch
    from trueup.trainers.inputs import load_inputs

    result = train("reward", tiny_model, pairs, output, num_epochs=1, dtype="float32")
    plain = AutoModelForSequenceClassification.from_pretrained(result.model_folder)
    loaded = load_reward_model(result.model_folder, dtype="float32")
    inputs = load_inputs(RewardSettings(), loaded.tokenizer, task="preference", data=pairs, say=lambda _: None)
    _, _, groups = next(inputs.steps(0))
    with torch.no_grad():
        ours = prepare_reward_scorer(loaded.model)(tree_batch(groups))
        sequences = [torch.tensor([*g.prompt, *c.tokens]) for g in groups for c in g.completions]
        pad = plain.config.pad_token_id
        rows = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad)
        theirs = plain(rows, attention_mask=rows != pad).logits[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_fit_reference_starts_dpo_from_the_fitted_model(tiny_model: str, pairs: list, output: str):
    fitting = {"fit_reference": True, "fit_learning_rate": 1e-2, "dtype": "float32"}
    train("preference", tiny_model, pairs, output, eval_data=pairs, **fitting)
    fitted = [line for line in metrics(Path(output) / "reference") if "eval_loss" in line]
    tuned = [line for line in metrics(output) if "eval_loss" in line]
    assert fitted[-1]["eval_loss"] < fitted[0]["eval_loss"]
    assert tuned[0]["eval_loss"] == pytest.approx(0.6931472, abs=1e-6)
    # The reference explains the chosen answers as well as the fitted model does, per sequence.
    tokens = [len(row["chosen"]) + 1 for row in pairs]
    assert -tuned[0]["eval_logps/chosen"] == pytest.approx(fitted[-1]["eval_loss"] * sum(tokens) / len(pairs), rel=1e-4)


def test_ranked_lists_need_plackett_luce(tiny_model: str, output: str):
    rows = [{"prompt": "1+1=", "completions": ["2", "3", "4"]}, {"prompt": "1+2=", "completions": ["3", "2"]}] * 4
    with pytest.raises(SettingsError, match="more than two completions") as caught:
        train("preference", tiny_model, rows, output)
    assert "plackett_luce" in str(caught.value)
    result = train("preference", tiny_model, rows, output + "-pl", loss="plackett_luce", eval_data=rows, num_epochs=40)
    assert result.metrics["eval_rewards/accuracies"] > 0.9
    result = train("reward", tiny_model, rows, output + "-rm", eval_data=rows, num_epochs=40)
    assert result.metrics["eval_accuracy"] > 0.9


def test_a_ranked_list_is_refused_before_anything_is_trained(tiny_model: str, pairs: list, output: str):
    rows = [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]]} for row in pairs]
    with pytest.raises(SettingsError, match="more than two completions"):
        train("preference", tiny_model, [*rows, {"prompt": "1+1=", "completions": ["2", "3", "4"]}], output)
    assert not (Path(output) / "metrics.jsonl").exists()


@pytest.mark.parametrize("loop", ["reward", "preference"])
def test_groups_that_hold_nothing_to_learn_are_refused(loop: str, tiny_model: str, output: str):
    tokens = np.array([4, 5])
    alone = CompletionGroup(prompt=tokens, completions=(Completion(tokens=tokens),))
    with pytest.raises(DataError, match="two completions"):
        train(loop, tiny_model, [alone], output)
    masked = Completion(tokens=tokens, mask=np.zeros(2, dtype=bool))
    with pytest.raises(DataError, match="no token to train on"):
        train(loop, tiny_model, [dataclasses.replace(alone, completions=(masked, masked))], output)


def test_fit_reference_fits_the_better_side_of_groups_and_of_an_iterator(tiny_model: str, pairs: list, tmp_path: Path):
    tokenizer: Any = load_tokenizer(tiny_model)
    groups, _ = load_groups(pairs, tokenizer, task="preference", settings=TokenizeSettings())
    for name, data in (("rows", pairs), ("groups", groups), ("iterator", iter(pairs))):
        train("preference", tiny_model, data, str(tmp_path / name), fit_reference=True, num_samples=0)
        assert metrics(tmp_path / name) == metrics(tmp_path / "rows")


def test_rewards_without_a_reference_are_means_over_tokens(tiny_model: str, output: str):
    """A sum would call the shorter answer the better one."""
    rows = [{"prompt": "1+1=", "chosen": "2" * 9, "rejected": "3"}] * 8
    result = train("preference", tiny_model, rows, output, loss="simpo", beta=2.0, num_epochs=20, eval_data=rows)
    assert result.metrics["eval_rewards/accuracies"] == 1.0
    assert result.metrics["eval_rewards/chosen"] == pytest.approx(2.0 * result.metrics["eval_logps/chosen"] / 10)


def test_the_reference_must_read_the_same_tokens(tiny_model: str, pairs: list, tmp_path: Path):
    other = make_model(tmp_path / "other", characters="=+9876543210", hidden_size=16, num_heads=2, seed=3)
    with pytest.raises(ModelError, match="not those of the policy"):
        train("preference", tiny_model, pairs, str(tmp_path / "run"), reference=str(other))


def test_a_sequence_longer_than_the_context_is_cut(pairs: list, tmp_path: Path, capsys):
    family: Any = {"family": "gpt2", "hidden_size": 16, "num_heads": 2, "num_layers": 1}
    short = make_model(tmp_path / "short", characters="0123456789+=", max_length=16, **family)
    rows = [{"prompt": "1+1=", "completion": "2" * 20}, {"prompt": "1" * 16, "completion": "2"}] * 4
    train("sft", str(short), rows, str(tmp_path / "run"), sample_tokens=50, quiet=False)
    told = capsys.readouterr().out
    assert "the model reads 16 tokens" in told
    assert "prompt longer than 15 tokens" in told


@pytest.mark.parametrize("name", ["data", "eval_data"])
def test_holdout_is_not_ignored(name: str, tiny_model: str, pairs: list, output: str):
    groups, _ = load_groups(
        pairs, cast(Any, load_tokenizer(tiny_model)), task="preference", settings=TokenizeSettings()
    )
    with pytest.raises(SettingsError, match="--holdout"):
        preference(**{"model": tiny_model, "data": pairs, "output": output, "holdout": 0.2, name: groups})


def test_a_stream_keeps_to_its_limit(tiny_model: str, pairs: list, output: str):
    result = train("sft", tiny_model, pairs, output, streaming=True, limit=4, max_steps=2, num_epochs=1)
    assert result.metrics["epoch"] == 3.0  # 16 rows, 4 at a time


def test_a_loss_that_is_not_finite_is_skipped_counted_and_kept(tiny_model: str, pairs: list, output: str):
    with pytest.raises(NonFiniteError, match="2 steps"):
        train("sft", tiny_model, pairs, output, learning_rate=1e30, optimizer="sgd", max_skipped_steps=2, num_samples=0)
    kept = [json.loads(line) for line in (Path(output) / "bad_batches.jsonl").read_text().splitlines()]
    assert [row["step"] for row in kept] == [2] * 8 + [3] * 8  # the first step is what broke the model
    assert [line["skipped_steps"] for line in metrics(output)] == [0, 1, 2]


def test_one_model_object_can_be_trained_twice(tiny_model: str, pairs: list, tmp_path: Path):
    loaded = load_model(tiny_model, dtype="bfloat16")
    for name in ("first", "second"):
        settings = {"tokenizer": loaded.tokenizer, "learning_rate": 1e-2, "num_samples": 0, "quiet": True}
        sft(model=loaded.model, data=pairs, output=str(tmp_path / name), **settings)
        assert all(line["grad_norm"] > 0 for line in metrics(tmp_path / name))


def test_an_evaluation_of_a_broken_model_says_nan(tiny_model: str, pairs: list, output: str):
    broken = {"learning_rate": 1e30, "optimizer": "sgd", "eval_data": pairs, "eval_every": 1, "num_samples": 0}
    with pytest.raises(NonFiniteError):
        train("preference", tiny_model, pairs, output, max_skipped_steps=2, **broken)
    last = [line for line in metrics(output) if "eval_loss" in line][-1]
    assert math.isnan(last["eval_rewards/accuracies"])


def test_the_seed_draws_a_reward_model_s_head(tiny_model: str, pairs: list, tmp_path: Path):
    losses = set()
    for seed in (0, 1):
        train("reward", tiny_model, pairs, str(tmp_path / str(seed)), seed=seed, eval_data=pairs, max_steps=1)
        losses.add(metrics(tmp_path / str(seed))[0]["eval_loss"])
    assert len(losses) == 2


def test_a_folder_in_use_and_other_settings_are_refused(tiny_model: str, pairs: list, output: str):
    train("sft", tiny_model, pairs, output, num_epochs=1)
    with pytest.raises(SettingsError, match="not empty"):
        train("sft", tiny_model, pairs, output, num_epochs=1)
    with pytest.raises(CheckpointError, match="learning_rate"):
        train("sft", tiny_model, pairs, output, num_epochs=1, learning_rate=1e-3, resume="auto")
    before = metrics(output)
    again = train("sft", tiny_model, pairs, output, num_epochs=1, resume="yes")
    assert metrics(output) == before
    assert again.metrics["loss"] == before[-1]["loss"]


def test_mistakes_say_what_to_do(tiny_model: str, pairs: list, output: str):
    with pytest.raises(SettingsError, match="--model"):
        sft(data=pairs, output=output)
    with pytest.raises(SettingsError, match="--data"):
        sft(model=tiny_model, output=output + "1")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        sft(model=tiny_model, data=pairs, output=output + "2", resume="yes")
    with pytest.raises(DataError, match="no row is left"):
        sft(model=tiny_model, data=pairs, output=output + "3", max_length=2, quiet=True)
    with pytest.raises(SettingsError, match="--learning-rate"):
        sft(model=tiny_model, data=pairs, output=output, learning_rate=0.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam"},
        {"lr_schedule": "cosin"},
        {"resume": False},
        {"loss": ("dop",)},
        {"learning_rate": math.inf},
        {"lora_alpha": 8.0},
        {"label_smoothing": 0.1},
        {"simpo_margin": 1.0, "loss": ("orpo",)},
        {"reference": "sft", "loss": ("simpo",)},
        {"cache_reference": False, "loss": ("orpo",)},
        {"divergence": "forward_kl", "loss": ("dpo", "kto")},
        {"divergence_alpha": 0.3},
        {"length_alpha": 0.5, "loss": ("kto",)},
        {"normalize_lengths": True, "loss": ("simpo",)},
        {"desirable_weight": 2.0},
        {"fit_epochs": 2},
        {"num_epochs": 2, "streaming": True, "max_steps": 3},
    ],
)
def test_a_setting_that_means_nothing_is_refused(settings: dict[str, Any]):
    with pytest.raises(SettingsError, match=f"--{next(iter(settings)).replace('_', '-')}: (is|has no effect)"):
        PreferenceSettings(**settings)


def test_paths_are_names_that_the_run_is_repeated_from(tiny_model: str, pairs: list, tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    result = sft(model=Path(tiny_model), data=file, output=str(tmp_path / "run"), quiet=True, num_samples=0)
    config = (result.folder / "config.yaml").read_text()
    assert str(file) in config
    assert tiny_model in config


def test_a_tokenizer_beside_a_named_model_is_not_ignored(tiny_model: str, pairs: list, output: str):
    with pytest.raises(SettingsError, match="tokenizer"):
        sft(model=tiny_model, tokenizer=load_tokenizer(tiny_model), data=pairs, output=output)


def test_a_template_of_no_use_does_not_bar_plain_text(tiny_model: str, pairs: list, output: str):
    loaded = load_model(tiny_model)
    loaded.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    sft(model=loaded.model, tokenizer=loaded.tokenizer, data=pairs, output=output, quiet=True, sample_tokens=2)


def test_settings_are_frozen():
    for settings in (SFTSettings(), RewardSettings(), PreferenceSettings()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            settings.seed = 1


def test_parameters_that_are_not_finite_are_not_saved(tiny_model: str, pairs: list, output: str):
    overflow = {"learning_rate": 1e30, "weight_decay": 1e30, "optimizer": "sgd"}
    with pytest.raises(NonFiniteError, match="not finite numbers any more"):
        train("sft", tiny_model, pairs, output, max_steps=1, num_samples=0, **overflow)
    assert not list(Path(output).glob("checkpoints/step-*"))


def test_a_run_of_another_kind_is_not_resumed(tiny_model: str, pairs: list, output: str):
    train("reward", tiny_model, pairs, output, num_epochs=1)
    (Path(output) / "config.yaml").write_text("")
    with pytest.raises(CheckpointError, match="a run of 'reward', not of 'sft'"):
        train("sft", tiny_model, pairs, output, num_epochs=1, resume="auto")

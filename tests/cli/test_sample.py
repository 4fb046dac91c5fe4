"""``trueup sample``, and from nothing to DPO: sample, pairs, dpo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trueup.cli.main import main
from trueup.models.scratch import make_model

TEMPLATE = (
    "{% for turn in messages %}{{ turn['content'] }}{{ '<end>' if turn['role'] == 'assistant' else ':' }}{% endfor %}"
)
REWARD = """
def longer(prompts, completions, completion_ids, offset, **columns):
    texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
    return [len(text) + shift for text, shift in zip(texts, offset)]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_model("model", characters="0123456789+=:", hidden_size=16, num_heads=2, chat_template=TEMPLATE)
    rows = [{"prompt": f"{a}+{b}=", "offset": 0} for a in range(5) for b in range(5)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [{"prompt": [{"role": "user", "content": row["prompt"]}], "offset": 0} for row in rows[:6]]
    Path("turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    Path("rewards.py").write_text(REWARD)
    return tmp_path


def sample(*flags: str, data: str = "prompts.jsonl", output: str = "samples.jsonl") -> list[dict[str, Any]]:
    base = ["sample", "--model", "model", "--data", data, "--output", output, "--dtype", "float32", "--quiet"]
    assert main([*base, "--max-new-tokens", "6", *flags]) == 0
    return [json.loads(line) for line in Path(output).read_text().splitlines()]


def test_samples_and_what_is_said_of_them(folder, capsys):
    lines = sample("--limit", "5")
    assert [line["prompt"] for line in lines] == ["0+0=", "0+1=", "0+2=", "0+3=", "0+4="]
    assert all(len(line["completions"]) == 4 for line in lines)
    lengths = [length for line in lines for length in line["lengths"]]
    cut = [reason == "length" for line in lines for reason in line["stop_reasons"]]
    out = capsys.readouterr().out
    assert f"samples.jsonl: 5 prompts, 20 completions, {sum(lengths)} tokens" in out
    assert f"mean {sum(lengths) / 20:.1f}, longest {max(lengths)} tokens; cut at the limit: {5 * sum(cut):.1f} %" in out
    for line in lines:
        for text, ids, reason in zip(line["completions"], line["completion_ids"], line["stop_reasons"], strict=True):
            assert (ids[-1] == 2) == (reason == "end")  # token 2 is the model's <end>
            assert "<end>" not in text


def test_a_prompt_is_answered_alike_in_any_order_and_company(folder):
    lines = {line["request"]: line for line in sample()}
    assert list(lines) == list(range(25))
    mixed = sample("--shuffle", "--limit", "7", output="shuffled.jsonl")
    numbers = [line["request"] for line in mixed]
    assert numbers != sorted(numbers)
    assert all(line["completion_ids"] == lines[line["request"]]["completion_ids"] for line in mixed)
    other = sample("--seed", "1", "--limit", "3", output="other.jsonl")
    assert [line["completion_ids"] for line in other] != [lines[n]["completion_ids"] for n in range(3)]


def test_the_end_can_be_set(folder):
    whole = sample("--no-end-tokens", "--limit", "4")
    assert {length for line in whole for length in line["lengths"]} == {6}
    stopped = sample("--stop-tokens", "3", "4", "--limit", "8", output="stopped.jsonl")  # the tokens of 0 and 1
    ends = {text[-1:] for line in stopped for text in line["completions"]}
    assert {"0", "1"} <= ends
    assert not any(digit in text[:-1] for digit in "01" for line in stopped for text in line["completions"])
    greedy = sample("--temperature", "0", "--limit", "3", output="greedy.jsonl")
    assert all(len(set(line["completions"])) == 1 for line in greedy)


def test_conversations_are_answered_by_a_turn(folder):
    lines = sample(data="turns.jsonl")
    assert lines[0]["prompt"] == [{"role": "user", "content": "0+0="}]
    assert all(turn["role"] == "assistant" for line in lines for (turn,) in line["completions"])


@pytest.mark.parametrize("data", ["prompts.jsonl", "turns.jsonl"])
def test_from_nothing_to_dpo(folder, capsys, data):
    sample(data=data)
    assert (
        main(["pairs", "--data", "samples.jsonl", "--reward", "rewards.py:longer", "--truncated", "keep", "--quiet"])
        == 0
    )
    assert main(["data", "check", "pairs.jsonl", "--model", "model"]) == 0
    out = capsys.readouterr().out
    assert "(pairs)" in out
    assert "longer one in 100.0 %" in out  # that is what the reward is for
    train = [
        "dpo",
        "--model",
        "model",
        "--data",
        "pairs.jsonl",
        "--output",
        "runs/dpo",
        "--dtype",
        "float32",
        "--quiet",
    ]
    assert main([*train, "--max-steps", "2", "--batch-size", "4", "--no-cache-reference"]) == 0
    assert main(["sample", "--model", "runs/dpo", "--data", data, "--limit", "2", "--output", "after.jsonl"]) == 0


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ([], "no model is given"),
        (["--model", "model"], "no data is given"),
        (["--model", "model", "--data", "prompts.jsonl", "--num-completions", "0"], "--num-completions: 0 is out of"),
        (["--model", "model", "--data", "prompts.jsonl", "--limit", "0"], "--limit: is 0, but must be at least 1"),
        (["--model", "model", "--data", "nothing.jsonl"], "nothing.jsonl: no such file"),
        (["--model", "model", "--data", "prompts.jsonl", "--max-prompt-length", "2"], "no prompt is left"),
        (["--model", "nowhere/./x", "--data", "prompts.jsonl"], "no such folder"),
    ],
)
def test_mistakes_are_said_and_leave_nothing(folder, capsys, flags, what):
    assert main(["sample", *flags]) == 2
    assert what in capsys.readouterr().err
    assert not Path("samples.jsonl").exists()


def test_going_on_with_other_settings_or_another_model_is_refused(folder, capsys):
    before = sample()
    again = [
        "sample",
        "--model",
        "model",
        "--data",
        "prompts.jsonl",
        "--dtype",
        "float32",
        "--quiet",
        "--resume",
        "auto",
    ]
    assert main([*again, "--max-new-tokens", "6"]) == 0
    assert main([*again, "--max-new-tokens", "7"]) == 2
    assert "--max-new-tokens was 6 and is 7 now" in capsys.readouterr().err
    make_model("other", characters="0123456789+=:", hidden_size=16, num_heads=2, seed=1, chat_template=TEMPLATE)
    assert main([*again, "--max-new-tokens", "6", "--model", "other"]) == 2
    assert "not what this file was begun with: weights" in capsys.readouterr().err
    assert main([*again[:-2], "--max-new-tokens", "6"]) == 2
    assert "there is such a file already" in capsys.readouterr().err
    assert [json.loads(line) for line in Path("samples.jsonl").read_text().splitlines()] == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_again_and_again_it_writes_the_same_file(folder):
    flags = ["--num-completions", "64", "--max-new-tokens", "60", "--prompts-per-part", "2", "--no-end-tokens"]
    command = [
        sys.executable,
        "-m",
        "trueup",
        "sample",
        "--model",
        "model",
        "--data",
        "prompts.jsonl",
        "--quiet",
        *flags,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--output", "whole.jsonl"], env=environment, check=True)
    kills = 0
    while True:
        process = subprocess.Popen([*command, "--output", "killed.jsonl", "--resume", "auto"], env=environment)
        size = Path("killed.jsonl").stat().st_size if Path("killed.jsonl").exists() else 0
        while process.poll() is None and (
            not Path("killed.jsonl").exists() or Path("killed.jsonl").stat().st_size <= size
        ):
            time.sleep(0.005)
        time.sleep(0.01 * (kills % 7))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
    assert kills >= 3
    assert Path("killed.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()

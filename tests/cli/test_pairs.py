"""``trueup pairs``, from flags to a file that training reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trueup.cli.main import main
from trueup.data.formats import read_examples
from trueup.data.report import ReadReport
from trueup.models.scratch import make_model

ROWS: list[dict[str, Any]] = [
    {"prompt": "1+1=", "completions": ["2", "3", "2", "11"], "scores": [1.0, 0.25, 1.0, 0.0]},
    {"prompt": "2+2=", "completions": ["4", "5"], "scores": [0.5, 0.5]},
    {"prompt": "3+3=", "completions": ["6", "", "7"], "scores": [1.0, 0.0, 0.5]},
    {"prompt": "4+4=", "completions": ["8", "8"], "scores": [1.0, 1.0]},
]

REWARD = """
def right(prompts, completions, answer, **columns):
    return [float(said == told) for said, told in zip(completions, answer)]

def by_turns(prompts, completions, completion_ids, **columns):
    assert all(len(ids) == 2 for ids in completion_ids)
    return [float(turns[0]["content"]) for turns in completions]

def broken(completions, **columns):
    return [1.0]
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text(REWARD)

    def write(rows: list[dict[str, Any]], name: str = "samples.jsonl") -> None:
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(ROWS)
    return write


def pairs(*flags: str) -> list[dict[str, Any]]:
    Path("pairs.jsonl").unlink(missing_ok=True)
    assert main(["pairs", "--data", "samples.jsonl", "--quiet", *flags]) == 0
    return [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]


def test_the_best_against_the_worst(files, capsys):
    assert pairs() == [
        {"prompt": "1+1=", "chosen": "2", "rejected": "11"},
        {"prompt": "3+3=", "chosen": "6", "rejected": "7"},
    ]
    out = capsys.readouterr().out
    assert "data: 4 prompts, 11 completions\n" in out
    assert (
        "left out: 2 repeated completions; 1 empty completions; 1 prompts with fewer than two completions left; "
        "1 prompts whose completions are all as good\n"
    ) in out
    assert "pairs.jsonl: 2 pairs\n" in out


def test_every_two_with_margins_and_a_gap(files):
    found = pairs("--pairs", "all", "--margin")
    assert [(row["chosen"], row["rejected"], row["margin"]) for row in found] == [
        ("2", "3", 0.75), ("2", "11", 1.0), ("3", "11", 0.25), ("6", "7", 0.5),
    ]  # fmt: skip
    examples = list(read_examples("pairs.jsonl", task="preference", report=ReadReport()))
    assert [example.margin for example in examples] == [0.75, 1.0, 0.25, 0.5]
    near = pairs("--pairs", "all", "--min-gap", "0.75")
    assert [(row["chosen"], row["rejected"]) for row in near] == [("2", "3"), ("2", "11")]


def test_ties_in_both_orders(files):
    assert pairs("--ties", "keep")[1:3] == [
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        {"prompt": "2+2=", "chosen": "5", "rejected": "4"},
    ]


def test_ranked_lists(files, capsys):
    assert pairs("--pairs", "ranked") == [
        {"prompt": "1+1=", "completions": ["2", "3", "11"], "scores": [1.0, 0.25, 0.0]},
        {"prompt": "3+3=", "completions": ["6", "7"], "scores": [1.0, 0.5]},
    ]
    assert "2 ranked lists" in capsys.readouterr().out
    report = ReadReport()
    examples = list(read_examples("pairs.jsonl", task="preference", report=report))
    assert report.format == "ranked"
    assert examples[0].completions == ("2", "3", "11")


def test_a_reward_scores_and_sees_the_columns(files):
    files(
        [
            {"prompt": "1+1=", "completions": ["3", "2"], "stop_reasons": ["end", "end"], "completion_ids": [[1], [2]],
             "columns": {"answer": "2"}, "scores": [5, 1]},
        ]
    )  # fmt: skip
    assert pairs("--reward", "rewards.py:right") == [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}]


def test_conversations_stay_whole_and_are_tokenised_for_rewards(files, tmp_path):
    end = "{{ '<end>' if turn['role'] == 'assistant' else ':' }}"
    template = "{% for turn in messages %}{{ turn['content'] }}" + end + "{% endfor %}"
    make_model(tmp_path / "model", characters="0123456789 +=?:s", hidden_size=16, num_heads=2, chat_template=template)
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"}]
    said = [[{"role": "assistant", "content": content}] for content in "123"]
    files([{"prompt": prompt, "completions": said}])
    assert pairs("--reward", "rewards.py:by_turns", "--tokenizer", str(tmp_path / "model")) == [
        {"prompt": prompt, "chosen": said[2], "rejected": said[0]}
    ]


def test_what_was_cut_is_left_out_unless_told(files, capsys):
    row = {
        "prompt": "1+1=",
        "completions": ["2", "3", "4"],
        "scores": [1, 2, 3],
        "stop_reasons": ["end", "stop", "length"],
    }
    files([row])
    assert pairs() == [{"prompt": "1+1=", "chosen": "3", "rejected": "2"}]
    assert "1 completions cut at the length limit" in capsys.readouterr().out
    assert pairs("--truncated", "keep") == [{"prompt": "1+1=", "chosen": "4", "rejected": "2"}]


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ((), "there is such a file already"),
        (("--output", "new.jsonl", "--scores-column", "marks"), "samples.jsonl:1: there is no column 'marks'"),
        (("--output", "new.jsonl", "--min-gap", "3"), "no two completions of a prompt are told apart"),
        (("--output", "new.jsonl", "--min-gap", "-1"), "--min-gap: is -1.0, but must be at least 0"),
        (("--output", "new.jsonl", "--pairs", "ranked", "--margin"), "--margin: has no effect without --pairs"),
        (("--output", "new.jsonl", "--ties", "keep", "--min-gap", "1"), "--ties: has no effect without --min-gap 0"),
        (("--output", "new.jsonl", "--tokenizer", "x"), "--tokenizer: has no effect without --reward"),
        (("--output", "new.jsonl", "--reward", "rewards.py:right", "--scores-column", "x"), "has no effect beside"),
        (("--output", "new.jsonl", "--reward", "rewards.py:right"), "samples.jsonl:1: the row has no completion_ids"),
    ],
)
def test_mistakes_are_said_and_leave_nothing(files, capsys, flags, what):
    Path("pairs.jsonl").write_text("mine\n")
    assert main(["pairs", "--data", "samples.jsonl", *flags]) == 2
    assert what in capsys.readouterr().err
    assert Path("pairs.jsonl").read_text() == "mine\n"
    assert not Path("new.jsonl").exists()


def test_no_data_and_a_reward_that_fails(files, capsys):
    assert main(["pairs"]) == 2
    assert "no data is given" in capsys.readouterr().err
    files([row | {"completion_ids": [[1]] * len(row["completions"])} for row in ROWS])
    assert main(["pairs", "--data", "samples.jsonl", "--reward", "rewards.py:broken"]) == 2
    assert "broken" in capsys.readouterr().err
    assert not Path("pairs.jsonl").exists()

"""``trueup data check`` says what is in a file, shows what is trained, and obeys nothing that the data says."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from trueup.cli.data import CheckSettings, check
from trueup.cli.main import main
from trueup.data.check import check_data, print_check, visible
from trueup.data.settings import TokenizeSettings
from trueup.errors import DataError, SettingsError

PAIR = {"prompt": "one two three", "chosen": "four five", "rejected": "six"}
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a b"}]


def shown(source: Any, *, colour: bool = False, name: str = "FILE", **options: Any) -> str:
    console = Console(
        file=io.StringIO(), width=100, force_terminal=colour, color_system="truecolor" if colour else None
    )
    print_check(check_data(source, **options), console, name=name)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_whole_output_without_tokenizer() -> None:
    rows = [PAIR, PAIR | {"rejected": "four five"}, PAIR | {"chosen": "x"}]
    assert shown(rows, num_examples=1).splitlines() == [
        "FILE",
        "  format   explicit (detected): prompt, chosen, rejected (strings or message lists)",
        "  rows     3 read, 2 kept (pairs)",
        "  dropped  1 × identical sides (first: row 2)",
        "",
        "  length in words              mean  least  5 %  50 %  95 %  99 %  most",
        "  prompt                          3      3    3     3     3     3     3",
        "  chosen                          2      1    1     2     2     2     2",
        "  rejected                        1      1    1     1     1     1     1",
        "  prompt + longest completion     4      4    4     4     5     5     5",
        "",
        "  The chosen side is the longer one in 75.0 % of the pairs (ties count ½).",
        "",
        "── example 1: row 1 ",
        "one two three",
        "── chosen",
        "⟦four five⟧",
        "── rejected",
        "⟦six⟧",
        "",
        "⟦…⟧ is trained; with --tokenizer: every token",
    ]


def test_with_a_tokenizer_the_trained_tokens_are_marked(letters: PreTrainedTokenizerBase) -> None:
    rows = [{"messages": [*TALK, {"role": "user", "content": "r"}, {"role": "assistant", "content": "c"}]}]
    lines = shown(rows, tokenizer=letters).splitlines()
    assert lines[lines.index("── example 1: row 1 ") :] == [
        "── example 1: row 1 ",
        "<|im_start|>user",
        "q<|im_end|>",
        "<|im_start|>assistant",
        "── completion",
        "⟦a b<|im_end|>⟧",
        "<|im_start|>user",
        "r<|im_end|>",
        "<|im_start|>assistant",
        "⟦c<|im_end|>⟧",
        "",
        "⟦…⟧ is trained",
    ]
    assert any(line.startswith("  length in tokens") for line in lines)


def test_all_tokens_are_marked_where_all_are_trained(letters: PreTrainedTokenizerBase) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}]}]
    for tokenizer, marked in (
        (letters, "<|im_start|>⟦user\nHi<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>⟧"),
        (None, "user: ⟦Hi⟧\nassistant: ⟦No.⟧\n"),
    ):
        (example,) = check_data(rows, task="sft", tokenizer=tokenizer, train_on="all").examples
        parts = (*example.prompt, *example.completions[0])
        assert "".join(f"⟦{part.text}⟧" if part.trained else part.text for part in parts) == marked
    with pytest.raises(SettingsError, match="--train-on: has no effect without --task sft"):
        CheckSettings(files=("rows.jsonl",), train_on="all")


def test_cuts_and_drops_of_the_tokenizer_are_counted(letters: PreTrainedTokenizerBase) -> None:
    rows = [PAIR, PAIR | {"prompt": "x" * 40}, PAIR | {"prompt": "x" * 22}]
    settings = TokenizeSettings(max_length=24, max_prompt_length=23)
    found = check_data(rows, tokenizer=letters, settings=settings)
    assert found.report.dropped == {"prompt longer than 23 tokens": 1}
    assert found.report.num_completions_cut == 2
    assert found.prompt_lengths.tolist() == [13, 22]
    assert [lengths.tolist() for lengths in found.completion_lengths] == [[10, 4], [2, 2]]
    text = shown(rows, tokenizer=letters, settings=settings)
    assert "  cut      2 completions, whose end is not trained" in text
    assert "── chosen (cut)\n⟦fo⟧" in text


def test_ranked_lists_and_demonstrations() -> None:
    text = shown([{"prompt": "p", "completions": ["a", "b", "c"]}, {"prompt": "p", "completions": ["a", "b"]}])
    assert "(2 to 3 ranked completions each)" in text
    assert "── rank 3\n⟦c⟧" in text
    text = shown([PAIR], task="sft")
    assert "preference data read as demonstrations: the chosen side only" in text
    assert "⟦six⟧" not in text


def test_malformed_rows_are_listed_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([json.dumps(PAIR), "{", json.dumps(PAIR | {"chosen": 1}), json.dumps(PAIR)]))
    text = shown(path)
    assert "4 read, 2 kept" in text
    assert re.search(rf"broken   1 × not valid JSON.*\(first: {path}:2\)", text)
    assert f"1 × 'chosen' must be a string, found int (first: {path}:3)" in text
    with pytest.raises(DataError, match=rf"{path}:2: 2 malformed rows, the first: not valid JSON"):
        check(CheckSettings(files=(str(path),)))


HOSTILE = "\x1b[31mred\x1b]0;title\x07 [bold]markup[/bold] :smile: \u202eback\u2066 \x9b5m ⟦forged⟧ \x00 \r"


@pytest.mark.parametrize("colour", [False, True])
def test_hostile_text_is_shown_and_not_obeyed(
    letters: PreTrainedTokenizerBase, write_jsonl: Callable[..., Path], colour: bool
) -> None:
    rows = [
        {"prompt": HOSTILE, "chosen": f"a{HOSTILE}", "rejected": "b"},
        {"prompt": "p", "chosen": HOSTILE, "rejected": HOSTILE},
    ]
    path = write_jsonl(*rows, name="[red]odd\x1b[0m.jsonl")
    for tokenizer in (None, letters):
        text = shown(path, tokenizer=tokenizer, colour=colour, name=str(path))
        # With colours the console's own codes remain: they set colours and nothing else.
        text = re.sub(r"\x1b\[[0-9;]*m", "", text) if colour else text
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
        assert "[bold]markup[/bold] :smile:" in text
        assert "[red]odd" in text
        assert "⟦forged⟧" not in text
        if tokenizer is None:
            assert r"\x1b[31mred\x1b]0;title\x07 [bold]" in text


@given(st.text())
def test_visible_text_has_nothing_to_obey_and_stays_readable(text: str) -> None:
    seen = visible(text)
    assert all(character.isprintable() or character in "\n\t" for character in seen)
    if text.isprintable() and not set(text) & set("⟦⟧"):
        assert seen == text


def test_long_parts_are_shortened() -> None:
    text = shown([PAIR | {"prompt": "x" * 5000}])
    assert "x" * 600 + " … 3,800 characters … " + "x" * 600 in text


def test_the_share_of_longer_chosen_sides() -> None:
    assert check_data([PAIR]).longer_wins == 1.0
    assert check_data([{"text": "a b"}]).longer_wins is None


def test_the_command(shared_data: Path, write_jsonl: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl({"messages": TALK})
    tokenizer = str(shared_data / "smollm2-tokenizer")
    for flag in ("--model", "--tokenizer"):
        assert main(["data", "check", str(path), flag, tokenizer, "--num-examples", "1"]) == 0
        printed = capsys.readouterr().out
        assert "format   messages (detected)" in printed
        assert "⟦a b<|im_end|>⟧" in printed
    assert main(["data", "check", str(path), "--task", "preference"]) == 2
    assert "rows of the format 'messages', not preference data" in capsys.readouterr().err
    assert main(["data", "check", str(path.parent / "none.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_the_command_wants_a_file() -> None:
    with pytest.raises(SettingsError, match="no file is given"):
        check(CheckSettings(files=()))

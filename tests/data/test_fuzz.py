"""Whatever bytes or rows come in: records or a ``DataError`` with a place, never anything else."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from trueup.data.chat import tokenize_group
from trueup.data.dialogues import hh_conversation, split_at_turns
from trueup.data.formats import FORMATS, read_examples
from trueup.data.report import ReadReport
from trueup.data.rows import Row, read_rows
from trueup.data.settings import TokenizeSettings
from trueup.errors import DataError
from trueup.records import RankedCompletions

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "a b", "", "<|im_end|>"])
WORDS = st.text(max_size=6) | st.sampled_from(
    ["\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c", "Human:", "\n\nAssistant:", "<|im_end|>", " "]
)
TURN = st.fixed_dictionaries({"role": ROLES, "content": WORDS})
MESSAGE = TURN | st.fixed_dictionaries({"from": ROLES, "value": WORDS})
CELL = WORDS | st.lists(MESSAGE, max_size=4) | st.lists(WORDS, max_size=4) | st.lists(st.floats(), max_size=4) | JSON
COLUMNS = [
    *("prompt", "question", "completion", "answer", "chosen", "rejected", "messages", "conversations", "text"),
    *(
        "instruction",
        "input",
        "output",
        "completions",
        "steps",
        "labels",
        "ratings",
        "label",
        "scores",
        "ranks",
        "margin",
        "score_chosen",
        "score_rejected",
        "system",
    ),
]
ROW = st.dictionaries(st.sampled_from(COLUMNS), CELL, min_size=1, max_size=5)


def _read(path: Path) -> None:
    """Every row, and the error that may end them, names the file."""
    found: list[Row | DataError] = []
    try:
        found += read_rows(path)
    except DataError as error:
        found.append(error)
    assert all(str(each.where).startswith(str(path)) for each in found)


@quick
@given(
    kind=st.sampled_from(["jsonl", "json", "csv", "parquet", "jsonl.gz", "json.zst"]), content=st.binary(max_size=80)
)
@example(kind="json", content=b"[" * 5000)
@example(kind="csv", content=b'a\n"\x00')
def test_any_bytes(tmp_path: Path, kind: str, content: bytes) -> None:
    path = tmp_path / f"data.{kind}"
    path.write_bytes(content)
    _read(path)


@quick
@given(records=st.lists(ROW, max_size=4), at=st.integers(0, 2000), junk=st.binary(max_size=4))
def test_a_good_file_with_a_piece_of_junk(tmp_path: Path, records: list[Any], at: int, junk: bytes) -> None:
    for kind, content in (
        ("jsonl", "".join(json.dumps(record) + "\n" for record in records).encode()),
        ("json", json.dumps(records, indent=1).encode()),
        ("jsonl.gz", gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode())),
    ):
        path = tmp_path / f"data.{kind}"
        path.write_bytes(content[:at] + junk + content[at + 1 :])
        _read(path)


@quick
@given(records=st.lists(JSON | ROW, max_size=5))
def test_written_and_read_is_the_same(tmp_path: Path, records: list[Any]) -> None:
    """JSON lines and a JSON array hold the same rows; what is no row is refused by both."""
    rows = [record if isinstance(record, dict) else {"text": str(record)} for record in records]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    one, other = ([repr(row.fields) for row in read_rows(tmp_path / name)] for name in ("a.jsonl", "a.json"))
    assert one == other == [repr(row) for row in json.loads(json.dumps(rows))]


@settings(max_examples=300, deadline=None)
@given(row=ROW, data_format=st.sampled_from(["auto", *FORMATS]), task=st.sampled_from(["sft", "preference", "process"]))
def test_any_row_is_read_dropped_or_refused(row: dict[str, Any], data_format: str, task: Any) -> None:
    report = ReadReport()
    refused = None
    examples: list[RankedCompletions] = []
    try:
        examples += read_examples([row], task=task, data_format=data_format, report=report)
    except DataError as error:
        refused = error
    if refused:
        assert refused.way_out
        return
    assert report.num_rows == 1
    assert len(examples) == report.num_kept == 1 - sum(report.dropped.values())
    for found in examples:
        assert len(found.completions) >= (2 if task == "preference" and found.desirable is None else 1)
        assert (found.steps is None) == (task != "process")
        assert len({isinstance(text, str) for text in (found.prompt, *found.completions)}) == 1
        assert all(text not in found.completions[:index] for index, text in enumerate(found.completions))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["Human", "Assistant"]), WORDS), max_size=5), WORDS)
def test_hh_strings_lose_only_labels_and_space(turns: list[tuple[str, str]], stray: str) -> None:
    text = "".join(f"\n\n{label}: {content}" for label, content in turns) + stray
    try:
        found = hh_conversation(text)
    except DataError:
        return
    assert all(one["role"] != other["role"] for one, other in pairwise(found))
    said = "".join("".join(str(turn["content"]).split()) for turn in found)
    remaining = iter("".join(text.split()))
    assert all(character in remaining for character in said)  # in order: a subsequence of what was written


@settings(max_examples=100, deadline=None)
@given(st.lists(TURN, max_size=4), st.lists(TURN, max_size=4))
def test_a_cut_loses_nothing(chosen: list[Any], rejected: list[Any]) -> None:
    prompt, *sides = split_at_turns(tuple(chosen), tuple(rejected))
    assert prompt + sides[0] == tuple(chosen)
    assert prompt + sides[1] == tuple(rejected)
    assert not prompt or prompt[-1]["role"] == "user"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=2, max_size=5),
    as_chat=st.booleans(),
    max_length=st.integers(2, 60),
    keep_end=st.booleans(),
)
def test_tokens_obey_the_limits(
    letters: PreTrainedTokenizerBase, texts: list[str], as_chat: bool, max_length: int, keep_end: bool
) -> None:
    """At most ``max_length`` tokens; a prompt of one at least; the end token where and only where nothing was cut."""
    prompt, *completions = texts
    how = TokenizeSettings(max_length=max_length, overlong_prompt="keep_end" if keep_end else "drop", wrap_text=as_chat)
    report = ReadReport(num_rows=1)
    found = tokenize_group(letters, RankedCompletions(prompt=prompt, completions=tuple(completions)), how, report)
    if found is None:
        assert sum(report.dropped.values()) == 1
        return
    assert 1 <= len(found.prompt) < max_length
    end = letters.eos_token_id
    for completion in found.completions:
        assert 1 <= len(completion.tokens) <= max_length - len(found.prompt)
        assert completion.tokens.tolist().count(end) == (not completion.truncated)
        assert completion.truncated or completion.tokens[-1] == end
    assert report.num_completions_cut == sum(completion.truncated for completion in found.completions)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(row=ROW, data_format=st.sampled_from(["auto", *FORMATS]), task=st.sampled_from(["sft", "preference", "process"]))
def test_many_rows(row: dict[str, Any], data_format: str, task: Any) -> None:
    test_any_row_is_read_dropped_or_refused.hypothesis.inner_test(row, data_format, task)  # type: ignore[attr-defined]

from __future__ import annotations

import json

import pytest

from trueup.errors import CheckpointError, SettingsError
from trueup.runs.line_file import append, begun, check_free, keep_lines

LINES = [{"n": 0, "text": "a\nb"}, {"n": 1, "text": "é"}, {"n": 22, "text": ""}]


def read(path, resume="auto"):
    return begun(path, resume, "numbers", '{"n": ', lambda line: line["n"])


def test_a_file_cut_anywhere_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    assert read(path) == []
    append(path, LINES[:2])
    append(path, LINES[2:])
    content = path.read_bytes()
    assert read(path) == [0, 1, 22]
    assert path.read_bytes() == content
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = sum(end <= size for end in ends)
        assert read(path) == [0, 1, 22][:whole], size
        assert path.read_bytes() == content[: ends[whole - 1] if whole else 0]


def test_lines_are_json_and_stay_as_written(tmp_path):
    path = tmp_path / "lines.jsonl"
    append(path, LINES)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == LINES
    assert "é" in path.read_text(encoding="utf-8")
    keep_lines(path, 2)
    assert read(path) == [0, 1]
    with pytest.raises(ValueError, match="JSON"):
        append(path, [{"n": float("nan")}])
    assert read(path) == [0, 1]


@pytest.mark.parametrize(
    ("content", "number"),
    [('{"m": 1}\n', 1), ("no json\n", 1), ("[1]\n", 1), ("my notes", 1), ('{"n": 1}\n{"other": ', 2)],
)
def test_what_holds_something_else_is_left_as_it_is(tmp_path, content, number):
    path = tmp_path / "lines.jsonl"
    path.write_text(content)
    with pytest.raises(CheckpointError, match="not a line of numbers") as raised:
        read(path)
    assert raised.value.where == f"{path}:{number}"
    assert path.read_text() == content


def test_going_on_has_to_be_meant(tmp_path):
    path = tmp_path / "lines.jsonl"
    with pytest.raises(CheckpointError, match="nothing to go on with"):
        check_free(path, "yes")
    check_free(path, "no")
    check_free(path, "auto")
    append(path, LINES)
    check_free(path, "yes")
    with pytest.raises(SettingsError, match="such a file already") as raised:
        read(path, "no")
    assert "--resume auto" in str(raised.value)

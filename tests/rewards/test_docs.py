"""The snippets of the page on rewards do what it says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from trueup.errors import RewardError
from trueup.rewards.built_in import BUILT_IN

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def blocks() -> list[tuple[str, str]]:
    """Of every Python snippet: its text, and the block that follows it (empty where text does)."""
    found = re.findall(r"^```python\n(.*?)^```\n(?:\n^```\n(.*?)^```\n)?", PAGE, re.MULTILINE | re.DOTALL)
    assert len(found) == 5
    return found


def test_the_snippets_print_what_stands_below_them(confinement, tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.chdir(tmp_path)
    (own, _), *others = blocks()
    (tmp_path / "scoring.py").write_text(own)
    names: dict[str, object] = {"__name__": "snippet"}
    for code, below in others:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(code, "<stdin>", "exec"), names)
        except RewardError as error:
            printed.write(f"trueup.errors.RewardError: {error}\n")
        assert printed.getvalue() == below


def test_the_table_has_every_built_in():
    assert re.findall(r"^\| `([\w-]+)(?::PATTERN)?` \|", PAGE, re.MULTILINE)[: len(BUILT_IN)] == [
        "exact",
        "regex",
        "format",
        "math",
        "length",
        "overlong",
        "sentiment",
        "code",
        "reasoning-gym",
    ]
    assert len(BUILT_IN) == 9

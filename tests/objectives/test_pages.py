"""The documentation's snippets run as written, in order, and print what the page says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = [
    "objectives/" + name
    for name in (
        *("returns", "advantages", "policy_gradient", "value", "divergence", "reduce", "logprobs"),
        *("preference", "preference_losses", "pointwise", "reference_free"),
    )
]
PAGES += ["mdp", "control", *sorted(f"classical/{page.stem}" for page in (DOCS / "classical").glob("[0-9]*.md"))]
BLOCK = re.compile(r"```python\n(?P<code>.*?)```(?:\n\n```text\n(?P<output>.*?)```)?", re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_snippets(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where runs are written
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block["code"], page, "exec"), namespace)
        assert printed.getvalue() == (block["output"] or "")

"""The rows that the documentation shows are of the formats that it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

from trueup.data.formats import FORMATS, detect_format, read_examples
from trueup.data.report import ReadReport
from trueup.data.rows import Row

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def test_every_row_of_the_tables_is_what_it_is_called() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\{.*\})` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(FORMATS)
    for name, text in rows:
        row = json.loads(text)
        assert detect_format([Row("page", row)], FORMATS[name].task) == name
        assert len(list(read_examples([row], task=FORMATS[name].task, report=ReadReport()))) == 1

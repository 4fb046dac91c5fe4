"""Tables of numbers as they are shown."""

from __future__ import annotations

import pytest

from trueup.cli.tables import rounded, show, table_of


def test_rounded() -> None:
    assert [rounded(number) for number in (220.4, 0.0123, 2.8e-15, 15.0)] == ["220", "0.012", "0", "15"]


def test_a_table_has_the_width_it_needs_where_nothing_limits_it(capsys: pytest.CaptureFixture[str]) -> None:
    table = table_of("state", *(f"a long name of column {number}" for number in range(4)))
    table.add_row("s", *"1234")
    show(table)
    header, *_ = (line for line in capsys.readouterr().out.splitlines() if line.strip())
    assert header.split("  ")[1].strip() == "state"
    assert header.rstrip().endswith("a long name of column 3")

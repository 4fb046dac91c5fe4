"""Tables of numbers on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def table_of(*columns: str, title: str | None = None) -> Table:
    """An empty table: the first column to the left, numbers to the right."""
    from rich import box
    from rich.table import Table

    table = Table(columns[0], title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in columns[1:]:
        table.add_column(name, justify="right")
    return table


def show(table: Table) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a file has no width to fit into
    console.print(table)


def rounded(number: float) -> str:
    """Two digits, without an exponent where it can be; what float64 loses in a sum counts as 0."""
    return f"{float(f'{number:.2g}'):g}" if abs(number) > 1e-12 else "0"

"""What became of the rows of a source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from trueup.data.data_format import Dropped, Note
from trueup.data.rows import Row
from trueup.errors import DataError

Record = TypeVar("Record")


@dataclass(slots=True, kw_only=True)
class ReadReport:
    """What became of the rows: counts, reasons and the first place of each. Filled while the rows are read."""

    format: str = ""
    detected: bool = False
    side: str = ""
    """Of preferences that are read as demonstrations: the side that is taken."""
    num_rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason → rows that were left out."""
    first_dropped: dict[str, str] = field(default_factory=dict)
    """Reason → where the first of them is."""
    noted: dict[str, int] = field(default_factory=dict)
    """Rows that were kept, but changed or worth a look: what → how many."""
    first_noted: dict[str, str] = field(default_factory=dict)
    malformed: list[DataError] = field(default_factory=list)
    """Rows that can't be read at all; only filled by readers that go on after them."""
    num_completions_cut: int = 0
    """Completions cut at the length limit: their end token is missing and not trained."""
    num_prompts_cut: int = 0

    @property
    def num_kept(self) -> int:
        return self.num_rows - sum(self.dropped.values()) - len(self.malformed)

    def drop(self, reason: str, where: str) -> None:
        """Count a row that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.first_dropped.setdefault(reason, where)

    def note(self, what: str, where: str) -> None:
        """Count a row that is kept, but changed."""
        self.noted[what] = self.noted.get(what, 0) + 1
        self.first_noted.setdefault(what, where)

    def summary(self) -> str:
        """All of it in one line."""
        parts = [f"format {self.format}{' (detected)' if self.detected else ''}, {self.num_rows:,} rows"]
        if self.side:
            parts.append(f"the {self.side} side as demonstration")
        parts.append(f"{self.num_kept:,} kept")
        parts += [f"{n:,} dropped: {why} (first: {self.first_dropped[why]})" for why, n in self.dropped.items()]
        if self.malformed:
            parts.append(f"{len(self.malformed):,} malformed (first: {self.malformed[0].where})")
        if self.num_completions_cut:
            parts.append(f"completions cut at the length limit: {self.num_completions_cut:,}")
        if self.num_prompts_cut:
            parts.append(f"prompts cut: {self.num_prompts_cut:,}")
        return "; ".join(parts)


def read_all(
    rows: Iterable[Row | DataError],
    read: Callable[[Row, Note], Record],
    report: ReadReport,
    *,
    wanted: str,
    strict: bool = True,
) -> Iterator[Record]:
    """What ``read`` makes of each row; ``report`` is filled on the way.

    A row that ``read`` drops (``Dropped``) is counted and left out. A malformed one raises ``DataError`` with its
    place, and if nothing better is known with what is ``wanted`` as the way out; with ``strict=False`` it is collected
    in the report and reading goes on.
    """
    for row in rows:
        report.num_rows += 1
        seen: list[str] = []
        try:
            if isinstance(row, DataError):
                raise row
            record = read(row, seen.append)
        except Dropped as reason:
            report.drop(str(reason), row.where or "")
        except (DataError, RecursionError) as error:
            malformed = row if isinstance(row, DataError) else _at(row, error, wanted)
            if strict:
                raise malformed from None
            report.malformed.append(malformed)
        else:
            for what in dict.fromkeys(seen):
                report.note(what, row.where)
            yield record


def _at(row: Row, error: DataError | RecursionError, wanted: str) -> DataError:
    if isinstance(error, RecursionError):
        return DataError("nested too deeply", where=row.where, way_out="flatten or remove the row")
    return DataError(error.what, where=row.where, way_out=error.way_out or wanted)

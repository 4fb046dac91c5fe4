"""How far a run is: a live bar in a terminal, a plain line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

Item = TypeVar("Item")

_WINDOW_SECONDS = 30.0
"""Tokens per second are counted over this time: long enough to be steady, short enough to show a change."""


class RunProgress:
    """Steps, loss, tokens per second, time elapsed and left.

        with RunProgress(100, title="sft") as progress:
            for step in range(100):
                ...
                progress.step(num_tokens=4096, metrics={"loss": 1.2})

    ``done`` are steps of an earlier part of the run (resume): they are shown, and don't count for the speed.
    ``quiet`` prints nothing. Where the output is no terminal, a plain line comes every ``seconds_between_lines``, and
    one at the end. ``aside`` shows what is done between the steps (an evaluation): it takes no part in the time left.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        title: str = "",
        done: int = 0,
        quiet: bool = False,
        seconds_between_lines: float = 10.0,
        console: Console | None = None,
    ) -> None:
        self.num_steps, self.title, self.done, self.quiet = num_steps, title, done, quiet
        self._first = self._last_line_step = done
        self._console = console or Console(highlight=False)
        self._seconds_between_lines = seconds_between_lines
        self._started = self._last_line = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque([(self._started, 0)])
        self._num_tokens = 0
        self._metrics: dict[str, float] = {}
        self._bar: Progress | None = None
        self._seconds_aside = 0.0

    def __enter__(self) -> Self:
        self._started = self._last_line = time.monotonic()
        self._recent = deque([(self._started, self._num_tokens)])
        if self._console.is_terminal and not self.quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[line]}"),
            )
            self._bar = Progress(*columns, console=self._console, refresh_per_second=2)
            self._task = self._bar.add_task(self.title, total=self.num_steps, completed=self.done, line="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif not self.quiet and self._last_line_step != self.done:
            self._print_line()

    def step(self, *, num_steps: int = 1, num_tokens: int = 0, metrics: Mapping[str, float] | None = None) -> None:
        """One step is done, or several: ``num_tokens`` tokens, and these ``metrics`` (shown until replaced)."""
        now = time.monotonic()
        self.done += num_steps
        self._num_tokens += num_tokens
        self._metrics.update(metrics or {})
        self._recent.append((now, self._num_tokens))
        while len(self._recent) > 2 and now - self._recent[0][0] > _WINDOW_SECONDS:
            self._recent.popleft()
        if self._bar:
            self._bar.update(self._task, completed=self.done, line=self.line)
        elif not self.quiet and now - self._last_line >= self._seconds_between_lines:
            self._print_line()

    def aside(self, items: Sequence[Item], title: str) -> Iterator[Item]:
        """The items, one by one, with a bar (or now and then a line) of their own, and the time left for them."""
        with self.meter(len(items), title) as advance:
            for item in items:
                yield item
                advance(1)

    @contextmanager
    def meter(
        self, total: int, title: str, *, at_most: bool = False, part_of_step: bool = False
    ) -> Iterator[Callable[[int], None]]:
        """For what is done between the steps: call what this gives with the number of items done since the last call.

        ``at_most``: there may turn out to be fewer than ``total``, and so the time left is a bound. ``part_of_step``:
        it is done for every step, and so belongs to the time that steps take.
        """
        began = last_line = time.monotonic()
        done = 0
        task = self._bar.add_task(title, total=total, line="") if self._bar else None

        def advance(number: int) -> None:
            nonlocal done, last_line
            done += number
            now = time.monotonic()
            left = clock((now - began) / max(done, 1) * (total - done))
            line = f"{done:,}/{total:,} · {clock(now - began)} elapsed · {'at most ' * at_most}{left} left"
            if self._bar and task is not None:
                self._bar.update(task, completed=done, line=line)
            elif not self.quiet and now - last_line >= self._seconds_between_lines:
                last_line = now
                self._console.print(f"{title} {line}", markup=False, soft_wrap=True)

        try:
            yield advance
        finally:
            if self._bar and task is not None:
                self._bar.remove_task(task)
            spent = 0.0 if part_of_step else time.monotonic() - began
            self._seconds_aside += spent
            # The tokens of steps before and after are not to be divided by the time between them.
            self._recent = deque((at + spent, tokens) for at, tokens in self._recent)

    def say(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one; nothing when quiet."""
        if not self.quiet:
            self._console.print(text, markup=False, soft_wrap=True)

    @property
    def elapsed(self) -> float:
        """Seconds since the run, or this part of it, was started."""
        return time.monotonic() - self._started

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over the last half minute; 0 before the first step."""
        (start, before), (end, now) = self._recent[0], self._recent[-1]
        return (now - before) / (end - start) if end > start else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Steps left times the mean time of a step so far; None before the first step. What may come between the steps
        is not known, and not counted."""
        new = self.done - self._first
        return (self.elapsed - self._seconds_aside) / new * (self.num_steps - self.done) if new else None

    @property
    def line(self) -> str:
        """One line: step, metrics, tokens per second (where there are tokens), elapsed, left."""
        left = self.seconds_left
        parts = [
            f"step {self.done}/{self.num_steps}",
            *(f"{name} {value:.4g}" for name, value in self._metrics.items()),
            f"{self.tokens_per_second:,.0f} tok/s" if self._num_tokens else "",
            f"{clock(self.elapsed)} elapsed",
            f"{clock(left)} left" if left is not None else "",
        ]
        return " · ".join(part for part in parts if part)

    def _print_line(self) -> None:
        self._last_line, self._last_line_step = time.monotonic(), self.done
        self._console.print(f"{self.title} {self.line}".strip(), markup=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """``75`` → ``1:15``, ``3675`` → ``1:01:15``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"

"""Leaving a loop cleanly when the user, or the machine's scheduler, asks for it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class Stopped(KeyboardInterrupt):
    """The run ended because a signal asked for it. The text says what is saved and how to go on."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.exit_code = 128 + number


@dataclass(slots=True)
class Interrupt:
    """Whether the run was asked to stop, and by which signal."""

    number: int | None = None

    @property
    def requested(self) -> bool:
        return self.number is not None

    def stop(self, text: str) -> Stopped:
        """What to raise when the run has ended as asked."""
        return Stopped(text, self.number or signal.SIGINT)


@contextmanager
def interrupts() -> Iterator[Interrupt]:
    """While open, the first SIGINT or SIGTERM only sets ``requested``; the next raises ``Stopped`` at once.

    The loop looks at ``requested`` after each step, writes its checkpoint and raises ``Stopped``, a
    ``KeyboardInterrupt``, whose exit code the command line ends with: 128 + the signal's number, so 130 for SIGINT and
    143 for SIGTERM. Outside the main thread signals can't be caught: there it changes nothing.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def handle(number: int, frame: object) -> None:
        again, interrupt.number = interrupt.requested, number
        if again:
            raise interrupt.stop("stopped at once: --resume auto goes on from the last checkpoint, if there is one")
        # Not through sys.stderr: the signal may have come in the middle of a write to it, which can't be entered twice.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step, with a checkpoint; once more to stop at once\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Leaving a loop cleanly when the user, or the machine's scheduler, asks for it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class Interrupt:
    """Whether the run was asked to stop."""

    requested: bool = False


@contextmanager
def interrupts() -> Iterator[Interrupt]:
    """While open, the first SIGINT or SIGTERM only sets ``requested``; the next raises ``KeyboardInterrupt`` at once.

    The loop looks at ``requested`` after each step, writes its checkpoint and raises ``KeyboardInterrupt``, which the
    command line turns into exit code 130. Outside the main thread signals can't be caught: there it changes nothing.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def handle(number: int, frame: object) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True
        print("\nstopping after this step, with a checkpoint; once more to stop at once", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

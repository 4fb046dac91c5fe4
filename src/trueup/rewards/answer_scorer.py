"""Answers scored by a library in a process beside this one, so that no answer can stop or change the run."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

from trueup.errors import RewardError
from trueup.rewards.sandbox import worker
from trueup.rewards.sandbox.run import MEBI, Limits, check_confinement, confined, refusal, source_of, write_all

START_SECONDS = 120.0
"""How long a worker may take until it is ready."""

SLACK_SECONDS = 60.0
"""How much longer than its answers may take together a worker may take to give their scores."""

MEMORY_BYTES = 4096 * MEBI
"""Address space of a worker, and of each of the processes that it scores in."""


class AnswerScorer:
    """A worker (``sandbox.worker``) that is started when it is first needed, and again when it has come to an end.

    ``confined``: it runs where untrusted code may run, for scorers that evaluate what an answer says. Otherwise it is a
    process like any other. Each answer has ``seconds`` of processor time and a process of its own in either case.
    """

    def __init__(self, kind: str, *, confined: bool, seconds: float) -> None:
        if confined:
            check_confinement()
        self.kind, self.confined, self.seconds = kind, confined, seconds
        self._at_once = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
        self._worker: Worker | None = None

    def scores(self, requests: Sequence[Sequence[Any] | None]) -> list[float | None]:
        """The score of each request; None where there is no request, or the scorer finds nothing to score. Equal
        requests, as a policy that has learned to answer makes them, are scored once.

        An answer that can't be scored, because scoring it raises, hangs, or ends the process, has the score 0: it is
        the answer that makes the difference. There is one warning for each call, with the first reason. Raises
        ``RewardError`` for a request that makes no sense whatever the answer, and where the worker can't do its work.
        """
        asked = [index for index, request in enumerate(requests) if request is not None]
        scores: list[float | None] = [None] * len(requests)
        if not asked:
            return scores
        keys = [json.dumps(requests[index]) for index in asked]
        different = {key: requests[index] for key, index in zip(keys, asked, strict=True)}
        wanted = list(different.values())
        try:
            found = self._ask(wanted)
        except WorkerEnded:  # an answer can do that; which one shows by itself
            found = [self._alone(request) for request in wanted]
        outcome_of = dict(zip(different, found, strict=True))
        outcomes = [outcome_of[key] for key in keys]
        for index, (kind, value) in zip(asked, outcomes, strict=True):
            if kind == "failed":
                raise RewardError(value, sample=index)
            scores[index] = value if kind == "score" else 0.0
        broken = [reason for kind, reason in outcomes if kind == "ended"]
        if broken:
            warnings.warn(
                f"reward '{self.kind}': {len(broken)} of {len(outcomes)} answers can't be scored and count as wrong "
                f"(the first: {broken[0]})",
                stacklevel=2,
            )
        return scores

    def _ask(self, requests: Sequence[Any]) -> list[Any]:
        if self._worker is None or not self._worker.is_alive:
            self._worker = Worker(self.kind, confined=self.confined, at_once=self._at_once)
        message = {"requests": requests, "seconds": self.seconds, "at_once": self._at_once}
        limit = SLACK_SECONDS + worker.PATIENCE * self.seconds * len(requests)
        return self._worker.ask(message | {"memory_bytes": MEMORY_BYTES}, limit)

    def _alone(self, request: Any) -> Any:
        try:
            return self._ask([request])[0]
        except WorkerEnded as error:
            return ["ended", error.what]


class WorkerEnded(RewardError):
    """A worker that came to an end, or doesn't answer, in the middle of its work."""


class Worker:
    """One process that scores answers. Ends with this object, or with this process."""

    def __init__(self, kind: str, *, confined: bool, at_once: int) -> None:
        self.kind = kind
        opened = contextlib.ExitStack()
        self._finalizer = weakref.finalize(self, opened.close)
        self.process, self._answers, self._setup = (_confined if confined else _beside)(kind, opened, at_once)
        self._unread = b""
        try:
            reason = self._read(time.monotonic() + START_SECONDS)
        except WorkerEnded as error:
            reason = error.what
        if reason is not None:
            raise RewardError(f"the scorer can't be started: {reason}", where=f"reward '{kind}'")

    @property
    def is_alive(self) -> bool:
        return self._finalizer.alive and self.process.poll() is None

    def ask(self, message: dict[str, Any], seconds: float) -> Any:
        """What the worker answers. Raises ``WorkerEnded``, and ends the worker, where it doesn't."""
        try:
            with contextlib.suppress(BrokenPipeError):  # reading tells
                write_all(self.process.stdin, (json.dumps(message) + "\n").encode())
            return self._read(time.monotonic() + seconds)
        except BaseException:
            self._finalizer()
            raise

    def _read(self, deadline: float) -> Any:
        """One line of JSON."""
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(self._answers.fileno(), 1 << 16) if ready else b""
            if not piece:
                setup = self._setup.read() if self._setup is not None and ready else b""
                if setup:
                    raise refusal(setup.decode(errors="replace"))
                what = "came to an end" if ready else "did not answer"
                raise WorkerEnded(f"the process that scores {what}", where=f"reward '{self.kind}'")
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)


def _confined(kind: str, opened: contextlib.ExitStack, at_once: int) -> tuple[subprocess.Popen[bytes], Any, Any]:
    limits = Limits(
        cpu_seconds=10**9, memory_bytes=MEMORY_BYTES, num_processes=at_once + 8, open_files=256, wall_seconds=10**9
    )
    running = opened.enter_context(confined(source_of(worker), kind, "4", limits=limits, quiet=True))
    return running.process, running.outcomes, running.setup


def _beside(kind: str, opened: contextlib.ExitStack, at_once: int) -> tuple[subprocess.Popen[bytes], Any, Any]:
    readable, writable = os.pipe()
    answers = opened.enter_context(os.fdopen(readable, "rb", buffering=0))
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", source_of(worker), kind, str(writable)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        pass_fds=(writable,),
        start_new_session=True,
    )
    os.close(writable)
    opened.callback(process.wait)
    opened.callback(process.kill)
    opened.enter_context(process.stdin)  # pyright: ignore[reportArgumentType]
    return process, answers, None

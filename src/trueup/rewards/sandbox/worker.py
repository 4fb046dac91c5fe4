"""Scores answers one by one, each in a process of its own that can be ended. Run as ``python -c``, standing alone.

The arguments are the kind of scorer, and the descriptor to answer on. Standard input is a line of JSON per batch:
``{"requests": [[…], …], "seconds": …, "memory_bytes": …, "at_once": …}``. For each comes a line back: in the order of
the requests ``["score", NUMBER or null]``, ``["failed", REASON]`` (the request makes no sense, whatever the answer) or
``["ended", REASON]`` (scoring this answer raised, ended the process, or took too long). The first line that comes says
that the scorer is ready: null, or why it is not.

What a scorer needs is imported once; every answer is scored in a fork, so that one which hangs, fills the memory or
breaks the interpreter costs its own score and nothing else.
"""

import functools
import json
import math
import os
import resource
import secrets
import selectors
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

PATIENCE = 3
"""How many times its processor time an answer may take: on a machine that is busy, time passes without work."""

Scorer = Callable[..., Callable[[], "float | None"]]
"""Takes a request and gives what scores the answer in it: only that sees the answer, and runs in the fork."""


def math_scorer() -> Scorer:
    """Whether an answer equals the given one, as math-verify sees it; None for a given answer without mathematics."""
    import logging

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # it tells of every answer that it can't read

    untimed: dict[str, Any] = {"parsing_timeout": None}  # the fork is timed

    def given(answer: str) -> list[Any]:
        answer = answer.rpartition("####")[2].strip()  # as GSM8K has it
        is_text = "$" in answer or "\\boxed" in answer or "\\(" in answer or "\\[" in answer
        return parse(answer if is_text else f"\\boxed{{{answer}}}", **untimed)

    verify(given("$1/2$"), parse("0.5", **untimed), timeout_seconds=None)  # what is built at first use is there for all

    def scorer(completion: str, answer: str) -> Callable[[], float | None]:
        def score() -> float | None:
            gold = given(answer)
            if not gold:
                return None
            return float(verify(gold, parse(completion, **untimed), timeout_seconds=None))

        return score

    return scorer


def gym_scorer() -> Scorer:
    """The score that a task of reasoning-gym gives an answer to one of its entries, which is made anew."""
    import reasoning_gym
    from reasoning_gym.utils import extract_answer

    @functools.lru_cache(maxsize=64)
    def dataset(task: str, settings: str) -> Any:
        return reasoning_gym.create_dataset(task, **json.loads(settings))

    def scorer(completion: str, task: str, settings: str, index: int, answer: str | None) -> Callable[[], float]:
        entry = dataset(task, settings)[index]
        if entry["answer"] != answer:
            raise LookupError(f"entry {index} of {task} is another one here: was it made by another version?")

        def score() -> float:
            tagged = extract_answer(completion)
            return float(dataset(task, settings).score_answer(completion.strip() if tagged is None else tagged, entry))

        return score

    return scorer


SCORERS: dict[str, Callable[[], Scorer]] = {"math": math_scorer, "reasoning-gym": gym_scorer}


def start(score: Callable[[], "float | None"], key: str, seconds: float, memory_bytes: int) -> tuple[int, int]:
    """A process that scores an answer, and the pipe on which it says so, with the key."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writable)
        return pid, readable
    try:
        os.dup2(writable, 3)
        os.closerange(4, 256)  # nobody else's answer
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 1))
        try:
            answer: list[Any] = ["score", score()]
        except Exception as error:
            answer = ["ended", f"{type(error).__name__}: {error}"[:500]]
        os.write(3, json.dumps([key, *answer]).encode())
    finally:
        os._exit(0)


def read_answer(content: bytes, key: str) -> list[Any]:
    """What a process says, if it has the key and is a score in [0, 1], None, or why there is none."""
    try:
        said, kind, value = json.loads(content)
        if said == key and (kind == "ended" or value is None or 0 <= float(value) <= 1):
            return [kind, value]
    except (ValueError, TypeError, RecursionError):
        pass
    return ["ended", "the scorer came to an end without a score"]


def score_all(
    scorer: Scorer, requests: list[list[Any]], seconds: float, memory_bytes: int, at_once: int
) -> list[list[Any]]:
    """The outcome of every request, ``at_once`` of them at a time."""
    late = ["ended", f"no score within {seconds:g} s"]
    outcomes: list[list[Any]] = [late] * len(requests)
    waiting = list(reversed(range(len(requests))))
    running: dict[int, tuple[int, int, float]] = {}  # pipe → process, request, deadline
    key = secrets.token_hex(16)  # so that an answer that is evaluated can't write a score of its own without looking
    with selectors.DefaultSelector() as selector:
        while waiting or running:
            while waiting and len(running) < at_once:
                index = waiting.pop()
                try:
                    score = scorer(*requests[index])
                except Exception as error:
                    outcomes[index] = ["failed", f"{type(error).__name__}: {error}"]
                    continue
                pid, pipe = start(score, key, seconds, memory_bytes)
                running[pipe] = pid, index, time.monotonic() + PATIENCE * seconds
                selector.register(pipe, selectors.EVENT_READ)
            wait = min((deadline for _, _, deadline in running.values()), default=0.0) - time.monotonic()
            ready = {key.fd for key, _ in selector.select(max(0.0, wait))}
            for pipe, (pid, index, deadline) in list(running.items()):
                if pipe not in ready and time.monotonic() < deadline:
                    continue
                if pipe in ready:
                    outcomes[index] = read_answer(os.read(pipe, 4096), key)
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
                    outcomes[index] = late
                selector.unregister(pipe)
                os.close(pipe)
                del running[pipe]
    return outcomes


def main() -> None:
    kind, descriptor = sys.argv[1], int(sys.argv[2])
    try:
        scorer = SCORERS[kind]()
    except Exception as error:
        os.write(descriptor, (json.dumps(f"{type(error).__name__}: {error}") + "\n").encode())
        return
    os.write(descriptor, b"null\n")
    for line in sys.stdin:
        outcomes = score_all(scorer, **json.loads(line))
        content = (json.dumps(outcomes) + "\n").encode()
        while content:
            content = content[os.write(descriptor, content) :]


if __name__ == "__main__":
    main()

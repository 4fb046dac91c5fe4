"""Calling rewards: time limits, concurrency, and of one that fails the sample it fails at.

What can be enforced: a function runs in a thread of its own, so that one that doesn't come back is noticed and named;
Python can't end the thread, which is left behind and doesn't keep the process from ending. A function that never lets
go of the interpreter (a regular expression of ``re`` that explodes, a C extension) can't be noticed at all. An
``async`` function is cancelled.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import math
import numbers
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from trueup.errors import RewardError, TrueupError
from trueup.rewards.samples import Samples, StepScores

Scores = Sequence[float | None] | StepScores
RewardFunction = Callable[..., Scores | Coroutine[Any, Any, Scores]]
"""Called with the keywords ``prompts``, ``completions``, ``completion_ids`` and the columns of the data, each a list
with an entry for every sample; gives one score for each, None where it doesn't apply. May be ``async``."""


@dataclass(frozen=True, eq=False)
class Reward:
    """A reward function and what messages and metrics call it.

    ``timed``: it is somebody's own code and is held to a time limit. What is built in keeps its own.
    ``scores_steps``: it gives ``StepScores``.
    """

    name: str
    function: RewardFunction
    timed: bool = True
    scores_steps: bool = False

    @cached_property
    def is_async(self) -> bool:
        call = self.function
        return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(getattr(call, "__call__", None))  # noqa: B004

    def call(self, samples: Samples) -> Any:
        """What the function gives, or of an ``async`` one the coroutine.

        A function without ``**columns`` gets those keywords that it has.
        """
        keywords = samples.keywords()
        parameters = inspect.signature(self.function).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            taken = {parameter.name for parameter in parameters}
            keywords = {name: value for name, value in keywords.items() if name in taken}
        return self.function(**keywords)


class Overtime(Exception):
    """A call that did not come back in time; ``place``: where it was, if known."""

    def __init__(self, place: str | None = None) -> None:
        self.place = place
        super().__init__(place)


class Caller:
    """Calls rewards with one time limit for each: ``async`` ones side by side, and meanwhile the others in turn."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """One event loop for all calls: what an ``async`` function keeps open belongs to its loop."""
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
        return loop

    def results(self, rewards: Sequence[Reward], samples: Samples) -> list[Any]:
        """What each reward gives, unchecked.

        Raises ``RewardError`` for one that raises or takes too long; what is built in may raise other ``TrueupError``s.
        """
        started = {reward: self._start(reward, samples) for reward in rewards if reward.is_async}
        try:
            found = {
                reward: self._guarded(reward, samples, lambda reward=reward: self._sync(reward, samples))
                for reward in rewards
                if not reward.is_async
            }
            for reward, future in started.items():
                found[reward] = self._guarded(reward, samples, lambda future=future: self._result(future))
        finally:
            for future in started.values():
                future.cancel()
        return [found[reward] for reward in rewards]

    def _guarded(self, reward: Reward, samples: Samples, call: Callable[[], Any]) -> Any:
        """What ``call`` gives; what it raises, as a ``RewardError`` that names the sample."""
        try:
            return call()
        except Overtime as overtime:
            raise self._too_long(reward, samples, overtime) from None
        except Exception as error:
            if reward.timed or not isinstance(error, TrueupError):
                raise self._failed(reward, samples, error) from error
            if not isinstance(error, RewardError) or error.sample is None:
                raise
            where = place_of(reward.name, samples, error.sample)
            raise RewardError(error.what, where=where, way_out=error.way_out) from error

    def _sync(self, reward: Reward, samples: Samples) -> Any:
        if not reward.timed:
            return reward.call(samples)
        return in_thread(lambda: reward.call(samples), self.timeout)

    def _start(self, reward: Reward, samples: Samples) -> concurrent.futures.Future[Any]:
        async def limited() -> Any:
            try:
                async with asyncio.timeout(self.timeout) as limit:
                    return await reward.call(samples)
            except TimeoutError:
                if not limit.expired():  # its own, of a request say
                    raise
                raise Overtime from None

        return asyncio.run_coroutine_threadsafe(limited(), self._loop)

    def _result(self, future: concurrent.futures.Future[Any]) -> Any:
        """Of a coroutine. One that blocks the loop itself can't be cancelled, but is noticed."""
        concurrent.futures.wait([future], timeout=self.timeout + 1)
        if not future.done():
            raise Overtime
        return future.result()

    def _alone(self, reward: Reward, samples: Samples) -> Any:
        """One call as part of the search for the sample, in the thread of the search."""
        return asyncio.run(reward.call(samples)) if reward.is_async else reward.call(samples)

    def _failed(self, reward: Reward, samples: Samples, error: Exception) -> RewardError:
        """The error for a function that raised, with the first sample that it raises for by itself."""
        what = f"raises {type(error).__name__}: {error}{raised_at(error)}"

        def search() -> int | None:
            for index in range(len(samples)):
                try:
                    self._alone(reward, samples.only(index))
                except BaseException:  # SystemExit too
                    return index
            return None

        try:
            index = in_thread(search, self.timeout)
        except Overtime:
            index = None
        return RewardError(what, where=place_of(reward.name, samples, index), way_out="mend the function")

    def _too_long(self, reward: Reward, samples: Samples, overtime: Overtime) -> RewardError:
        """The error for a function that didn't come back, with the sample that takes most of the time by itself."""
        reached = [0, time.monotonic()]

        def search() -> None:
            for index in range(len(samples)):
                reached[:] = index, time.monotonic()
                self._alone(reward, samples.only(index))

        index = None
        try:
            in_thread(search, self.timeout)
        except Overtime:
            if time.monotonic() - reached[1] > self.timeout / 2:
                index = int(reached[0])
        except Exception:
            index = int(reached[0])
        at = f", at {overtime.place}" if overtime.place else ""
        return RewardError(
            f"did not come back within {self.timeout:g} s{at}",
            where=place_of(reward.name, samples, index),
            way_out="mend the function, or give it more time with --reward-timeout",
        )


def in_thread(function: Callable[[], Any], timeout: float) -> Any:
    """What ``function`` gives or raises. Raises ``Overtime`` after ``timeout`` seconds; the thread is left behind."""
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            # SystemExit would end the thread without a word
            outcome.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    thread = threading.Thread(target=run, name="reward", daemon=True)
    thread.start()
    concurrent.futures.wait([outcome], timeout=timeout)
    if not outcome.done():
        raise Overtime(running_at(thread))
    return outcome.result()


def checked(found: Any, name: str, samples: Samples) -> np.ndarray:
    """Scores as float64 [N], NaN for None. Raises ``RewardError`` for another length, and what is no finite number."""
    if inspect.isawaitable(found):
        if inspect.iscoroutine(found):
            found.close()
        raise RewardError("gives a coroutine", where=f"reward '{name}'", way_out="declare it with async def")
    if not isinstance(found, Sequence) and hasattr(found, "tolist"):  # an array or tensor
        found = found.tolist()
    if not isinstance(found, Sequence) or isinstance(found, str | bytes):
        raise RewardError(
            f"gives {type(found).__name__} {found!r:.60}, not a list of scores",
            where=f"reward '{name}'",
            way_out="return one number, or None, for each completion",
        )
    if len(found) != len(samples):
        raise RewardError(
            f"gives {len(found)} scores for {len(samples)} samples",
            where=place_of(name, samples, min(len(found), len(samples) - 1) if len(samples) else None),
            way_out="return one number, or None, for each completion",
        )
    return np.array([number(score, name, samples, index) for index, score in enumerate(found)], dtype=np.float64)


def number(score: Any, name: str, samples: Samples, index: int) -> float:
    """A score as a float, NaN for None. Raises ``RewardError``."""
    if score is None:
        return math.nan
    if hasattr(score, "item"):  # of an array or tensor
        with contextlib.suppress(ValueError, RuntimeError):
            score = score.item()
    if not isinstance(score, numbers.Real | np.bool_):
        raise RewardError(
            f"gives {type(score).__name__} {score!r:.60}, not a number",
            where=place_of(name, samples, index),
            way_out="return one number, or None, for each completion",
        )
    value = float(score)
    if not math.isfinite(value):
        raise RewardError(
            f"gives {value}, not a finite number",
            where=place_of(name, samples, index),
            way_out="return None where the reward doesn't apply",
        )
    return value


def place_of(name: str, samples: Samples, index: int | None) -> str:
    """``reward 'length', sample 3 (…)``; without an index what is known: all of the samples together."""
    if index is not None:
        return f"reward '{name}', {samples.place(index)}"
    if len(samples) == 0:
        return f"reward '{name}'"
    return f"reward '{name}', {len(samples)} samples together, none of them alone, the first {samples.place(0)}"


def raised_at(error: BaseException) -> str:
    """`` (file.py:12)``, the innermost place of an error."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def running_at(thread: threading.Thread) -> str | None:
    """``file.py:12``, where a thread is now."""
    frame: FrameType | None = sys._current_frames().get(thread.ident or 0)
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else None

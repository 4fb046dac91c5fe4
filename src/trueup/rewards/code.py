"""Python code scored by the tests that it passes, run where it can do no harm (``sandbox.run``)."""

from __future__ import annotations

import ast
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from trueup.errors import RewardError
from trueup.rewards.parameters import column_of
from trueup.rewards.samples import text_of
from trueup.rewards.sandbox.inside import encoded
from trueup.rewards.sandbox.run import MEBI, Limits, check_confinement, run_inside

_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class CodeTests:
    """1 if the code in the completion passes all tests in ``column``, else 0; ``partial``: the share that it passes.

    The code is the last fenced block of the completion, or without one all of it. A test is Python text, such as
    ``assert add(1, 2) == 3``, which runs behind the code, or ``{"input": …, "output": …}``: then the code runs as a
    program, and has to write ``output`` to standard output when it reads ``input`` (spaces at the ends of lines and
    empty lines at the end left out). A cell is a list of tests, or a list as JSON, or one test; None: doesn't apply.

    ``seconds``: processor time of a run, and a third of the time that it may take altogether; ``memory_mb``: address
    space of each of its processes.

    Of a test ``assert EXPRESSION == LITERAL`` the expression alone is run, and its value compared outside: what is
    expected, there and in ``output``, is where the code can't reach it. Other tests run in the interpreter of the code,
    which an attacker's code can change; printing, exiting or writing to every descriptor passes none of them.

    Raises ``RewardError`` where code can't be confined, with the reason.
    """

    column: str = "tests"
    partial: bool = False
    seconds: float = 5.0
    memory_mb: int = 512

    def __post_init__(self) -> None:
        check_confinement()

    def __call__(self, *, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        cells = column_of(columns, self.column, "code")
        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(self._score, range(len(cells)), completions, cells))

    def _score(self, index: int, completion: Any, cell: Any) -> float | None:
        if cell is None:
            return None
        passed = passes(code_of(text_of(completion)), read_tests(cell, index), self._limits)
        return sum(passed) / len(passed) if self.partial else float(all(passed))

    @property
    def _limits(self) -> Limits:
        return Limits(
            cpu_seconds=max(1, round(self.seconds)), wall_seconds=3 * self.seconds, memory_bytes=self.memory_mb * MEBI
        )


def code_of(text: str) -> str:
    """The last fenced block of a text, cut off or not; without a fence the text."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else text


def read_tests(cell: Any, index: int) -> list[Any]:
    """The tests in a cell. Raises ``RewardError`` for what is none."""
    if isinstance(cell, str) and cell.lstrip().startswith(("[", "{")):
        try:
            cell = json.loads(cell)
        except ValueError:
            cell = [cell]
    tests = [cell] if isinstance(cell, str | Mapping) else cell
    if not isinstance(tests, Sequence) or not tests:
        raise RewardError(f"has no tests: {cell!r:.60}", sample=index)
    for test in tests:
        if not isinstance(test, str) and not (isinstance(test, Mapping) and {"input", "output"} <= test.keys()):
            raise RewardError(
                f"{test!r:.60} is no test",
                sample=index,
                way_out='write a test as Python text, or as {"input": …, "output": …}',
            )
    return list(tests)


def passes(code: str, tests: Sequence[Any], limits: Limits) -> list[bool]:
    """Of each test whether the code passes it. All tests in Python share one process, in their order."""
    results = [False] * len(tests)
    inside = [index for index, test in enumerate(tests) if isinstance(test, str)]
    for index, passed in zip(inside, passes_inside(code, [tests[index] for index in inside], limits), strict=True):
        results[index] = passed
    for index, test in enumerate(tests):
        if not isinstance(test, str):
            ran = run_inside({"code": code, "tests": None}, stdin=str(test["input"]), limits=limits)
            wanted, written = str(test["output"]), ran.stdout.decode(errors="replace")
            results[index] = ran.in_order and trimmed(written) == trimmed(wanted)
    return results


def trimmed(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def passes_inside(code: str, tests: Sequence[str], limits: Limits) -> list[bool]:
    """Tests in Python text, run behind the code."""
    if not tests:
        return []
    split = [comparison(test) for test in tests]
    job = {
        "code": code,
        "tests": [
            ["assert", test] if found is None else ["value", found[0]] for test, found in zip(tests, split, strict=True)
        ],
        "key": secrets.token_hex(16),
    }
    said = outcomes(run_inside(job, limits=limits).outcomes, job["key"])
    return [
        said.get(index, [])[:1] == ["passed"] if found is None else said.get(index) == ["value", found[1]]
        for index, found in enumerate(split)
    ]


def comparison(test: str) -> tuple[str, Any] | None:
    """Of ``assert EXPRESSION == LITERAL``: the expression, and the literal as ``encoded``; None for another test."""
    try:
        (statement,) = ast.parse(test.strip()).body
        assert isinstance(statement, ast.Assert)
        compared = statement.test
        assert isinstance(compared, ast.Compare)
        assert [type(each) for each in compared.ops] == [ast.Eq]
        return ast.unparse(compared.left), encoded(ast.literal_eval(compared.comparators[0]))
    except (SyntaxError, ValueError, AssertionError, TypeError):
        return None


def outcomes(content: bytes, key: str) -> dict[int, list[Any]]:
    """The first outcome of each test among the lines that have the key."""
    found: dict[int, list[Any]] = {}
    for line in content.splitlines():
        try:
            said, index, *outcome = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            continue
        if said == key and isinstance(index, int):
            found.setdefault(index, outcome)
    return found

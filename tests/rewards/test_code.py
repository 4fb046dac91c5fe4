"""Code scored by its tests, and code that would rather not pass them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trueup.errors import RewardError
from trueup.rewards.code import code_of, comparison, outcomes, passes, read_tests, trimmed
from trueup.rewards.rewards import Rewards
from trueup.rewards.sandbox.inside import encoded
from trueup.rewards.sandbox.run import Limits

LIMITS = Limits(wall_seconds=20, cpu_seconds=1)
RIGHT = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return a - b\n"
COMPARED = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
ASSERTED = ["x = add(1, 2)\nassert x == 3 and x > 0", "assert not add(0, 0)"]
PRINTED = [{"input": "1 2\n", "output": "3\n"}]


pytestmark = pytest.mark.usefixtures("confinement")


def test_right_and_wrong_code(samples):
    given = samples([RIGHT, WRONG, f"Here:\n```python\n{RIGHT}```\ndone", "no code at all"], tests=[COMPARED] * 4)
    assert Rewards.load(["code"]).score(given).total.tolist() == [1, 0, 1, 0]
    assert Rewards.load(["code:partial=true"]).score(given).total.tolist() == [1, 0.5, 1, 0]


def test_tests_of_every_kind(samples):
    program = "a, b = map(int, input().split())\nprint(a + b, ' ')\n"
    cells = [COMPARED, ASSERTED, PRINTED, json.dumps(COMPARED), COMPARED[0], json.dumps(PRINTED[0])]
    codes = [RIGHT, RIGHT, program, RIGHT, RIGHT, program]
    assert Rewards.load(["code:column=checks"]).score(samples(codes, checks=cells)).total.tolist() == [1] * 6
    codes = [WRONG, WRONG, program.replace("+", "-"), WRONG, WRONG, "print(3); raise SystemExit(1)"]
    assert Rewards.load(["code:column=checks"]).score(samples(codes, checks=cells)).total.tolist() == [0] * 6


def test_a_row_without_tests_is_left_out(samples):
    scores = Rewards.load(["code", "regex:."]).score(samples([RIGHT, RIGHT], tests=[COMPARED, None]))
    assert str(scores.each["code"]) == "[ 1. nan]"


@pytest.mark.parametrize("cell", [[], 7, [7], [{"input": "1"}], {"output": "1"}])
def test_what_is_no_test_is_named_with_its_sample(cell, samples):
    with pytest.raises(RewardError, match=r"reward 'code', sample 1 \(data.jsonl:2"):
        Rewards.load(["code"]).score(samples([RIGHT, RIGHT], tests=[COMPARED, cell]))


FORGERIES = {
    "prints what passes": "print('passed'); print([0, 'passed', None]); print(True)",
    "writes to every descriptor": """
import json, os
for fd in range(3, 64):
    for line in (["", 0, "passed", None], [None, 0, "value", 3], [0, "passed"]):
        try:
            os.write(fd, (json.dumps(line) + "\\n").encode())
        except OSError:
            pass
""",
    "exits in good order": "import os; os._exit(0)",
    "leaves by an exception": "raise SystemExit(0)",
    "kills itself": "import os; os.kill(os.getpid(), 9)",
    "ends its parent": "import os; os.kill(os.getppid(), 9)",
    "leaves a child behind": "import os\nif os.fork() == 0:\n    os.setsid()\n    import time; time.sleep(100)",
    "closes the channel": "import os; os.closerange(3, 64)",
    "never ends": "while True: pass",
    "exits at the first test": "def add(a, b):\n    import os; os._exit(0)",
    "raises at the first test": "def add(a, b): raise SystemExit(0)",
    "fills the memory": "x = bytearray(1 << 40)",
    "talks without end": "while True: print('x' * 10000)",
    "writes the channel full": "import os\nwhile True: os.write(4, b'x' * 10000)",
    "is no Python": "def add(a, b:",
    "holds a null character": "\0",
    "holds half a character": "x = '\ud800'",
}


@pytest.mark.parametrize("tests", [COMPARED, ASSERTED, PRINTED], ids=["compared", "asserted", "printed"])
@pytest.mark.parametrize("forgery", FORGERIES)
def test_tricks_pass_no_test(forgery, tests):
    limits = Limits(wall_seconds=20, cpu_seconds=1, output_bytes=1 << 16)
    assert passes(FORGERIES[forgery], tests, limits) == [False] * len(tests)


def test_an_object_that_equals_everything_passes_no_comparison():
    code = """
class Yes:
    def __eq__(self, other): return True
    def __bool__(self): return True
class Two(int):
    def __eq__(self, other): return True
    def __hash__(self): return 0
def add(a, b): return Yes()
def mul(a, b): return Two(2)
"""
    assert passes(code, ["assert add(1, 2) == 3", "assert mul(1, 2) == 3"], LIMITS) == [False, False]


def test_what_is_expected_is_not_to_be_found_inside():
    """Hunted for in every frame and every object."""
    code = """
import gc, re, sys
def add(a, b):
    frame, found = sys._getframe(), []
    while frame:
        found += [repr(frame.f_locals), repr(frame.f_globals)]
        frame = frame.f_back
    text = " ".join(found) + " ".join(repr(each)[:2000] for each in gc.get_objects())
    found = re.search("98765" + "4[0-9]+", text)
    return int(found.group()) if found else 0
"""
    assert passes(code, ["assert add(1, 2) == 987654321"], LIMITS) == [False]
    assert passes(code, ["x = 987654321\nassert add(1, 2) == x"], LIMITS) == [True], "the hunt is one that finds things"


def test_tests_go_on_behind_one_that_fails():
    tests = ["assert add(1, 2) == 4", "assert add('a', 1) == 2", "assert add(1, 2) == 3", "assert add(1, 2) > 2"]
    assert passes(RIGHT, tests, LIMITS) == [False, False, True, True]


def test_tests_before_a_loop_without_end_have_passed():
    code = "def f(n):\n    while n > 1: pass\n    return n"
    limits = Limits(wall_seconds=20, cpu_seconds=1)
    assert passes(code, ["assert f(0) == 0", "assert f(2) == 2", "assert f(1) == 1"], limits) == [True, False, False]


def test_tests_share_what_they_define():
    assert passes(RIGHT, ["y = add(1, 1)", "assert y == 2", "assert add(y, y) == 4"], LIMITS) == [True] * 3


@pytest.mark.parametrize(
    ("expression", "literal"),
    [
        ("(1, [2.0, True], {'a': None})", "(1, [2, 1], {'a': None})"),
        ("__import__('collections').Counter('aab')", "{'b': 1, 'a': 2}"),
        ("__import__('collections').OrderedDict(b=1, a=2)", "{'a': 2, 'b': 1}"),
        ("{3, 1, 2}", "{1, 2, 3}"),
        ("frozenset('ab')", "{'a', 'b'}"),
        ("b'\\xff'", "b'\\xff'"),
        ("10 ** 30", "1000000000000000000000000000000"),
        ("float('inf')", "1e999"),
        ("1 + 2j", "(1+2j)"),
        ("__import__('fractions').Fraction(1, 2)", "0.5"),
        ("'é\\n'", "'é\\n'"),
    ],
)
def test_comparisons_hold_as_in_python(expression, literal):
    assert eval(f"{expression} == {literal}")
    assert comparison(f"assert {expression} == {literal}") is not None
    assert passes("", [f"assert {expression} == {literal}"], LIMITS) == [True]


@pytest.mark.parametrize(
    "pair", ["[1] == (1,)", "'1' == 1", "None == 0", "0.1 + 0.2 == 0.3", "{1} == [1]", "b'a' == 'a'"]
)
def test_and_fail_as_in_python(pair):
    assert not eval(pair)
    assert passes("", [f"assert {pair}"], LIMITS) == [False]


def test_what_counts_as_a_comparison():
    assert comparison("assert f(1) == 2, 'no'") == ("f(1)", 2)
    assert comparison("  assert f(x)[0] == (1, -2.5)\n") == ("f(x)[0]", encoded((1, -2.5)))
    for other in (
        "assert f(1)",
        "assert f(1) != 2",
        "assert f(1) == g(2)",
        "assert 0 == f(1) == 0",
        "x = 1",
        "assert",
        "",
    ):
        assert comparison(other) is None
    assert comparison("x = 1\nassert x == 1") is None


def test_where_the_code_is():
    assert code_of("a = 1") == "a = 1"
    assert code_of("```python\na = 1\n```\ntext\n```\nb = 2\n```") == "b = 2\n"
    assert code_of("```py\na = 1") == "a = 1"
    assert code_of("```\n```") == ""


def test_outcomes_without_the_key_do_not_count():
    lines = [["k", 0, "passed", None], ["x", 1, "passed", None], ["k", 0, "failed", ""], ["k", "2", "passed"], 7, []]
    content = b"\n".join(json.dumps(line).encode() for line in lines) + b"\n{]\n" + b"[" * 100_000
    assert outcomes(content, "k") == {0: ["passed", None]}


def test_output_is_compared_without_spaces_at_the_ends():
    assert trimmed("1 \n2\n\n") == trimmed("1\n2") == ["1", "2"]
    assert trimmed(" 1") != trimmed("1")
    assert trimmed("1\n\n2") != trimmed("1\n2")


def test_a_cell_that_looks_like_json_and_is_not():
    assert read_tests("[x] = [1]\nassert x", 0) == ["[x] = [1]\nassert x"]


def test_many_at_once(samples):
    given = samples([RIGHT, WRONG] * 8, tests=[COMPARED] * 16)
    assert Rewards.load(["code"]).score(given).total.tolist() == [1, 0] * 8


def test_nothing_is_left_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = len(list(Path("/proc/self/fd").iterdir()))
    passes("open('a', 'w').write('x')\n" + RIGHT, COMPARED, LIMITS)
    assert list(tmp_path.iterdir()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before

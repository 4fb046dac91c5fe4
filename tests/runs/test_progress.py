from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from trueup.runs import progress as module
from trueup.runs.progress import RunProgress, clock


class Clock:
    """Time that passes when it is told to."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=200)


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_lines_come_now_and_then_and_at_the_end(time):
    plain = console(terminal=False)
    with RunProgress(100, title="sft", console=plain, seconds_between_lines=10) as progress:
        for step in range(25):
            time.now += 1
            progress.step(num_tokens=1000, metrics={"loss": 2 - step / 100})
    lines = output(plain).splitlines()
    assert [re.search(r"step (\d+)/100", line)[1] for line in lines] == ["10", "20", "25"]
    assert lines[0] == "sft step 10/100 · loss 1.91 · 1,000 tok/s · 0:10 elapsed · 1:30 left"
    assert lines[-1] == "sft step 25/100 · loss 1.76 · 1,000 tok/s · 0:25 elapsed · 1:15 left"


def test_several_steps_at_once(time):
    plain = console(terminal=False)
    with RunProgress(100, title="score", console=plain, seconds_between_lines=10) as progress:
        time.now += 20
        progress.step(num_steps=40, num_tokens=6000)
    assert output(plain) == "score step 40/100 · 300 tok/s · 0:20 elapsed · 0:30 left\n"


def test_what_has_no_tokens(time):
    plain = console(terminal=False)
    with RunProgress(100, title="td", console=plain, seconds_between_lines=10) as progress:
        time.now += 20
        progress.step(num_steps=40, metrics={"distance": 0.25})
    assert output(plain) == "td step 40/100 · distance 0.25 · 0:20 elapsed · 0:30 left\n"


def test_the_last_line_is_not_told_twice(time):
    plain = console(terminal=False)
    with RunProgress(1, console=plain, seconds_between_lines=1) as progress:
        time.now += 2
        progress.step()
    assert len(output(plain).splitlines()) == 1


def test_a_run_with_nothing_left_to_do_tells_nothing(time):
    plain = console(terminal=False)
    with RunProgress(5, done=5, console=plain):
        pass
    assert output(plain) == ""


def test_quiet_is_silent(time):
    for terminal in (True, False):
        silent = console(terminal=terminal)
        with RunProgress(2, console=silent, quiet=True, seconds_between_lines=0) as progress:
            progress.step(metrics={"loss": 1.0})
            progress.say("hello")
        assert output(silent) == ""


def test_a_terminal_gets_a_bar_and_lines_above_it():
    shown = console(terminal=True)
    with RunProgress(4, title="dpo", console=shown) as progress:
        progress.say("step 0: [accuracy] 0.5")
        for _ in range(4):
            progress.step(num_tokens=10, metrics={"loss": 0.693})
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output(shown))
    assert "step 0: [accuracy] 0.5" in text
    assert "100%" in text
    assert "step 4/4 · loss 0.693" in text


def test_speed_is_that_of_the_last_half_minute(time):
    progress = RunProgress(1000, console=console(terminal=False))
    assert progress.tokens_per_second == 0
    assert progress.seconds_left is None
    for tokens, steps in ((100, 40), (400, 60)):
        for _ in range(steps):
            time.now += 1
            progress.step(num_tokens=tokens)
    assert progress.tokens_per_second == pytest.approx(400)


def test_a_resumed_run_counts_its_own_speed_only(time):
    with RunProgress(100, done=90, console=console(terminal=False)) as progress:
        time.now += 4
        progress.step()
        time.now += 4
        progress.step()
        assert progress.seconds_left == pytest.approx(8 * 4)
        assert progress.line.startswith("step 92/100")


def test_an_evaluation_has_its_own_line_and_no_part_in_the_time_left(time):
    plain = console(terminal=False)
    with RunProgress(10, title="sft", console=plain, seconds_between_lines=10) as progress:
        for _ in progress.aside(range(4), "evaluation"):
            time.now += 100
        assert progress.tokens_per_second == 0
        for _ in range(2):
            time.now += 3
            progress.step(num_tokens=30)
        assert progress.seconds_left == pytest.approx(8 * 3)
        assert progress.tokens_per_second == pytest.approx(10)
        for _ in progress.aside(range(1), "evaluation"):
            time.now += 1
        assert progress.tokens_per_second == pytest.approx(10)
    lines = output(plain).splitlines()
    assert lines[0] == "evaluation 1/4 · 1:40 elapsed · 5:00 left"
    assert lines[3] == "evaluation 4/4 · 6:40 elapsed · 0:00 left"


def test_an_evaluation_on_a_terminal():
    shown = console(terminal=True)
    with RunProgress(1, title="dpo", console=shown) as progress:
        assert list(progress.aside("abc", "evaluation")) == ["a", "b", "c"]
        progress.step()
    assert "evaluation" in output(shown)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (75, "1:15"), (3675, "1:01:15"), (90_000, "25:00:00")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text

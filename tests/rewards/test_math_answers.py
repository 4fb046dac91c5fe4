"""Answers in mathematics, scored in processes that a hostile answer can't get out of."""

from __future__ import annotations

import os
import signal
import warnings

import pytest

from trueup.errors import RewardError
from trueup.rewards import answer_scorer
from trueup.rewards.answer_scorer import AnswerScorer, WorkerEnded
from trueup.rewards.rewards import Rewards

pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def rewards() -> Rewards:
    return Rewards.load(["math:seconds=20"])


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("72", "so it is 72.", "so it is 73."),
        ("72", "\\boxed{72}", "72 or \\boxed{27}"),
        ("she sells 3 * 4 = 12\n#### 12", "The answer is 12", "The answer is 3"),
        ("1,234", "$1234$", "$1.234$"),
        ("0.5", "$\\frac{1}{2}$", "$\\frac{1}{3}$"),
        ("\\frac{1}{2}", "0.5", "\\boxed{1}"),
        ("$\\frac{\\sqrt{8}}{2}$", "\\boxed{\\sqrt{2}}", "\\boxed{\\sqrt{8}}"),
        ("Thus \\boxed{x^2 - 1}", "$(x-1)(x+1)$", "$x^2 + 1$"),
        ("x^2", "$x \\cdot x$", "2"),
        ("\\{1, 2\\}", "$\\{2, 1\\}$", "$\\{1\\}$"),
        ("(1, 2]", "\\boxed{(1,2]}", "\\boxed{[1,2)}"),
        ("50\\%", "$50\\%$", "$5\\%$"),
    ],
)
def test_equal_answers_are_right(answer, right, wrong, rewards, samples):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rewards.score(samples([right, wrong, "no idea"], answer=[answer] * 3)).total.tolist() == [1, 0, 0]


def test_a_row_without_mathematics_is_left_out(samples):
    scores = Rewards.load(["math:column=truth", "regex:."]).score(samples(["1", "1", "1"], truth=[1, None, ""]))
    assert str(scores.each["math"]) == "[ 1. nan nan]"


def test_an_answer_that_never_ends_is_wrong_and_warned_of(samples):
    rewards = Rewards.load(["math:seconds=0.7"])
    given = samples(["1", "$9^{9^{9^{9}}}$", "1"], answer=["1", "1", "1"])
    with pytest.warns(UserWarning, match=r"1 of 3 answers can't be scored and count as wrong .*no score within 0.7 s"):
        scores = rewards.score(given)
    assert scores.total.tolist() == [1, 0, 1]


def test_a_worker_that_died_is_replaced():
    scorer = AnswerScorer("math", confined=False, seconds=20)
    assert scorer.scores([("1", "1")]) == [1]
    worker = scorer._worker
    assert worker is not None
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    assert scorer.scores([("1", "1"), None, ("2", "1")]) == [1, None, 0]
    assert scorer._worker is not worker


def test_a_worker_that_cannot_start_says_why():
    with pytest.raises(RewardError, match="can't be started: KeyError: 'nonsense'"):
        AnswerScorer("nonsense", confined=False, seconds=1).scores([("1", "1")])


def test_a_worker_that_does_not_answer_is_replaced(monkeypatch):
    scorer = AnswerScorer("math", confined=False, seconds=20)
    scorer.scores([("1", "1")])
    worker = scorer._worker
    assert worker is not None
    os.kill(worker.process.pid, signal.SIGSTOP)
    monkeypatch.setattr(answer_scorer, "SLACK_SECONDS", 0.2 - 60)
    with pytest.raises(WorkerEnded, match="the process that scores did not answer"):
        scorer._ask([("1", "1")])
    assert not worker.is_alive
    monkeypatch.undo()
    assert scorer.scores([("1", "1")]) == [1]


def test_a_worker_ends_with_its_owner():
    scorer = AnswerScorer("math", confined=False, seconds=20)
    scorer.scores([("1", "1")])
    worker = scorer._worker
    assert worker is not None
    process = worker.process
    del scorer, worker
    assert process.wait(10) is not None


def test_equal_answers_are_scored_once(monkeypatch):
    scorer = AnswerScorer("math", confined=False, seconds=20)
    ask, asked = scorer._ask, []
    monkeypatch.setattr(scorer, "_ask", lambda requests: asked.extend(requests) or ask(requests))
    assert scorer.scores([("1", "1"), ("2", "1"), None, ("1", "1"), ("1", "2")]) == [1, 0, None, 1, 0]
    assert asked == [("1", "1"), ("2", "1"), ("1", "2")]

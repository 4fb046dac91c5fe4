"""The interface: what a reward is given, how several are added, and what becomes of one that fails."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest
import torch

from trueup.errors import DataError, RewardError, SettingsError
from trueup.rewards.rewards import Rewards
from trueup.rewards.samples import Samples, text_of
from trueup.rewards.settings import RewardChoice


def test_a_function_gets_the_arguments_that_trl_gives(samples):
    seen = {}

    def reward(**keywords):
        seen.update(keywords)
        return [0.5, 1]

    turns = ({"role": "user", "content": "2+2"},)
    given = samples(["4", ({"role": "assistant", "content": "5"},)], prompts=["1+1", turns], answer=[2, 4])
    scores = Rewards.load([reward]).score(given)
    assert seen == {
        "prompts": ["1+1", [{"role": "user", "content": "2+2"}]],
        "completions": ["4", [{"role": "assistant", "content": "5"}]],
        "completion_ids": [[0], [0]],
        "answer": [2, 4],
    }
    assert scores.total.tolist() == [0.5, 1.0]
    assert scores.total.dtype == np.float64
    assert scores.steps is None
    assert scores.step_ends is None


def test_a_function_may_name_only_what_it_reads(samples):
    def reward(completions, answer):
        return [float(a == b) for a, b in zip(completions, answer, strict=True)]

    assert Rewards.load([reward]).score(samples(["a", "b"], answer=["a", "c"], other=[1, 2])).total.tolist() == [1, 0]


def test_rewards_are_weighted_and_none_leaves_a_sample_out(samples):
    def length(completions, **columns):
        return [len(each) for each in completions]

    def only_first(completions, **columns):
        return [10.0, None, None]

    async def later(completions, **columns):
        return [None, 1, None]

    scores = Rewards.load([length, only_first, later], [1.0, 0.5, -2.0]).score(samples(["a", "bb", "ccc"]))
    assert scores.total.tolist() == [1 + 5.0, 2 - 2.0, 3.0]
    assert list(scores.each) == ["length", "only_first", "later"]
    np.testing.assert_array_equal(scores.each["only_first"], [10, np.nan, np.nan])
    np.testing.assert_array_equal(scores.each["later"], [np.nan, 1, np.nan])


def test_two_of_one_name_are_told_apart(samples):
    scores = Rewards.load(["length:target=1", "length:target=2", "length:target=4"]).score(samples(["ab"]))
    assert {name: each.item() for name, each in scores.each.items()} == {
        "length": -1.0,
        "length_2": 0.0,
        "length_3": -0.5,
    }


@pytest.mark.parametrize(
    "given",
    [np.array([1, 2], dtype=np.int32), torch.tensor([1.0, 2.0]), (np.float32(1), torch.tensor(2)), [True, np.int64(2)]],
)
def test_numbers_of_all_kinds_will_do(given, samples):
    assert Rewards.load([lambda **columns: given]).score(samples(["a", "b"])).total.tolist() == [1, 2]


def test_async_functions_run_side_by_side(samples):
    """Each waits for the other: one after the other they would never end."""
    here = [asyncio.Event(), asyncio.Event()]

    async def first(**columns):
        here[0].set()
        await here[1].wait()
        return [1]

    async def second(**columns):
        here[1].set()
        await here[0].wait()
        return [2]

    assert Rewards.load([first, second], timeout=30).score(samples(["a"])).total.tolist() == [3]


def test_a_sync_function_runs_while_async_ones_wait(samples):
    go = threading.Event()

    async def waits(**columns):
        while not go.is_set():
            await asyncio.sleep(0.005)
        return [1]

    def goes(**columns):
        go.set()
        return [1]

    assert Rewards.load([waits, goes], timeout=30).score(samples(["a"])).total.tolist() == [2]


def test_what_an_async_function_keeps_open_lives_on(samples):
    loops = []

    async def reward(**columns):
        loops.append(asyncio.get_running_loop())
        return [1]

    rewards = Rewards.load([reward])
    rewards.score(samples(["a"]))
    rewards.score(samples(["a"]))
    assert loops[0] is loops[1]


# --------------------------------------------------------------------------------------------------- what goes wrong


def error_of(reward, given, timeout=20.0) -> RewardError:
    with pytest.raises(RewardError) as caught:
        Rewards.load([reward], timeout=timeout).score(given)
    return caught.value


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_one_that_raises_is_named_with_its_sample(kind, samples):
    def reward(answer, **columns):
        return [1 / (each - 3) for each in answer]

    async def later(answer, **columns):
        return reward(answer)

    error = error_of(reward if kind == "sync" else later, samples(["a", "b", "c"], answer=[1, 2, 3]))
    name = "reward" if kind == "sync" else "later"
    assert error.where == f"reward '{name}', sample 2 (data.jsonl:3, prompt 'question 2')"
    assert error.what.startswith("raises ZeroDivisionError: division by zero (test_rewards.py:")


def test_an_error_of_ours_from_a_users_function_is_named_too(samples):
    def reward(completions, **columns):
        raise DataError("no")

    assert "sample 0 (data.jsonl:1, prompt 'question 0'): raises DataError: no" in str(error_of(reward, samples(["a"])))


def test_one_that_raises_only_for_all_together(samples):
    def reward(completions, **columns):
        if len(completions) > 1:
            raise ValueError("too many")
        return [0]

    error = error_of(reward, samples(["a", "b"]))
    assert "2 samples together, none of them alone, the first sample 0 (data.jsonl:1" in str(error)


def test_one_that_exits_is_an_error_too(samples):
    def reward(**columns):
        raise SystemExit(0)

    assert "raises RuntimeError: SystemExit(0)" in str(error_of(reward, samples(["a"])))


@pytest.mark.parametrize("kind", ["sync", "async", "async that blocks"])
def test_one_that_hangs_is_named_with_its_sample(kind, samples):
    ever = threading.Event()

    def sync(completions, **columns):
        if "b" in completions:
            ever.wait()
        return [0.0] * len(completions)

    async def later(completions, **columns):
        if "b" in completions:
            await asyncio.Event().wait()
        return [0.0] * len(completions)

    async def blocks(completions, **columns):
        return sync(completions)

    reward = {"sync": sync, "async": later, "async that blocks": blocks}[kind]
    error = error_of(reward, samples(["a", "b", "c"]), timeout=0.3)
    assert "did not come back within 0.3 s" in error.what
    assert "sample 1 (data.jsonl:2, prompt 'question 1')" in str(error)
    if kind == "sync":
        assert ", at threading.py:" in error.what
    ever.set()


def test_one_that_is_slow_for_all_blames_no_sample(samples):
    def reward(completions, **columns):
        time.sleep(0.2 * len(completions))
        return [0.0] * len(completions)

    error = error_of(reward, samples(["a"] * 8), timeout=1.0)
    assert "8 samples together" in str(error)


@pytest.mark.parametrize(
    ("given", "what", "index"),
    [
        ([1.0], "gives 1 scores for 2 samples", 1),
        ([1.0, 2.0, 3.0], "gives 3 scores for 2 samples", 1),
        ([1.0, float("nan")], "gives nan, not a finite number", 1),
        ([float("-inf"), 1.0], "gives -inf, not a finite number", 0),
        ([1.0, "2"], "gives str '2', not a number", 1),
        ([[1.0], 2.0], "gives list [1.0], not a number", 0),
        ([1.0, torch.ones(2)], "gives Tensor tensor([1., 1.]), not a number", 1),
        ([1j, 1.0], "gives complex 1j, not a number", 0),
        (None, "gives NoneType None, not a list of scores", None),
        ("ab", "gives str 'ab', not a list of scores", None),
        ({"a": 1, "b": 2}, "gives dict", None),
        (np.ones((2, 1)), "gives list [1.0], not a number", 0),
    ],
)
def test_what_is_no_list_of_scores_is_named(given, what, index, samples):
    error = error_of(lambda **columns: given, samples(["a", "b"]))
    assert what in error.what
    expected = "reward '<lambda>'" if index is None else f"reward '<lambda>', sample {index} (data.jsonl:{index + 1}, "
    assert str(error.where).startswith(expected)


def test_a_coroutine_from_a_plain_function_is_told(samples):
    async def later():
        return [1.0]

    assert "declare it with async def" in str(error_of(lambda **columns: later(), samples(["a"])))


def test_a_sample_that_no_reward_applies_to_is_named(samples):
    with pytest.raises(RewardError, match=r"sample 1 \(data.jsonl:2, .*none of the rewards applies") as caught:
        Rewards.load([lambda **columns: [1, None], lambda **columns: [None, None]]).score(samples(["a", "b"]))
    assert "<lambda>, <lambda>_2: all None" in str(caught.value)


def test_a_long_prompt_is_shortened(samples):
    error = error_of(lambda **columns: ["x"], samples(["a"], prompts=["long " * 100]))
    assert len(str(error.where)) < 120


def test_no_samples_have_no_scores(samples):
    assert Rewards.load([lambda **columns: []]).score(samples([])).total.shape == (0,)


def test_samples_of_other_lengths_are_refused():
    parts = {"prompts": ["a"], "completions": ["b"], "completion_ids": [np.arange(1)], "truncated": [False]}
    with pytest.raises(DataError, match="'answer' has 2 entries for 1 prompts"):
        Samples(**parts, columns={"answer": [1, 2]})
    with pytest.raises(DataError, match="a column 'completions'"):
        Samples(**parts, columns={"completions": [1]})


@pytest.mark.parametrize(
    ("weights", "timeout", "what"),
    [
        ([1.0, 2.0], 1.0, "2 weights for 1 rewards"),
        ([float("nan")], 1.0, "not all finite"),
        (None, 0.0, "0.0 is out of range"),
        (None, float("inf"), "inf is out of range"),
    ],
)
def test_weights_and_time_are_checked(weights, timeout, what):
    with pytest.raises(SettingsError, match=what):
        Rewards.load(["regex:a"], weights, timeout=timeout)
    with pytest.raises(SettingsError, match=what):
        RewardChoice(reward=("regex:a",), reward_weights=tuple(weights or ()), reward_timeout=timeout)


def test_there_has_to_be_a_reward():
    with pytest.raises(SettingsError, match="no reward is given"):
        Rewards.load([])


def test_what_a_completion_says():
    assert text_of("4") == "4"
    assert text_of([{"role": "assistant", "content": "4"}, {"role": "tool", "content": "x"}]) == "4"
    assert text_of([{"content": [{"type": "text", "text": "a"}, {"type": "image"}]}, {"content": None}]) == "a\n"

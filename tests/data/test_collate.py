"""Batches are pure functions: every group once an epoch, the same everywhere, resumable at any step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueup.data.collate import (
    MOST_SIBLINGS,
    batches,
    epoch_order,
    first_human_turn,
    is_held_out,
    merge_prompts,
    micro_batches,
    num_steps,
    prompt_families,
    siblings_together,
    split_holdout,
    train_all_tokens,
)
from trueup.data.formats import read_examples
from trueup.data.report import ReadReport
from trueup.errors import DataError, SettingsError
from trueup.records import Completion, CompletionGroup, RankedCompletions


def test_an_order_that_other_machines_and_versions_must_repeat() -> None:
    assert epoch_order(10, seed=0, epoch=0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    assert epoch_order(10, seed=7, epoch=3).tolist() == [2, 4, 7, 3, 5, 1, 8, 9, 0, 6]


@given(st.integers(0, 60), st.integers(0, 2**63), st.integers(0, 50))
def test_an_order_is_a_permutation(num_groups: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(num_groups, seed, epoch).tolist()) == list(range(num_groups))


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = {tuple(epoch_order(20, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_every_place_is_as_likely_for_every_group() -> None:
    """Chi-square over 4,000 orders of 6 groups: 25 degrees of freedom, far tail."""
    counts = np.zeros((6, 6))
    for epoch in range(4000):
        counts[np.arange(6), epoch_order(6, 1, epoch)] += 1
    expected = 4000 / 6
    assert ((counts - expected) ** 2 / expected).sum() < 60


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 4), st.integers(0, 2**40))
def test_each_epoch_has_every_group_once(num_groups: int, batch_size: int, num_epochs: int, seed: int) -> None:
    steps = list(batches(num_groups, batch_size, seed=seed, num_epochs=num_epochs))
    assert [step for step, _, _ in steps] == list(range(num_steps(num_groups, batch_size, num_epochs)))
    for epoch in range(num_epochs):
        parts = [indices.tolist() for _, found, indices in steps if found == epoch]
        assert sorted(chain.from_iterable(parts)) == list(range(num_groups))
        assert [len(part) for part in parts[:-1]] == [batch_size] * (len(parts) - 1)


@given(st.integers(1, 30), st.integers(1, 7), st.integers(1, 3), st.integers(0, 40))
def test_a_resumed_run_sees_what_is_left(num_groups: int, batch_size: int, num_epochs: int, start: int) -> None:
    def steps(start_step: int) -> list[tuple[int, int, list[int]]]:
        found = batches(num_groups, batch_size, seed=3, num_epochs=num_epochs, start_step=start_step)
        return [(step, epoch, indices.tolist()) for step, epoch, indices in found]

    assert steps(start) == steps(0)[start:]


def test_batches_of_nothing_are_no_batches() -> None:
    assert list(batches(0, 4, seed=0, num_epochs=3)) == []
    with pytest.raises(SettingsError, match="batch_size"):
        list(batches(3, 0, seed=0, num_epochs=1))


def group(*lengths: int) -> CompletionGroup:
    """A group whose prompt has the first length, and a completion for every other one."""
    prompt, *completions = (np.zeros(length, dtype=np.int64) for length in lengths)
    return CompletionGroup(prompt=prompt, completions=tuple(Completion(tokens=tokens) for tokens in completions))


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30), st.integers(0, 30)), max_size=20), st.integers(1, 80))
def test_micro_batches_hold_every_group_once_within_the_limit(lengths: list[tuple[int, ...]], limit: int) -> None:
    groups = [group(*each) for each in lengths]
    cut = micro_batches(groups, limit)
    assert sorted(chain.from_iterable(cut)) == list(range(len(groups)))
    for part in cut:
        assert part
        assert len(part) == 1 or sum(groups[index].num_tokens for index in part) <= limit


def test_micro_batches_put_like_lengths_together_the_longest_first() -> None:
    groups = [group(1, 2, 2), group(9, 4, 4), group(5, 5), group(3), group(1, 4)]
    assert micro_batches(groups, 16) == [[1], [2, 0], [4, 3]]
    assert micro_batches([], 16) == []
    with pytest.raises(SettingsError, match="tokens_per_batch"):
        micro_batches(groups, 0)


# ------------------------------------------------------------------------------------------------------ shared prompts

families_of = st.lists(st.integers(0, 6), min_size=1, max_size=60).map(lambda numbers: np.array(numbers))


def demonstration(prompt: list[int], *completion: int, where: str = "") -> CompletionGroup:
    return CompletionGroup(prompt=np.array(prompt), completions=(Completion(tokens=np.array(completion)),), where=where)


def test_an_order_with_siblings_that_other_machines_and_versions_must_repeat() -> None:
    families = np.array([0, 1, 0, 2, 1, 0, 3, 0, 1, 4])
    assert epoch_order(10, seed=7, epoch=3, families=families).tolist() == [3, 8, 1, 4, 9, 2, 0, 7, 5, 6]


def test_siblings_by_hand() -> None:
    families = np.array([0, 1, 0, 2, 1, 0, 3, 0, 1, 4])
    order = np.array([2, 4, 7, 3, 5, 1, 8, 9, 0, 6])
    deal = -np.arange(10)  # the last of a family first
    # Family 0 (rows 0, 2, 5, 7) stands where row 0 stood, its second pair where row 5 did; family 1 at rows 1 and 8.
    assert siblings_together(order, deal, families).tolist() == [3, 8, 4, 1, 9, 7, 5, 2, 0, 6]
    assert siblings_together(order, deal, families, most=2).tolist() == [3, 2, 0, 8, 4, 1, 9, 7, 5, 6]


@given(families_of, st.integers(0, 2**63), st.integers(1, 9))
def test_siblings_are_neighbours_in_parts_that_are_not_too_large(families: np.ndarray, seed: int, most: int) -> None:
    order, deal = (epoch_order(len(families), seed, epoch) for epoch in (0, 1))
    order = siblings_together(order, deal, families, most)
    assert sorted(order.tolist()) == list(range(len(families)))
    in_order = families[order].tolist()
    for family, size in zip(*np.unique(families, return_counts=True), strict=True):
        places = [place for place, found in enumerate(in_order) if found == family]
        stretches = 1 + sum(right - left > 1 for left, right in pairwise(places))
        assert stretches <= -(-size // most)


@given(st.integers(1, 40), st.integers(0, 2**63))
def test_rows_without_siblings_keep_their_order(num_groups: int, seed: int) -> None:
    order = epoch_order(num_groups, seed, 0, families=np.arange(num_groups)[::-1].copy())
    assert np.array_equal(order, epoch_order(num_groups, seed, 0))


def test_no_part_comes_sooner_because_it_is_large() -> None:
    """Families of 1, 2, 7 and 20 rows, at most 8 in a part: the first row of an epoch is of each by its parts."""
    families = np.repeat([0, 1, 2, 3], [1, 2, 7, 20])
    firsts = [families[epoch_order(30, 5, epoch, families)[0]] for epoch in range(3000)]
    expected = 3000 * np.array([1, 1, 1, 3]) / 6
    assert ((np.bincount(firsts) - expected) ** 2 / expected).sum() < 25


def test_every_row_of_a_large_family_is_as_likely_in_every_place() -> None:
    """Chi-square over 3,000 orders of 12 rows of one prompt: 121 degrees of freedom, far tail."""
    counts = np.zeros((12, 12))
    for epoch in range(3000):
        counts[np.arange(12), epoch_order(12, 2, epoch, families=np.zeros(12, dtype=np.int64))] += 1
    expected = 3000 / 12
    assert ((counts - expected) ** 2 / expected).sum() < 200


@given(families_of, st.integers(1, 7), st.integers(0, 2**40), st.integers(0, 30))
def test_steps_of_siblings_hold_as_many_rows_and_resume(
    families: np.ndarray, batch_size: int, seed: int, start: int
) -> None:
    def steps(start: int) -> list[list[int]]:
        found = batches(len(families), batch_size, seed=seed, num_epochs=2, start_step=start, families=families)
        return [indices.tolist() for _, _, indices in found]

    alone = [len(indices) for *_, indices in batches(len(families), batch_size, seed=seed, num_epochs=2)]
    assert [len(step) for step in steps(0)] == alone
    assert sorted(chain.from_iterable(steps(0))) == sorted([*range(len(families))] * 2)
    assert steps(start) == steps(0)[start:]


def test_families_are_prompts_of_the_same_tokens() -> None:
    groups = [demonstration(prompt, 9) for prompt in ([1, 2], [3, 4], [1, 2], [1], [1], [1, 2, 3], [3, 4])]
    assert prompt_families(groups).tolist() == [0, 1, 0, 2, 3, 4, 1]  # a prompt of one token is nobody's to share
    narrow = CompletionGroup(prompt=np.array([1, 2], dtype=np.int32), completions=groups[0].completions)
    assert prompt_families([groups[0], narrow]).tolist() == [0, 0]
    assert prompt_families([]).tolist() == []


def test_one_prompt_becomes_one_group() -> None:
    groups = [
        demonstration([1, 2], 5, where="a:1"),
        demonstration([3, 4], 6, where="a:2"),
        demonstration([1, 2], 7, 8, where="a:3"),
        demonstration([1, 2], 5, where="a:4"),
    ]
    shared, alone = merge_prompts(groups, 100)
    assert alone is groups[1]
    assert shared.prompt.tolist() == [1, 2]
    assert [completion.tokens.tolist() for completion in shared.completions] == [[5], [7, 8], [5]]
    assert shared.where == "a:1, a:3, a:4"
    assert [group.num_tokens for group in merge_prompts(groups, 5)] == [5, 3, 3]  # 2 + 1 + 2, and the last one alone


@pytest.mark.parametrize("judged", [{"margin": 0.0}, {"desirable": (False,)}])
def test_what_is_compared_is_not_merged(judged: dict[str, Any]) -> None:
    groups = [demonstration([1, 2], 5), replace(demonstration([1, 2], 6, where="a:2"), **judged)]
    with pytest.raises(DataError, match="a:2: completions that are compared or labelled"):
        merge_prompts(groups, 100)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=25), st.integers(1, 30))
def test_merging_keeps_every_row_and_the_limit(rows: list[tuple[int, int]], limit: int) -> None:
    prompts = [[1], [1, 1], [2, 2], [2, 2, 2]]
    groups = [demonstration(prompts[which], *[number] * length) for number, (which, length) in enumerate(rows)]
    merged = merge_prompts(groups, limit)

    def named(groups: list[CompletionGroup]) -> list[tuple[list[int], list[int]]]:
        return sorted((g.prompt.tolist(), c.tokens.tolist()) for g in groups for c in g.completions)

    assert named(merged) == named(groups)
    assert all(len(group.completions) == 1 or group.num_tokens <= limit for group in merged)
    assert all(len(group.completions) == 1 for group in merged if len(group.prompt) == 1)
    if limit == 30 and all(length == 1 for _, length in rows):
        assert len({tuple(group.prompt) for group in merged if len(group.prompt) > 1}) == sum(
            len(group.prompt) > 1 for group in merged
        )


def test_most_siblings_save_what_the_constant_says() -> None:
    assert 1 - 1 / MOST_SIBLINGS == 7 / 8


def test_all_tokens_trained() -> None:
    tokens, mask = np.array([4, 5, 6]), np.array([True, False, True])
    group = CompletionGroup(prompt=np.array([1, 2, 3]), completions=(Completion(tokens=tokens, mask=mask),), where="w")
    whole = train_all_tokens(group)
    assert whole.prompt.tolist() == [1]
    (completion,) = whole.completions
    assert completion.tokens.tolist() == [2, 3, 4, 5, 6]
    assert completion.completion_mask.all()
    assert whole.where == "w"
    assert whole.num_tokens == group.num_tokens
    again = train_all_tokens(whole)
    assert again.completions[0].tokens.tolist() == completion.tokens.tolist()


# ------------------------------------------------------------------------------------------------------- held-out part


def example(prompt: str, completion: str = "c") -> RankedCompletions:
    return RankedCompletions(prompt=({"role": "user", "content": prompt},), completions=(completion,))


def test_the_first_human_turn() -> None:
    turns = ({"role": "system", "content": "s"}, {"role": "user", "content": " a "}, {"role": "user", "content": "b"})
    assert first_human_turn(turns) == "a"
    assert first_human_turn("text\n") == "text"
    assert first_human_turn(turns[:1]) == "s"
    assert first_human_turn(()) == ""


def test_what_is_held_out_depends_on_nothing_but_the_text() -> None:
    """Frozen, so that a later version draws the same line through the same data."""
    held_out = [number for number in range(8) if is_held_out(f"question {number}", 0.5)]
    assert held_out == [0, 1, 5, 7]


@given(st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f"]), max_size=30), st.floats(0, 0.99))
def test_same_question_same_side_and_a_larger_part_holds_the_smaller(questions: list[str], fraction: float) -> None:
    examples = [example(question, str(number)) for number, question in enumerate(questions)]
    train, held_out = split_holdout(examples, fraction)
    assert len(train) + len(held_out) == len(examples)
    assert not {e.prompt[0]["content"] for e in train} & {e.prompt[0]["content"] for e in held_out}  # type: ignore[index]
    _, more = split_holdout(examples, min(0.99, fraction + 0.2))
    assert all(each in more for each in held_out)


def test_the_share_is_about_the_fraction() -> None:
    _, held_out = split_holdout([example(f"question {number}") for number in range(4000)], 0.25)
    assert abs(len(held_out) - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5
    _, nothing = split_holdout([example("a")], 0.0)
    assert nothing == []


def test_texts_without_prompt_are_not_all_on_one_side() -> None:
    texts = [RankedCompletions(prompt="", completions=(f"text {number}",)) for number in range(100)]
    train, held_out = split_holdout(texts, 0.5)
    assert train
    assert held_out


def test_a_key_of_one_s_own() -> None:
    examples = [RankedCompletions(prompt=f"{topic} {n}", completions=("c",)) for topic in "abcdef" for n in range(5)]
    train, held_out = split_holdout(examples, 0.5, key=lambda each: str(each.prompt)[0])
    assert {str(e.prompt)[0] for e in train}.isdisjoint(str(e.prompt)[0] for e in held_out)
    for fraction in (1.0, -0.1):
        with pytest.raises(SettingsError, match="held-out fraction"):
            split_holdout(examples, fraction)


def test_real_questions_stay_on_one_side(shared_data: Path, hh_rows: Callable[[str], list[dict[str, str]]]) -> None:
    """A fifth of both HH files: more than 700 pairs held out, and no opening question on both sides."""
    examples = [
        each
        for name in ("helpful-base", "helpful-online")
        for each in read_examples(hh_rows(name), task="preference", report=ReadReport())
    ]
    train, held_out = split_holdout(examples, 0.22)
    assert len(held_out) > 700
    assert not {first_human_turn(e.prompt) for e in train} & {first_human_turn(e.prompt) for e in held_out}

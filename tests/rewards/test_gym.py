"""Tasks of reasoning-gym: as data, and scored by their own rules where an answer is code."""

from __future__ import annotations

import json

import pytest

from trueup.data.reasoning_gym import parse_task, reasoning_gym_rows
from trueup.data.rows import read_rows
from trueup.errors import DataError, RewardError
from trueup.rewards.rewards import Rewards

pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def rewards(confinement) -> Rewards:
    return Rewards.load(["reasoning-gym:seconds=20"])


def columns_of(rows):
    return {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}


def test_the_name_of_a_task():
    assert parse_task("reasoning-gym:chain_sum?size=5&min_terms=2&x=a+b&y=[1,2]&z=true&system=simple") == (
        "chain_sum",
        {"size": 5, "min_terms": 2, "x": "a b", "y": [1, 2], "z": True},
        "simple",
    )
    assert parse_task("reasoning-gym:chain_sum") == ("chain_sum", {}, None)


def test_entries_are_rows():
    import reasoning_gym

    rows = list(reasoning_gym_rows("reasoning-gym:chain_sum?size=3&seed=7&max_terms=3"))
    truth = reasoning_gym.create_dataset("chain_sum", size=3, seed=7, max_terms=3)
    assert [row["prompt"] for row in rows] == [truth[index]["question"] for index in range(3)]
    assert [row["answer"] for row in rows] == [truth[index]["answer"] for index in range(3)]
    assert [row["task_index"] for row in rows] == [0, 1, 2]
    assert rows[0]["metadata"]["expression"] == truth[0]["metadata"]["expression"]
    assert json.loads(json.dumps(rows)) == rows


def test_rows_are_the_same_every_time():
    first, again = (list(reasoning_gym_rows("reasoning-gym:chain_sum?size=3")) for _ in range(2))
    assert first == again


def test_a_system_prompt_makes_conversations():
    (row,) = reasoning_gym_rows("reasoning-gym:chain_sum?size=1&system=simple")
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]
    assert "<answer>" in row["prompt"][0]["content"]


def test_the_data_side_reads_them():
    rows = list(read_rows("reasoning-gym:chain_sum?size=2"))
    assert [row.where for row in rows] == [f"reasoning-gym:chain_sum?size=2 entry {index}" for index in range(2)]
    assert rows[1].fields["task_index"] == 1


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("reasoning-gym:no_such_task", "no_such_task"),
        ("reasoning-gym:chain_sum?nonsense=1", "doesn't take these settings: .*nonsense"),
        ("reasoning-gym:chain_sum?min_terms=5&max_terms=2", "doesn't take these settings"),
        ("reasoning-gym:chain_sum?size=1&system=shouted", "has no system prompt 'shouted'"),
    ],
)
def test_what_is_no_task(source, what):
    with pytest.raises(DataError, match=what):
        next(reasoning_gym_rows(source))


@pytest.mark.parametrize("task", ["chain_sum", "countdown", "n_queens", "simple_integration", "propositional_logic"])
def test_the_tasks_own_answers_are_right(task, rewards, samples):
    rows = list(reasoning_gym_rows(f"reasoning-gym:{task}?size=4&seed=2"))
    solved = [row["answer"] or row["metadata"].get("example_answer", "") for row in rows]
    answers = [solved[0], f"I think\n<answer>{solved[1]}</answer>", "<answer></answer>", "no"]
    first, tagged, empty, none = rewards.score(samples(answers, **columns_of(rows))).total.tolist()
    assert (first, tagged) == (1, 1)
    assert max(empty, none) < 0.5


HOSTILE = [
    "__import__('os')._exit(0)",
    "__import__('time').sleep(1000)",
    "9**9**9**9",
    "[0] * 10**12",
    "print('[\"score\", 1.0]')",
    "__import__('os').write(3, b'[\"score\", 1.0]')",
    "[__import__('os').write(fd, b'[\"\", \"score\", 1.0]') for fd in (3, 1)]",
    "__import__('os').write(4, b'[[\"score\", 1.0]]\\n')",
    "__import__('socket').create_connection(('127.0.0.1', 80))",
]


@pytest.mark.filterwarnings("ignore:reward 'reasoning-gym'")
def test_an_answer_that_is_an_attack_scores_nothing_and_harms_nobody(samples, rewards):
    rows = list(reasoning_gym_rows(f"reasoning-gym:n_queens?size={len(HOSTILE)}"))
    quick = Rewards.load(["reasoning-gym:seconds=1"])
    assert quick.score(samples(HOSTILE, **columns_of(rows))).total.max() < 0.1
    honest = quick.score(samples([row["answer"] for row in rows], **columns_of(rows)))
    assert honest.total.tolist() == [1] * len(rows)


@pytest.mark.filterwarnings("ignore:reward 'reasoning-gym'")
def test_an_answer_that_ends_the_scorer_costs_its_neighbour_nothing(samples, rewards):
    rows = list(reasoning_gym_rows("reasoning-gym:n_queens?size=2"))
    answers = ["__import__('os').kill(__import__('os').getppid(), 9)", rows[1]["answer"]]
    hostile, honest = rewards.score(samples(answers, **columns_of(rows))).total
    assert hostile < 0.1
    assert honest == 1


def test_an_answer_writes_no_file(tmp_path, samples, rewards):
    target = tmp_path / "here"
    row = next(reasoning_gym_rows("reasoning-gym:n_queens?size=1"))
    rewards.score(samples([f"open({str(target)!r}, 'w').write('x')"], **columns_of([row])))
    assert not target.exists()


def test_a_row_of_no_task_is_left_out(samples, rewards):
    row = next(reasoning_gym_rows("reasoning-gym:chain_sum?size=1"))
    columns = {name: [value, None] for name, value in row.items() if name != "prompt"}
    given = samples([row["answer"], "x"], **columns)
    assert str(rewards._caller.results(rewards.rewards, given)) == "[[1.0, None]]"


def test_an_entry_that_is_another_one_now_is_named(samples, rewards):
    row = next(reasoning_gym_rows("reasoning-gym:chain_sum?size=1")) | {"answer": "another"}
    with pytest.raises(RewardError, match=r"sample 0 \(data.jsonl:1, .*entry 0 of chain_sum is another one here"):
        rewards.score(samples(["1"], **columns_of([row])))


def test_without_confinement(samples):
    row = next(reasoning_gym_rows("reasoning-gym:chain_sum?size=1"))
    rewards = Rewards.load(["reasoning-gym:confined=false"])
    assert rewards.score(samples([row["answer"]], **columns_of([row]))).total.tolist() == [1]

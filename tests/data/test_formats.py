"""Every shape of row becomes the same records; what a row lacks is said, what it can't teach is counted."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trueup.data.data_format import Task
from trueup.data.dialogues import hh_conversation
from trueup.data.formats import FORMATS, detect_format, read_examples
from trueup.data.report import ReadReport
from trueup.data.rows import Row
from trueup.errors import DataError
from trueup.records import RankedCompletions


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def read(
    *rows: dict[str, Any], task: Task | None = "preference", data_format: str = "auto"
) -> tuple[list[RankedCompletions], ReadReport]:
    report = ReadReport()
    return list(read_examples(list(rows), task=task, data_format=data_format, report=report)), report


def read_one(row: dict[str, Any], task: Task, data_format: str = "auto") -> tuple[RankedCompletions, ReadReport]:
    (example,), report = read(row, task=task, data_format=data_format)
    return example, report


ASKED = (user("2+2?"),)

SFT_ROWS: dict[str, tuple[dict[str, Any], RankedCompletions]] = {
    "messages": (
        {"messages": [{"role": "system", "content": "Sum."}, *ASKED, assistant("4"), user("Sure?"), assistant("Yes")]},
        RankedCompletions(
            prompt=({"role": "system", "content": "Sum."}, *ASKED),
            completions=((assistant("4"), user("Sure?"), assistant("Yes")),),
        ),
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
            "system": "Sum.",
        },
        RankedCompletions(
            prompt=({"role": "system", "content": "Sum."}, *ASKED),
            completions=((assistant("4"),),),
        ),
    ),
    "prompt_completion": (
        {"prompt": "2+2=", "completion": "4"},
        RankedCompletions(prompt="2+2=", completions=("4",)),
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        RankedCompletions(prompt=(user("Add.\n\n2 and 2"),), completions=((assistant("4"),),)),
    ),
    "text": ({"text": "Once."}, RankedCompletions(prompt="", completions=("Once.",))),
}

PREFERENCE_ROWS: dict[str, tuple[dict[str, Any], RankedCompletions]] = {
    "explicit": (
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        RankedCompletions(prompt="2+2=", completions=("4", "5")),
    ),
    "explicit, conversations": (
        {"prompt": list(ASKED), "chosen": [assistant("4")], "rejected": assistant("5")},
        RankedCompletions(prompt=ASKED, completions=((assistant("4"),), (assistant("5"),))),
    ),
    "explicit, mixed": (
        {"prompt": "2+2?", "chosen": [assistant("4")], "rejected": "5"},
        RankedCompletions(prompt=ASKED, completions=((assistant("4"),), (assistant("5"),))),
    ),
    "implicit": (
        {"chosen": [*ASKED, assistant("4")], "rejected": [*ASKED, assistant("5")]},
        RankedCompletions(prompt=ASKED, completions=((assistant("4"),), (assistant("5"),))),
    ),
    "implicit, prompt repeated": (
        {"prompt": "2+2?", "chosen": [*ASKED, assistant("4")], "rejected": [*ASKED, assistant("5")]},
        RankedCompletions(prompt=ASKED, completions=((assistant("4"),), (assistant("5"),))),
    ),
    "hh": (
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        RankedCompletions(prompt=ASKED, completions=((assistant("4"),), (assistant("5"),))),
    ),
    "hh_prompt": (
        {"prompt": "\n\nHuman: 2+2?\n\nAssistant:", "chosen": " 4", "rejected": " 5"},
        RankedCompletions(prompt=ASKED, completions=((assistant("4"),), (assistant("5"),))),
    ),
    "ranked": (
        {"prompt": "2+2=", "completions": ["4", "four", "5"]},
        RankedCompletions(prompt="2+2=", completions=("4", "four", "5")),
    ),
    "ranked, conversations": (
        {"prompt": list(ASKED), "completions": [[assistant("4")], [assistant("5")], [assistant("6")]]},
        RankedCompletions(prompt=ASKED, completions=((assistant("4"),), (assistant("5"),), (assistant("6"),))),
    ),
    "unpaired": (
        {"prompt": "2+2=", "completion": "4", "label": True},
        RankedCompletions(prompt="2+2=", completions=("4",), desirable=(True,)),
    ),
    "unpaired, conversation and number": (
        {"question": list(ASKED), "answer": "4", "label": 1},
        RankedCompletions(prompt=ASKED, completions=((assistant("4"),),), desirable=(True,)),
    ),
}

STEPS: dict[str, Any] = {
    "prompt": "2+2+3=",
    "completions": ("2+2=4\n4+3=8",),
    "steps": (("2+2=4", "4+3=8"),),
    "step_labels": ((1.0, 0.0),),
}
PROCESS_ROWS: dict[str, tuple[dict[str, Any], RankedCompletions]] = {
    "stepwise": (
        {"prompt": "2+2+3=", "steps": ["2+2=4", "4+3=8"], "labels": [True, False]},
        RankedCompletions(**STEPS),
    ),
    "stepwise, as TRL has it": (
        {"prompt": "2+2+3=", "completions": ["2+2=4", "4+3=8"], "labels": [1, 0]},
        RankedCompletions(**STEPS),
    ),
    "stepwise, rated": (
        {"question": "2+2+3=", "steps": ["2+2=4", "hm", "4+3=8", "so 8"], "ratings": [1, 0, -1, None]},
        RankedCompletions(
            prompt="2+2+3=",
            completions=("2+2=4\nhm\n4+3=8\nso 8",),
            steps=(("2+2=4", "hm", "4+3=8", "so 8"),),
            step_labels=((1.0, 1.0, 0.0, None),),
        ),
    ),
    "stepwise, soft labels of a conversation": (
        {"prompt": list(ASKED), "steps": ["4"], "labels": [0.875]},
        RankedCompletions(prompt=ASKED, completions=((assistant("4"),),), steps=(("4",),), step_labels=((0.875,),)),
    ),
    "math_shepherd": (
        {
            "input": "What is 2+2+3? Step 1: 2+2=4 ки\nStep 2: 4+3=8 ки",
            "label": "What is 2+2+3? Step 1: 2+2=4 +\nStep 2: 4+3=8 -",
            "task": "GSM8K",
        },
        RankedCompletions(
            prompt="What is 2+2+3?\n",
            completions=("Step 1: 2+2=4\nStep 2: 4+3=8",),
            steps=(("Step 1: 2+2=4", "Step 2: 4+3=8"),),
            step_labels=((1.0, 0.0),),
        ),
    ),
}


@pytest.mark.parametrize(
    ("name", "row", "wanted", "task"),
    [
        *((name, row, wanted, "sft") for name, (row, wanted) in SFT_ROWS.items()),
        *((name, row, wanted, "preference") for name, (row, wanted) in PREFERENCE_ROWS.items()),
        *((name, row, wanted, "process") for name, (row, wanted) in PROCESS_ROWS.items()),
    ],
)
def test_every_format_is_detected_and_read(
    name: str, row: dict[str, Any], wanted: RankedCompletions, task: Task
) -> None:
    example, report = read_one(row, task)
    assert report.format == name.partition(",")[0]
    assert report.detected
    assert (example.prompt, example.completions) == (wanted.prompt, wanted.completions)
    assert (example.steps, example.step_labels) == (wanted.steps, wanted.step_labels)
    assert example.desirable == wanted.desirable
    assert example.where == "row 1"
    assert (report.num_rows, report.num_kept, report.dropped) == (1, 1, {})
    told, told_report = read_one(row, task, data_format=report.format)
    assert told == example
    assert not told_report.detected


def test_every_format_is_tried_above() -> None:
    tried = {name.partition(",")[0] for name in (*SFT_ROWS, *PREFERENCE_ROWS, *PROCESS_ROWS)}
    assert tried == set(FORMATS) - {"prompt", "sampled"}, "those are in test_prompts.py and test_sampled.py"


@pytest.mark.parametrize("name", PREFERENCE_ROWS)
def test_preferences_serve_as_demonstrations_of_their_best_side(name: str) -> None:
    row, wanted = PREFERENCE_ROWS[name]
    example, report = read_one(row, "sft")
    assert (example.prompt, example.completions) == (wanted.prompt, wanted.completions[:1])
    assert re.search("the (chosen|desirable) side as demonstration", report.summary())
    assert example.desirable is None


def test_labels_of_unpaired_rows() -> None:
    row = {"prompt": "2+2=", "completion": "5"}
    for label, good in ((False, False), (0, False), ("false", False), ("True", True), (np.bool_(True), True)):
        example, _ = read_one({**row, "label": label}, "preference")
        assert example.desirable == (good,)
    examples, report = read({**row, "label": False}, {**row, "completion": "4", "label": True}, task="sft")
    assert [example.completions for example in examples] == [("4",)]
    assert report.dropped == {"undesirable completion": 1}
    # Any other column of that name is none of ours.
    assert read_one({**row, "label": "sums"}, "sft")[1].format == "prompt_completion"
    with pytest.raises(DataError, match=r"row 1(.|\n)*'label' must be true or false, found 'sums'"):
        read({**row, "label": "sums"}, data_format="unpaired")


def test_an_override_beats_detection() -> None:
    row = {"prompt": "Q", "completion": "A", "text": "Once."}
    assert read_one(row, "sft")[0].completions == ("A",)
    assert read_one(row, "sft", data_format="text")[0].completions == ("Once.",)


def test_columns_by_other_names() -> None:
    assert read_one({"question": "2+2?", "answer": "4"}, "sft")[0].completions == ("4",)
    assert read_one({"prompt": "2+2?", "response": "4"}, "sft")[0].completions == ("4",)
    assert read_one({"question": "2+2?", "chosen": "4", "rejected": "5"}, "preference")[0].prompt == "2+2?"


# ------------------------------------------------------------------------------------------------- cutting at turns


def test_the_cut_is_at_a_turn_and_never_inside_an_answer() -> None:
    example, _ = read_one(
        {"chosen": [*ASKED, assistant("I think 4")], "rejected": [*ASKED, assistant("I think 5")]}, "preference"
    )
    assert example.completions == ((assistant("I think 4"),), (assistant("I think 5"),))


def test_sides_that_part_at_a_human_turn_are_cut_at_the_last_one_they_share() -> None:
    first = [*ASKED, assistant("4")]
    example, _ = read_one(
        {"chosen": [*first, user("Sure?"), assistant("Yes")], "rejected": [*first, user("Why?"), assistant("So")]},
        "preference",
    )
    assert example.prompt == ASKED
    assert example.completions == (
        (assistant("4"), user("Sure?"), assistant("Yes")),
        (assistant("4"), user("Why?"), assistant("So")),
    )


def test_sides_that_share_no_human_turn_are_dropped() -> None:
    examples, report = read(
        {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]},
        {"chosen": [*ASKED, assistant("4")], "rejected": [*ASKED, assistant("5")]},
    )
    assert len(examples) == 1
    assert report.dropped == {"the sides share no human turn": 1}
    assert report.first_dropped == {"the sides share no human turn": "row 1"}


def test_hh_turns() -> None:
    assert hh_conversation("\n\nHuman: a\n\nb\n\nAssistant: c: Human: d") == (user("a\n\nb"), assistant("c: Human: d"))
    assert hh_conversation("Human: a\n\nAssistant:") == (user("a"), assistant(""))
    noted: list[str] = []
    joined = hh_conversation("\n\nHuman: a\n\nAssistant: One moment.\n\nAssistant: It is 4.", noted.append)
    assert joined == (user("a"), assistant("One moment.\n\nIt is 4."))
    assert noted == ["turns of one speaker in a row joined"]
    for text in ("Hello\n\nHuman: a", "", "no labels at all"):
        with pytest.raises(DataError, match="begins with 'Human:'"):
            hh_conversation(text)


def test_hh_dialogues_that_end_oddly() -> None:
    start = "\n\nHuman: a\n\nAssistant:"
    examples, report = read(
        {"chosen": f"{start} x", "rejected": f"{start} y\n\nHuman: more?"},
        {"chosen": f"{start} x", "rejected": f"{start} "},
        {"chosen": f"{start} x", "rejected": f"{start} x\n\nHuman: more?"},
    )
    assert [example.completions for example in examples] == [((assistant("x"),), (assistant("y"),))]
    assert report.dropped == {"empty completion": 1, "identical sides": 1}
    assert report.noted["turns after the last answer left out"] == 1


def characters_shared_into_the_answer(row: dict[str, str]) -> bool:
    """Whether cutting at the longest common prefix would cut into both answers."""
    chosen, rejected = row["chosen"], row["rejected"]
    common = _common(chosen, rejected)
    return common > chosen.rfind("\n\nAssistant:", 0, common) + len("\n\nAssistant: ")


def _common(one: str, other: str) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_real_hh_pairs_lose_no_character(shared_data: Path, hh_rows: Callable[[str], list[dict[str, str]]]) -> None:
    """437 pairs share first characters of their answers: 435 different ones, and 2 that are identical altogether."""
    rows = hh_rows("helpful-base")
    sharing = [row for row in rows if characters_shared_into_the_answer(row)]
    assert len(rows) == 2354
    assert len(sharing) == 437
    assert sum(row["chosen"] != row["rejected"] for row in sharing) == 435

    report = ReadReport()
    path = str(shared_data / "hh-rlhf" / "helpful-base.test.jsonl.gz")
    examples = list(read_examples(path, task="preference", report=report))
    assert report.num_rows == 2354
    assert report.num_kept == len(examples) == 2348
    assert report.dropped == {"empty completion": 4, "identical sides": 2}
    assert report.noted == {
        "turns of one speaker in a row joined": 15,
        "'Human:' or 'Assistant:' inside a turn kept as text": 41,
    }
    for example in examples:
        row = rows[int(example.where.rpartition(":")[2]) - 1]
        for side, completion in zip(("chosen", "rejected"), example.completions, strict=True):
            turns = (*example.prompt, *completion)
            assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)  # type: ignore[index]
            # The labels of turns that were joined are the only letters that may be missing.
            said = "".join(str(turn["content"]) for turn in turns)  # type: ignore[index]
            written = row[side].replace("\n\nHuman:", "").replace("\n\nAssistant:", "")
            assert "".join(said.split()) == "".join(written.split())
        assert example.completions[0][0] != example.completions[1][0]


def test_real_online_pairs(shared_data: Path) -> None:
    report = ReadReport()
    path = str(shared_data / "hh-rlhf" / "helpful-online.test.jsonl.gz")
    assert len(list(read_examples(path, task="preference", report=report))) == 1131
    assert report.dropped == {"identical sides": 3, "empty completion": 3}
    assert report.noted["turns after the last answer left out"] == 1


# ---------------------------------------------------------------------------------------------------- ranks, margins


def test_scores_and_ranks_order_the_completions() -> None:
    row = {"prompt": "p", "completions": ["bad", "best", "good"]}
    by_score, _ = read_one(row | {"scores": [0.5, 9, 7.5]}, "preference")
    by_rank, _ = read_one(row | {"ranks": [3, 1, 2]}, "preference")
    assert by_score.completions == by_rank.completions == ("best", "good", "bad")
    assert by_score.margin == 1.5
    assert by_rank.margin is None


def test_ties_and_copies_in_ranked_lists() -> None:
    row = {"prompt": "p", "completions": ["a", "b", "c"]}
    example, report = read_one(row | {"scores": [1, 2, 1]}, "preference")
    assert example.completions == ("b", "a")
    assert report.noted == {"tied completions of a ranked list left out": 1}
    example, report = read_one({"prompt": "p", "completions": ["a", "", "a", "c"]}, "preference")
    assert example.completions == ("a", "c")
    assert report.noted == {"empty or repeated completions of a ranked list left out": 1}
    _, report = read(
        row | {"scores": [1, 1, 1]}, {"prompt": "p", "completions": ["a"]}, {"prompt": "p", "completions": ["a", "a"]}
    )
    assert report.dropped == {"all completions tie": 1, "fewer than two completions": 1, "identical sides": 1}


def test_margins() -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert read_one(pair, "preference")[0].margin is None
    assert read_one(pair | {"margin": 2}, "preference")[0].margin == 2.0
    assert read_one(pair | {"score_chosen": "8.5", "score_rejected": "6"}, "preference")[0].margin == 2.5
    assert read_one(pair | {"chosen_score": 3, "rejected_score": 3}, "preference")[0].margin == 0.0
    assert read(pair | {"score_chosen": 1, "score_rejected": 2})[1].dropped == {
        "the chosen side has the lower score": 1
    }
    assert read_one(pair | {"margin": 2}, "sft")[0].margin is None


# ------------------------------------------------------------------------------------------- what is dropped or changed


def test_rows_that_teach_nothing_are_dropped_and_counted() -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    examples, report = read(pair, pair | {"rejected": "a"}, pair | {"chosen": " \n"}, pair | {"rejected": ""})
    assert len(examples) == 1
    assert report.dropped == {"identical sides": 1, "empty completion": 2}
    assert report.first_dropped == {"identical sides": "row 2", "empty completion": "row 3"}
    assert (report.num_rows, report.num_kept) == (4, 1)
    line = report.summary()
    assert line == (
        "format explicit (detected), 4 rows; 1 kept; 1 dropped: identical sides (first: row 2); "
        "2 dropped: empty completion (first: row 3)"
    )


def test_conversations_without_an_answer_and_with_a_loose_end() -> None:
    examples, report = read(
        {"messages": [user("a"), assistant("b"), user("c")]},
        {"messages": [user("a")]},
        {"messages": [assistant("Welcome."), user("a"), assistant("b")]},
        {"messages": [assistant("Welcome.")]},
        {"messages": [user("a"), assistant("")]},
        {"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]},
        task="sft",
    )
    assert [(len(example.prompt), len(example.completions[0])) for example in examples] == [(1, 1), (2, 1), (1, 1)]
    assert report.dropped == {"no assistant turn that answers one before it": 2, "empty completion": 1}
    assert report.noted == {
        "turns after the last answer left out": 1,
        "assistant turns before the first question made part of the prompt": 1,
    }


def test_message_details() -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    example, _ = read_one(
        {"messages": [{"role": "user", "content": parts, "name": None}, {**assistant("4"), "extra": 1}]}, "sft"
    )
    assert example.prompt == ASKED
    assert example.completions == (({**assistant("4"), "extra": 1},),)


def test_arrays_and_json_in_csv_cells(tmp_path: Path) -> None:
    example, _ = read_one(
        {"prompt": "p", "completions": np.array(["a", "b"]), "scores": np.array([1, 2])}, "preference"
    )
    assert example.completions == ("b", "a")
    path = tmp_path / "data.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["messages"])
        writer.writerow([json.dumps([user("2+2?"), assistant("4")])])
    report = ReadReport()
    (found,) = read_examples(path, task="sft", report=report)
    assert found.prompt == ASKED


# -------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("row", [row for name, (row, _) in PROCESS_ROWS.items() if name != "math_shepherd"])
def test_steps_are_neither_demonstrations_nor_a_ranking(row: dict[str, Any]) -> None:
    """Read as a ranked list, the first step would be better than the second; as a demonstration, wrong steps taught."""
    for task in ("sft", "preference"):
        with pytest.raises(DataError, match=r"rows of the format 'stepwise', not \w+ data\n.*trueup reward --process"):
            read(row, task=task)
        with pytest.raises(DataError, match="'stepwise' is no format of"):
            read(row, task=task, data_format="stepwise")
    (example,), report = read(row, task=None)
    assert report.format == "stepwise"
    assert example.steps


def test_preferences_are_no_steps() -> None:
    with pytest.raises(DataError, match=r"of the format 'ranked', not process data\n.*trueup reward or"):
        read({"prompt": "2+2=", "completions": ["4", "5"]}, task="process")
    with pytest.raises(DataError, match="'ranked' is no format of process data"):
        read({"prompt": "2+2=", "completions": ["4", "5"]}, task="process", data_format="ranked")


def test_steps_in_csv_cells_and_arrays(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt", "steps", "labels"], ["p", '["a", "b"]', "[true, 0.5]"]])
    (example,) = read_examples(path, task="process", report=ReadReport())
    assert (example.steps, example.step_labels) == ((("a", "b"),), ((1.0, 0.5),))
    (example,), _ = read({"prompt": "p", "steps": np.array(["a"]), "labels": np.array([False])}, task="process")
    assert example.step_labels == ((0.0,),)


def test_rows_without_a_labelled_step_are_dropped() -> None:
    rows = [{"prompt": "p", "steps": [], "labels": []}, {"prompt": "p", "steps": ["a", "b"], "labels": [None, None]}]
    examples, report = read(*rows, task="process")
    assert examples == []
    assert report.dropped == {"no steps": 1, "no step is labelled": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "steps": ["a", "b"], "labels": [1]}, "2 steps but 1 labels"),
        ({"prompt": "p", "steps": ["a"], "labels": [1, 0]}, "1 steps but 2 labels"),
        ({"prompt": "p", "steps": ["a", " \n"], "labels": [1, 0]}, "step 2 is empty"),
        ({"prompt": "p", "steps": ["a"]}, "the column 'labels' or 'ratings' is missing"),
        ({"prompt": "p", "steps": "a b", "labels": [1]}, "'steps' must be a list"),
        ({"prompt": "p", "steps": ["a"], "labels": 1}, "'labels' must be a list"),
        ({"prompt": "p", "steps": ["a", 7], "labels": [1, 0]}, r"'steps\[1\]' must be a string, found int"),
        ({"prompt": "p", "steps": ["a"], "labels": ["right"]}, r"'labels\[0\]' must be a number, found 'right'"),
        ({"prompt": "p", "steps": ["a"], "labels": [math.nan]}, "finite number"),
        ({"prompt": "p", "steps": ["a", "b"], "labels": [1, -1]}, r"between 0 and 1, found -1\n.*'ratings'"),
        ({"prompt": "p", "steps": ["a"], "ratings": [0.5]}, r"'ratings\[0\]' must be 1, 0 \(neutral\) or -1"),
        ({"prompt": "p", "completions": [["a"]], "labels": [1]}, r"'completions\[0\]' must be a string, found list"),
        ({"input": "q Step 1: a ки", "label": "q Step 1: b +"}, "'label' is not 'input' with"),
        ({"input": "q Step 1: a ки", "label": "q Step 1: a *"}, "'label' is not 'input' with"),
        ({"input": "q a ки", "label": "q a +"}, "has no 'Step 1:'"),
        ({"input": "q Step 1: aки ки", "label": "q Step 1: a+ +"}, "step 2 is empty"),
    ],
)
def test_malformed_steps_say_what_and_where(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read(row, task="process")
    assert error.value.where == "row 1"
    assert error.value.way_out


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("row", "data_format", "message"),
    [
        (
            {"prompt": "p", "chosen": "a"},
            "explicit",
            r"row 1: the column 'rejected' is missing or empty",
        ),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "explicit", r"'chosen' must be a string, found int"),
        ({"prompt": "p", "chosen": "\ud800", "rejected": "b"}, "explicit", r"half of a surrogate pair"),
        (
            {"chosen": [user("a")], "rejected": [{**assistant("b"), "tool_calls": [{"name": "\ud800"}]}]},
            "implicit",
            r"rejected\[0\]' holds half of a surrogate pair",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "x"}, "explicit", r"'margin' must be a number"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": float("nan")}, "explicit", r"finite number"),
        ({"prompt": "p", "completions": "abc"}, "ranked", r"'completions' must be a list"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1]}, "ranked", r"2 completions but 1 scores"),
        ({"chosen": [user("a")], "rejected": [{"role": "user"}]}, "implicit", r"rejected\[0\] has no content"),
        ({"chosen": ["a"], "rejected": ["b"]}, "implicit", r'chosen\[0\] is not a message(.|\n)*"role"'),
        ({"chosen": [{"role": "a b", "content": ""}], "rejected": []}, "implicit", r"'a b', which is no role"),
        (
            {"chosen": [{"role": "user", "content": [{"type": "image"}]}], "rejected": []},
            "implicit",
            r"parts that are not text",
        ),
    ],
)
def test_malformed_rows_say_what_and_where(row: dict[str, Any], data_format: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read(row, data_format=data_format)
    assert error.value.where == "row 1"
    assert error.value.way_out


def test_a_message_nested_too_deeply() -> None:
    deep: list[Any] = []
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(DataError, match="row 1: nested too deeply"):
        read({"messages": [user("q"), {**assistant("a"), "extra": deep}]}, task="sft")


def test_detection_fails_with_the_formats_it_knows() -> None:
    with pytest.raises(DataError, match=r"row 1: no known format(.|\n)*'title', 'body'(.|\n)*explicit +prompt, chosen"):
        read({"title": "a", "body": "b"})
    with pytest.raises(DataError, match=r"rows of the format 'messages', not preference data\n.*trueup sft"):
        read({"messages": [user("a"), assistant("b")]}, task="preference")
    with pytest.raises(DataError, match="row 2: looks like the format 'text', but row 1 like 'alpaca'"):
        read({"instruction": "a", "output": "b"}, {"text": "c"}, task="sft")
    with pytest.raises(DataError, match="there are no rows"):
        read()
    with pytest.raises(DataError, match=r"'nonsense' is no format of preference data(.|\n)*explicit"):
        read({"text": ""}, data_format="nonsense")
    with pytest.raises(DataError, match="'text' is no format of preference data"):
        read({"text": ""}, data_format="text")


def test_names_of_columns_can_t_reach_the_terminal_as_they_are() -> None:
    with pytest.raises(DataError) as error:
        read({"\x1b[2J": "a"})
    assert "\x1b" not in str(error.value)


def test_errors_name_file_and_line(write_jsonl: Callable[..., Path]) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    path = write_jsonl(pair, pair | {"chosen": 1})
    with pytest.raises(DataError, match=rf"{path}:2: 'chosen' must be a string"):
        list(read_examples(path, task="preference", report=ReadReport()))
    report = ReadReport()
    assert len(list(read_examples(path, task="preference", report=report, strict=False))) == 1
    assert [error.where for error in report.malformed] == [f"{path}:2"]
    assert report.num_kept == 1


def test_detection_is_by_several_rows() -> None:
    rows = [Row("a:1", {"text": "x", "prompt": None}), Row("a:2", {"text": "y"})]
    assert detect_format(rows, "sft") == "text"
    assert detect_format(rows, None) == "text"

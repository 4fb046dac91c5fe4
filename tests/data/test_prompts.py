"""Prompts alone: found in every kind of row, the same tokens that training sees, and answers turned back into text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from trueup.cli.main import main
from trueup.data.chat import completion_text, load_prompts, tokenize_group, tokenize_prompt
from trueup.data.check import check_data
from trueup.data.formats import read_examples
from trueup.data.prompts import PromptRow, read_prompts
from trueup.data.report import ReadReport
from trueup.data.settings import TokenizeSettings
from trueup.errors import DataError, ModelError
from trueup.records import RankedCompletions, Text


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def read(*rows: Any, **options: Any) -> tuple[list[PromptRow], ReadReport]:
    report = ReadReport()
    return list(read_prompts(list(rows), report=report, **options)), report


SYSTEM = {"role": "system", "content": "Sum."}
ASKED = (user("2+2?"),)
HH = "\n\nHuman: 2+2?\n\nAssistant:"

ROWS: list[tuple[dict[str, Any], Text, set[str]]] = [
    ({"prompt": "2+2=", "answer": 4, "level": None}, "2+2=", {"answer", "level"}),
    ({"question": "2+2=", "answer": "4"}, "2+2=", {"answer"}),
    ({"prompt": "2+2=", "question": "sum?"}, "2+2=", {"question"}),
    ({"prompt": list(ASKED), "solution": ["4"]}, ASKED, {"solution"}),
    ({"prompt": json.dumps(ASKED)}, ASKED, set()),
    ({"prompt": "2+2=", "chosen": "4", "rejected": "4"}, "2+2=", {"chosen", "rejected"}),
    ({"prompt": "2+2=", "completion": ""}, "2+2=", {"completion"}),
    ({"prompt": HH, "chosen": " 4", "rejected": " 5"}, ASKED, {"chosen", "rejected"}),
    ({"messages": [SYSTEM, *ASKED, assistant("4")]}, (SYSTEM, *ASKED), set()),
    ({"messages": [*ASKED, assistant("4"), user("Sure?"), assistant("Yes")]},
     (*ASKED, assistant("4"), user("Sure?")), set()),
    ({"messages": list(ASKED)}, ASKED, set()),
    ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "system": "Sum."},
     (SYSTEM, *ASKED), {"system"}),
    ({"chosen": [*ASKED, assistant("4")], "rejected": [*ASKED, assistant("5")]}, ASKED, {"chosen", "rejected"}),
    ({"chosen": HH + " 4", "rejected": HH + " 4"}, ASKED, {"chosen", "rejected"}),
    ({"instruction": "Add.", "input": "2 and 2", "output": "4"}, (user("Add.\n\n2 and 2"),),
     {"instruction", "input", "output"}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "prompt", "others"), ROWS)
def test_the_prompt_of_every_kind_of_row(row: dict[str, Any], prompt: Text, others: set[str]) -> None:
    (found,), report = read(row)
    assert found == PromptRow(prompt=prompt, columns={name: row[name] for name in others}, where="row 1")
    assert report.summary() == "format prompt, 1 rows; 1 kept"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"text": "Once"}, "no prompt in these columns: 'text'"),
        ({"chosen": "4", "rejected": "5"}, "no prompt in these columns: 'chosen', 'rejected'"),
        ({"prompt": None}, "no prompt in these columns: none"),
        ({"prompt": 4}, "'prompt' must be a string, found int"),
        ({"prompt": [{"role": "user"}]}, "prompt[0] has no content"),
    ],
)
def test_a_row_without_a_prompt_is_named(row: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError) as raised:
        read({"prompt": "2+2="}, row)
    assert raised.value.what == what
    assert raised.value.where == "row 2"
    assert "'prompt'" in str(raised.value.way_out)
    found, report = read({"prompt": "2+2="}, row, strict=False)
    assert len(found) == 1
    assert [error.where for error in report.malformed] == ["row 2"]


def test_a_conversation_that_asks_nothing_is_counted() -> None:
    found, report = read(
        {"messages": [SYSTEM, assistant("Hello!")]}, {"chosen": HH + " 4", "rejected": "\n\nHuman: 3?\n\nAssistant: 5"}
    )
    assert found == []
    assert report.dropped == {"no turn that asks for an answer": 1, "the sides share no human turn": 1}


def test_rows_from_a_file_and_from_an_unreadable_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": 2}\n{"prompt": \n')
    report = ReadReport()
    rows = read_prompts(str(path), report=report)
    assert next(rows) == PromptRow(prompt="1+1=", columns={"answer": 2}, where=f"{path}:1")
    with pytest.raises(DataError, match="not valid JSON") as raised:
        next(rows)
    assert raised.value.where == f"{path}:2"


# ------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("tokenizer", ["letters", "smollm2", "qwen", "stories"])
@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        ("2+2=", {}),
        ("2+2=", {"wrap_text": True}),
        ((SYSTEM, *ASKED), {}),
        ((*ASKED, assistant("4"), user("Sure? <|im_end|>")), {}),
        ((*ASKED, assistant("4"), user("Sure?")), {"chat_template": "plain"}),
    ],
)
def test_prompts_and_answers_agree_with_training(
    tokenizer: str, prompt: Text, settings: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """The prompt's tokens are those of the same row in training, and the text of its completion's tokens is what was
    tokenised: what a reward reads is what was said, and what is sampled trains as the tokens that were sampled."""
    loaded = request.getfixturevalue(tokenizer)
    how = TokenizeSettings(**({"chat_template": "plain"} if tokenizer == "stories" else {}) | settings)
    said = "It is  4.\nSure!" if isinstance(prompt, str) else (assistant("It is  4.\nSure!"),)
    group = tokenize_group(loaded, RankedCompletions(prompt=prompt, completions=(said,)), how, ReadReport())
    tokens = tokenize_prompt(loaded, PromptRow(prompt=prompt, columns={}), how, ReadReport())
    assert group is not None
    assert tokens is not None
    assert tokens.dtype == np.int64
    assert tokens.tolist() == group.prompt.tolist()
    written = group.completions[0].tokens
    assert completion_text(loaded, written, prompt, how) == said
    unfinished = completion_text(loaded, written[:-1], prompt, how)  # cut by a length limit: nothing to take away
    assert unfinished == said


def test_what_a_completion_does_not_say(smollm2: PreTrainedTokenizerBase) -> None:
    encode = smollm2.convert_tokens_to_ids
    words = smollm2("so it is")["input_ids"]
    assert completion_text(smollm2, [*words, encode("<|im_end|>")], "2+2=") == "so it is"
    assert completion_text(smollm2, [*words, encode("<|endoftext|>")], ASKED) == (assistant("so it is"),)
    assert completion_text(smollm2, [words[0], encode("<|im_start|>"), *words[1:]], "2+2=") == "so it is"
    assert completion_text(smollm2, np.array([encode("<|im_end|>")]), "2+2=") == ""
    assert completion_text(smollm2, [], ASKED) == (assistant(""),)


def test_long_prompts_are_dropped_or_keep_their_end(letters: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "abcdef", "n": 1}, {"prompt": "abc", "n": 2}, {"prompt": "", "n": 3}]
    loaded = load_prompts(rows, letters, settings=TokenizeSettings(max_length=5))
    assert [row.columns["n"] for row in loaded.rows] == [2]
    assert loaded.report.dropped == {"prompt longer than 4 tokens": 1, "empty prompt": 1}
    kept = load_prompts(rows, letters, settings=TokenizeSettings(max_prompt_length=4, overlong_prompt="keep_end"))
    assert [letters.decode(tokens) for tokens in kept.tokens] == ["cdef", "abc"]
    assert kept.report.num_prompts_cut == 1
    limited = load_prompts(rows, letters, settings=TokenizeSettings(), limit=1)
    assert [row.columns["n"] for row in limited.rows] == [1]
    with pytest.raises(DataError, match="no prompt is left: format prompt, 3 rows; 0 kept"):
        load_prompts(rows, letters, settings=TokenizeSettings(max_length=2))


def test_templates_that_refuse_or_are_missing(
    letters: PreTrainedTokenizerBase, stories: PreTrainedTokenizerBase
) -> None:
    refusing = (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    rows = [{"prompt": [SYSTEM, *ASKED]}, {"prompt": list(ASKED)}]
    loaded = load_prompts(rows, letters, settings=TokenizeSettings(chat_template=refusing))
    assert loaded.report.dropped == {"the chat template refuses the conversation (no system)": 1}
    with pytest.raises(ModelError, match="no chat template") as raised:
        load_prompts(rows, stories, settings=TokenizeSettings())
    assert raised.value.where == "row 1"


# -------------------------------------------------------------------------------------------------------------- check


def test_prompts_in_data_check(
    write_jsonl: Callable[..., Path], smollm2: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl({"prompt": list(ASKED), "answer": "4"}, {"prompt": list(ASKED), "answer": 4})
    assert main(["data", "check", str(path), "--task", "prompt", "--num-examples", "1"]) == 0
    out = capsys.readouterr().out
    assert "2 read, 2 kept\n" in out
    assert "user: 2+2?" in out
    assert "completion" not in out
    check = check_data(str(path), task="prompt", tokenizer=smollm2)
    tokens = load_prompts(str(path), smollm2, settings=TokenizeSettings()).tokens
    assert check.prompt_lengths.tolist() == [len(each) for each in tokens]


def test_prompt_rows_are_refused_where_completions_are_needed() -> None:
    with pytest.raises(DataError, match="rows of the format 'prompt', not sft data") as raised:
        list(read_examples([{"prompt": "2+2="}], task="sft", report=ReadReport()))
    assert "trueup sample" in str(raised.value)

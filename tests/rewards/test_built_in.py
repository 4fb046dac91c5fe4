"""Built-in rewards against values from their definitions."""

from __future__ import annotations

import importlib.util

import pytest

from trueup.errors import MissingExtraError, RewardError
from trueup.rewards import built_in
from trueup.rewards.rewards import Rewards


def total(spec, given):
    return Rewards.load([spec]).score(given).total.tolist()


def test_exact(samples):
    given = samples([" 4\n", "four", "A b"], answer=[4, "4", "a B"])
    assert total("exact", given) == [1, 0, 0]
    assert total("exact:ignore_case=true", given) == [1, 0, 1]
    assert total("exact:column=truth", samples(["x"], truth=["x"])) == [1]


def test_exact_behind_a_mark(samples):
    given = samples(["2+2 is #### 4", "4", "#### 5 or #### 4", "####"], answer=["so #### 4", "4", 4, ""])
    assert total("exact:after=%23%23%23%23", given) == [1, 0, 1, 1]


def test_a_row_without_answer_is_left_out(samples):
    scores = Rewards.load(["exact", "regex:."]).score(samples(["a", "b"], answer=["a", None]))
    assert scores.each["exact"].tolist()[0] == 1
    assert str(scores.each["exact"][1]) == "nan"


def test_a_missing_column_is_named(samples):
    with pytest.raises(RewardError, match="no column 'answer' \\(columns: 'truth'\\)") as caught:
        total("exact", samples(["x"], truth=["x"]))
    assert "exact:column=…" in str(caught.value)


def test_conversations_are_scored_by_what_the_assistant_says(samples):
    turn = ({"role": "assistant", "content": "4"},)
    assert total("exact", samples([turn], prompts=[({"role": "user", "content": "2+2"},)], answer=["4"])) == [1]


def test_patterns(samples):
    given = samples(["it is 42", "42", "a\nb: 7"])
    assert total(r"regex:\d+", given) == [1, 1, 1]
    assert total(r"regex:^\d+$", given) == [0, 1, 0]
    assert total(r"format:\d+", given) == [0, 1, 0]
    assert total("format:a.b: [0-9]", given) == [0, 0, 1]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>2+2</think>4", 1),
        ("\n<think>\n2+2\n</think>\n\n4\n", 1),
        ("<think>2+2</think>", 0),
        ("<think>2+2</think>\n \n", 0),
        ("4", 0),
        ("so <think>2+2</think>4", 0),
        ("<think>a<think>b</think>4", 0),
        ("<think>a</think>4</think>5", 0),
        ("<think>a", 0),
    ],
)
def test_the_format_of_thoughts(text, score, samples):
    assert total("format", samples([text])) == [score]


def test_a_pattern_that_explodes_is_an_error_with_the_sample(samples, monkeypatch):
    monkeypatch.setattr(built_in, "MATCH_SECONDS", 0.05)
    with pytest.raises(RewardError, match=r"sample 1 \(data.jsonl:2.*raises TimeoutError"):
        total("regex:(a|aa)+$", samples(["aaaa", "a" * 40 + "b"]))


def test_length(samples):
    assert total("length:target=4", samples(["1234", "12", "", "123456789012"])) == [0, -0.5, -1, -2]


@pytest.mark.parametrize(
    ("length", "penalty"),
    [
        (0, 0),
        (16384, 0),
        (16385, -1 / 4096),
        (18432, -0.5),
        (20479, -4095 / 4096),
        (20480, -1),
        (20481, -1),
        (99999, -1),
    ],
)
def test_overlong_has_the_values_of_the_paper(length, penalty, samples):
    """L_max 20480, L_cache 4096, as in its section 4.1."""
    assert built_in.Overlong(max_length=20480, buffer=4096).penalty(length) == penalty


def test_overlong_counts_tokens_and_has_a_limit_without_slope(samples):
    given = samples(["1" * length for length in (3, 4, 5, 6)])
    assert total("overlong:max_length=5&buffer=2", given) == [0, -0.5, -1, -1]
    assert total("overlong:max_length=5&buffer=0", given) == [0, 0, 0, -1]


def test_sentiment(samples):
    pytest.importorskip("vaderSentiment")
    good, bad, none, empty = total("sentiment", samples(["I love it!", "I hate it.", "a table", ""]))
    assert (good, bad, none, empty) == (pytest.approx(0.6696, abs=1e-4), pytest.approx(-0.5719, abs=1e-4), 0, 0)


@pytest.mark.parametrize(
    ("spec", "module", "extra"),
    [
        ("sentiment", "vaderSentiment", "sentiment"),
        ("math", "math_verify", "math"),
        ("reasoning-gym", "reasoning_gym", "reasoning-gym"),
    ],
)
def test_a_missing_package_names_its_extra(spec, module, extra, monkeypatch):
    real, real_import = importlib.util.find_spec, importlib.import_module

    def find(name, *rest):
        return None if name == module else real(name, *rest)

    def load(name, *rest):
        if name.startswith(module):
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return real_import(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(importlib, "import_module", load)
    with pytest.raises(MissingExtraError, match=rf"'{module}', which is not installed\n.*trueup\[{extra}\]"):
        Rewards.load([spec])

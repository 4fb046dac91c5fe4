"""Rewards by their names: the user's own code, built-ins, endpoints and models; what can't be one says so."""

from __future__ import annotations

import sys
import textwrap

import pytest

from trueup.errors import ModelError, RewardError, SettingsError
from trueup.rewards.rewards import Rewards


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes files into the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


def test_a_function_in_a_file_and_what_lies_beside_it(module, samples):
    module("mine/beside.py", "FACTOR = 3")
    path = module(
        "mine/own.py",
        """
        from dataclasses import dataclass
        from beside import FACTOR

        @dataclass
        class Thing:
            number: int

        def length(completions, **columns):
            return [Thing(len(each)).number * FACTOR for each in completions]
        """,
    )
    rewards = Rewards.load([f"{path}:length", "mine/own.py:length"])
    assert rewards.names == ("length", "length_2")
    assert rewards.score(samples(["a", "bb"])).total.tolist() == [6, 12]


def test_a_function_in_a_module_of_the_working_directory(module, samples):
    module("scoring_of_mine/__init__.py", "")
    module(
        "scoring_of_mine/lengths.py", "async def length(completions):\n    return [len(each) for each in completions]"
    )
    assert Rewards.load(["scoring_of_mine.lengths:length"]).score(samples(["ab"])).total.tolist() == [2]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("def f(:", "can't be imported: SyntaxError"),
        ("import does_not_exist_at_all", "can't be imported: ModuleNotFoundError"),
        ("x = 1\nraise SystemExit(1)", r"can't be imported: SystemExit: 1 \(own.py:2\)"),
        ("def other(): pass\nf = 1", "has no function 'f'\n  → it has other"),
    ],
)
def test_code_that_cannot_be_had(module, text, what):
    path = module("own.py", text)
    with pytest.raises(RewardError, match=what) as caught:
        Rewards.load([f"{path}:f"])
    assert str(caught.value).startswith(f"reward '{path}:f'")


def test_a_file_that_is_not_there():
    with pytest.raises(SettingsError, match="no such file"):
        Rewards.load(["/nowhere/own.py:f"])


@pytest.mark.parametrize("spec", ["./exact", "nothing/of/this"])
def test_what_is_none_of_these_is_looked_for_as_a_model(spec, module):
    with pytest.raises(ModelError, match="no such folder") as caught:
        Rewards.load([spec])
    assert "exact, regex, format" in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("exact:colunm=x", "has no parameter 'colunm'\n  → exact:column=…&after=…&ignore_case=…"),
        ("exact:answer", "can't read the parameters 'answer'"),
        ("exact:ignore_case=perhaps", "'perhaps' is not of type bool"),
        ("length", "needs the parameter 'target'"),
        ("length:target=long", "'long' is not of type int"),
        ("length:target=0", "target=0 is out of range"),
        ("overlong:max_length=5&buffer=6", "buffer=6 with max_length=5"),
        ("overlong:max_length=5", "needs the parameter 'buffer'"),
        ("sentiment:x=1", "sentiment has no parameters"),
        ("regex", "needs a pattern"),
        ("regex:(", "no regular expression"),
        ("format:[", "no regular expression"),
    ],
)
def test_parameters_that_a_built_in_does_not_have(spec, what):
    with pytest.raises(SettingsError) as caught:
        Rewards.load([spec])
    assert what in str(caught.value)

"""How text becomes tokens is said once: what commands add to it, they add."""

from __future__ import annotations

from dataclasses import fields

import pytest

from trueup.cli.data import CheckSettings
from trueup.cli.score import ScoreSettings
from trueup.data.settings import TextSettings, TokenizeSettings
from trueup.errors import SettingsError
from trueup.runs.settings import parse
from trueup.trainers.settings import PreferenceSettings, RewardSettings, SFTSettings

CHANGED = {
    "max_length": 64,
    "max_prompt_length": 32,
    "overlong_prompt": "keep_end",
    "overlong_completion": "drop",
    "chat_template": "plain",
    "wrap_text": True,
    "special_tokens_in_text": "token",
}


@pytest.mark.parametrize("command", [CheckSettings, ScoreSettings, SFTSettings, RewardSettings, PreferenceSettings])
def test_every_command_hands_all_of_it_on(command: type[TextSettings]) -> None:
    assert set(CHANGED) == {field.name for field in fields(TextSettings)}
    own = {"files": ("a",)} if command is CheckSettings else {}
    turns = {"train_turns": "last"} if hasattr(command, "train_turns") else {}
    steps = {"process": True, "step_separator": "; "} if command is RewardSettings else {}
    given = TokenizeSettings.of(command(**CHANGED, **own, **turns, **steps))
    steps.pop("process", None)
    assert given == TokenizeSettings(**CHANGED, **turns, **steps)
    assert TokenizeSettings.of(given, max_length=40).max_length == 40


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_length": 1}, "--max-length: is 1, but must be at least 2"),
        ({"max_prompt_length": 0}, "--max-prompt-length: is 0, but must be at least 1"),
        ({"max_length": 8, "max_prompt_length": 8}, "--max-prompt-length: is 8, but must be below 8"),
        ({"overlong_prompt": "cut"}, "--overlong-prompt: is 'cut'"),
    ],
)
def test_limits_that_leave_no_room(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        TokenizeSettings(**wrong)


@pytest.mark.parametrize(("command", "needs"), [(CheckSettings, ["rows.jsonl"]), (RewardSettings, ["--process"])])
def test_a_step_separator_as_a_shell_writes_it(command: type[TextSettings], needs: list[str]) -> None:
    settings = parse(command, [*needs, "--step-separator", r"\n\n"], "trueup")
    assert TokenizeSettings.of(settings).step_separator == "\n\n"

"""The command line's flags, frozen: a change of a name, type or default has to be meant. Their order is free.

``python tests/cli/test_flags.py`` writes ``flags.txt`` anew.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from trueup.cli.main import COMMANDS, main

FROZEN = Path(__file__).with_name("flags.txt")


def default_of(field: Field, preset: Any) -> str:
    if preset is not None:
        return repr(getattr(preset, field.name))
    if field.default is not MISSING:
        return repr(field.default)
    return repr(field.default_factory()) if field.default_factory is not MISSING else "required"


def flags_of(name: str) -> list[str]:
    command = COMMANDS[name]
    module = import_module(command.module)
    preset = getattr(module, command.defaults)([]) if command.defaults else None
    return [
        f"{name} --{field.name.replace('_', '-')}: {field.type} = {default_of(field, preset)}"
        for field in fields(getattr(module, command.settings))
    ]


def all_flags() -> str:
    return "".join(f"{line}\n" for name in COMMANDS for line in flags_of(name))


def test_flags_are_as_frozen():
    frozen = FROZEN.read_text(encoding="utf-8")
    assert sorted(all_flags().splitlines()) == sorted(frozen.splitlines()), (
        "meant? then: python tests/cli/test_flags.py"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_flag(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as raised:
        main([*name.split(), "--help"])
    assert raised.value.code == 0
    out = capsys.readouterr().out
    command = COMMANDS[name]
    blocks = re.split(r"^\W{0,3}(?=--\w)", out, flags=re.MULTILINE)[1:]
    for field in fields(getattr(import_module(command.module), command.settings)):
        if "Positional" in str(field.type):
            assert "positional arguments" in out
            continue
        flag = "--" + field.name.replace("_", "-")
        (block,) = (block for block in blocks if re.match(rf"(--[^,\n]+, )?{flag}(?![\w-])", block))
        # its help is a sentence, then comes the default, which may itself have several lines
        assert re.search(r"[\w)?'.]\.? \((default: .*|required)\)", block, re.DOTALL), field.name


if __name__ == "__main__":
    FROZEN.write_text(all_flags(), encoding="utf-8")

"""``name=value&name=value`` behind a reward's name → the fields of a dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from trueup.errors import RewardError, SettingsError
from trueup.rewards.samples import ARGUMENTS

Made = TypeVar("Made")

_TRUTHS = {"true": True, "false": False}


def made_from(cls: type[Made], text: str, name: str) -> Made:
    """An object of the dataclass ``cls``; its fields are of type str, bool, int or float.

    ``text`` is a query string: ``%26`` is an ampersand, ``+`` a space. Raises ``SettingsError`` for an unknown or
    missing parameter, or one of the wrong type; ``name`` is the reward's, for messages.
    """
    known = {field.name: field for field in fields(cls)}  # pyright: ignore[reportArgumentType]
    usage = f"{name}:{'&'.join(f'{each}=…' for each in known)}" if known else f"{name} has no parameters"
    try:
        given = dict(parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text)))
    except ValueError as error:
        raise SettingsError(f"can't read the parameters {text!r}", where=f"--reward {name}", way_out=usage) from error
    for unknown in given.keys() - known:
        raise SettingsError(f"has no parameter {unknown!r}", where=f"--reward {name}", way_out=usage)
    for each, field in known.items():
        if each not in given and field.default is MISSING:
            raise SettingsError(f"needs the parameter {each!r}", where=f"--reward {name}", way_out=usage)
    return cls(
        **{each: _value(value, str(known[each].type), f"--reward {name}, {each}") for each, value in given.items()}
    )


def _value(text: str, kind: str, where: str) -> Any:
    try:
        if kind == "bool":
            return _TRUTHS[text.lower()]
        return {"str": str, "int": int, "float": float}[kind](text)
    except (ValueError, KeyError):
        raise SettingsError(f"{text!r} is not of type {kind}", where=where) from None


def column_of(columns: Mapping[str, list[Any]], column: str, name: str) -> list[Any]:
    """A column of the data. Raises ``RewardError`` naming the reward and what there is."""
    if column not in columns:
        there = ", ".join(repr(each) for each in columns if each not in ARGUMENTS)
        raise RewardError(
            f"the data have no column {column!r} (columns: {there or 'none'})",
            where=f"reward '{name}'",
            way_out=f"name it: {name}:column=…",
        )
    return columns[column]

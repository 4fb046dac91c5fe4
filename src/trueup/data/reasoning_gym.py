"""Tasks of reasoning-gym as prompts: ``reasoning-gym:TASK?size=500&seed=1&…``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

from trueup.errors import DataError, require_extra

PREFIX = "reasoning-gym:"


def parse_task(source: str) -> tuple[str, dict[str, Any], str | None]:
    """``reasoning-gym:TASK?name=value&…`` → the task, its settings, and the name of a system prompt, if one is given.

    A value is read as JSON where it is that (``3``, ``true``, ``[1,2]``) and as text otherwise.
    """
    task, _, query = source.removeprefix(PREFIX).partition("?")
    settings = {name: _value(text) for name, text in parse_qsl(query, keep_blank_values=True)}
    system = settings.pop("system", None)
    return task, settings, system


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def reasoning_gym_rows(source: str) -> Iterator[dict[str, Any]]:
    """The entries of a task as rows, made as they are asked for.

    ``prompt``: the question, or with ``system=NAME`` (one of reasoning-gym's system prompts: simple, default …) a
    conversation that begins with it. ``answer``; ``task``, ``task_settings`` (JSON) and ``task_index``, from which
    the reward ``reasoning-gym`` makes the same entry again; ``metadata``, as JSON has it. ``size`` (default 500) and
    ``seed`` (default 0) are settings of every task.

    Raises ``DataError`` for an unknown task, setting or system prompt, ``MissingExtraError`` without the package.
    """
    gym = require_extra("reasoning_gym", "reasoning-gym")
    from reasoning_gym.utils import SYSTEM_PROMPTS

    task, settings, system = parse_task(source)
    settings = {"seed": 0} | settings
    if system is not None and system not in SYSTEM_PROMPTS:
        raise DataError(f"has no system prompt {system!r}", where=source, way_out=f"one of {', '.join(SYSTEM_PROMPTS)}")
    try:
        entries = gym.create_dataset(task, **settings)
    except ValueError as error:
        raise DataError(f"{error}", where=source, way_out="look the task up in reasoning-gym's gallery") from error
    except (TypeError, AssertionError) as error:
        raise DataError(f"{task} doesn't take these settings: {error}", where=source) from error
    for index in range(len(entries)):
        entry = entries[index]
        question = entry["question"]
        instruction = [] if system is None else [{"role": "system", "content": SYSTEM_PROMPTS[system]}]
        yield {
            "prompt": [*instruction, {"role": "user", "content": question}] if instruction else question,
            "answer": entry["answer"],
            "task": task,
            "task_settings": json.dumps(settings),
            "task_index": index,
            "metadata": json.loads(json.dumps(entry["metadata"], default=str, skipkeys=True)),
        }

"""Where rewards come from: a built-in, a function of the user's, an HTTP endpoint, or a trained model."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from trueup.data.settings import TextSettings, TokenizeSettings
from trueup.errors import ModelError, RewardError, SettingsError, TrueupError
from trueup.rewards.built_in import BUILT_IN
from trueup.rewards.calls import Reward, RewardFunction, raised_at

_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>\w+)")
_MODULE = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")


def load_reward(
    spec: str | RewardFunction,
    *,
    timeout: float = 60.0,
    tokenizer: Any = None,
    text: TextSettings | None = None,
    **model_options: Any,
) -> Reward:
    """The reward that ``spec`` names: a function itself, or in this order

    - ``http://…`` or ``https://…``: an endpoint (``endpoint.Endpoint``)
    - ``FILE.py:NAME``: a function in a file, which is imported
    - ``NAME`` or ``NAME:PARAMETERS`` of a built-in (``built_in.BUILT_IN``)
    - ``MODULE:NAME``: a function in a module, which is imported; the working directory counts
    - all else: a reward model's folder, run or name on the hub (``./math`` where a folder has a built-in's name).

    Raises as ``Rewards.load`` says.
    """
    if callable(spec):
        return Reward(getattr(spec, "__name__", type(spec).__name__), spec)
    if spec.startswith(("http://", "https://")):
        from trueup.rewards.endpoint import Endpoint

        endpoint = Endpoint(spec, timeout=timeout)
        return Reward(endpoint.name, endpoint, timed=False)
    if match := _FILE.fullmatch(spec):
        return _function(spec, match["name"], lambda: import_file(Path(match["file"]).expanduser()))
    name, _, parameters = spec.partition(":")
    if name in BUILT_IN:
        return Reward(name, BUILT_IN[name](parameters), timed=False)
    if match := _MODULE.fullmatch(spec):
        return _function(spec, match["name"], lambda: import_module(match["module"]))
    return _model(spec, tokenizer, text, model_options)


def _model(spec: str, tokenizer: Any, text: TextSettings | None, options: dict[str, Any]) -> Reward:
    from trueup.rewards.process_reward_model import ProcessRewardModel
    from trueup.rewards.reward_model import RewardModel, scores_steps
    from trueup.rewards.reward_model_function import ModelFunction, StepFunction

    try:
        options |= {"settings": None if text is None else TokenizeSettings.of(text)}
        if scores_steps(spec):
            function = StepFunction(ProcessRewardModel.load(spec, **options), tokenizer)
        else:
            function = ModelFunction(RewardModel.load(spec, **options))
    except ModelError as error:
        raise ModelError(
            error.what,
            where=error.where,
            way_out=f"{error.way_out}; other rewards are {', '.join(BUILT_IN)}, FILE.py:FUNCTION and https://…",
        ) from error
    return Reward(Path(spec).name, function, timed=False, scores_steps=isinstance(function, StepFunction))


def _function(spec: str, name: str, load: Callable[[], ModuleType]) -> Reward:
    """A function of a module that is imported now. Raises ``RewardError``."""
    try:
        module = load()
    except TrueupError:
        raise
    except (Exception, SystemExit) as error:
        what = f"can't be imported: {type(error).__name__}: {error}{raised_at(error)}"
        raise RewardError(what, where=f"reward '{spec}'", way_out="mend the code or the name") from error
    function = getattr(module, name, None)
    if not callable(function):
        there = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise RewardError(
            f"has no function '{name}'", where=f"reward '{spec}'", way_out=f"it has {', '.join(there) or 'none'}"
        )
    return Reward(name, function)  # pyright: ignore[reportArgumentType]


def import_file(path: Path) -> ModuleType:
    """A file as a module; what lies beside it can be imported by it."""
    if not path.is_file():
        raise SettingsError("no such file", where=f"--reward {path}")
    module_name = f"trueup_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _findable(path.resolve().parent)
    sys.modules[module_name] = module  # dataclasses and pickles look their module up there
    spec.loader.exec_module(module)
    return module


def import_module(name: str) -> ModuleType:
    _findable(Path.cwd())
    return importlib.import_module(name)


def _findable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

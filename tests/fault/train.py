"""Not a test: runs training loops to their end, in as many lives as it takes. ``test_kills`` starts it as a script.

PyTorch is imported once; every life is a process forked from this one, killed as its line of the plan says. A line is a
JSON object: ``loop``, ``settings``, and ``kills``, a life for each, then one that is left alone. A kill is a number
(SIGKILL from outside, after that share of the time that the last whole run took), or ``[module, function, count]``: the
life kills itself as it calls that function for the ``count``-th time. The answer is a line too: what ended each life,
9 for SIGKILL, 0 for the end of the run.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import sys
import time
import traceback
import warnings
from typing import Any

import torch

from trueup import preference, reward, rl, sft

# Imported before the forks, so that no life spends its time on it.
LOOPS = {"sft": sft, "reward": reward, "preference": preference, "rl": rl}
for name in ("sft", "reward", "preference", "policy"):
    importlib.import_module(f"trueup.trainers.{name}")


def die_at(module: str, function: str, count: int) -> None:
    """Let the ``count``-th call of a function (or ``Class.method``) be the last thing that this process does."""
    *path, name = function.split(".")
    owner: Any = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), 0

    def deadly(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(owner, name, deadly)


def train(loop: str, settings: dict[str, Any]) -> int:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            LOOPS[loop](**settings, resume="auto", quiet=True)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def live(loop: str, settings: dict[str, Any], kill: Any, whole: float) -> int:
    """One life. ``whole``: seconds that a whole run takes."""
    child = os.fork()
    if child == 0:
        if isinstance(kill, list):
            die_at(*kill)
        os._exit(train(loop, settings))
    if isinstance(kill, float):
        time.sleep(kill * whole)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code > 0:
        raise RuntimeError("a life failed, see above")
    return -code


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    whole = 0.0
    for line in sys.stdin:
        plan = json.loads(line)
        began = time.monotonic()
        ends = [live(plan["loop"], plan["settings"], kill, whole) for kill in [*plan["kills"], None]]
        if not plan["kills"]:
            whole = time.monotonic() - began
        print(json.dumps(ends), flush=True)


if __name__ == "__main__":
    main()

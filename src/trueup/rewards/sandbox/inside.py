"""What runs inside: the untrusted code, then its tests. Run as ``python -c``, with the standard library alone.

The job, on descriptor 3, is a JSON object: ``code``, and ``tests``, a list of ``["assert", SOURCE]`` and
``["value", EXPRESSION]``; without ``tests`` the code runs as a program. Each outcome is a line of JSON on descriptor 4:
``[KEY, INDEX, "passed", null]``, ``[KEY, INDEX, "value", ENCODED]`` or ``[KEY, INDEX, "failed", MESSAGE]``.
"""

import json
import numbers
import os
from typing import Any


def encoded(value: Any) -> Any:
    """A value made of numbers, text and the containers of Python as JSON, so that equal values are written alike.

    Raises ``TypeError`` for another kind of value.
    """
    if isinstance(value, numbers.Integral):  # True is 1
        return int(value)
    if isinstance(value, numbers.Real):
        value = float(value)
        return int(value) if value.is_integer() else value
    if isinstance(value, complex):
        return {"complex": [encoded(value.real), encoded(value.imag)]} if value.imag else encoded(value.real)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, (set, frozenset)):
        return {"set": sorted((encoded(each) for each in value), key=json.dumps)}
    if isinstance(value, dict):
        return {"dict": sorted(([encoded(key), encoded(each)] for key, each in value.items()), key=json.dumps)}
    for kind in (list, tuple):
        if isinstance(value, kind):
            return {kind.__name__: [encoded(each) for each in value]}
    raise TypeError(f"{type(value).__name__} is not a plain value")


def main() -> None:
    with os.fdopen(3, encoding="utf-8", errors="surrogatepass") as file:
        job = json.load(file)
    if job["tests"] is None:
        os.close(4)
        exec(compile(job["code"], "program.py", "exec"), {"__name__": "__main__"})
        return
    names: dict[str, Any] = {"__name__": "program"}
    broken = ""
    try:
        exec(compile(job["code"], "program.py", "exec"), names)
    except BaseException as error:
        broken = f"{type(error).__name__}: {error}"
    for index, (kind, source) in enumerate(job["tests"]):
        outcome: list[Any] = ["failed", broken]
        if not broken:
            try:
                if kind == "value":
                    outcome = ["value", encoded(eval(source, names))]
                else:
                    exec(compile(source, f"test {index}", "exec"), names)
                    outcome = ["passed", None]
            except BaseException as error:
                outcome = ["failed", f"{type(error).__name__}: {error}"[:200]]
        os.write(4, (json.dumps([job["key"], index, *outcome]) + "\n").encode())


if __name__ == "__main__":
    main()

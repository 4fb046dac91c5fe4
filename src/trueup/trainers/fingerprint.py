"""What a run was started with, in a few hexadecimal digits each: a run that goes on must find the same.

A setting names a file, not what is in it. A file that was edited, a model folder that another run wrote to, a template
with one more space would go unnoticed, and the run would be the result of neither the old nor the new.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trueup.errors import CheckpointError
from trueup.records import CompletionGroup
from trueup.rewards.reward_model import ScoringModel
from trueup.rewards.rewards import Rewards

_SAMPLED = 4096

WAYS_OUT = {
    "training data": "bring back the rows it was started with, or start a new run in another folder",
    "held-out data": "bring back the rows it was started with, or start a new run in another folder",
    "tokenizer": "bring back the tokenizer and chat template it was started with, or start a new run",
    "starting weights": "give the model as it was before training, or start a new run in another folder",
    "reference": "give the reference model as it was, or start a new run in another folder",
    "critic": "give the critic as it was before training, or start a new run in another folder",
    "rewards": "bring back the rewards (code, models, weights) as they were, or start a new run in another folder",
}
"""What is compared, in the order in which it is told: a tokenizer that changed changes the data too."""


def groups_fingerprint(groups: Iterable[CompletionGroup]) -> str:
    """Changes with any token, mask, label or margin, and with the order; not with the name of the file."""
    digest = _digest()
    for group in groups:
        _update(digest, group)
    return digest.hexdigest()


def stream_fingerprint(source: Any, first: Iterable[CompletionGroup]) -> str:
    """For data that are not all read first: the tokens of the ``first`` groups, and what the files of ``source`` hold.

    Files are read through once, for their bytes alone: some seconds for a gigabyte. What has no file (``hf:NAME``,
    rows in memory) is known by its first groups only.
    """
    digest = _digest(groups_fingerprint(first))
    for path in _files(source):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, _digest).digest())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Changes with the vocabulary, the special tokens and the chat template."""
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.chat_template)
    return _digest(repr((sorted(tokenizer.get_vocab().items()), special))).hexdigest()


def weights_fingerprint(module: nn.Module) -> str:
    """Changes when a model was trained further.

    It looks at a few thousand numbers of every tensor, which costs next to nothing; training changes them all. They are
    rounded to bfloat16, so that the same model in another precision, on another device, is the same.
    """
    digest = _digest()
    for tensor in module.state_dict().values():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLED)].to("cpu", torch.bfloat16).contiguous()
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(sample.view(torch.uint8).numpy())
    return digest.hexdigest()


def rewards_fingerprint(rewards: Rewards) -> str:
    """Of all rewards with their weights: changes with the text of the file that a function stands in (of the function
    alone, where it is a script or notebook that trains), and when a reward model was trained further.

    What other files the code uses, and what an endpoint does, is not known.
    """
    digest = _digest(repr(rewards.weights.tolist()))
    for reward in rewards.rewards:
        digest.update(f" {reward.name} ".encode())
        function: Any = reward.function
        if isinstance(model := getattr(function, "model", None), ScoringModel):
            digest.update((weights_fingerprint(model.scorer) + tokenizer_fingerprint(model.tokenizer)).encode())
            continue
        if reward.timed:
            digest.update(_code_of(function))
        if dataclasses.is_dataclass(function):
            digest.update(repr(function).encode())
    return digest.hexdigest()


def _code_of(function: Any) -> bytes:
    """The text that somebody's own function is read from; nothing where there is none."""
    while isinstance(function, functools.partial):
        function = function.func
    code = function if hasattr(function, "__code__") else type(function)
    try:
        if code.__module__ == "__main__":
            return inspect.getsource(code).encode()
        return Path(inspect.getsourcefile(code) or "").read_bytes()
    except (OSError, TypeError):
        return b""


def check_unchanged(then: Mapping[str, str], now: Mapping[str, str], where: str) -> None:
    """Raise ``CheckpointError`` that names what is not as it was. What only one of the two knows is not compared."""
    changed = [name for name in WAYS_OUT if name in then and name in now and then[name] != now[name]]
    if "tokenizer" in changed:
        changed = [name for name in changed if not name.endswith("data")]
    if changed:
        raise CheckpointError(
            f"not what this run was started with: {', '.join(changed)}", where=where, way_out=WAYS_OUT[changed[0]]
        )


def _digest(text: str = "") -> hashlib.blake2b:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16)


def _update(digest: hashlib.blake2b, value: Any) -> None:
    """Add a record, field by field; ``where`` is only a name for messages."""
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype.str}{value.shape}".encode())
        digest.update(value.tobytes())
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if field.name != "where":
                _update(digest, getattr(value, field.name))
    elif isinstance(value, tuple | list):
        digest.update(f"({len(value)}".encode())
        for item in value:
            _update(digest, item)
    else:
        digest.update(f" {value!r}".encode())


def _files(source: Any) -> Iterator[Path]:
    """The files that a source names, in the order in which they are read."""
    for name in source if isinstance(source, Sequence) and not isinstance(source, str) else [source]:
        if isinstance(name, str | Path):
            path = Path(name).expanduser()
            found = [path] if path.exists() else sorted(map(Path, glob(str(path), recursive=True)))  # noqa: PTH207
            yield from (each for each in found if each.is_file())

"""log π_ref of every completion: known before training starts, and kept on disk; or live, from a frozen model.

Before its first update the policy is its own reference. So the log-probs of all completions that a run will look at are
computed once, before that update: no second model stays in memory, no step and no evaluation computes them again, and
the next run on the same model and data finds them on disk.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trueup.data.collate import micro_batches
from trueup.errors import ModelError
from trueup.models.adapters import has_adapter, plain_model, plain_name, reference_mode
from trueup.models.load import load_model
from trueup.models.scorer import Scorer, prepare_scorer
from trueup.models.tree import TreeBatch, tree_batch
from trueup.models.wheel import cache_folder
from trueup.records import CompletionGroup
from trueup.runs.files import write_atomic
from trueup.runs.progress import RunProgress
from trueup.trainers.fingerprint import groups_fingerprint, weights_fingerprint
from trueup.trainers.settings import PreferenceSettings

Reference = Callable[[Sequence[CompletionGroup], TreeBatch], Tensor]
"""log π_ref of the scored tokens of a batch made of these groups: float32 [S]."""


def reference_logprobs(
    settings: PreferenceSettings,
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[CompletionGroup] | None,
    *,
    say: Callable[[str], None],
) -> tuple[Reference, dict[str, str]]:
    """How log π_ref is found, and the fingerprint of a reference that is a model of its own.

    ``scorer`` is the policy's, before its first update.
    ``groups``: everything that will be asked for; None where that is not known (a stream), or not wanted in advance.
    The reference is ``settings.reference``, or the policy as it is now: with LoRA the adapter switched off, which costs
    no memory, otherwise, where it has to stay at hand, a frozen copy.
    Raises ``ModelError`` for a reference that reads the tokens otherwise than the policy.
    """
    if not settings.needs_reference:
        return lambda groups, batch: torch.zeros_like(batch.targets, dtype=torch.float32), {}
    fingerprints = {}
    if settings.reference is not None:
        loaded = load_model(settings.reference, dtype=settings.dtype, device=settings.device)
        if loaded.tokenizer.get_vocab().items() ^ tokenizer.get_vocab().items():
            raise ModelError(
                "its tokens are not those of the policy, so the same numbers mean other texts",
                where=settings.reference,
                way_out="take a reference with the policy's tokenizer",
            )
        frozen = prepare_scorer(loaded.model).requires_grad_(False).eval()
        fingerprints = {"reference": weights_fingerprint(frozen)}
    elif groups is not None or has_adapter(scorer.model):
        frozen = scorer
    else:
        frozen = copy.deepcopy(scorer).requires_grad_(False).eval()
    if groups is None:
        return lambda groups, batch: frozen_logprobs(frozen, batch), fingerprints
    return lookup(groups, stored_logprobs(settings, frozen, groups, say)), fingerprints


def frozen_logprobs(scorer: Scorer, batch: TreeBatch, temperature: float = 1.0) -> Tensor:
    """Log-probs without gradient, adapters off."""
    with torch.no_grad(), reference_mode(scorer.model) if has_adapter(scorer.model) else nullcontext():
        return scorer(batch, temperature=temperature).logprobs


def lookup(groups: Sequence[CompletionGroup], logprobs: Sequence[np.ndarray]) -> Reference:
    """A reference that knows the log-probs of these very objects. ``logprobs``: float32 [S] of each group."""
    # The group is kept beside its numbers: an id means an object only as long as that is there.
    known = {id(group): (group, values) for group, values in zip(groups, logprobs, strict=True)}

    def found(groups: Sequence[CompletionGroup], batch: TreeBatch) -> Tensor:
        flat = np.concatenate([known[id(group)][1] for group in groups])
        return torch.from_numpy(flat).to(batch.targets.device)

    return found


def stored_logprobs(
    settings: PreferenceSettings, scorer: Scorer, groups: Sequence[CompletionGroup], say: Callable[[str], None]
) -> list[np.ndarray]:
    """Token log-probs of every group, float32 [S] each: from disk, or computed and put there.

    The file is named by a hash of the weights, the config, and the tokens (which is what a tokenizer and a chat
    template make of the data): whatever changes, another file is asked for. A damaged file counts as none. Its time is
    that of its last use, for whoever looks for what is no longer needed.
    """
    ends = np.cumsum([num_scored(group) for group in groups])
    path = cache_folder() / "reference" / f"{fingerprint(scorer.model, groups)}.safetensors"
    flat = read_stored(path, size=int(ends[-1]))
    if flat is not None:
        say(f"reference: {len(groups):,} groups, known from {path}")
        with suppress(OSError):  # somebody else's cache may be read only
            path.touch()
    else:
        flat = np.concatenate(
            computed_logprobs(scorer, groups, tokens_per_batch=settings.tokens_per_batch, quiet=settings.quiet)
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, save({"logprobs": flat}, metadata=described(settings)))
        except OSError as error:
            say(f"reference: not kept on disk, the next run computes it anew ({error})")
    return np.split(flat, ends[:-1])


def described(settings: PreferenceSettings) -> dict[str, str]:
    """What log-probs are of, in words, as far as it has names."""
    return {"model": settings.reference or settings.model, "data": " ".join(settings.data + settings.eval_data)}


def read_stored(path: Path, size: int) -> np.ndarray | None:
    """The log-probs in a file; None if it is not there, or not whole."""
    try:
        flat = load_file(path)["logprobs"]
    except (OSError, SafetensorError, KeyError):
        return None
    return flat if flat.shape == (size,) and bool(np.isfinite(flat).all()) else None


def computed_logprobs(
    scorer: Scorer, groups: Sequence[CompletionGroup], *, tokens_per_batch: int = 4096, quiet: bool = True
) -> list[np.ndarray]:
    """Token log-probs of every group under a frozen model (adapters off), float32 [S] each, with progress."""
    device = next(scorer.parameters()).device
    cut = micro_batches(groups, tokens_per_batch)
    found: dict[int, np.ndarray] = {}
    with evaluating(scorer), RunProgress(len(cut), title="log-probs", quiet=quiet) as progress:
        for micro in cut:
            batch = tree_batch([groups[index] for index in micro], device)
            flat = frozen_logprobs(scorer, batch).float().cpu().numpy()
            ends = np.cumsum([num_scored(groups[index]) for index in micro])
            found |= zip(micro, np.split(flat, ends[:-1]), strict=True)
            progress.step(num_tokens=len(batch.tokens))
    return [found[index] for index in range(len(groups))]


def num_scored(group: CompletionGroup) -> int:
    return sum(int(completion.completion_mask.sum()) for completion in group.completions)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside the block."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def fingerprint(model: nn.Module, groups: Iterable[CompletionGroup]) -> str:
    """32 hexadecimal digits that change with any weight (adapters apart), with the config, and with the groups."""
    digest = hashlib.blake2b(digest_size=16)
    config: dict[str, Any] = plain_model(model).config.to_dict()
    named = {key: value for key, value in config.items() if key not in {"_name_or_path", "transformers_version"}}
    digest.update(json.dumps(named, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            digest.update(f"{plain_name(name)} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    digest.update(groups_fingerprint(groups).encode())
    return digest.hexdigest()

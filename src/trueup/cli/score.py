"""``trueup score`` and ``trueup model normalize``: a trained reward model in use.

Importing this file is quick; PyTorch is loaded when a command runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trueup.data.settings import TextSettings, TokenizeSettings
from trueup.errors import SettingsError
from trueup.runs.settings import check_range, check_used

if TYPE_CHECKING:
    from trueup.rewards.reward_model import RewardModel
    from trueup.rewards.scoring import Scored


@dataclass(frozen=True, kw_only=True)
class ScoringSettings(TextSettings):
    """How text becomes scores."""

    data_format: str = "auto"
    """Row format; auto looks at the first rows. Demonstrations, comparisons and ranked lists will do."""
    limit: int | None = None
    """Read at most this many rows."""
    tokens_per_batch: int = 8192
    """Most tokens in one forward pass."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision; auto takes bfloat16 where the hardware has it."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("limit", "tokens_per_batch"):
            check_range(self, name, at_least=1)


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(ScoringSettings):
    """Score every completion of a file, and say how good the scores are."""

    model: tuple[str, ...] = ()
    """Reward model, or several: folders, runs' folders or hub names. Each reads the text with its own tokenizer."""
    data: tuple[str, ...] = ()
    """What to score: files (JSONL, JSON, CSV, Parquet; .gz and .zst too), globs, or hf:NAME."""
    output: str = "scores.jsonl"
    """File to write: prompt, completions and scores, one row a line."""
    aggregate: Literal["mean", "min", "mean_minus_std", "mean_minus_variance"] = "mean"
    """One score of several models': their mean, the worst, or the mean less a charge for disagreement."""
    spread_coef: float = 1.0
    """Factor of the charge for disagreement (mean_minus_std, mean_minus_variance)."""
    normalize_on: tuple[str, ...] = ()
    """Shift each model's scores so that their mean on these files' completions is 0 (demonstrations, say)."""
    scale: bool = False
    """With --normalize-on: scale the scores to standard deviation 1 there too."""
    resume: Literal["no", "auto", "yes"] = "no"
    """Go on behind the last whole line of --output: auto if there is such a file, yes insists on it."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "spread_coef", at_least=0)
        check_used(self, len(self.model) > 1, "more than one --model", "aggregate")
        check_used(self, self.aggregate.startswith("mean_minus"), "--aggregate mean_minus_…", "spread_coef")
        check_used(self, bool(self.normalize_on), "--normalize-on", "scale")


@dataclass(frozen=True, kw_only=True)
class NormalizeSettings(ScoringSettings):
    """Copy a reward model, its scores shifted to mean 0 on given completions."""

    model: str = ""
    """Reward model: a folder, a run's folder or a hub name."""
    data: tuple[str, ...] = ()
    """The completions, each counted once: demonstrations, say."""
    output: str = "models/reward"
    """Folder to write; it must be new or empty."""
    scale: bool = False
    """Scale the scores to standard deviation 1 too; their differences are then no longer log-odds."""


def score(settings: ScoreSettings) -> None:
    """Write the scores and print what they are worth. Raises ``TrueupError`` for what the user can mend."""
    check_given(settings.model, settings.data)
    from trueup.rewards.ensembles import AGGREGATES
    from trueup.rewards.normalization import normalized_on, read_groups
    from trueup.rewards.scoring import begun, score_data

    begun(Path(settings.output), settings.resume)  # before the models are loaded, which takes a while
    models = [load(name, settings) for name in settings.model]
    if settings.normalize_on:
        models = [
            normalized_on(model, read_groups(model, settings.normalize_on)[0], scale=settings.scale) for model in models
        ]
    try:
        scored = score_data(
            models,
            settings.data,
            settings.output,
            data_format=settings.data_format,
            limit=settings.limit,
            aggregate=lambda scores: AGGREGATES[settings.aggregate](scores, settings.spread_coef),
            resume=settings.resume,
            quiet=settings.quiet,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; --resume auto goes on with {settings.output}") from None
    for line in summary_lines(scored):
        print(line)


def normalize(settings: NormalizeSettings) -> None:
    """Write the shifted model and say by how much. Raises ``TrueupError`` for what the user can mend."""
    check_given(settings.model, settings.data)
    from trueup.rewards.normalization import normalized_on, read_groups, save_scaled

    model = load(settings.model, settings)
    groups, report = read_groups(model, settings.data, data_format=settings.data_format, limit=settings.limit)
    scale = normalized_on(model, groups, scale=settings.scale).scale
    folder = save_scaled(settings.model, settings.output, scale)
    print(f"data: {report.summary()}")
    sign = "+" if scale.score_mean < 0 else "−"
    print(f"{folder}: score = (raw score {sign} {abs(scale.score_mean):.6g}) / {scale.score_std:.6g}")


def check_given(model: Sequence[str], data: Sequence[str]) -> None:
    """Raise ``SettingsError`` where nothing is named."""
    if not model:
        raise SettingsError("no reward model is given", where="--model", way_out="--model runs/reward")
    if not data:
        raise SettingsError("no data is given", where="--data", way_out="--data FILE.jsonl")


def load(name: str, settings: ScoringSettings) -> RewardModel:
    """A reward model that reads text as the settings say."""
    from trueup.rewards.reward_model import RewardModel

    return RewardModel.load(
        name,
        dtype=settings.dtype,
        device=settings.device,
        tokens_per_batch=settings.tokens_per_batch,
        settings=TokenizeSettings.of(settings),
    )


def summary_lines(scored: Scored) -> Iterator[str]:
    """The file, its scores, and where rows rank their completions, how right and how sure of itself the model is."""
    metrics = scored.metrics
    yield f"data: {scored.report.summary()}"
    yield f"{scored.path}: {metrics['num_rows']:,} rows, {metrics['num_completions']:,} completions"
    if "score_mean" in metrics:
        yield f"score: mean {metrics['score_mean']:.4g}, standard deviation {metrics['score_std']:.4g}"
    if "accuracy" not in metrics:
        return
    yield "accuracy (95 % interval):"
    titles = {"": "all pairs", "_length_matched": "lengths balanced", "_longer_answer": "of the longer answer"}
    models = [name for name in metrics if name.startswith("accuracy/model_") and f"{name}_low" in metrics]
    titles |= {name.removeprefix("accuracy"): f"model {name.rpartition('_')[2]} alone" for name in models}
    for suffix, title in titles.items():
        name = f"accuracy{suffix}"
        yield f"  {title:20}  {interval(metrics[name], metrics[f'{name}_low'], metrics[f'{name}_high'])}"
    yield "accuracy by length gap (tokens, better minus worse):"
    for row in scored.tables["length_gaps"]:
        gaps = f"{row['shortest_gap']:+,.0f} to {row['longest_gap']:+,.0f}"
        yield f"  {gaps:20}  {interval(row['accuracy'], row['low'], row['high'])}  {row['count']:,} pairs"
    yield (
        f"calibration: ECE {metrics['ece']:.3f} ({metrics['ece_by_chance']:.3f} by chance), "
        f"Brier {metrics['brier']:.3f}, log-loss {metrics['log_loss']:.3f}"
    )
    for row in scored.tables["reliability"]:
        sure = f"{row['predicted']:.3f} sure, right"
        yield f"  {sure:20}  {interval(row['observed'], row['low'], row['high'])}  {row['count']:,} pairs"


def interval(mean: float, low: float, high: float) -> str:
    """``0.713 [0.672, 0.751]``."""
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"

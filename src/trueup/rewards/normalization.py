"""Where a reward model's zero lies: its scores shifted, and scaled if asked, to mean 0 (and 1) on given completions.

Ouyang et al. 2022 (arXiv 2203.02155), section 3.5, shift a reward model so that the labelers' demonstrations score 0 on
average before the policy is trained with it. An ensemble needs it more: see ``ensembles``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from trueup.data.formats import read_examples
from trueup.data.report import ReadReport
from trueup.data.rows import Source, source_name
from trueup.errors import DataError, ModelError
from trueup.models.load import model_source
from trueup.models.score_scale import ScoreScale
from trueup.records import CompletionGroup
from trueup.rewards.reward_model import RewardModel, check_trained
from trueup.runs.files import sync_tree, write_atomic, write_errors


def normalized_on(model: RewardModel, groups: Sequence[CompletionGroup], *, scale: bool = False) -> RewardModel:
    """The model with scores of mean 0 on the completions of ``groups``, each counted once; ``scale``: and of standard
    deviation 1.

        s' = s − s̄,      with scale: (s − s̄) / √(1/n Σ (s − s̄)²)

    The weights are shared with ``model``. Shifting changes no difference between scores. Scaling does: σ of a
    difference is then no longer the probability that the model was trained to give.

    Raises ``DataError`` without completions, and with ``scale`` where all scores are equal.
    """
    scores = np.concatenate([np.empty(0), *model.score_groups(groups)])
    if len(scores) == 0:
        raise DataError("there is no completion to take the mean over")
    mean, std = float(scores.mean()), float(scores.std()) if scale else 1.0
    if std == 0:
        raise DataError(
            f"all {len(scores)} scores are equal, so they have no scale",
            where=model.name,
            way_out="give more completions, or leave out --scale",
        )
    return replace(model, scale=model.scale.then(ScoreScale(score_mean=mean, score_std=std)))


def read_groups(
    model: RewardModel, source: Source, *, data_format: str = "auto", limit: int | None = None
) -> tuple[list[CompletionGroup], ReadReport]:
    """Every completion of a source, demonstrations and comparisons alike, in the model's tokens.

    Raises ``DataError`` as ``read_examples`` does, and where no row is left.
    """
    report = ReadReport()
    examples = islice(read_examples(source, task=None, data_format=data_format, report=report), limit)
    tokenized = (model.tokenized(example, report) for example in examples)
    groups = [group for group in tokenized if group is not None]
    if not groups:
        raise DataError(f"no row is left to score: {report.summary()}", where=source_name(source))
    return groups, report


def save_scaled(name: str | Path, folder: str | Path, scale: ScoreScale) -> Path:
    """Copy a saved reward model, its weights bit for bit, with ``scale`` in its config; returns ``folder``.

    ``folder`` appears whole or not at all. Raises ``ModelError`` for a ``folder`` with something in it,
    ``CheckpointError`` if it can't be written.
    """
    check_trained(name)
    source, folder = model_source(name), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError("is in use already", where=str(folder), way_out="choose another folder, or remove this one")
    with write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            for path in source.iterdir():
                if path.is_file():
                    shutil.copyfile(path, aside / path.name)
            config = json.loads((aside / "config.json").read_text(encoding="utf-8")) | scale.fields()
            write_atomic(aside / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
            aside.chmod(0o755)
            sync_tree(aside)
            aside.replace(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder

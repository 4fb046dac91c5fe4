"""Process reward model: at the end of every step, how probable it is that the step is right.

1. r_θ(x, y_1 … y_t): a linear head on the hidden state of the last token of step t
2. loss  −z·log σ(r) − (1 − z)·log(1 − σ(r))  for a step with the label z
3. mean over the labelled steps of the optimiser step; one optimiser step
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trueup.errors import DataError
from trueup.models.heads import load_reward_model
from trueup.models.load import context_length
from trueup.models.scorer import prepare_reward_scorer
from trueup.models.tree import TreeBatch
from trueup.objectives.process import process_reward_loss
from trueup.records import CompletionGroup
from trueup.runs.statistics import accuracy_interval, length_matched_accuracy
from trueup.trainers.fit import fit
from trueup.trainers.inputs import load_inputs
from trueup.trainers.ranked import outcomes
from trueup.trainers.session import RunResult, guarded, open_session
from trueup.trainers.settings import RewardSettings
from trueup.trainers.summary import Summary
from trueup.trainers.tally import Tally, Totals
from trueup.trainers.trained_model import load_trained, save_trained


@guarded
def train_process(
    settings: RewardSettings, *, model: Any = None, tokenizer: Any = None, data: Any = None, eval_data: Any = None
) -> RunResult:
    """Train a process reward model on answers that are labelled step by step. Arguments as ``train_reward``'s."""
    session = open_session("process", settings)
    reward_model, tokenizer = load_trained(
        settings, model, tokenizer, load=partial(load_reward_model, seed=settings.seed, scores_each="step")
    )
    inputs = load_inputs(
        settings,
        tokenizer,
        task="process",
        data=data,
        eval_data=eval_data,
        say=session.say,
        check=check_steps,
        context_length=context_length(reward_model),
        share_prompts=True,
    )
    scorer = prepare_reward_scorer(reward_model)

    def loss(groups: Sequence[CompletionGroup], batch: TreeBatch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        scores = scorer(batch)
        labels = step_labels(groups, like=scores)
        rows = step_rows(scores, groups)
        losses = process_reward_loss(rows, labels, ~labels.isnan())
        return losses.sum() / totals.steps, step_metrics(rows, labels)

    return fit(
        session,
        inputs,
        scorer,
        loss=loss,
        save_model=lambda folder: save_trained(reward_model, tokenizer, folder),
        summarise=step_summary,
    )


def check_steps(group: CompletionGroup) -> None:
    """Raise ``DataError`` for a completion without labelled steps, or whose ends and labels don't belong together."""
    for completion in group.completions:
        ends, labels = completion.step_ends, completion.step_labels
        if ends is None or labels is None:
            what, way_out = "a completion is not labelled step by step", "leave out --process to train on preferences"
        elif len(ends) != len(labels):
            what, way_out = f"{len(ends)} steps but {len(labels)} labels", "label each step; NaN where not known"
        elif (np.diff(ends, prepend=-1) < 1).any() or (ends >= len(completion.tokens)).any():
            what, way_out = "step_ends must ascend and stay inside the completion", "count its tokens from 0"
        elif not (np.isnan(labels) | ((labels >= 0) & (labels <= 1))).all() or np.isnan(labels).all():
            what, way_out = "step_labels must lie between 0 and 1, and not all be NaN", "1 is right, 0 is wrong"
        else:
            continue
        raise DataError(what, where=group.where or None, way_out=way_out)


def step_rows(values: Tensor, groups: Sequence[CompletionGroup]) -> Tensor:
    """``values[M]`` in the order of the steps → ``[C, S]``, a row per completion; shorter ones are filled with NaN."""
    counts = [0 if ends is None else len(ends) for ends in (each.step_ends for g in groups for each in g.completions)]
    return pad_sequence(list(values.split(counts)), batch_first=True, padding_value=math.nan)


def step_labels(groups: Sequence[CompletionGroup], like: Tensor) -> Tensor:
    """The steps' labels in the same rows: NaN where there is no step, or nobody labelled it."""
    labels = [each.step_labels for group in groups for each in group.completions if each.step_labels is not None]
    return step_rows(torch.from_numpy(np.concatenate(labels)).to(like), groups)


def step_metrics(scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """How scores and labels agree, of rows ``[C, S]``: by step, and by each completion's first mistake.

    A step is right if its label is above ½ and wrong if it is below; at ½, or without a label, it is neither.
    """
    right, wrong = labels > 0.5, labels < 0.5
    judged = right | wrong
    agrees = torch.where(right, outcomes(scores, -scores), outcomes(-scores, scores))
    found = (first(wrong) == first(judged & (scores < 0))).float()
    found = torch.where((judged & scores.isnan()).any(-1), math.nan, found)
    return {
        "accuracy": agrees[judged],
        "accuracy_right": agrees[right],
        "accuracy_wrong": agrees[wrong],
        "score_right": scores[right],
        "score_wrong": scores[wrong],
        "first_mistake_found": found[wrong.any(-1)],
        "faultless_passed": found[judged.any(-1) & ~wrong.any(-1)],
        "right_steps": right[judged].float(),
        "judged_steps": judged.sum(-1).float(),
    }


def first(marked: Tensor) -> Tensor:
    """Of each row of a bool ``[C, S]``, the first column that is True; S where none is: ``[C]``."""
    return torch.where(marked.any(-1), marked.int().argmax(-1), marked.shape[-1])


def step_summary(tally: Tally) -> Summary:
    """Means of an evaluation; accuracies with their 95 % intervals, which count completions: their steps go together.

    ``balanced_accuracy`` is what the accuracy would be if right and wrong steps were equally many: most steps are
    right, so that a model that praises everything is mostly right too, and scores ½ here.
    """
    figures = tally.means()
    agrees, right = tally.all("accuracy").numpy(), tally.all("right_steps").numpy()
    if not len(agrees) or np.isnan(agrees).any():  # nothing is judged, or the model is broken
        return Summary(figures)
    counts = tally.all("judged_steps").numpy().astype(int)
    lists = np.repeat(np.arange(len(counts)), counts)
    intervals = {
        "accuracy": accuracy_interval(agrees, lists=lists),
        # Pairs of one length gap in which either side is the longer one: so right and wrong steps weigh the same.
        "balanced_accuracy": length_matched_accuracy(agrees, 2 * right - 1, lists=lists),
    }
    for name in ("first_mistake_found", "faultless_passed"):
        if name in figures:
            intervals[name] = accuracy_interval(tally.all(name).numpy())
    for name, (mean, low, high) in intervals.items():
        if not math.isnan(mean):
            figures |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    return Summary(figures)

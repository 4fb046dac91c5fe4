"""The loop that the offline trainers share: one batch, its micro-batches, one optimiser step; evaluate, save, resume.

What a trainer adds is its loss. A loss is given the groups of a micro-batch, their tree batch, and the totals of the
whole step; it returns its share of the step's loss, and metrics as one value per token, completion or pair.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from trueup.data.collate import micro_batches
from trueup.models.tree import TreeBatch, tree_batch
from trueup.records import CompletionGroup
from trueup.runs.progress import RunProgress
from trueup.runs.statistics import accuracy_metrics, calibration_metrics, comparison_tables
from trueup.trainers.fingerprint import weights_fingerprint
from trueup.trainers.inputs import Inputs
from trueup.trainers.memory import memory_errors
from trueup.trainers.session import RunResult, Session
from trueup.trainers.stepping import Stepper
from trueup.trainers.tally import Tally, Totals

Told = Callable[[list[list[int]]], Iterator[list[int]]]
"""Goes through micro-batches, and shows how far it is."""

StepLoss = Callable[[Sequence[CompletionGroup], TreeBatch, Totals], tuple[Tensor, dict[str, Tensor]]]


def fit(
    session: Session,
    inputs: Inputs,
    scorer: nn.Module,
    *,
    loss: StepLoss,
    save_model: Callable[[Path], None],
    write_samples: Callable[[int], None] = lambda step: None,
    accuracy: str | None = None,
    score_gap: str | None = None,
    summarise: Callable[[Tally], dict[str, float]] | None = None,
    statistics: Callable[[Sequence[CompletionGroup]], Mapping[str, Tensor]] | None = None,
) -> RunResult:
    """Minimise ``loss`` over the steps of ``inputs``; evaluates at step 0, every ``eval_every`` steps and at the end.

    ``accuracy`` names the metric of 0, ½ and 1 that gets an interval and its length-matched form in evaluations;
    ``score_gap`` the one whose σ is the model's probability of what people chose, for calibration and its tables.
    ``summarise`` makes an evaluation's figures where these two do not do.
    ``statistics`` computes what couples a batch over all groups of a step, before the first micro-batch.
    Raises ``NonFiniteError`` after ``max_skipped_steps`` steps without a finite loss or gradient, and
    ``KeyboardInterrupt`` after an interrupt, once the step is finished and saved; and ``OutOfMemoryError``.
    """
    settings = session.settings
    device = next(scorer.parameters()).device
    stepper = Stepper(scorer, settings, inputs.num_steps)

    def measure(groups: Sequence[CompletionGroup], *, learn: bool, told: Told = iter) -> Tally:
        tally, totals = Tally(), Totals.of(groups, statistics(groups) if statistics else None)
        for micro in told(micro_batches(groups, settings.tokens_per_batch)):
            chosen = [groups[index] for index in micro]
            with memory_errors(settings, chosen):
                batch = tree_batch(chosen, device)
                share, metrics = loss(chosen, batch, totals.at(micro))
                if learn:
                    share.backward()
            tally.add(share, metrics, tokens=len(batch.tokens), groups=chosen)
        return tally

    def evaluate(step: int, progress: RunProgress) -> dict[str, float]:
        scorer.eval()
        metrics = {}
        if inputs.held_out:
            with torch.no_grad():
                tally = measure(inputs.held_out, learn=False, told=partial(progress.aside, title="evaluation"))
            figures = summarise(tally) if summarise else summary(tally, accuracy, score_gap)
            metrics = {f"eval_{name}": value for name, value in figures.items()}
            session.log(metrics, step)
            if score_gap and math.isfinite(metrics[f"eval_{score_gap}"]):
                gaps, lengths = tally.all(score_gap).numpy(), tally.all("length_gap").numpy()
                session.folder.log_calibration(comparison_tables(gaps, lengths, tally.lists()), step)
        write_samples(step)
        scorer.train()
        return metrics

    fingerprints = inputs.fingerprints | {"starting weights": weights_fingerprint(scorer)}
    start, counters = session.restore(stepper, fingerprints)
    evaluated: dict[str, float] = {}
    trained: dict[str, float] = {}
    scorer.train()
    if settings.warmup_steps >= inputs.num_steps:
        session.say(
            f"all {inputs.num_steps} steps are warm-up: the peak learning rate comes after step {settings.warmup_steps}"
        )
    with closing(stepper), session.running(start, inputs.num_steps) as progress:
        if start == 0:
            evaluated = evaluate(0, progress)
        for step, epoch, groups in inputs.steps(start):
            began, done = time.perf_counter(), step + 1
            tally = measure(groups, learn=True)
            grad_norm, learning_rate = stepper.step(step) if math.isfinite(tally.loss) else stepper.skip()
            seconds = time.perf_counter() - began
            counters.num_tokens += tally.tokens
            counters.skipped_steps += not math.isfinite(grad_norm)
            trained = tally.means() | {
                "grad_norm": grad_norm,
                "learning_rate": learning_rate,
                "epoch": epoch,
                **vars(counters),
                "step_seconds": seconds,
                "tokens_per_second": tally.tokens / seconds,
            }
            session.log(trained, done)
            progress.step(num_tokens=tally.tokens, metrics={"loss": tally.loss})
            if not math.isfinite(grad_norm):
                session.skipped(groups, done, counters)

            last = done == inputs.num_steps
            if last or due(done, settings.eval_every):
                evaluated = evaluate(done, progress)
            if last or due(done, settings.save_every) or session.interrupt.requested:
                session.save(done, stepper, counters, save_model)
            if session.interrupt.requested:
                raise session.stopped(done)
    return session.result(evaluated or trained)


def due(step: int, every: int | None) -> bool:
    """Is it time for what happens every ``every`` steps?"""
    return every is not None and step % every == 0


def summary(tally: Tally, accuracy: str | None, score_gap: str | None = None) -> dict[str, float]:
    """Means of an evaluation; the accuracy with its 95 % interval, and with the lengths of the sides balanced; of
    ``score_gap`` the calibration."""
    metrics = tally.means()
    if accuracy not in metrics:
        return metrics
    outcomes, lists = tally.all(accuracy).numpy(), tally.lists()
    if np.isnan(outcomes).any():  # the model is broken: the means say so, and there is nothing to estimate
        return metrics
    metrics |= accuracy_metrics(outcomes, tally.all("length_gap").numpy(), lists, name=accuracy)
    return metrics | (calibration_metrics(tally.all(score_gap).numpy(), lists) if score_gap else {})

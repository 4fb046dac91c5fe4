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

import torch
from torch import Tensor, nn

from trueup.data.collate import micro_batches
from trueup.models.tree import TreeBatch, tree_batch
from trueup.records import CompletionGroup
from trueup.trainers.fingerprint import weights_fingerprint
from trueup.trainers.inputs import Inputs
from trueup.trainers.memory import memory_errors
from trueup.trainers.session import RunResult, Session
from trueup.trainers.stepping import Stepper
from trueup.trainers.summary import Summarise, means
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
    summarise: Summarise = means,
    statistics: Callable[[Sequence[CompletionGroup]], Mapping[str, Tensor]] | None = None,
    fingerprints: Mapping[str, str] | None = None,
) -> RunResult:
    """Minimise ``loss`` over the steps of ``inputs``; evaluates at step 0, every ``eval_every`` steps and at the end.

    ``summarise`` makes an evaluation's figures and tables of what it added up to.
    ``statistics`` computes what couples a batch over all groups of a step, before the first micro-batch.
    ``fingerprints``: of what else the run was started with, beside its data, tokenizer and weights.
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

    def evaluate(step: int) -> None:
        nonlocal evaluated
        scorer.eval()
        if inputs.held_out:
            with torch.no_grad():
                tally = measure(inputs.held_out, learn=False, told=partial(progress.aside, title="evaluation"))
            figures, tables = summarise(tally)
            evaluated = {f"eval_{name}": value for name, value in figures.items()}
            session.log(evaluated, step)
            if tables is not None:
                session.folder.log_calibration(tables, step)
        write_samples(step)
        scorer.train()

    def save(step: int) -> None:
        session.save(step, stepper, counters, save_model)

    known = inputs.fingerprints | {"starting weights": weights_fingerprint(scorer), **(fingerprints or {})}
    start, counters = session.restore(stepper, known)
    evaluated: dict[str, float] = {}
    trained: dict[str, float] = {}
    scorer.train()
    if settings.warmup_steps >= inputs.num_steps:
        session.say(
            f"all {inputs.num_steps} steps are warm-up: the peak learning rate comes after step {settings.warmup_steps}"
        )
    with closing(stepper), session.running(start, inputs.num_steps) as progress:
        if start == 0:
            evaluate(0)
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

            session.after_step(done, inputs.num_steps, evaluate=evaluate, save=save)
    return session.result(evaluated or trained)

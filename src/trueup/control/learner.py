"""What the learners of rollouts and of replayed experience share: parameters and optimiser, records, checkpoints."""

from __future__ import annotations

import json
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trueup.control.agent import Agent
from trueup.control.environments import Environments
from trueup.control.evaluation import evaluate
from trueup.control.networks import Network
from trueup.control.rollout import Collector
from trueup.control.settings import ControlSettings
from trueup.errors import NonFiniteError
from trueup.runs.checkpoint import latest_checkpoint
from trueup.runs.folder import read_metrics
from trueup.runs.sampled import with_interval
from trueup.runs.session import Session

_LAST = 100
"""Episodes that the running return is the mean of."""

_EVALUATION_SEED = 1_000_000
"""Evaluations begin with the same episodes, which are none of training's."""


class Learner:
    """One optimiser over the parameters of all runs; each run's gradient is clipped by itself."""

    def __init__(self, network: Network, settings: ControlSettings) -> None:
        self.network, self.settings = network, settings
        if settings.optimizer == "adam":
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
                [network.flat], settings.learning_rate, eps=settings.optimizer_eps, fused=True
            )
        else:
            self.optimizer = torch.optim.RMSprop(
                [network.flat], settings.learning_rate, alpha=0.99, eps=settings.optimizer_eps
            )

    def at(self, left: float) -> None:
        """Set the learning rate for when this part of the run is ``left``."""
        factor = left if self.settings.lr_schedule == "linear" else 1.0
        self.optimizer.param_groups[0]["lr"] = self.settings.learning_rate * factor

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def step(self) -> None:
        """Follow the gradient that the network's backward pass has left."""
        if self.settings.max_grad_norm is not None:
            self.network.clip_gradient(self.settings.max_grad_norm)
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {"parameters": self.network.flat.clone(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.network.flat.copy_(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])


class RandomNumbers:
    """A generator for each run, so that a run's numbers don't depend on those beside it."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [np.random.default_rng(seed) for seed in seeds]

    def stack(self, draw: Callable[[np.random.Generator], np.ndarray], axis: int = 0) -> np.ndarray:
        """What ``draw`` gets from each generator, side by side along ``axis``."""
        return np.stack([draw(generator) for generator in self.generators], axis)

    def state(self) -> list[str]:
        return [json.dumps(generator.bit_generator.state) for generator in self.generators]

    def restore(self, state: Sequence[str]) -> None:
        for generator, text in zip(self.generators, state, strict=True):
            generator.bit_generator.state = json.loads(text)


@dataclass(frozen=True)
class ControlResult:
    """Where a run lies, and what its last evaluation measured."""

    folder: Path
    agent_folder: Path
    metrics: dict[str, Any]


@dataclass
class Training:
    """An open run: what a loop acts, learns and reports with."""

    session: Session[ControlSettings]
    collector: Collector
    learner: Learner
    agent: Agent
    random: RandomNumbers
    make: Callable[[int], Environments]
    """Makes environments to evaluate in."""
    recent: list[deque[float]] = field(default_factory=list)
    """Each run's returns of its last episodes."""
    own_state: Callable[[], Mapping[str, Any]] = dict
    """What else the loop needs for going on."""
    num_episodes: int = 0
    evaluated: dict[str, Any] = field(default_factory=dict)
    _clock: tuple[float, int] = (0.0, 0)

    @property
    def settings(self) -> ControlSettings:
        return self.session.settings

    def begin(self, take_over: Callable[[Mapping[str, Any]], None]) -> int:
        """The step to go on from; what was saved is taken over, ``take_over`` is given the loop's own part."""

        def take(state: Mapping[str, Any]) -> None:
            self.learner.restore(state["learner"])
            self.random.restore(state["random"])
            if self.agent.scale is not None:
                self.agent.scale.restore(state["observations"])
            resumed = self.collector.restore(state["collector"])
            if not resumed:
                warnings.warn(
                    "these environments can't be brought back to where they were: new episodes begin", stacklevel=2
                )
            self.recent = [deque(returns, _LAST) for returns in state["recent"]]
            self.num_episodes = state["num_episodes"]
            take_over({**state["own"], "resumed": resumed})

        self.recent = [deque(maxlen=_LAST) for _ in self.settings.seeds]
        step = self.session.go_on(take)
        if step == 0:
            self.collector.begin()
        self._clock = time.perf_counter(), step
        return step

    def report(self, metrics: Mapping[str, Float[Tensor, " s"] | float], step: int) -> dict[str, float]:
        """One line of metrics: each run's numbers if there are several, and their means; returns what to show."""
        ended = self.collector.episodes.take()
        self.num_episodes += len(ended)
        for run, total, _ in ended:
            self.recent[run].append(total)
        now = time.perf_counter()
        (then, before), self._clock = self._clock, (now, step)
        runs = len(self.settings.seeds)
        by_run: dict[str, list[float]] = {}
        if all(self.recent):
            by_run["return_100"] = [float(np.mean(returns)) for returns in self.recent]
        if ended:
            of_runs = [[length for owner, _, length in ended if owner == run] for run in range(runs)]
            if all(of_runs):
                by_run["episode_length"] = [float(np.mean(lengths)) for lengths in of_runs]
        numbers: dict[str, Any] = {}
        for name, value in metrics.items():
            if isinstance(value, Tensor):
                by_run[name] = value.tolist()
            else:
                numbers[name] = value
        record = averages(by_run, self.settings.seeds) | numbers
        record |= {
            "learning_rate": self.learner.learning_rate,
            "num_episodes": self.num_episodes,
            "steps_per_second": runs * (step - before) / max(now - then, 1e-9),
        }
        if not np.isfinite([value for values in by_run.values() for value in values]).all():
            self.session.folder.log(record, step)
            raise NonFiniteError(
                f"at step {step:,} a loss is not a finite number any more",
                where=str(self.session.folder.metrics),
                way_out="start a new run with a lower --learning-rate, or with --normalize-observations",
            )
        self.session.log(record, step)
        return {"return": record["return_100"]} if "return_100" in record else {}

    def evaluate(self, step: int) -> None:
        if self.settings.eval_episodes:
            outcome = evaluate(self.agent, self.make, self.settings.eval_episodes, seed=_EVALUATION_SEED)
            by_run = {"eval_return": outcome.returns.mean(1).tolist(), "eval_length": outcome.lengths.mean(1).tolist()}
            self.evaluated = averages(by_run, self.settings.seeds)
            self.session.log(self.evaluated, step)
            self._clock = time.perf_counter(), step

    def save(self, step: int) -> None:
        state = {
            "learner": self.learner.state(),
            "random": self.random.state(),
            "observations": None if self.agent.scale is None else self.agent.scale.state(),
            "collector": self.collector.state(),
            "recent": [list(returns) for returns in self.recent],
            "num_episodes": self.num_episodes,
            "own": dict(self.own_state()),
        }
        self.session.write_checkpoint(step, self.agent.save, state)

    def after(self, before: int, step: int) -> None:
        """What comes after an update."""
        self.session.after_step(step, self.settings.total_steps, evaluate=self.evaluate, save=self.save, before=before)

    def result(self) -> ControlResult:
        checkpoint = latest_checkpoint(self.session.folder)
        assert checkpoint is not None  # the last step always writes one
        metrics = self.evaluated or read_metrics(self.session.folder.metrics)[-1]
        return ControlResult(self.session.folder.path, checkpoint / "model", dict(metrics))


def averages(by_run: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> dict[str, float]:
    """Of one run its numbers. Of several: means; of returns each run's own too, as ``name/seed``, and the mean's 95 %
    interval."""
    if len(seeds) == 1:
        return {name: values[0] for name, values in by_run.items()}
    record: dict[str, float] = {}
    for name, values in by_run.items():
        if "return" in name:
            record |= with_interval(name, values)
            record |= {f"{name}/{seed}": value for seed, value in zip(seeds, values, strict=True)}
        else:
            record[name] = float(np.mean(values))
    return record

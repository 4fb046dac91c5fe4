"""Training an agent in an environment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trueup.control.agent import Agent
from trueup.control.dqn import train_dqn, value_network
from trueup.control.environments import Environments, LocalEnvironments, Vectorization, make_environments
from trueup.control.learner import ControlResult, Learner, RandomNumbers, Training
from trueup.control.normalization import ObservationScale
from trueup.control.on_policy import policy_network, train_on_policy
from trueup.control.rollout import Collector
from trueup.control.settings import MAY_CHANGE, ControlSettings
from trueup.runs.interrupt import Interrupt
from trueup.runs.lock import release
from trueup.runs.seeds import seed_everything
from trueup.runs.session import Session, open_folder


def train(settings: ControlSettings, *, make: Callable[[], Any] | None = None) -> ControlResult:
    """Train agents, one for each seed.

    ``make`` makes an environment, in place of the name in the settings. Raises ``TrueupError`` for every mistake that
    the user can mend, and ``KeyboardInterrupt`` after an interrupt, once the step is saved.
    """

    # What evaluates steps all environments at once and is soon done: a process for each would take longer to start.
    evaluated_in = "envpool" if settings.vectorization == "envpool" else "local"

    def environments(rows: int, vectorization: Vectorization) -> Environments:
        return make_environments(settings.env, rows, vectorization) if make is None else LocalEnvironments(make, rows)

    rows = environments(len(settings.seeds) * settings.num_envs, settings.vectorization)
    try:
        folder = open_folder(settings.output, settings, may_change=MAY_CHANGE)
        seed_everything(settings.seeds[0])
        session = Session(settings.algorithm, settings, folder, Interrupt())
        build, learn = (value_network, train_dqn) if settings.algorithm == "dqn" else (policy_network, train_on_policy)
        network = build(settings, rows)
        scale = None
        if settings.normalize_observations:
            scale = ObservationScale(len(settings.seeds), rows.num_inputs, settings.observation_clip)
        training = Training(
            session=session,
            collector=Collector(rows, list(settings.seeds), settings.num_envs),
            learner=Learner(network, settings),
            agent=Agent(settings.env, settings.algorithm, settings.seeds, rows.actions, network, scale),
            random=RandomNumbers(settings.seeds),
            make=lambda number: environments(number, evaluated_in),
        )
        learn(training)
        return training.result()
    finally:
        rows.close()
        release(Path(settings.output))

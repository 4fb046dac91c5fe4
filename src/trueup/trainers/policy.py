"""Online reinforcement learning: one loop for REINFORCE, RLOO, PPO, GRPO and their kin.

The unified view of DeepSeekMath (arXiv 2402.03300, §5.2), as a loop over rollouts:

    1. sample      K completions of each prompt, from the policy as it is now
    2. score       each of them, by the rewards
    3. advantages  how much better each token was than expected          (algorithm.advantages)
    4. for every pass over the rollout, for every mini-batch of it:
           surrogate  + β KL − c entropy,  reduced to one number         (algorithm.surrogate, algorithm.reduce)
           one optimiser step of the policy; and of the critic, if there is one

What the methods differ in is an ``Algorithm``: ``recipes.RECIPES`` is the table.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trueup.data.collate import epoch_order
from trueup.objectives import divergence, policy_gradient, reduce
from trueup.objectives.advantages import whiten
from trueup.objectives.value import clipped_value_loss, value_loss
from trueup.trainers.algorithms import Algorithm, Learned, kl_loss
from trueup.trainers.evaluation import evaluate_policy
from trueup.trainers.experience import Experience, Micro, passes, put_rows, said_by, units
from trueup.trainers.memory import memory_errors
from trueup.trainers.players import Players, Progressed, load_players
from trueup.trainers.policy_inputs import PolicyInputs, load_policy_inputs
from trueup.trainers.policy_metrics import Alarms, rollout_metrics, surrogate_metrics
from trueup.trainers.policy_settings import PolicySettings
from trueup.trainers.rollouts import roll_out
from trueup.trainers.session import RunResult, guarded, open_session
from trueup.trainers.stepping import Stepper
from trueup.trainers.tally import Tally, Totals
from trueup.trainers.trained_model import load_trained, save_trained


@guarded
def train_policy(
    settings: PolicySettings,
    algorithm: Algorithm,
    *,
    model: Any = None,
    tokenizer: Any = None,
    data: Any = None,
    eval_data: Any = None,
    reward: Any = None,
) -> RunResult:
    """Improve a causal language model against rewards, by ``algorithm``.

    ``model`` and ``tokenizer`` (objects), ``data`` and ``eval_data`` (rows or a ``datasets`` object), ``reward`` (a
    function, several, or ``Rewards``) take the place of the settings of the same name. Raises ``TrueupError`` for every
    mistake that the user can mend.
    """
    session = open_session(settings.recipe, settings)
    policy, tokenizer = load_trained(settings, model, tokenizer)
    inputs = load_policy_inputs(settings, policy, tokenizer, data=data, eval_data=eval_data, say=session.say)
    players = load_players(settings, algorithm, policy, tokenizer, reward=reward, say=session.say)
    stepper = Stepper(players.scorer, settings, inputs.num_steps)
    critic_stepper = players.critic_stepper(settings, inputs.num_steps)
    state, alarms = Progressed(kl_coef=settings.kl_coef, penalty_coef=settings.penalty_coef), Alarms()
    x: Experience | None = None
    evaluated: dict[str, float] = {}
    trained: dict[str, float] = {}

    def take_over(saved: Mapping[str, Any]) -> None:
        nonlocal x
        state.__dict__.update(saved["progressed"])
        alarms.__dict__.update(saved["alarms"])
        players.load_state_dict(saved["players"])
        if critic_stepper:
            critic_stepper.load_state_dict(saved["critic"])
        if saved["experience"] is not None:
            x = Experience.from_state(saved["experience"], players.device)

    def evaluate(step: int) -> None:
        nonlocal evaluated
        evaluated = evaluate_policy(session, settings, players, inputs, progress, step)

    def save(step: int) -> None:
        whole = step % settings.steps_per_rollout == 0
        more = {
            "progressed": vars(state),
            "alarms": vars(alarms),
            "players": players.state_dict(),
            "critic": critic_stepper.state_dict() if critic_stepper else None,
            "experience": None if whole or x is None else x.state_dict(),
        }
        session.save(step, stepper, counters, lambda folder: save_trained(policy, tokenizer, folder), more)

    known = inputs.fingerprints | players.fingerprints
    start, counters = session.restore(stepper, known, take_over)
    players.engine_from_policy()
    with closing(stepper), session.running(start, inputs.num_steps) as progress:
        if start == 0:
            evaluate(0)
        for step in range(start, inputs.num_steps):
            number, inner = divmod(step, settings.steps_per_rollout)
            metrics: dict[str, float] = {}
            if inner == 0:
                x, metrics = roll_out(number, settings, algorithm, players, inputs, state, progress)
                x = replace(x, advantages=advantages(x, settings, algorithm))
                metrics |= rollout_metrics(x, settings)
            assert x is not None
            began = time.perf_counter()
            tally = learn(x, mini_batch(x, settings, step), settings, algorithm, players, state)
            moved = tally.means().get("policy/approxkl_avg", 0.0)
            state.stopped |= settings.target_kl is not None and moved > settings.target_kl
            if state.stopped or not math.isfinite(tally.loss) or number < settings.critic_warmup:
                grad_norm, learning_rate = stepper.skip()
            else:
                grad_norm, learning_rate = stepper.step(step)
    return session.result(evaluated or trained)

"""Online reinforcement learning: one loop for REINFORCE, RLOO, PPO, GRPO and their kin.

The unified view of DeepSeekMath (arXiv 2402.03300, §5.2) made code:

    1. sample      K completions of each prompt, from the policy as it is now
    2. score       each of them, by the rewards
    3. advantage   how much better each token was than expected                       (algorithm.advantages)
    4. for every pass over the rollout, for every mini-batch of it:
         surrogate + β KL − c entropy, made one number  (algorithm.surrogate, algorithm.reduce)
         one optimiser step of the policy; one of the critic, where there is one

What the methods differ in is an ``Algorithm``; ``recipes.RECIPES`` is the table.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trueup.errors import OutOfMemoryError, RewardError
from trueup.objectives import policy_gradient, reduce, value
from trueup.trainers.algorithms import Algorithm, Learned, kl_loss
from trueup.trainers.evaluation import evaluate_policy
from trueup.trainers.experience import Experience, Micro, passes, units
from trueup.trainers.memory import memory_errors
from trueup.trainers.players import Players, load_players, save_critic
from trueup.trainers.policy_checks import check_fits, warn
from trueup.trainers.policy_inputs import load_policy_inputs
from trueup.trainers.policy_metrics import Alarms, learning_metrics, not_clipped
from trueup.trainers.policy_settings import PolicySettings
from trueup.trainers.rollouts import Moving, mini_batch, roll_out
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
    check_fits(settings, algorithm)
    session = open_session(settings.recipe, settings)
    policy, tokenizer = load_trained(settings, model, tokenizer)
    inputs = load_policy_inputs(settings, policy, tokenizer, data=data, eval_data=eval_data, say=session.say)
    players = load_players(settings, algorithm, policy, tokenizer, reward=reward)
    stepper = Stepper(players.scorer, settings, inputs.num_steps)
    critic = critic_stepper(players, settings, inputs.num_steps)
    moving, alarms = Moving(kl_coef=settings.kl_coef, penalty_coef=settings.penalty_coef), Alarms()
    x: Experience | None = None
    evaluated: dict[str, float] = {}
    metrics: dict[str, float] = {}

    def take_over(saved: Mapping[str, Any]) -> None:
        nonlocal x
        vars(moving).update(saved["moving"])
        vars(alarms).update(saved["alarms"])
        if critic:
            critic.load_state_dict(saved["critic"])
        if saved["reference"] is not None and players.reference is not None:
            players.reference.load_state_dict(saved["reference"])
        if saved["experience"] is not None:
            x = Experience.from_state(saved["experience"], players.device)

    def evaluate(step: int) -> None:
        nonlocal evaluated
        with kept(step):
            evaluated = evaluate_policy(session, settings, players, inputs, progress, step)

    def save(step: int) -> None:
        in_the_middle = step % settings.steps_per_rollout != 0
        more = {
            "moving": vars(moving),
            "alarms": vars(alarms),
            "critic": critic.state_dict() if critic else None,
            "reference": players.moving_reference(settings),
            "experience": x.state_dict() if x is not None and in_the_middle else None,
        }
        session.save(step, stepper, counters, save_models, more)

    def save_models(folder: Path) -> None:
        save_trained(policy, tokenizer, folder)
        save_critic(players, tokenizer, folder)

    @contextmanager
    def kept(step: int) -> Iterator[None]:
        """What was learned up to this step is not lost for a reward that fails."""
        try:
            yield
        except (RewardError, OutOfMemoryError):
            if step > start:
                save(step)
            raise

    start, counters = session.restore(stepper, {**inputs.fingerprints, **players.fingerprints}, take_over)
    players.take_policy_to_engine()
    warn(settings, inputs.num_steps, session.say)
    open_critic = closing(critic) if critic else nullcontext()
    with closing(stepper), open_critic, session.running(start, inputs.num_steps) as progress:
        if start == 0 or session.lacks_evaluation(start, inputs.num_steps):
            evaluate(start)
        for step in range(start, inputs.num_steps):
            number, inner = divmod(step, settings.steps_per_rollout)
            if inner == 0:
                with kept(step):
                    x, metrics = roll_out(number, settings, algorithm, players, inputs, moving, progress)
                for alarm in alarms.heard(metrics):
                    progress.say(alarm)
            assert x is not None
            if not moving.stopped:
                began = time.perf_counter()
                only_critic = number < settings.critic_warmup
                chosen = mini_batch(len(x.groups), settings, step)
                tally = learn(x, chosen, settings, algorithm, players, moving, only_critic=only_critic)
                learned = tally.means()
                moving.stopped = learned.get("approx_kl", 0.0) > (settings.target_kl or math.inf)
                moves = math.isfinite(tally.loss) and not moving.stopped
                grad_norm, learning_rate = stepper.step(step) if moves and not only_critic else stepper.skip()
                norms = [] if only_critic else [grad_norm]
                if critic:
                    learned["critic_grad_norm"], _ = critic.step(step) if moves else critic.skip()
                    norms.append(learned["critic_grad_norm"])
                broken = not moving.stopped and not all(map(math.isfinite, norms))
                seconds = time.perf_counter() - began
                counters.num_tokens += tally.tokens
                counters.skipped_steps += broken
                metrics |= learned | {
                    "grad_norm": grad_norm,
                    "learning_rate": learning_rate,
                    "kl_coef": moving.kl_coef,
                    **({"penalty_coef": moving.penalty_coef} if settings.penalty_target else {}),
                    "epoch": moving.num_drawn / len(inputs.requests),
                    **vars(counters),
                    **alarms.metrics,
                    "step_seconds": seconds,
                    "tokens_per_second": tally.tokens / seconds,
                }
                session.log(metrics, step + 1)
                shown = {name: metrics[name] for name in ("reward", "loss") if name in metrics}
                progress.step(num_tokens=tally.tokens, metrics=shown)
                if broken:
                    session.skipped([x.groups[index] for index in chosen], step + 1, counters)
                if moving.stopped or inner + 1 == settings.steps_per_rollout:
                    adapt(settings, moving, metrics)
            else:
                progress.step()
            if inner + 1 == settings.steps_per_rollout:
                end_rollout(number, settings, players)
            session.after_step(step + 1, inputs.num_steps, evaluate=evaluate, save=save)
            metrics = {}
    return session.result(evaluated)


# --- 4: learn


def learn(
    x: Experience,
    chosen: Sequence[int],
    settings: PolicySettings,
    algorithm: Algorithm,
    players: Players,
    moving: Moving,
    *,
    only_critic: bool = False,
) -> Tally:
    """Gradients of one optimiser step, added up over micro-batches; what they are of, and metrics."""
    rows = [index * x.group_size + k for index in chosen for k in range(x.group_size)]
    totals = Totals(groups=len(chosen), completions=len(rows), tokens=int(x.learned[rows].sum()))
    tally = Tally()
    wanted = taking_part(x, settings, algorithm)
    limit = sum(x.groups[index].num_tokens for index in chosen) if algorithm.whole_groups else settings.tokens_per_batch
    for micro in passes(units(x, chosen, wanted, limit), settings.tokens_per_batch, players.device):
        with memory_errors(settings, micro.groups, divisible=not algorithm.whole_groups):
            share, metrics = x.rewards.new_zeros(()), {}
            if not only_critic:
                share, metrics = policy_loss(x, micro, totals, settings, algorithm, players, moving)
                share.backward()
            if players.critic is not None:
                regression, explained = critic_loss(x, micro, totals, settings, players)
                regression.backward()
                metrics |= explained
        tally.add(share, metrics, tokens=len(micro.batch.tokens), groups=micro.groups)
    left_out = [row for row in rows if not wanted[row]]
    tally.add(x.rewards.new_zeros(()), not_clipped(x, left_out, whole_ratio=algorithm.whole_ratio), tokens=0)
    return tally


def taking_part(x: Experience, settings: PolicySettings, algorithm: Algorithm) -> np.ndarray:
    """bool [C]: completions that have a gradient. Where all of their advantages are 0 they have none, unless another
    term than the surrogate looks at them; they are counted all the same."""
    other_terms = algorithm.every_completion or settings.entropy_coef > 0 or algorithm.critic
    if other_terms or (settings.kl_coef > 0 and settings.kl_form != "reward"):
        return np.ones(len(x.rewards), dtype=bool)
    assert x.advantages is not None
    return (x.advantages * x.learned).ne(0).any(-1).cpu().numpy()


def policy_loss(
    x: Experience,
    micro: Micro,
    totals: Totals,
    settings: PolicySettings,
    algorithm: Algorithm,
    players: Players,
    moving: Moving,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the step's loss."""
    said = players.scorer(
        micro.batch, temperature=settings.temperature, want=("entropy",) * (settings.entropy_coef > 0)
    )
    logprobs = micro.batch.rows(said.logprobs)

    def rows(values: Tensor) -> Tensor:
        return values[micro.rows, : micro.batch.longest]

    old = torch.where(rows(x.old_logprobs).isnan(), logprobs.detach(), rows(x.old_logprobs))
    x.old_logprobs[micro.rows, : micro.batch.longest] = old
    sampler = rows(x.sampler_logprobs)
    assert x.advantages is not None
    learned = Learned(
        logprobs=logprobs,
        old_logprobs=old,
        advantages=torch.where(rows(x.learned), rows(x.advantages) * importance(old - sampler, settings), 0.0),
        mask=rows(x.learned),
        group_size=x.group_size,
        ref_logprobs=None if x.ref_logprobs is None else rows(x.ref_logprobs),
        entropy=None if said.entropy is None else micro.batch.rows(said.entropy),
        penalty_coef=moving.penalty_coef,
        whole_ratio=algorithm.whole_ratio,
    )
    loss = algorithm.reduce(algorithm.surrogate(learned, settings), learned.mask, totals, settings)
    metrics = learning_metrics(learned, sampler, settings)
    if moving.kl_coef > 0 and settings.kl_form != "reward" and not algorithm.reference:
        loss = loss + moving.kl_coef * kl_loss(learned, algorithm, totals, settings)
    if learned.entropy is not None:
        loss = loss - settings.entropy_coef * reduce.token_mean(learned.entropy, learned.mask, max(totals.tokens, 1))
    return loss, metrics


def importance(log_ratios: Tensor, settings: PolicySettings) -> Tensor:
    """The weight of each token for the sampler's difference from the trainer."""
    if settings.importance == "none":
        return torch.ones_like(log_ratios)
    weigh = {"truncated": policy_gradient.truncated_weights, "masked": policy_gradient.masked_weights}
    return weigh[settings.importance](log_ratios.exp(), cap=settings.importance_cap)


def critic_loss(
    x: Experience, micro: Micro, totals: Totals, settings: PolicySettings, players: Players
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same of the critic's regression on the returns, a mean over tokens."""
    assert x.returns is not None
    assert x.values is not None
    before, _ = players.values(micro.batch)
    values, (old, returns, mask) = (
        micro.batch.rows(before),
        (tensor[micro.rows, : micro.batch.longest] for tensor in (x.values, x.returns, x.learned)),
    )
    if settings.value_clip is None:
        losses = value.value_loss(values, returns)
    else:
        losses = value.clipped_value_loss(values, old, returns, clip=settings.value_clip)
    return reduce.token_mean(losses, mask, max(totals.tokens, 1)), {"loss/value_avg": losses[mask]}


# --- between rollouts


def adapt(settings: PolicySettings, moving: Moving, metrics: Mapping[str, float]) -> None:
    """The controllers' turn, after the last step that was made on a rollout: ``metrics`` are of that step. What is not
    a finite number there moves nothing."""
    known = {name: value for name, value in metrics.items() if math.isfinite(value)}
    if settings.kl_target is not None and "objective/kl" in known:
        moving.kl_coef = policy_gradient.adapt_kl_leash(moving.kl_coef, known["objective/kl"], settings.kl_target)
    if settings.penalty_target is not None and "approx_kl" in known:
        moving.penalty_coef = policy_gradient.adapt_kl_penalty(
            moving.penalty_coef, known["approx_kl"], settings.penalty_target
        )


def end_rollout(number: int, settings: PolicySettings, players: Players) -> None:
    """The engine samples from the new policy, which becomes the reference too where it is time."""
    players.take_policy_to_engine()
    if settings.reference_every and (number + 1) % settings.reference_every == 0:
        players.take_policy_to_reference()


def critic_stepper(players: Players, settings: PolicySettings, num_steps: int) -> Stepper | None:
    """What updates the critic: the policy's optimiser and schedule, with a learning rate of its own."""
    if players.critic is None:
        return None
    rate = settings.critic_learning_rate or settings.learning_rate
    return Stepper(players.critic, replace(settings, learning_rate=rate), num_steps)

"""Our side: the same steps with ``trueup``'s own loops, on the pairs that are given as ids, and online on prompts."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import protocol
import torch

from trueup.cli.memory import keep_freed_memory
from trueup.models.scorer import prepare_scorer
from trueup.recipes import policy_defaults, recipe_named
from trueup.records import Completion, CompletionGroup, StopReason
from trueup.runs.folder import RunFolder, read_metrics
from trueup.trainers.experience import new_experience, said_by
from trueup.trainers.players import load_players
from trueup.trainers.policy import learn, train_policy
from trueup.trainers.policy_inputs import PolicyInputs
from trueup.trainers.policy_settings import PolicySettings
from trueup.trainers.preference import train_preference
from trueup.trainers.reward import train_reward
from trueup.trainers.rollouts import Moving
from trueup.trainers.settings import PreferenceSettings, RewardSettings, SFTSettings
from trueup.trainers.sft import train_sft
from trueup.trainers.stepping import Stepper
from trueup.trainers.trained_model import load_trained


def groups(objective: str, pairs: list[protocol.Pair]) -> list[CompletionGroup]:
    """The pairs as groups: chosen and rejected, for SFT the chosen alone."""

    def group(pair: protocol.Pair) -> CompletionGroup:
        sides = (pair.chosen,) if objective == "sft" else (pair.chosen, pair.rejected)
        return CompletionGroup(
            prompt=np.asarray(pair.prompt, dtype=np.int64),
            completions=tuple(Completion(tokens=np.asarray(side, dtype=np.int64)) for side in sides),
        )

    return [group(pair) for pair in pairs]


def common_settings(args: argparse.Namespace, output: Path) -> dict[str, Any]:
    """The same recipe for all objectives."""
    settings = {
        "output": str(output),
        "max_steps": args.num_steps,
        "dtype": args.precision,
        "device": args.device,
        "optimizer": "adamw",
        "learning_rate": protocol.LEARNING_RATE,
        "lr_schedule": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": protocol.MAX_GRAD_NORM,
        "num_samples": 0,
        "quiet": True,
    }
    return settings | ({} if args.tokens_per_batch is None else {"tokens_per_batch": args.tokens_per_batch})


def train(args: argparse.Namespace, output: Path) -> None:
    """On the pairs. Streaming takes them in the order of the file, as the peer does."""
    common = common_settings(args, output) | {"streaming": True, "batch_size": args.batch_size}
    data = groups(args.objective, protocol.read_pairs(args.work)[: args.num_steps * args.batch_size])
    if args.objective == "dpo":
        reference = str(args.work.reference)
        settings = PreferenceSettings(
            model=str(args.work.policy), reference=reference, beta=protocol.DPO_BETA, **common
        )
        train_preference(settings, data=data)
    elif args.objective == "sft":
        train_sft(SFTSettings(model=str(args.work.policy), **common), data=data)
    else:
        train_reward(RewardSettings(model=str(args.work.reward_model), **common), data=data)


class Stamped:
    """The reward of the online cases, and when it was called: once in every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        self.times.append(time.perf_counter())
        return protocol.score(completion_ids)


def online_settings(args: argparse.Namespace, output: Path, **changes: Any) -> PolicySettings:
    case = protocol.CASES[args.case]
    given = common_settings(args, output) | {
        "model": str(args.work.policy),
        "batch_size": case.num_prompts,
        "group_size": case.group_size,
        "max_new_tokens": case.new_tokens,
        "kl_coef": args.kl_coef,
        "rollout_compile": args.compile,
    }
    return PolicySettings(**(policy_defaults("grpo") | given | changes))


def train_online(args: argparse.Namespace, output: Path) -> None:
    """GRPO; one line for every step.

    A step runs from one call of the reward to the next: all that belongs to a step lies between them, learning from one
    rollout, handing the weights to the engine and sampling the next, whatever the loop's own clocks leave out. The run
    makes a step more than it reports, in which the last of these ends.
    """
    PolicyInputs.stop_tokens = ()  # pyright: ignore[reportAttributeAccessIssue]
    reward, prompts = Stamped(), protocol.CASES[args.case].prompts()
    train_policy(
        online_settings(args, output, max_steps=args.num_steps + 1),
        recipe_named("grpo").algorithm(),
        data=[{"prompt": protocol.as_text(prompt)} for prompt in prompts],
        reward=reward,
    )
    lines = list(read_metrics(RunFolder(output).metrics))
    for number, (line, next_line) in enumerate(pairwise(lines)):
        if line["frac_reward_zero_std"]:
            raise SystemExit(protocol.NO_SIGNAL)
        seconds = reward.times[number + 1] - reward.times[number]
        sample, scoring = next_line["sample_seconds"], next_line["score_seconds"] + next_line["prepare_seconds"]
        emit_step(line, seconds, parts={"sample": sample, "score": scoring, "learn": seconds - sample - scoring})


def replay(args: argparse.Namespace, output: Path) -> None:
    """Learn from the peer's completions and scores: advantages, losses and gradients by the loop's own functions.

    The reference is another model than the policy, as equal ones would leave nothing to see of the KL.
    """
    settings, algorithm = online_settings(args, output), recipe_named("grpo").algorithm()
    policy, tokenizer = load_trained(settings, None, None)
    players = load_players(settings, algorithm, policy, tokenizer, reward=protocol.score)
    if players.reference is not None:
        model, _ = load_trained(replace(settings, model=str(args.work.reference)), None, None)
        players = replace(players, reference=prepare_scorer(model).requires_grad_(False))
    stepper, moving = Stepper(players.scorer, settings, args.num_steps), Moving(kl_coef=args.kl_coef, penalty_coef=0.0)
    for number, step in enumerate(protocol.read_steps(args.steps_file)):
        began = time.perf_counter()
        found = [
            CompletionGroup(
                prompt=np.asarray(prompt),
                completions=tuple(
                    Completion(tokens=np.asarray(tokens), stop_reason=StopReason.LENGTH) for tokens in completions
                ),
            )
            for prompt, completions in zip(step.prompts, step.completions, strict=True)
        ]
        x = new_experience(found, torch.tensor(step.scores), mask_truncated=False, device=players.device)
        if players.reference is not None:
            x = replace(x, ref_logprobs=said_by(players.ref_logprobs, x, range(len(found)), settings.tokens_per_batch))
        x = replace(x, advantages=algorithm.advantages(x, settings))
        tally = learn(x, range(len(found)), settings, algorithm, players, moving)
        grad_norm, _ = stepper.step(number)
        emit_step({"step": number + 1, "loss": tally.loss, "grad_norm": grad_norm}, time.perf_counter() - began)


def wait_in_steps(device: str) -> None:
    """Let the loops' clocks stop when the GPU is done with a step: they read the gradient norm, not the update."""
    update = Stepper.step

    def step(self: Stepper, number: int) -> tuple[float, float]:
        found = update(self, number)
        protocol.wait_for(device)
        return found

    Stepper.step = step


def emit_step(line: Mapping[str, Any], seconds: float, **more: Any) -> None:
    with contextlib.redirect_stdout(sys.__stdout__):
        protocol.emit(step=line["step"] - 1, loss=line["loss"], grad_norm=line["grad_norm"], seconds=seconds, **more)


def main() -> None:
    parser = protocol.side_parser("trueup's side of the step benchmark.")
    parser.add_argument("--tokens-per-batch", type=int, help="by default that of the settings")
    parser.add_argument("--compile", action="store_true", help="GRPO only: the sampler's attention")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the command line does
    wait_in_steps(args.device)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        imported_mib = protocol.used_mib(args.device)
        with contextlib.redirect_stdout(sys.stderr):
            if args.objective != "grpo":
                train(args, output)
                for line in read_metrics(RunFolder(output).metrics):
                    emit_step(line, line["step_seconds"])
            elif args.steps_file:
                replay(args, output)
            else:
                train_online(args, output)
    protocol.emit(imported_mib=imported_mib, peak_mib=protocol.peak_mib(args.device))


if __name__ == "__main__":
    main()

"""One side of the rollout benchmark: completions of the same prompts by ``trueup``, ``transformers`` or vLLM.

Each engine is imported where it is asked for: every side runs in an environment of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before anything imports them: no progress bars on the output, no calls to a hub, no telemetry.
os.environ.update(
    TQDM_DISABLE="1", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1"
)

import protocol

Completions = list[list[list[int]]]
"""By prompt, by completion."""
Sample = Callable[[Sequence[Sequence[int]], int], Completions]
"""(prompts, seed) → completions at temperature 1."""
Greedy = Callable[[Sequence[Sequence[int]]], tuple[list[list[int]], list[list[float]]]]
"""Prompts → the most likely tokens, and the log-prob of each."""


def ours(args: argparse.Namespace, case: protocol.Case) -> tuple[Sample, Greedy]:
    import numpy as np
    import torch

    from trueup.cli.memory import keep_freed_memory
    from trueup.models.load import load_model
    from trueup.rollout.settings import SamplingParams
    from trueup.rollout.torch_engine import TorchEngine

    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the command line does
    model = load_model(str(args.work.policy), dtype=args.precision, device=args.device).model
    engine = TorchEngine(model, dtype=args.precision, compiled=args.compile)

    def generate(prompts: Sequence[Sequence[int]], **how: Any) -> list[Any]:
        sampling = SamplingParams(max_new_tokens=case.new_tokens, **how)
        return engine.generate([np.asarray(prompt) for prompt in prompts], sampling)

    def sample(prompts: Sequence[Sequence[int]], seed: int) -> Completions:
        groups = generate(prompts, num_completions=case.group_size, seed=seed)
        return [[completion.tokens.tolist() for completion in group.completions] for group in groups]

    def greedy(prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[float]]]:
        found = [group.completions[0] for group in generate(prompts, temperature=0.0)]
        return [each.tokens.tolist() for each in found], [each.untempered_logprobs.tolist() for each in found]

    return sample, greedy


def transformers(args: argparse.Namespace, case: protocol.Case) -> tuple[Sample, Greedy]:
    """``generate`` on left-padded rows, ``--micro-batch`` of them at a time, a prompt's completions together."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(
        args.work.policy, dtype=getattr(torch, args.precision), attn_implementation=args.attention
    ).eval()
    model.to(args.device)
    model.generation_config.eos_token_id = None

    def generate(prompts: Sequence[Sequence[int]], **how: Any) -> Any:
        longest = max(map(len, prompts))
        rows = [[case.padding_token] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return model.generate(
            input_ids=torch.tensor(rows, device=args.device),
            attention_mask=torch.tensor(mask, device=args.device),
            max_new_tokens=case.new_tokens,
            pad_token_id=case.padding_token,
            cache_implementation=args.cache,
            disable_compile=not args.compile,
            return_dict_in_generate=True,
            **how,
        ), longest

    def sample(prompts: Sequence[Sequence[int]], seed: int) -> Completions:
        torch.manual_seed(seed)
        at_once = max(1, args.micro_batch // case.group_size)
        found: Completions = []
        for start in range(0, len(prompts), at_once):
            some = prompts[start : start + at_once]
            output, longest = generate(
                some, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, num_return_sequences=case.group_size
            )
            found += output.sequences[:, longest:].view(len(some), case.group_size, -1).tolist()
        return found

    def greedy(prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[float]]]:
        output, longest = generate(prompts, do_sample=False, output_logits=True)
        tokens = output.sequences[:, longest:]
        logprobs = torch.stack(output.logits, 1).float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return tokens.tolist(), logprobs.tolist()

    return sample, greedy


def vllm(args: argparse.Namespace, case: protocol.Case) -> tuple[Sample, Greedy]:
    """vLLM on ids, without tokenizer and text; prefix caching on. Its other variables: ``side_environment``.

    In one process, unless it is told otherwise: an engine and a worker in processes of their own wait for each other in
    loops that take the cores from the work.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(args.several_processes))
    if not args.own_threads:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(args.work.policy),
        skip_tokenizer_init=True,
        dtype=args.precision,
        enable_prefix_caching=True,
        **({"block_size": args.block_size} if args.block_size else {}),
        max_model_len=case.longest + case.new_tokens,
        max_num_seqs=case.num_completions,
        enforce_eager=args.eager,
        disable_log_stats=True,
    )

    def generate(prompts: Sequence[Sequence[int]], **how: Any) -> list[Any]:
        sampling = SamplingParams(max_tokens=case.new_tokens, ignore_eos=True, detokenize=False, **how)
        return engine.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling, use_tqdm=False)

    def sample(prompts: Sequence[Sequence[int]], seed: int) -> Completions:
        del seed  # a seed per request would take a slower path; the engine's own stream goes on from call to call
        logprobs = 0 if args.logprobs else None
        outputs = generate(prompts, n=case.group_size, temperature=1.0, top_p=1.0, top_k=0, logprobs=logprobs)
        return [[list(completion.token_ids) for completion in output.outputs] for output in outputs]

    def greedy(prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[float]]]:
        found = [output.outputs[0] for output in generate(prompts, temperature=0.0, logprobs=0)]
        return [list(each.token_ids) for each in found], [
            [said[token].logprob for token, said in zip(each.token_ids, each.logprobs, strict=True)] for each in found
        ]

    return sample, greedy


def surprise(args: argparse.Namespace, case: protocol.Case) -> None:
    """Print how far the completions in ``--sampled`` are from samples of the model.

    Of a token x that was sampled from p, log p(x) + H(p) has mean 0. Printed are the mean over all tokens and its
    standard error, with p from the plain forward pass in float32.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.work.policy, dtype=torch.float32).eval()
    model.to(args.device)
    sampled = protocol.read_steps(args.sampled)[0]
    values = []
    with torch.no_grad():
        for prompt, completions in zip(sampled.prompts, sampled.completions, strict=True):
            if len(completions) != case.group_size or any(len(each) != case.new_tokens for each in completions):
                raise SystemExit(f"not {case.group_size} completions of {case.new_tokens} tokens each")
            rows = torch.tensor([prompt + completion for completion in completions], device=args.device)
            logprobs = model(rows, logits_to_keep=case.new_tokens + 1).logits[:, :-1].log_softmax(-1)
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            values.append(logprobs.gather(-1, rows[:, len(prompt) :, None]).squeeze(-1) + entropy)
    flat = torch.cat([each.flatten() for each in values]).double()
    protocol.emit(mean=flat.mean().item(), standard_error=(flat.std() / len(flat) ** 0.5).item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("ours", "transformers", "vllm", "surprise"))
    parser.add_argument("--work", type=lambda text: protocol.Work(folder=Path(text)), required=True)
    parser.add_argument("--case", choices=tuple(protocol.CASES), required=True)
    parser.add_argument("--repetitions", type=int, default=4, help="rollouts; the first is to warm up")
    parser.add_argument("--precision", choices=protocol.PRECISIONS, default="bfloat16")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", choices=protocol.DEVICES, default="cpu")
    parser.add_argument("--greedy", type=Path, help="write the greedy completions here, and time nothing")
    parser.add_argument("--sampled", type=Path, help="write the last rollout here (of surprise: read it)")
    parser.add_argument("--micro-batch", type=int, default=64, help="transformers: rows at a time")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="transformers")
    parser.add_argument("--cache", choices=("static",), help="transformers; by default it grows")
    parser.add_argument("--compile", action="store_true", help="ours: attention; transformers: with a static cache")
    parser.add_argument("--block-size", type=int, help="vllm: tokens of a block of its cache, in place of its default")
    parser.add_argument("--several-processes", action="store_true", help="vllm: as by default, in place of one")
    parser.add_argument("--own-threads", action="store_true", help="vllm: as by default, its own choice of cores")
    parser.add_argument("--eager", action="store_true", help="vllm: without torch.compile")
    parser.add_argument("--logprobs", action="store_true", help="vllm: with the log-prob of each token, as ours always")
    args = parser.parse_args()
    case = protocol.CASES[args.case]
    if args.side == "surprise":
        surprise(args, case)
        return
    with contextlib.redirect_stdout(sys.stderr):
        sample, greedy = {"ours": ours, "transformers": transformers, "vllm": vllm}[args.side](args, case)
        if args.greedy:
            tokens, logprobs = greedy(case.prompts())
            args.greedy.write_text(json.dumps({"tokens": tokens, "logprobs": logprobs}), encoding="utf-8")
            return
        imported_mib, seconds = protocol.used_mib(args.device), []
        prompts, completions = [], []
        for number in range(args.repetitions):
            prompts = case.prompts(number)
            began = time.perf_counter()
            completions = sample(prompts, number)
            seconds.append(time.perf_counter() - began)
        if args.sampled:
            protocol.add_step(args.sampled, protocol.OnlineStep(prompts=prompts, completions=completions, scores=[]))
    for each in seconds:
        protocol.emit(tokens=case.num_tokens, seconds=each)
    # vLLM takes the share of a GPU that it is told to.
    comparable = args.side != "vllm" or args.device == "cpu"
    peak_mib = protocol.peak_mib(args.device) if comparable else math.nan
    protocol.emit(imported_mib=imported_mib, peak_mib=peak_mib)


if __name__ == "__main__":
    main()

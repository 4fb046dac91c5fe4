"""The pure parts of the step benchmark: what counts as the same, how rounds become a row, how the peer is tuned."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """``benchmarks/run.py``: a script beside its modules, not a package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("run")


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


@pytest.mark.parametrize(("peer_loss", "agrees"), [(2.000001, True), (2.1, False)])
def test_sides_that_compute_different_losses_get_no_row(bench, tmp_path, peer_loss, agrees):
    class Canned(bench.Bench):
        def ours(self, objective, allocator, options=()):
            return make_run(bench, (2.0, 1.0, 1.0), (2.0, 1.0, 1.0))

        def peer(self, objective, allocator, options, num_steps=None):
            return make_run(bench, (2.0, 1.0, 5.0), (peer_loss, 1.0, 5.0))

    canned = Canned(
        work=bench.protocol.Work(folder=tmp_path),
        num_steps=2,
        batch_size=4,
        precision="float32",
        threads=1,
        our_python=tmp_path,
        peer_python=tmp_path,
        our_options=(),
    )
    if agrees:
        result = canned.result("dpo", "default", 2, ("--micro-batch", "1"))
        assert result.agreement.loss == pytest.approx(5e-7, rel=1e-3)
        assert result.comparison.ratio.median == 5.0
    else:
        with pytest.raises(bench.Disagreement, match=r"step 1: loss 2, 2\.1; gradient norm 1, 1"):
            canned.result("dpo", "default", 2, ("--micro-batch", "1"))

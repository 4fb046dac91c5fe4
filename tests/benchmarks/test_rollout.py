"""The pure parts of the rollout benchmark: who writes what the model says, what is tried, how rounds become rows."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CASE = "short-512"


def make_bench(rollout: ModuleType, made: type, folder: Path, **changes: Any):
    fields = {
        "work": rollout.protocol.Work(folder=folder),
        "precision": "bfloat16",
        "threads": 1,
        "device": "cpu",
        "repetitions": 1,
        "pythons": {rollout.OURS: Path(sys.executable), "vllm": folder / "python"},
    }
    return made(**(fields | changes))


def test_a_rollout_counts_after_the_warm_up_by_all_of_its_tokens(rollout):
    lines = [{"tokens": 10, "seconds": 99.0}, {"tokens": 10, "seconds": 1.0}, {"tokens": 10, "seconds": 3.0}]
    found = rollout.parse_rollouts([*lines, {"imported_mib": 1.0, "peak_mib": 2.0}])
    assert (found.tokens_per_second, found.imported_mib, found.peak_mib) == (5.0, 1.0, 2.0)


def test_rows_are_compared_up_to_the_first_token_that_differs(rollout):
    ours = [rollout.Writing([1, 2, 3], [-1.0, -1.0, -1.0]), rollout.Writing([4, 5], [-1.0, -1.0])]
    tie = [rollout.Writing([1, 9, 3], [-1.0, -1.25, -7.0]), rollout.Writing([4, 5], [-1.0, -1.125])]
    assert rollout.written_apart(ours, ours) == 0.0
    assert rollout.written_apart(ours, tie) == 0.25
    assert math.isnan(rollout.written_apart(ours, [rollout.Writing([1, 2, 3], [math.nan] * 3), ours[1]]))
    with pytest.raises(ValueError, match="shorter"):
        rollout.written_apart(ours, ours[:1])


@pytest.mark.parametrize(
    ("logprob", "mean", "astray"),
    [(-1.0005, 0.01, False), (-1.1, 0.0, True), (-1.0, 0.06, True), (-1.0, -0.06, True), (-1.0, math.nan, True)],
)
def test_a_side_that_does_not_write_what_the_model_says_is_not_timed(rollout, tmp_path, logprob, mean, astray):
    class Canned(rollout.Bench):
        def call(self, side, case, allocator, options):
            if side == "surprise":
                return [{"mean": mean, "standard_error": 0.01}]
            if "--greedy" in options:
                said = -1.0 if side == rollout.OURS else logprob
                folder = self.work.of_case(case).folder
                folder.mkdir(exist_ok=True)
                (folder / "greedy.json").write_text(json.dumps({"tokens": [[3]], "logprobs": [[said]]}))
            return [
                {"tokens": 1, "seconds": 1.0},
                {"tokens": 1, "seconds": 1.0},
                {"imported_mib": 0.0, "peak_mib": 0.0},
            ]

    canned = make_bench(rollout, Canned, tmp_path)
    if astray:
        with pytest.raises(rollout.Astray):
            canned.check(CASE, {rollout.OURS: (), "vllm": ()})
    else:
        found = canned.check(CASE, {rollout.OURS: (), "vllm": ()})
        assert found["vllm"]["greedy_logprobs_apart"] == pytest.approx(5e-4)


class Speeds:
    """A ``measure`` that answers with the tokens per second of (side, options)."""

    def __init__(self, rollout: ModuleType, speeds: Mapping[tuple[str, ...], float | None]) -> None:
        self.rollout, self.speeds = rollout, speeds

    def __call__(self, side: str, case: str, allocator: str, options: tuple[str, ...]) -> Any:
        speed = self.speeds.get((side, *options), 1.0)
        if speed is None:
            raise self.rollout.SideFailed("no kernel")
        return self.rollout.Rollouts(tokens_per_second=speed, imported_mib=0.0, peak_mib=speed)


def test_the_fastest_configuration_is_measured_in_turn_with_ours(rollout, tmp_path):
    several = ("--block-size", "32", "--several-processes")
    speeds = {(rollout.OURS,): 30.0, ("vllm", *several): 10.0, ("vllm", "--block-size", "64"): None}

    class Canned(rollout.Bench):
        measure = Speeds(rollout, speeds)

    ours, vllm = make_bench(rollout, Canned, tmp_path).rows(CASE, "keep", 2, {rollout.OURS: ()})
    assert vllm.options == several
    assert vllm.trials["--block-size 64"] is None
    assert set(vllm.trials) == {" ".join(each) for each in rollout.CANDIDATES["cpu"]["vllm"]}
    assert (ours.tokens_per_second.median, vllm.ratio.median, vllm.peak_mib) == (30.0, 3.0, 10.0)


def test_the_table_has_a_row_for_every_side_and_no_memory_that_was_not_measured(rollout):
    row = {
        "case": CASE,
        "allocator": "keep",
        "tokens_per_second": rollout.Spread.of([1234.0]),
        "ratio": rollout.Spread.of([2.5]),
        "trials": {},
    }
    rows = [
        rollout.Row(side=rollout.OURS, options=(), peak_mib=1500.0, **row),
        rollout.Row(side="vllm", options=("--several-processes",), peak_mib=math.nan, **row),
    ]
    header, rule, *lines = rollout.markdown_table(rows).splitlines()
    assert {line.count("|") for line in (header, rule, *lines)} == {8}
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == [CASE, "keep", "trueup", "1,234 (1,234–1,234)", "", "1,500", ""]
    assert cells[1][4:] == ["2.50 (2.50–2.50)", "", "`--several-processes`"]


def test_a_peer_that_cannot_be_installed_is_left_out_and_named(rollout, monkeypatch, capsys):
    def fails(device: str) -> Path:
        raise subprocess.CalledProcessError(1, "pip install vllm")

    monkeypatch.setattr(rollout, "vllm_python", fails)
    monkeypatch.setattr(rollout.run, "peer_python", lambda device: Path(device))
    found = rollout.pythons(["transformers", "vllm"], "cuda")
    assert list(found) == [rollout.OURS, "transformers"]
    assert "vllm can't be installed" in capsys.readouterr().err


def test_vllm_is_given_no_malloc_settings_but_what_its_manual_preloads(rollout, tmp_path):
    python = tmp_path / "bin" / "python"
    keep = rollout.side_environment("vllm", python, 2, "keep")
    assert not [name for name in keep if name.startswith("MALLOC_")]
    assert str(tmp_path / "lib" / "libiomp5.so") in keep["LD_PRELOAD"].split(":")
    assert "VLLM_CPU_KVCACHE_SPACE" in keep
    assert rollout.side_environment("transformers", python, 2, "keep") == rollout.environment(2, "keep")


@pytest.mark.slow
def test_our_rollouts_of_another_size_are_samples_of_the_model(rollout, bench, tmp_path, monkeypatch):
    """Prepare, sample, and hold the samples against the model: on the CPU, as it would on a GPU."""
    monkeypatch.setattr(bench, "our_python", lambda: Path(sys.executable))
    args = rollout.parse_arguments(["--cases", CASE, "--model-size", "tiny", "--device", "cpu"])
    alone = make_bench(rollout, rollout.Bench, tmp_path, pythons={rollout.OURS: Path(sys.executable)})
    bench.prepare_cases(args, alone.work)
    found = alone.check(CASE, {rollout.OURS: ()})
    assert 0 < found[rollout.OURS]["standard_error"] < 0.1
    (row,) = alone.rows(CASE, "default", 1, {rollout.OURS: ()})
    assert row.tokens_per_second.median > 0

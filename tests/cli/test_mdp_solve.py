"""``trueup mdp solve``: what it prints and writes of processes with known answers; mistakes."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from trueup.cli.main import main
from trueup.mdp import exact
from trueup.mdp.files import save_mdp
from trueup.mdp.generators import CLIFF, garnet, grid_world


def test_the_chain_of_easy_rl(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mdp", "solve", "--process", "chain", "--policy", "uniform"]) == 0
    printed = capsys.readouterr().out
    for value in ("7.6588", "1.8057", "0.4670", "0.2959", "0.8647", "3.5950", "15.3129"):
        assert value in printed
    assert "7 states, 1 actions, 19 transitions, gamma 0.5" in printed
    assert "action" not in printed.split("\n\n", 1)[1]


@pytest.mark.parametrize("method", ["modified", "value", "policy", "linear"])
def test_a_map(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["mdp", "solve", "--process", "cliff", "--gamma", "0.9", "--method", method, "--columns", "12"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[-1] == "→→→→→→→→→→→↓"
    assert lines[-1].split()[-1] == "↑···········"
    assert lines[-2].split()[11] == "-1.00"
    assert any("the policy loses at most" in line for line in lines)


def test_a_file_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mdp = garnet(0, num_states=30, num_actions=2, num_successors=3, gamma=0.9)
    file, table = save_mdp(mdp, tmp_path / "process.npz"), tmp_path / "new" / "solved.csv"
    assert main(["mdp", "solve", "--process", str(file), "--rows", "5", "--output", str(table)]) == 0
    printed = capsys.readouterr().out
    assert "… and 25 more states" in printed
    rows = list(csv.DictReader(table.open()))
    policy = np.array([int(row["action"]) for row in rows])
    np.testing.assert_allclose([float(row["value"]) for row in rows], exact.values(mdp, policy), atol=1e-5)
    q = np.array([[float(row["q_0"]), float(row["q_1"])] for row in rows])
    np.testing.assert_array_equal(q.argmax(-1), policy)


def test_without_a_discount(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mdp", "solve", "--process", "cliff"]) == 0
    printed = capsys.readouterr().out
    assert "no bound without a discount" in printed
    assert "expected return from the start: -13" in printed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--process", "cliff", "--symbols", "abcd"], "has no effect without --columns"),
        (["--process", "cliff", "--columns", "12", "--symbols", "ab"], "2 symbols for 4 actions"),
        (["--process", "chain", "--columns", "12"], "12 columns for 7 states"),
        (["--process", "chain", "--policy", "uniform", "--method", "value"], "has no effect without --policy optimal"),
    ],
)
def test_mistakes(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mdp", "solve", *given]) == 2
    assert message in capsys.readouterr().err


def test_where_nothing_leads_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save_mdp(grid_world(CLIFF, gamma=1.0), tmp_path / "cliff.json")
    assert main(["mdp", "solve", "--process", str(file), "--method", "policy", "--columns", "12"]) == 0
    assert "↑···········" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "size", "value"),
    [
        ("FrozenLake-v1", "17 states, 4 actions", "0.542026"),
        ("Taxi-v4", "501 states, 6 actions", "6.32746"),
        ("CliffWalking-v1", "49 states, 4 actions", "-12.2479"),  # 13 steps of -1: -(1 - 0.99**13) / 0.01
    ],
)
def test_gymnasium(name: str, size: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mdp", "solve", "--process", f"gymnasium:{name}"]) == 0
    printed = capsys.readouterr().out
    assert f"gymnasium:{name}: {size}" in printed
    assert "gamma 0.99" in printed
    assert f"expected return from the start: {value}\n" in printed


def test_holes_and_the_goal_are_no_places_to_act_in(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--process", "gymnasium:FrozenLake-v1", "--columns", "4", "--symbols", "←↓→↑"]
    assert main(["mdp", "solve", *command]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[-4:]] == ["←↑↑↑", "←·←·", "↑↓←·", "·→↓·"]


@pytest.mark.parametrize(
    ("given", "drawn"),
    [
        (["--columns", "12"], ["column", "row", "value V(s)", "start", "the end, or a wall", "−10.25"]),
        ([], ["state", "value V(s)", "action 1"]),
        (["--policy", "uniform"], ["cliff, γ = 0.95: values of acting at random"]),
    ],
)
def test_pictures(given: list[str], drawn: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cliff.svg"
    command = ["--process", "cliff", "--gamma", "0.95", *given, "--figure", str(file)]
    assert main(["mdp", "solve", *command]) == 0
    assert f"picture: {file}" in capsys.readouterr().out
    text = file.read_text(encoding="utf-8")
    for each in drawn:
        assert f"<!-- {each} -->" in text

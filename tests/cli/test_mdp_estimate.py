"""``trueup mdp estimate``: what it prints is true within its own standard errors; pictures; mistakes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from trueup.cli.main import main
from trueup.cli.mdp_estimate import EstimateSettings, policy_of
from trueup.errors import SettingsError
from trueup.mdp import exact
from trueup.mdp.files import save_mdp
from trueup.mdp.generators import random_mdp

STANDARD_ERRORS = 4.5
OF_STATES = ["monte-carlo-first", "monte-carlo-every", "td", "n-step", "td-lambda"]
OFF_POLICY = ["ordinary", "weighted", "per-decision", "doubly-robust"]
NUMBER = r"(-?[\d.]+(?:e-?\d+)?)"


def printed(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["mdp", "estimate", *command]) == 0
    return capsys.readouterr().out


@pytest.fixture
def branching(tmp_path: Path) -> str:
    mdp = random_mdp(6, num_states=5, num_actions=2, gamma=0.9, episodic=True)
    return str(save_mdp(mdp, tmp_path / "branching.npz"))


@pytest.mark.parametrize("policy", ["uniform", "optimal", "epsilon-greedy"])
def test_values_of_states(policy: str, branching: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = printed(["--process", branching, "--policy", policy, "--method", *OF_STATES, "--quiet"], capsys)
    mdp = random_mdp(6, num_states=5, num_actions=2, gamma=0.9, episodic=True)
    truth = exact.values(mdp, policy_of(mdp, policy, 0.1))
    assert f"expected return from the start {mdp.start @ truth:.6g}, exactly" in told
    rows = re.findall(rf"^  (\d) +{NUMBER} +" + " +".join([rf"{NUMBER} ± {NUMBER}"] * 5), told, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [0, 1, 2, 3]
    shown = np.array(rows, dtype=float)
    np.testing.assert_allclose(shown[:, 1], truth[:4], atol=5e-5)
    estimates, errors = shown[:, 2::2], shown[:, 3::2]
    # TD takes a while to forget that it began at 0.
    assert (np.abs(estimates - truth[:4, None]) <= STANDARD_ERRORS * errors + 0.03).all()
    unbiased = slice(0, 1)
    assert (np.abs(estimates - truth[:4, None]) <= STANDARD_ERRORS * errors + 1e-4)[:, unbiased].all()


def test_distances_and_steps(capsys: pytest.CaptureFixture[str]) -> None:
    told = printed(["--process", "random-walk", "--method", *OF_STATES, "--rows", "0", "--num-steps", "4000"], capsys)
    assert "distance to the exact values of 5 states" in told
    rows = {
        method: re.search(rf"^  {method} +([\d,]+) +([\d,]*) +{NUMBER} ± {NUMBER} +{NUMBER} +{NUMBER}", told, re.M)
        for method in OF_STATES
    }
    for method, row in rows.items():
        assert row is not None, method
        steps, episodes = (text.replace(",", "") for text in row.groups()[:2])
        one_run, _, of_mean, error = map(float, row.groups()[2:])
        assert 3600 < int(steps) < 4400
        assert (400 < int(episodes) < 520) if method.startswith("monte") else episodes == ""
        assert error < 0.01
        assert of_mean < one_run < 0.06
        # on the way, and at its end
        assert f"{method}: 50% · distance " in told
        assert re.search(rf"^{method} step 4000/4000 · distance {NUMBER} · ", told, re.M)
    assert " 0.1667" not in told  # no list of states


@pytest.mark.parametrize("policy", ["optimal", "epsilon-greedy"])
def test_returns_from_another_policy_s_episodes(
    policy: str, branching: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = printed(["--process", branching, "--policy", policy, "--method", *OFF_POLICY, "--quiet"], capsys)
    mdp = random_mdp(6, num_states=5, num_actions=2, gamma=0.9, episodic=True)
    truth = exact.expected_return(mdp, policy_of(mdp, policy, 0.1))
    assert f"{truth:.5g}" in told
    assert "from episodes of the uniform policy" in told
    for method in OFF_POLICY:
        row = re.search(rf"^  {method} +[\d,]+ +([\d,]+) +{NUMBER} ± {NUMBER} +{NUMBER} +{NUMBER}", told, re.M)
        assert row is not None, method
        estimate, error, distance, effective = map(float, row.groups()[1:])
        assert abs(estimate - truth) <= STANDARD_ERRORS * error
        assert 0 < error < 0.05
        assert 0 < distance < 0.2
        assert 0 < effective < float(row[1].replace(",", ""))


def test_an_endless_process(capsys: pytest.CaptureFixture[str]) -> None:
    told = printed(
        ["--process", "chain", "--method", "td", "doubly-robust", "--horizon", "40", "--num-steps", "4000", "--quiet"],
        capsys,
    )
    row = re.search(rf"doubly-robust +4,000 +100 +{NUMBER} ± {NUMBER}", told)
    assert row is not None
    assert abs(float(row[1]) - 30 / 7) <= STANDARD_ERRORS * float(row[2])
    assert "15.3129" in told


def test_the_same_seed_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--process", "random-walk", "--num-steps", "500", "--quiet"]
    first, again = printed(command, capsys), printed(command, capsys)
    assert first == again
    assert printed([*command, "--seed", "1"], capsys) != first


def test_a_picture_of_both_kinds(branching: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "curves.svg"
    command = ["--process", branching, "--method", "td", "weighted", "--num-steps", "300", "--figure", str(file)]
    printed([*command, "--quiet"], capsys)
    drawn = file.read_text(encoding="utf-8")
    assert drawn.startswith("<?xml")
    for text in ("td", "weighted", "exact", "distance to the exact values (RMS)", "estimated return"):
        assert f"<!-- {text} -->" in drawn


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--num-runs", "1"], "--num-runs: is 1, but must be at least 2"),
        (["--step-size", "0"], "--step-size: is 0.0, but must be above 0"),
        (["--n", "2"], "--n: has no effect without --method n-step"),
        (["--method", "td", "--trace-decay", "0.5"], "has no effect without --method td-lambda"),
        (["--epsilon", "0.2"], "has no effect without --policy epsilon-greedy"),
        (["--behaviour", "epsilon-greedy"], "--behaviour: has no effect without --method ordinary, weighted"),
        (["--method", "ordinary", "--behaviour-epsilon", "0.2"], "has no effect without --behaviour epsilon-greedy"),
        (["--method", "td", "--horizon", "5"], "has no effect without a method that takes whole episodes"),
        (["--method", "ordinary", "--step-size-power", "0"], "has no effect without --method td, n-step, td-lambda"),
        (["--horizon", "3"], "episodes were cut off at 3 steps, and monte-carlo-first needs their ends"),
        (["--num-steps", "5"], "--num-steps: 5 are too few for monte-carlo-first: an episode takes about"),
    ],
)
def test_mistakes(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mdp", "estimate", "--process", "random-walk", *given]) == 2
    assert message in capsys.readouterr().err


def test_a_behaviour_that_never_does_what_it_is_asked_about(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--process", "cliff", "--method", "td", "ordinary", "--behaviour", "epsilon-greedy"]
    assert main(["mdp", "estimate", *command, "--behaviour-epsilon", "0"]) == 2
    told = capsys.readouterr()
    assert "let the behaviour policy explore" in told.err
    assert "td" not in told.out, "nothing is run before"


def test_no_method_and_one_that_there_is_not() -> None:
    with pytest.raises(SettingsError, match="which methods"):
        EstimateSettings(process="chain", method=())
    with pytest.raises(SettingsError, match="must be one of monte-carlo-first"):
        EstimateSettings(process="chain", method=("montecarlo",))  # pyright: ignore[reportArgumentType]

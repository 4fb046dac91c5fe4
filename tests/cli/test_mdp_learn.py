"""``trueup mdp learn``: exact returns of what was learned, what SARSA is held against, pictures, mistakes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from trueup.cli.main import main
from trueup.cli.mdp_learn import LearnSettings, interval, learner, run
from trueup.cli.mdp_process import process_of
from trueup.errors import SettingsError
from trueup.mdp import exact
from trueup.mdp.files import save_mdp
from trueup.mdp.generators import random_mdp
from trueup.mdp.planning import best_exploring, policy_iteration

METHODS = ["sarsa", "expected-sarsa", "q-learning", "double-q-learning", "reinforce", "actor-critic"]
NUMBER = r"(-?[\d.]+(?:e-?\d+)?)"


def printed(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["mdp", "learn", *command]) == 0
    return capsys.readouterr().out


def test_every_method_beside_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mdp = random_mdp(3, num_states=4, num_actions=2, gamma=0.9, episodic=True)
    file = str(save_mdp(mdp, tmp_path / "process.json"))
    told = printed(["--process", file, "--method", *METHODS, "--num-steps", "3000", "--num-runs", "6"], capsys)
    best = exact.expected_return(mdp, policy_iteration(mdp).policy)
    random = exact.expected_return(mdp, np.full((4, 2), 0.5))
    assert f"exact return from the start: {best:.6g} at best, {random:.6g} at random" in told
    for method in METHODS:
        row = re.search(
            rf"^  {method} +([\d,]+) +{NUMBER} ± {NUMBER} +(\d) of 6 runs(?: +{NUMBER} ± {NUMBER})?", told, re.M
        )
        assert row is not None, method
        assert best - 0.2 * (best - random) < float(row[2]) < best + 1e-4
        assert (row[5] is None) == (method in ("reinforce", "actor-critic"))
        assert f"{method}: 50% · return " in told
    assert re.search(rf"^  the best +{best:.5g}", told, re.M)
    assert re.search(rf"^q-learning step 3000/3000 · return {NUMBER} · distance {NUMBER} · ", told, re.M)
    assert re.search(rf"^reinforce step 500/500 · return {NUMBER} · \d", told, re.M)


def test_the_edge_and_the_way_around(capsys: pytest.CaptureFixture[str]) -> None:
    """Sutton & Barto's example 6.6: Q-learning walks along the edge, SARSA as far from it as it can."""
    told = printed(["--process", "cliff", "--num-steps", "10000", "--num-runs", "4", "--quiet"], capsys)
    assert "exact return of the first 1,000 steps from the start: -13 at best" in told
    assert "to the best such, ε = 0.05" in told
    assert re.search(r"q-learning +10,000 +-13 ± 0 +4 of 4 runs", told)
    assert re.search(r"sarsa +10,000 +-1[57][.\d]* ± [.\d]+ +0 of 4 runs", told)


@pytest.mark.parametrize("method", METHODS[:4])
def test_what_q_is_held_against(method: str) -> None:
    """SARSA's Q is that of a policy that goes on exploring; held against Q*, it would never arrive."""
    settings = LearnSettings(
        process="cliff", gamma=0.8, method=(method,), num_steps=200, num_runs=3, epsilon_last=0.3, quiet=True
    )  # pyright: ignore[reportArgumentType]
    mdp = process_of("cliff", 0.8)
    final = learner(method, mdp, settings, lambda *_: None).final
    limit = best_exploring(mdp, 0.3 if "sarsa" in method else 0.0)
    live = ~mdp.terminal
    found = run(method, mdp, settings)
    assert found.distances is not None
    np.testing.assert_allclose(found.distances[-1], np.sqrt(((final - limit)[:, live] ** 2).mean((1, 2))), rtol=1e-9)
    by_hand = [exact.expected_return(mdp, q.argmax(-1)) for q in final]
    np.testing.assert_allclose(found.returns[-1], by_hand, atol=1e-9)


def test_policies_are_worth_what_they_are_with_all_their_chance() -> None:
    settings = LearnSettings(
        process="cliff", gamma=0.8, method=("actor-critic",), num_steps=200, num_runs=3, quiet=True
    )
    mdp = process_of("cliff", 0.8)
    found = run("actor-critic", mdp, settings)
    policies = learner("actor-critic", mdp, settings, lambda *_: None).final
    assert found.distances is None
    np.testing.assert_allclose(found.returns[-1], [exact.expected_return(mdp, policy) for policy in policies])


def test_the_interval_is_student_s() -> None:
    sample = np.array([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, loc=sample.mean(), scale=stats.sem(sample))
    mean, half = interval(sample).split(" ± ")
    assert (float(mean), float(half)) == (pytest.approx(7 / 3, abs=1e-4), pytest.approx((high - low) / 2, rel=0.02))


def test_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "curves.svg"
    command = ["--process", "cliff", "--method", "actor-critic", "sarsa", "--num-steps", "200", "--num-runs", "3"]
    printed([*command, "--figure", str(file), "--quiet"], capsys)
    drawn = file.read_text(encoding="utf-8")
    for text in ("actor-critic", "sarsa", "the best policy", "exact return from the start", "distance (RMS)"):
        assert f"<!-- {text} -->" in drawn
    assert "SARSA's: to the best with ε = 0.05" in drawn
    alone = tmp_path / "alone.svg"
    printed(["--process", "cliff", "--method", "actor-critic", *command[5:], "--figure", str(alone), "--quiet"], capsys)
    assert "distance" not in alone.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--epsilon", "2"], "--epsilon: is 2.0, but must be"),
        (["--num-updates", "0"], "--num-updates: is 0, but must be at least 1"),
        (["--num-updates", "5"], "--num-updates: has no effect without --method reinforce"),
        (["--learning-rate", "1"], "--learning-rate: has no effect without --method reinforce or actor-critic"),
        (["--method", "reinforce", "--num-steps", "5"], "--num-steps: has no effect without --method sarsa"),
        (["--method", "actor-critic", "--epsilon", "0.5"], "--epsilon: has no effect without --method sarsa"),
        (["--method", "sarsa", "reinforce"], "episodes were cut off at 1,000 steps, and reinforce needs their ends"),
    ],
)
def test_mistakes(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mdp", "learn", "--process", "cliff", *given]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert "sarsa" not in told.out, "nothing is run before"


def test_nothing_to_decide(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mdp", "learn", "--process", "chain"]) == 2
    assert "chain: there is nothing to decide: one action\n  → trueup mdp estimate" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="which methods"):
        LearnSettings(process="cliff", method=())

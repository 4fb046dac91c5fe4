"""Processes survive a file, and what is no process is said by file and place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trueup.errors import DataError
from trueup.mdp import TabularMDP
from trueup.mdp.files import load_mdp, save_mdp
from trueup.mdp.generators import CLIFF, chain, garnet, grid_world, random_mdp

PROCESSES = [
    random_mdp(2, num_states=4, num_actions=2, gamma=0.9, episodic=True),
    garnet(0, num_states=30, num_actions=2, num_successors=3, gamma=0.5),
    grid_world(CLIFF, gamma=1.0),
    chain([1, 0, 2], left=0.5, right=0.2, gamma=0.1),
]


@pytest.mark.parametrize("ending", [".npz", ".json"])
@pytest.mark.parametrize("mdp", PROCESSES)
def test_there_and_back(mdp: TabularMDP, ending: str, tmp_path: Path) -> None:
    again = load_mdp(save_mdp(mdp, tmp_path / f"process{ending}"))
    for name in ("transition_array", "start", "gamma", "terminal"):
        np.testing.assert_array_equal(getattr(again, name), getattr(mdp, name))
    np.testing.assert_allclose(again.reward_array, mdp.reward_array, rtol=1e-15)
    assert load_mdp(tmp_path / f"process{ending}", gamma=0.25).gamma == 0.25


def test_plain_arrays(tmp_path: Path) -> None:
    mdp = PROCESSES[0]
    fields = {"transitions": mdp.transition_array, "rewards": mdp.expected_rewards, "terminal": mdp.terminal}
    np.savez(tmp_path / "a.npz", **fields)
    (tmp_path / "a.json").write_text(json.dumps({name: array.tolist() for name, array in fields.items()}))
    for name in ("a.npz", "a.json"):
        found = load_mdp(tmp_path / name, gamma=0.5)
        np.testing.assert_array_equal(found.transition_array, mdp.transition_array)
        np.testing.assert_allclose(found.expected_rewards, mdp.expected_rewards)
        with pytest.raises(DataError, match="there is no gamma"):
            load_mdp(tmp_path / name)


def test_outcomes_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "by_hand.json"
    step = {"state": 0, "action": 0, "next_state": 1, "probability": 1.0, "reward": 3.0}
    file.write_text(json.dumps({"gamma": 0.5, "outcomes": [step], "terminal": [False, True]}))
    mdp = load_mdp(file)
    assert mdp.transition_array.tolist() == [[[0, 1]], [[0, 0]]]
    assert mdp.expected_rewards.tolist() == [[3], [0]]
    file.write_text(json.dumps({"gamma": 0.5, "outcomes": [step | {"action": 1}], "terminal": [False, True]}))
    with pytest.raises(DataError, match=r"by_hand\.json: state 0, action 0: probabilities add up to 0"):
        load_mdp(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "can't be read as a process"),
        ("a.json", b"[]", "there is no object at the top"),
        ("a.json", b'{"gamma": 0.5, "outcomes": [{"state": 0}]}', "can't be read as a process"),
        ("a.json", b'{"gamma": 0.5, "colour": 1}', "unknown: colour"),
        ("a.json", b'{"gamma": 0.5}', "can't be read as a process"),
        ("a.json", b"\xff\xfe\x00", "can't be read as a process"),
        ("a.npz", b"not a zip", "can't be read as a process"),
        ("a.npz", b"PK\x03\x04cut", "can't be read as a process"),
        ("a.txt", b"", r"unknown ending '\.txt'"),
        ("missing.json", None, "can't be read as a process"),
    ],
)
def test_what_is_no_process(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_mdp(tmp_path / name)
    assert name in str(caught.value)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", transitions=np.array([object()], dtype=object), gamma=0.5)
    with pytest.raises(DataError, match="can't be read as a process"):
        load_mdp(tmp_path / "a.npz")


def test_another_ending_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown ending '\.txt'"):
        save_mdp(PROCESSES[0], tmp_path / "a.txt")

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from trueup.errors import CheckpointError
from trueup.runs.checkpoint import (
    check_checkpoint,
    checkpoint_step,
    latest_checkpoint,
    load_latest,
    load_state,
    prune,
    save_checkpoint,
)

STATE = {
    "step": 3,
    "lr": 1e-6,
    "name": "sft",
    "nothing": None,
    "done": False,
    "order": [1, 2, [3.5, "x"]],
    "optimizer": {"state": {0: {"exp_avg": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(4.0)}}},
    "bf16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
}


def write_weights(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "nested").mkdir()
    (folder / "nested" / "weights.bin").write_bytes(b"w" * 2_000_000)


def save(run: Path, step: int, **options) -> Path:
    return save_checkpoint(run, step, save_model=write_weights, state=STATE | {"step": step}, **options)


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def test_state_and_model_come_back(tmp_path):
    checkpoint = save(tmp_path, 3)
    assert checkpoint == tmp_path / "checkpoints" / "step-000003" == latest_checkpoint(tmp_path)
    assert checkpoint_step(checkpoint) == 3
    assert equal(load_state(checkpoint), STATE)
    assert (checkpoint / "model" / "nested" / "weights.bin").stat().st_size == 2_000_000
    assert sorted(path.name for path in checkpoint.iterdir()) == ["manifest.json", "model", "state"]
    assert [path.name for path in checkpoint.parent.iterdir()] == ["step-000003"]


def test_latest_is_by_number_and_ignores_what_is_half_written(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    save(tmp_path, 999_999)
    newest = save(tmp_path, 1_000_000)
    (tmp_path / "checkpoints" / ".step-2000000.tmp-1" / "model").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-best").mkdir()
    assert latest_checkpoint(tmp_path) == newest


def test_leftovers_of_a_kill_are_cleared(tmp_path):
    leftover = tmp_path / "checkpoints" / ".step-000001.tmp-99" / "model"
    leftover.mkdir(parents=True)
    save(tmp_path, 2)
    assert not leftover.exists()


@pytest.mark.parametrize("name", ["model/config.json", "model/nested/weights.bin", "state/state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_checkpoint_cut_short_is_noticed(tmp_path, name, damage):
    save(tmp_path, 1)
    checkpoint = save(tmp_path, 2)
    path = checkpoint / name
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"damaged") as raised:
        load_state(checkpoint)
    assert "step-000002" in str(raised.value)
    assert "goes on from step-000001" in str(raised.value)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model/config.json", "model/nested/weights.bin", "state/state.pt"])
def test_a_flipped_bit_is_noticed(tmp_path, name):
    checkpoint = save(tmp_path, 1)
    flip_a_bit(checkpoint / name)
    with pytest.raises(CheckpointError, match=rf"{name} was changed.*\n.*goes on from its start"):
        check_checkpoint(checkpoint)


def test_the_newest_whole_checkpoint_is_taken_and_damaged_ones_make_room(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert load_latest(tmp_path) is not None
    flip_a_bit(tmp_path / "checkpoints" / "step-000003" / "state" / "state.pt")
    (tmp_path / "checkpoints" / "step-000002" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="damaged") as warned:
        found = load_latest(tmp_path)
    assert found is not None
    assert (found[0].name, found[1]["step"]) == ("step-000001", 1)
    assert len(warned) == 2
    assert "kept as damaged-step-000003" in str(warned[0].message)
    names = ["damaged-step-000002", "damaged-step-000003", "step-000001"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names
    assert save(tmp_path, 3) == latest_checkpoint(tmp_path)
    assert load_state(tmp_path / "checkpoints" / "step-000003")["step"] == 3


def test_where_no_checkpoint_is_whole_all_stay(tmp_path):
    assert load_latest(tmp_path) is None
    for step in (1, 2):
        flip_a_bit(save(tmp_path, step) / "state" / "state.pt")
    with pytest.raises(CheckpointError, match="step-000002: the checkpoint is damaged"):
        load_latest(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


def test_a_file_where_the_checkpoints_should_be_is_a_typed_error(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=r"can't be written.*there is no checkpoint yet"):
        save(tmp_path, 1)


def test_a_missing_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_state(tmp_path / "checkpoints" / "step-000001")


def test_pickled_code_in_a_state_is_not_run(tmp_path):
    import hashlib
    import json

    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").write_text, ("x",))

    checkpoint = save(tmp_path, 1)
    path = checkpoint / "state" / "state.pt"
    torch.save(Evil(), path)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["files"]["state/state.pt"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="can't be read"):
        load_state(checkpoint)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [np.float64(1.0), np.zeros(2), {1, 2}, Path("x"), lambda: None])
def test_what_could_not_be_read_back_is_refused_before_writing(tmp_path, value):
    with pytest.raises(TypeError, match=r"state\['inner'\]\[1\]"):
        save_checkpoint(tmp_path, 1, save_model=write_weights, state={"inner": [0, value]})
    assert latest_checkpoint(tmp_path) is None


def test_an_existing_checkpoint_of_the_step_stays(tmp_path):
    first = save(tmp_path, 1)
    before = (first / "manifest.json").stat().st_mtime_ns
    assert save(tmp_path, 1) == first
    assert (first / "manifest.json").stat().st_mtime_ns == before


def test_keep_last_removes_the_oldest(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep_last=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000010"]
    prune(tmp_path, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000010"]
    with pytest.raises(ValueError, match="at least 1"):
        prune(tmp_path, 0)


def test_nothing_is_pruned_when_the_new_checkpoint_fails(tmp_path):
    save(tmp_path, 1, keep_last=1)

    def fail(folder: Path) -> None:
        write_weights(folder)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save_checkpoint(tmp_path, 2, save_model=fail, state={}, keep_last=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, the disk that is always full")
def test_a_full_disk_while_the_model_is_written(tmp_path):
    save(tmp_path, 1, keep_last=1)

    def write_to_full_disk(folder: Path) -> None:
        write_weights(folder)
        with Path("/dev/full").open("w") as file:
            file.write("x")

    with pytest.raises(CheckpointError, match=r"step-000002: no room to write it; step-000001 is whole"):
        save_checkpoint(tmp_path, 2, save_model=write_to_full_disk, state={}, keep_last=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert load_state(tmp_path / "checkpoints" / "step-000001")["step"] == 1


FULL = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from trueup.errors import CheckpointError
from trueup.runs.checkpoint import save_checkpoint

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
big = {"big": torch.zeros(100_000)}
for save_model, state in (lambda folder: None, big), (lambda folder: save_file(big, folder / "model.safetensors"), {}):
    try:
        save_checkpoint(Path(sys.argv[1]), 2, save_model=save_model, state=state)
    except CheckpointError as error:
        print(str(error).splitlines()[0])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs file-size limits")
def test_no_room_while_a_library_writes(tmp_path):
    """PyTorch's and safetensors' own writers hit a file-size limit, which they report in their own exception types."""
    save(tmp_path, 1)
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=120)
    message = f"{tmp_path / 'checkpoints' / 'step-000002'}: no room to write it; step-000001 is whole"
    assert done.stdout.splitlines() == [message, message], done.stderr
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


# One interpreter imports PyTorch once and forks a victim per kill: many kills in the time of one start. The victim says
# after each save which step is safe; the kill comes at a random moment of the saves that follow.
KILLED = """
import os, signal, sys, time, torch
from pathlib import Path
from trueup.runs.checkpoint import latest_checkpoint, load_state, save_checkpoint

torch.set_num_threads(1)
run, moments = Path(sys.argv[1]), [float(text) for text in sys.argv[2:]]
weights = torch.zeros(50_000)

def save_model(folder):
    for part in range(8):
        (folder / f"part-{part}.bin").write_bytes(bytes(20_000))

def save_until_killed(start, announce):
    for step in range(start, start + 1_000_000):
        state = {"step": step, "weights": weights + step}
        save_checkpoint(run, step, save_model=save_model, state=state, keep_last=2)
        os.write(announce, f"{step}\\n".encode())

last = 0
for moment in moments:
    read_end, announce = os.pipe()
    victim = os.fork()
    if victim == 0:
        os.close(read_end)
        save_until_killed(last + 1, announce)
    os.close(announce)
    with os.fdopen(read_end) as announced_steps:
        first = int(announced_steps.readline())
        time.sleep(moment)
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        announced = max([first, *map(int, announced_steps.read().split())])
    state = load_state(latest_checkpoint(run))
    assert (state["weights"] == state["step"]).all()
    last = state["step"]
    print(announced, last, len(list(run.glob("checkpoints/.step-*"))), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """Killed again and again in the same folder: what was announced as saved is never lost, and always loads."""
    moments = np.random.default_rng(7).uniform(0.0, 0.03, size=25)
    arguments = [sys.executable, "-c", KILLED, str(tmp_path), *map(str, moments)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    reports = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(reports) == len(moments), done.stderr
    assert all(found in (announced, announced + 1) for announced, found, _ in reports)
    assert any(half_written for _, _, half_written in reports), "no kill came in the middle of a save"

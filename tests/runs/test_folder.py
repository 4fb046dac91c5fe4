from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from trueup.errors import CheckpointError, DataError, SettingsError
from trueup.runs.folder import RunFolder, environment_record, read_lines, read_metrics


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str = "m"
    learning_rate: float = 1e-6
    data: tuple[str, ...] = ("a.jsonl", "b.jsonl")
    quiet: bool = False


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs" / "one", Settings())


@pytest.fixture
def begun(folder) -> RunFolder:
    """The folder of a run that has made a step."""
    folder.log({"loss": 1.0}, step=1)
    return folder


def test_a_new_folder_holds_settings_and_environment(folder):
    assert (folder.path / "config.yaml").read_text() == (
        "model: m\nlearning_rate: 1.0e-06\ndata: [a.jsonl, b.jsonl]\nquiet: false\n"
    )
    environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0] or environment["packages"]["torch"]
    assert environment["num_threads"] == torch.get_num_threads()
    assert environment["python"] == sys.version.split()[0]
    assert environment["argv"] == sys.argv
    assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "config.yaml", "environment.json"]
    folder.close()
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "environment.json"]


def test_the_environment_names_the_git_revision_or_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment_record()["git"] is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "x")
    assert environment_record()["git"] == {"revision": git("rev-parse", "HEAD"), "changed": False}
    (tmp_path / "file").write_text("2")
    assert environment_record()["git"]["changed"] is True


def test_a_folder_in_use_is_refused_with_the_way_out(begun):
    with pytest.raises(SettingsError, match=r"(?s)not empty.*--resume"):
        RunFolder.create(begun.path, Settings())


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_never_made_a_step_leaves_its_folder_free(folder, resume):
    RunFolder.create(folder.path / "reference", Settings())
    again = RunFolder.create(folder.path, replace(Settings(), model="mended"), resume=resume)
    assert again.path == folder.path
    assert "model: mended" in (folder.path / "config.yaml").read_text()
    assert "resumed" not in json.loads((folder.path / "environment.json").read_text())


def test_a_settings_file_of_the_user_s_own_is_not_overwritten(tmp_path):
    (tmp_path / "config.yaml").write_text("model: m  # the one that works\n")
    with pytest.raises(SettingsError, match="not empty"):
        RunFolder.create(tmp_path, Settings())
    assert "the one that works" in (tmp_path / "config.yaml").read_text()


def test_a_path_that_can_t_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="can't make the run folder"):
        RunFolder.create(tmp_path / "file" / "run", Settings())
    with pytest.raises(SettingsError, match="can't make the run folder"):
        RunFolder.create(tmp_path / "file", Settings())


def test_resuming_keeps_the_first_environment_and_adds_the_new(begun):
    first = json.loads((begun.path / "environment.json").read_text())
    for _ in range(2):
        RunFolder.create(begun.path, Settings(), resume=True)
    after = json.loads((begun.path / "environment.json").read_text())
    assert {key: value for key, value in after.items() if key != "resumed"} == first
    assert [record["argv"] for record in after["resumed"]] == [sys.argv] * 2


def test_resuming_an_empty_folder_starts_it(tmp_path):
    folder = RunFolder.create(tmp_path / "new", Settings(), resume=True)
    assert "resumed" not in json.loads((folder.path / "environment.json").read_text())


def test_a_kill_before_the_first_file_leaves_the_folder_free(tmp_path):
    (tmp_path / ".environment.json.tmp-12345").write_text("{")
    (tmp_path / ".lock").write_text("12345")
    folder = RunFolder.create(tmp_path, Settings())
    folder.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "environment.json"]


def test_resuming_with_other_settings_names_them(begun):
    changed = replace(Settings(), learning_rate=1e-5, data=("a.jsonl",))
    with pytest.raises(CheckpointError) as raised:
        RunFolder.create(begun.path, changed, resume=True)
    message = str(raised.value)
    assert "learning_rate: 1.0e-06 then, 1.0e-05 now" in message
    assert "data: ['a.jsonl', 'b.jsonl'] then, ['a.jsonl'] now" in message
    assert "model" not in message.replace(str(begun.path), "")


def test_a_setting_that_came_with_a_later_version_doesn_t_bar_resuming(begun):
    config = begun.path / "config.yaml"
    config.write_text(config.read_text().replace("quiet: false\n", "gone: 3\n"))
    RunFolder.create(begun.path, Settings(), resume=True)
    assert config.read_text().endswith("quiet: false\n")


def test_what_may_change_may_and_is_written(begun):
    RunFolder.create(begun.path, replace(Settings(), quiet=True), resume=True, may_change=["quiet"])
    assert "quiet: true" in (begun.path / "config.yaml").read_text()


def test_resuming_what_is_no_run_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match=r"no config\.yaml"):
        RunFolder.create(tmp_path, Settings(), resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_metrics_are_one_object_a_line(folder):
    folder.log({"loss": 0.5, "eval/accuracy": np.float32(0.25), "n": np.int64(3), "t": torch.tensor(2.0)}, step=1)
    folder.log({"loss": 1, "note": "ok", "flag": True, "none": None}, step=2)
    assert folder.metrics.read_text() == (
        '{"step": 1, "loss": 0.5, "eval/accuracy": 0.25, "n": 3, "t": 2.0}\n'
        '{"step": 2, "loss": 1, "note": "ok", "flag": true, "none": null}\n'
    )


def test_numbers_that_json_lacks_come_back(folder):
    folder.log({"a": math.nan, "b": math.inf, "c": -math.inf, "d": torch.tensor(math.nan)}, step=1)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(folder.metrics.read_text(), parse_constant=refuse)["a"] == "NaN"
    (record,) = read_metrics(folder.metrics)
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)
    assert math.isnan(record["d"])


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x"])
def test_what_is_no_record_is_refused_and_nothing_written(folder, value):
    with pytest.raises(TypeError, match="loss"):
        folder.log({"ok": 1, "loss": value}, step=1)
    assert not folder.metrics.exists()


def test_a_tensor_of_many_numbers_is_no_metric(folder):
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        folder.log({"loss": torch.zeros(3)}, step=1)
    assert not folder.metrics.exists()


# Separators that str.splitlines knows and JSON leaves alone, a lone surrogate, NaN as a word.
HOSTILE = ["a\u2028b\x85c\x0bd\r\ne\n", "\ud800 lone", "NaN", "naïve 模型 🎉", '"}\n{"step": 9}']


def test_samples_come_back_as_they_were(folder):
    samples = [{"prompt": [{"role": "user", "content": text}], "completion": text, "score": 0.5} for text in HOSTILE]
    folder.log_samples(samples, step=0)
    folder.log_samples(samples, step=5)
    assert read_lines(folder.samples) == [{"step": step, **sample} for step in (0, 5) for sample in samples]
    folder.truncate_after(4)
    assert read_lines(folder.samples) == [{"step": 0, **sample} for sample in samples]


def test_truncating_cuts_later_steps_and_a_half_written_line(folder):
    for step in range(6):
        folder.log({"loss": step / 10}, step)
        folder.log_samples([{"text": "x"}, {"text": "y"}], step)
    whole = folder.metrics.read_bytes()
    with folder.metrics.open("ab") as file:
        file.write('{"step": 4, "text": "ü'.encode()[:-1])
    assert [record["step"] for record in read_lines(folder.metrics)] == list(range(6))
    folder.truncate_after(5)
    assert folder.metrics.read_bytes() == whole
    folder.truncate_after(3)
    assert folder.metrics.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
    assert [record["step"] for record in read_lines(folder.samples)] == [0, 0, 1, 1, 2, 2, 3, 3]
    folder.log({"loss": 0.4}, 4)
    assert folder.metrics.read_bytes() == b"".join(whole.splitlines(keepends=True)[:5])
    folder.truncate_after(-1)
    assert folder.metrics.read_bytes() == b""


def test_truncating_nothing_touches_nothing(folder):
    folder.truncate_after(3)
    folder.log({"loss": 1.0}, 1)
    before = folder.metrics.stat()
    folder.truncate_after(1)
    after = folder.metrics.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_broken_line_in_the_middle_loses_nothing(folder):
    folder.log({"loss": 1.0}, 1)
    with folder.metrics.open("a") as file:
        file.write("oops\n")
    folder.log({"loss": 2.0}, 2)
    before = folder.metrics.read_bytes()
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: "):
        folder.truncate_after(1)
    assert folder.metrics.read_bytes() == before


def test_every_appended_file_is_cut_back_or_none_is(folder):
    for step in (1, 2):
        folder.log({"loss": 1.0}, step)
        folder.log_samples([{"text": "x"}], step)
        folder.log_bad_batch([{"where": "a.jsonl:1"}, {"where": "a.jsonl:2"}], step)
    written = [path for path in folder.records if path.exists()]
    before = [path.read_bytes() for path in written]
    with folder.bad_batches.open("a") as file:
        file.write("oops\n")
    with pytest.raises(DataError, match=r"bad_batches\.jsonl:5: "):
        folder.truncate_after(1)
    assert [path.read_bytes() for path in written if path != folder.bad_batches] == before[:-1]
    folder.bad_batches.write_bytes(before[-1])
    folder.truncate_after(1)
    assert [[record["step"] for record in read_lines(path)] for path in written] == [[1], [1], [1, 1]]
    folder.sync()


def test_a_line_that_can_t_be_written_is_a_typed_error(folder):
    folder.metrics.mkdir()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: can't be written"):
        folder.log({"loss": 1.0}, 1)


@pytest.mark.parametrize(
    ("name", "content"), [("environment.json", "{"), ("environment.json", "[]"), ("config.yaml", "a: [")]
)
def test_resuming_with_a_damaged_record_names_the_file(begun, name, content):
    (begun.path / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{name}: can't be read"):
        RunFolder.create(begun.path, Settings(), resume=True)
    assert (begun.path / name).read_text() == content


def test_a_refused_folder_is_left_as_it_was(begun):
    begun.close()
    before = sorted(path.name for path in begun.path.iterdir())
    with pytest.raises(SettingsError, match="not empty"):
        RunFolder.create(begun.path, Settings())
    assert sorted(path.name for path in begun.path.iterdir()) == before

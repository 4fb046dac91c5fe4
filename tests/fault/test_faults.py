"""Every mistake ends in one message that says where and what to do, exit code 2, and nothing lost or half-written.

Each case is made in a folder of its own that holds a tiny model (``model``), pairs (``pairs.jsonl``), held-out pairs
(``held.jsonl``) and a run that was killed after its second checkpoint (``half``); and for online learning questions
with answers (``asked.jsonl``, held out: ``exam.jsonl``), a reward (``closeness.py``) and a run that was killed after
its third checkpoint, in the middle of its second rollout (``online``). The command runs inside it.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from trueup.cli.main import main
from trueup.errors import CheckpointError
from trueup.models.adapters import merge_and_save
from trueup.models.heads import load_reward_model
from trueup.models.scratch import make_model
from trueup.rewards.calls import Reward
from trueup.rollout.torch_engine import TorchEngine
from trueup.runs.checkpoint import check_checkpoint
from trueup.runs.folder import read_lines
from trueup.runs.settings import values_from_yaml
from trueup.runs.trackers import TRACKERS
from trueup.trainers import evaluation, policy

HALF = ["--output", "half", "--batch-size", "4", "--num-epochs", "2", "--save-every", "1", "--keep-checkpoints", "9"]
HALF += ["--eval-data", "held.jsonl", "--learning-rate", "1e-2", "--num-samples", "2", "--sample-tokens", "4"]

ONLINE = ["--reward", "closeness.py:closeness", "--max-new-tokens", "4", "--batch-size", "4", "--group-size", "2"]
HALF_ONLINE = ["--model", "model", "--data", "asked.jsonl", *ONLINE, "--output", "online", "--num-mini-batches", "2"]
HALF_ONLINE += ["--max-steps", "6", "--save-every", "1", "--keep-checkpoints", "9", "--num-samples", "1"]
HALF_ONLINE += ["--eval-data", "exam.jsonl", "--learning-rate", "1e-2"]

CLOSENESS = """
from pathlib import Path

def closeness(completions, answer, **columns):
    if Path("broken").exists():
        raise OSError("the disk with the answers is gone")
    return [sum(map(str.__eq__, said, right)) - len(said) / 8 for said, right in zip(completions, answer)]

def wrong_length(completions, **columns):
    return [0.0]

def not_finite(completions, **columns):
    return [float("nan")] * len(completions)

def hanging(completions, **columns):
    __import__("time").sleep(60)

def silent(completions, **columns):
    return [None] * len(completions)

def dividing(completions, **columns):
    return [1 / 0 for _ in completions]

def wordy(completions, **columns):
    return ["good"] * len(completions)
"""


@dataclass
class Home:
    """The folder of a case, which is also the working directory."""

    path: Path
    patch: pytest.MonkeyPatch
    processes: list[subprocess.Popen] = field(default_factory=list)

    def write(self, name: str, content: str | bytes) -> str:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    def rows(self, name: str, *rows: Any) -> str:
        return self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def edit(self, name: str, change: Callable[[bytes], bytes]) -> None:
        self.write(name, change((self.path / name).read_bytes()))

    def copy_model(self, name: str) -> Path:
        return Path(shutil.copytree(self.path / "model", self.path / name))


def on(command: str, data: str | None = "pairs.jsonl", model: str | None = "model") -> list[str]:
    """A short run of a loop, into ``out``."""
    named = [*(["--model", model] if model else []), *(["--data", data] if data else [])]
    return [command, *named, "--output", "out", "--batch-size", "8", "--max-steps", "2", "--num-samples", "0"]


def resumed(*flags: str) -> list[str]:
    return ["sft", "--model", "model", "--data", "pairs.jsonl", *HALF, "--resume", "auto", *flags]


def online(*flags: str, command: str = "grpo") -> list[str]:
    """A short run of the online loop, into ``out``; later flags override."""
    data = ["--model", "model", "--data", "asked.jsonl", *ONLINE]
    return [*command.split(), *data, "--output", "out", "--max-steps", "2", *flags]


def resumed_online(*flags: str, command: str = "grpo") -> list[str]:
    return [command, *HALF_ONLINE, "--resume", "auto", *flags]


Make = Callable[[Home], list[str]]
FAULTS: list[Any] = []


def fault(name: str, message: str, *, code: int = 2) -> Callable[[Make], Make]:
    """Register a case: the function makes the condition and returns the command line; ``message`` is a pattern."""

    def register(make: Make) -> Make:
        FAULTS.append(pytest.param(make, message, code, id=name))
        return make

    return register


def setting(name: str, message: str, *flags: str, command: str = "sft") -> None:
    """A case that is nothing but flags."""
    fault(name, message)(lambda home: [*on(command), *flags])


# ------------------------------------------------------------------------------------------------------- settings

setting("unknown flag", r"--learning-rate", "--learning-rat", "1e-3")
setting("a word for a number", r"--batch-size", "--batch-size", "many")
setting("an unknown choice", r"--optimizer", "--optimizer", "adam")
setting("a negative learning rate", r"--learning-rate: is -0\.1, but must be above 0", "--learning-rate=-0.1")
setting("NaN for a learning rate", r"--learning-rate: is nan", "--learning-rate", "nan")
setting("no rows in a batch", r"--batch-size: is 0, but must be at least 1", "--batch-size", "0")
setting("a stream without an end", r"--streaming: needs --max-steps", "--streaming", "--max-steps", "None")
setting("a holdout of a stream", r"--holdout: can't be cut from a stream", "--streaming", "--holdout", "0.1")
setting("holdout beside eval data", r"--holdout: --eval-data is given", "--holdout", "0.1", "--eval-data", "held.jsonl")
setting("alpha without LoRA", r"--lora-alpha: has no effect without --lora-rank", "--lora-alpha", "4")
setting("a project without tracker", r"--tracker-project: has no effect without --tracker", "--tracker-project", "x")
setting("a length without room", r"--max-length: .*at least 2", "--max-length", "1")
setting("a prompt as long as all", r"--max-prompt-length: is 1024", "--max-prompt-length", "1024")
setting("a device that is not there", r"device 'cuda:77' is not there", "--device", "cuda:77")
setting("no such device", r"no such device: 'gpu'", "--device", "gpu")
setting("an unknown data format", r"'hhh' is no format of sft data\n  → choose one of", "--data-format", "hhh")
setting("smoothing of hard labels", r"--label-smoothing: has no effect", "--label-smoothing", "0.1", command="dpo")


@fault("unknown key in a settings file", r"c\.yaml:2: learning_rat: unknown setting\n  → did you mean learning_rate")
def _(home: Home) -> list[str]:
    return [*on("sft"), "--config", home.write("c.yaml", "seed: 1\nlearning_rat: 0.1\n")]


@fault("a setting given twice", r"c\.yaml:2: seed: given twice \(first in line 1\)")
def _(home: Home) -> list[str]:
    return [*on("sft"), "--config", home.write("c.yaml", "seed: 1\nseed: 2\n")]


@fault("settings that are not YAML", r"c\.yaml:\d+: not valid YAML")
def _(home: Home) -> list[str]:
    return [*on("sft"), "--config", home.write("c.yaml", "data: [a\nseed: 1\n")]


@fault("settings that are not text", r"c\.yaml: can't read the settings: it is not UTF-8")
def _(home: Home) -> list[str]:
    return [*on("sft"), "--config", home.write("c.yaml", b"\xff\xfe\x00")]


@fault("no settings file", r"c\.yaml: can't read the settings: No such file")
def _(home: Home) -> list[str]:
    return [*on("sft"), "--config", "c.yaml"]


@fault("no model", r"--model: no model is given\n  → --model FOLDER")
def _(home: Home) -> list[str]:
    return on("sft", model=None)


@fault("no data", r"--data: no training data is given")
def _(home: Home) -> list[str]:
    return on("dpo", data=None)


@fault("a tracker that is not installed", r"this needs the package 'mlflow'.*\n  → pip install 'trueup\[mlflow\]'")
def _(home: Home) -> list[str]:
    home.patch.setitem(sys.modules, "mlflow", None)
    return [*on("sft", model="nowhere"), "--tracker", "mlflow"]


# ----------------------------------------------------------------------------------------------------------- data


def data_fault(name: str, message: str, file: str, content: str | bytes, command: str = "sft") -> None:
    """A case that is nothing but a data file."""
    fault(name, message)(lambda home: on(command, data=home.write(file, content)))


GZIPPED = gzip.compress(b"{}", mtime=0)
GOOD = '{"prompt": "1+1=", "chosen": "2", "rejected": "3"}\n'

data_fault("a broken line", r"d\.jsonl:2: not valid JSON.*\n  → mend or remove", "d.jsonl", GOOD + '{"prompt": "1\n')
data_fault("bytes that are no text", r"d\.jsonl:2: not valid UTF-8", "d.jsonl", GOOD.encode() + b'{"prompt": "\xff"}\n')
data_fault("a list for a row", r"d\.jsonl:2: expected an object", "d.jsonl", GOOD + "[1, 2]\n")
data_fault("a row nested without end", r"d\.jsonl:1: JSON nested too deeply", "d.jsonl", "[" * 100_000 + "\n")
data_fault("an array without end", r"d\.json:\d+: .*(no end|not valid JSON)", "d.json", "[" + GOOD.strip() + ",\n")
data_fault("text behind an array", r"d\.json:\d+: something follows", "d.json", "[" + GOOD.strip() + "]\nmore")
data_fault("an empty file", r"d\.jsonl: there are no rows", "d.jsonl", "")
data_fault("a header alone", r"d\.csv: there are no rows", "d.csv", "prompt,completion\n")
data_fault("cells without a column", r"d\.csv:2: 3 cells under 2 columns", "d.csv", "prompt,completion\n1+1=,2,3\n")
data_fault("two columns of one name", r"d\.csv:2?.*same name", "d.csv", "prompt,prompt\n1,2\n")
data_fault("an open quote", r"d\.csv:\d+: not valid CSV", "d.csv", 'prompt,completion\n"1+1=,2\n')
data_fault("a damaged .gz", r"d\.jsonl\.gz: the compressed file is damaged", "d.jsonl.gz", GZIPPED[:-5])
data_fault("a .gz that is none", r"d\.jsonl\.gz: the compressed file is damaged", "d.jsonl.gz", GOOD)
data_fault("a damaged .zst", r"d\.jsonl\.zst: the compressed file is damaged", "d.jsonl.zst", b"(\xb5/\xfd junk")
data_fault("a damaged Parquet file", r"d\.parquet: not a readable Parquet file", "d.parquet", b"PAR1 junk PAR1")
data_fault("an unknown kind of file", r"d\.txt: unknown kind of file\n  → rename", "d.txt", GOOD)
data_fault("unknown columns", r"d\.jsonl:1: no known format.*question_text", "d.jsonl", '{"question_text": "x"}\n')
data_fault(
    "two formats in one file",
    r"d\.jsonl:2: looks like the format",
    "d.jsonl",
    GOOD + '{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}\n',
)
data_fault(
    "a field that is missing far down",
    r"d\.jsonl:41: the column 'rejected' is missing",
    "d.jsonl",
    GOOD * 40 + '{"prompt": "1+1=", "chosen": "2"}\n',
    "dpo",
)
data_fault(
    "a margin that is no number",
    r"d\.jsonl:1: .*'margin'",
    "d.jsonl",
    '{"prompt": "1+1=", "chosen": "2", "rejected": "3", "margin": "much"}\n',
    "reward",
)
data_fault(
    "scores that don't match",
    r"d\.jsonl:1: 2 completions but 3 scores",
    "d.jsonl",
    '{"prompt": "1+1=", "completions": ["2", "3"], "scores": [3, 2, 1]}\n',
    "reward",
)
data_fault(
    "a ranked list for a loss of pairs",
    r"d\.jsonl:2: .*more than two completions\n  → --loss plackett_luce",
    "d.jsonl",
    '{"prompt": "1+1=", "completions": ["2", "3"]}\n{"prompt": "1+1=", "completions": ["2", "3", "4"]}\n',
    "dpo",
)
data_fault(
    "identical sides everywhere",
    r"d\.jsonl: no row is left to train on",
    "d.jsonl",
    '{"prompt": "1+1=", "chosen": "2", "rejected": "2"}\n',
    "dpo",
)
data_fault("empty completions everywhere", r"no row is left", "d.jsonl", '{"prompt": "1+1=", "completion": ""}\n' * 3)
data_fault(
    "conversations without a chat template",
    r"the tokenizer has no chat template\n  → set chat_template to 'plain'",
    "d.jsonl",
    '{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}\n',
)
CHAT = '{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}\n'


@fault("no such file", r"gone\.jsonl: no such file")
def _(home: Home) -> list[str]:
    return on("sft", data="gone.jsonl")


@fault("a folder for a file", r"model: this is a folder, not a file\n  → name its files")
def _(home: Home) -> list[str]:
    return on("sft", data="model")


@fault("held-out data that are missing", r"gone\.jsonl: no such file")
def _(home: Home) -> list[str]:
    return [*on("dpo"), "--eval-data", "gone.jsonl"]


@fault("prompts longer than the limit", r"pairs\.jsonl: no row is left to train on")
def _(home: Home) -> list[str]:
    return [*on("sft"), "--max-length", "3"]


@fault("a table of the wrong types", r"t\.parquet: row 1: ")
def _(home: Home) -> list[str]:
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [1, 2], "completion": [3.5, 4.5]}), home.path / "t.parquet")
    return on("sft", data="t.parquet")


@fault("text in a table that is not UTF-8", r"t\.parquet: not a readable Parquet file \('utf-8' codec")
def _(home: Home) -> list[str]:
    table = pyarrow.table({"prompt": ["1+1="], "completion": ["22222"]})
    pyarrow.parquet.write_table(table, home.path / "t.parquet", compression="none", use_dictionary=False)
    home.edit("t.parquet", lambda content: content.replace(b"22222", b"2\xff222"))
    return on("sft", data="t.parquet")


@fault("a template that is no file", r"chat_template is neither")
def _(home: Home) -> list[str]:
    return [*on("sft", data=home.write("d.jsonl", CHAT)), "--chat-template", "template.jinja"]


@fault("a template that does not parse", r"template")
def _(home: Home) -> list[str]:
    return [*on("sft", data=home.write("d.jsonl", CHAT)), "--chat-template", "{% for m in messages %}{{ m }}"]


@fault("a template without generation prompt", r"generation prompt")
def _(home: Home) -> list[str]:
    bare = "{% for m in messages %}{{ m['role'] }}={{ m['content'] }}<end>{% endfor %}"
    return [*on("sft", data=home.write("d.jsonl", CHAT)), "--chat-template", bare]


@fault("malformed rows in a check", r"d\.jsonl:2: ")
def _(home: Home) -> list[str]:
    return ["data", "check", home.write("d.jsonl", GOOD + "oops\n" + GOOD)]


@fault("a check of nothing", r"no file is given\n  → trueup data check FILE")
def _(home: Home) -> list[str]:
    return ["data", "check"]


# ---------------------------------------------------------------------------------------------------------- model


@fault("no such model", r"\./gone: no such folder")
def _(home: Home) -> list[str]:
    return on("sft", model="./gone")


@fault("a file for a model", r"\./pairs\.jsonl: is a file, not a folder")
def _(home: Home) -> list[str]:
    return on("sft", model="./pairs.jsonl")


@fault(
    "a folder without a model", r"inner: is not a model's folder: it has no config\.json\n  → did you mean inner/m\?"
)
def _(home: Home) -> list[str]:
    home.copy_model("inner/m")
    return on("sft", model="inner")


@fault("a model without weights", r"m: has no weights")
def _(home: Home) -> list[str]:
    (home.copy_model("m") / "model.safetensors").unlink()
    return on("sft", model="m")


@fault("pickled weights", r"m: has only pickled weights \(pytorch_model\.bin\), which could run code")
def _(home: Home) -> list[str]:
    (home.copy_model("m") / "model.safetensors").rename("m/pytorch_model.bin")
    return on("sft", model="m")


@fault("weights cut short", r"m: weights can't be read.*\n  → the file is cut short or damaged")
def _(home: Home) -> list[str]:
    home.copy_model("m")
    home.edit("m/model.safetensors", lambda content: content[:-500])
    return on("dpo", model="m")


@fault("weights that are missing", r"m: weights are missing for 1 parameters of LlamaForCausalLM")
def _(home: Home) -> list[str]:
    weights = load_file(home.copy_model("m") / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, "m/model.safetensors", metadata={"format": "pt"})
    return on("sft", model="m")


@fault("a config that is no JSON", r"m: can't be loaded")
def _(home: Home) -> list[str]:
    home.copy_model("m")
    home.write("m/config.json", "{")
    return on("reward", model="m")


@fault(
    "a model that wants its own code", r"m: can't be loaded.*\n  → it needs code of its own, which trueup never runs"
)
def _(home: Home) -> list[str]:
    home.copy_model("m")
    named = {"model_type": "my_own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    home.write("m/config.json", json.dumps(named))
    home.write("m/code.py", "raise SystemExit('it ran')")
    return on("sft", model="m")


@fault("a model without tokenizer", r"m: holds no tokenizer")
def _(home: Home) -> list[str]:
    for path in home.copy_model("m").glob("*token*"):
        path.unlink()
    return on("sft", model="m")


@fault("another model's tokenizer", r"m: the tokenizer has \d+ tokens, the model only \d+ rows")
def _(home: Home) -> list[str]:
    folder = home.copy_model("m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{index}" for index in range(50)])
    tokenizer.save_pretrained(folder)
    return on("sft", model="m")


@fault("a reference that reads other tokens", r"other: its tokens are not those of the policy")
def _(home: Home) -> list[str]:
    make_model(home.path / "other", characters="=+9876543210", hidden_size=16, num_layers=2, num_heads=2)
    return [*on("dpo"), "--reference", "./other"]


@fault("a hub out of reach", r"some/model: can't be fetched from the hub.*\n  → no local folder has this name")
def _(home: Home) -> list[str]:
    home.patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return on("sft", model="some/model")


@fault("a new model where one is", r"model: is in use already\n  → choose another folder")
def _(home: Home) -> list[str]:
    return ["model", "new", "--output", "model"]


@fault("heads that don't divide the width", r"hidden_size: 30 does not split into 4 heads")
def _(home: Home) -> list[str]:
    return ["model", "new", "--output", "out", "--hidden-size", "30"]


# ------------------------------------------------------------------------------------------------- the run folder


@fault("a folder in use", r"half: the run folder is not empty\n  → name another one, delete it, or go on with it")
def _(home: Home) -> list[str]:
    return ["sft", "--model", "model", "--data", "pairs.jsonl", *HALF]


@fault("a file for an output", r"out: can't make the run folder: File exists")
def _(home: Home) -> list[str]:
    home.write("out", "")
    return on("sft")


@fault("an output below a file", r"out/x: can't make the run folder: Not a directory")
def _(home: Home) -> list[str]:
    home.write("out", "")
    return [*on("sft"), "--output", "out/x"]


@fault("somebody else's folder", r"theirs: not a run folder: it has no config\.yaml\n  → name another one")
def _(home: Home) -> list[str]:
    home.write("theirs/thesis.tex", "precious")
    return [*on("sft"), "--output", "theirs", "--resume", "auto"]


@fault("nothing to resume", r"out: there is no checkpoint to resume\n  → --resume auto")
def _(home: Home) -> list[str]:
    return [*on("sft"), "--resume", "yes"]


@fault("a changed setting", r"other settings \(learning_rate: 0\.01 then, 0\.02 now\)\n  → resume with --config")
def _(home: Home) -> list[str]:
    return resumed("--learning-rate", "0.02")


@fault("changed training data", r"half: not what this run was started with: training data\n  → bring back the rows")
def _(home: Home) -> list[str]:
    home.edit("pairs.jsonl", lambda content: content.replace(b'"chosen": "3"', b'"chosen": "7"', 1))
    return resumed()


@fault("training data in another order", r"half: not what this run was started with: training data")
def _(home: Home) -> list[str]:
    home.edit("pairs.jsonl", lambda content: b"".join(reversed(content.splitlines(keepends=True))))
    return resumed()


@fault("changed held-out data", r"half: not what this run was started with: held-out data\n")
def _(home: Home) -> list[str]:
    home.edit("held.jsonl", lambda content: content + GOOD.encode())
    return resumed()


@fault("a model that was trained on", r"half: not what this run was started with: starting weights\n")
def _(home: Home) -> list[str]:
    weights = load_file("model/model.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in weights.items()}, "model/model.safetensors", {"format": "pt"})
    return resumed()


@fault("a tokenizer that was changed", r"half: not what this run was started with: tokenizer\n")
def _(home: Home) -> list[str]:
    home.write("model/chat_template.jinja", "{{ messages }}")
    return resumed()


@fault("a run of another kind", r"half: this is a run of 'sft', not of 'reward'\n  → name another folder")
def _(home: Home) -> list[str]:
    config = home.path / "half" / "config.yaml"
    config.write_text("")
    return ["reward", *resumed()[1:]]


@fault("a damaged config.yaml", r"half/config\.yaml: can't be read")
def _(home: Home) -> list[str]:
    home.write("half/config.yaml", "a: [")
    return resumed()


@fault("a damaged environment.json", r"half/environment\.json: can't be read")
def _(home: Home) -> list[str]:
    home.write("half/environment.json", "{")
    return resumed()


@fault("a line of metrics that is no record", r"half/metrics\.jsonl:2: not a record")
def _(home: Home) -> list[str]:
    home.edit("half/metrics.jsonl", lambda content: content.replace(b'{"step": 1', b'{"step 1', 1))
    return resumed()


@fault("no whole checkpoint", r"step-000002: the checkpoint is damaged: .*state\.pt.*\n  → delete it")
def _(home: Home) -> list[str]:
    for step in (1, 2):
        home.edit(f"half/checkpoints/step-00000{step}/state/state.pt", lambda content: content[:-100])
    return resumed()


@fault("another process in the folder", r"half: another process \(pid \d+\) is writing into this run folder\n  → wait")
def _(home: Home) -> list[str]:
    code = "import sys; from pathlib import Path; from trueup.runs.lock import FolderLock\n"
    code += "lock = FolderLock.acquire(Path('half')); print('locked', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    home.processes.append(holder)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"locked\n"
    return resumed()


# ------------------------------------------------------------------------------------------ while it is under way


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@fault("a full disk at a checkpoint", r"step-000003: no room to write it; step-000002 is whole\n  → free some space")
def _(home: Home) -> list[str]:
    home.patch.setattr("trueup.runs.checkpoint.sync_tree", full_disk)
    return resumed()


@fault("a full disk at the first checkpoint", r"no room to write it; there is no checkpoint yet")
def _(home: Home) -> list[str]:
    home.patch.setattr("torch.save", full_disk)
    return on("reward")


@fault("a full disk at a line of metrics", r"out/metrics\.jsonl: no room to write it\n  → free some space")
def _(home: Home) -> list[str]:
    home.patch.setattr("trueup.runs.session.RunFolder.metrics", property(lambda folder: FullFile(folder.path)))
    return on("sft")


class FullFile(type(Path())):
    """A file of records on a disk that is full."""

    def __new__(cls, folder: Path, name: str = "metrics") -> FullFile:
        return super().__new__(cls, folder / f"{name}.jsonl")

    def open(self, *_: Any, **__: Any) -> Any:
        full_disk()


@fault("a full disk at the start", r"out: can't make the run folder: No space left on device")
def _(home: Home) -> list[str]:
    home.patch.setattr("trueup.runs.folder.write_atomic", full_disk)
    return on("sft")


@fault("a full disk for a new model", r"no room left on the disk: .*No space left.*\n  → free some space")
def _(home: Home) -> list[str]:
    home.patch.setattr("transformers.PreTrainedModel.save_pretrained", full_disk)
    return ["model", "new", "--output", "out", "--hidden-size", "16"]


@fault("no memory for a new model", r"trueup: out of memory\n  → take a smaller model")
def _(home: Home) -> list[str]:
    home.patch.setattr("transformers.AutoModelForCausalLM.from_config", no_memory)
    return ["model", "new", "--output", "out", "--hidden-size", "16"]


def no_memory(*_: Any, **__: Any) -> None:
    torch.empty(1 << 60)


@fault(
    "no memory in a pass",
    r"out of memory, with (\d+) tokens in one pass\n  → go on with --resume auto and --tokens-per-batch \d+",
)
def _(home: Home) -> list[str]:
    home.patch.setattr("trueup.trainers.fit.tree_batch", no_memory)
    return on("sft")


@fault("no memory for one row", r"(?s)with \d+ tokens in one pass, all of one row.*--max-length \d+")
def _(home: Home) -> list[str]:
    home.patch.setattr("trueup.trainers.fit.tree_batch", no_memory)
    return [*on("dpo"), "--tokens-per-batch", "1"]


@fault("no memory for the optimiser", r"half: out of memory\n  → go on with --resume auto and --tokens-per-batch 2048")
def _(home: Home) -> list[str]:
    home.patch.setattr("trueup.trainers.stepping.Stepper.step", no_memory)
    return resumed()


@fault("no memory for the reference", r"out: out of memory\n  → go on with --resume auto and --tokens-per-batch 2048")
def _(home: Home) -> list[str]:
    home.patch.setattr("trueup.trainers.preference.reference_logprobs", no_memory)
    return on("dpo")


@fault("losses that are not finite", r"out/bad_batches\.jsonl: 2 steps had a loss or gradient that is not finite")
def _(home: Home) -> list[str]:
    flags = ["--learning-rate", "1e30", "--optimizer", "sgd", "--max-skipped-steps", "2", "--max-steps", "5"]
    return [*on("sft"), *flags, "--num-epochs", "5"]


@fault("parameters that are not finite", r"out: after step 1 the parameters are not finite numbers any more")
def _(home: Home) -> list[str]:
    flags = ["--learning-rate", "1e30", "--optimizer", "sgd", "--weight-decay", "1e30", "--max-steps", "1"]
    return [*on("sft"), *flags]


def signal_at_step(home: Home, *numbers: int) -> None:
    """The signals arrive while a step is made."""
    from trueup.trainers.stepping import Stepper

    step = Stepper.step

    def interrupted(*arguments: Any) -> Any:
        result = step(*arguments)
        for number in numbers:
            os.kill(os.getpid(), number)
        return result

    home.patch.setattr(Stepper, "step", interrupted)


@fault("Ctrl-C", r"interrupted after step 3, which is saved\n  → --resume auto goes on", code=130)
def _(home: Home) -> list[str]:
    signal_at_step(home, signal.SIGINT)
    return resumed()


@fault("SIGTERM", r"interrupted after step 3, which is saved", code=143)
def _(home: Home) -> list[str]:
    signal_at_step(home, signal.SIGTERM)
    return resumed()


@fault("Ctrl-C twice", r"stopped at once: --resume auto goes on from the last checkpoint", code=130)
def _(home: Home) -> list[str]:
    signal_at_step(home, signal.SIGINT, signal.SIGINT)
    return resumed()


# ------------------------------------------------------------------------------------------------ online learning


def online_setting(name: str, message: str, *flags: str, command: str = "grpo") -> None:
    """A case that is nothing but flags."""
    fault(name, message)(lambda home: online(*flags, command=command))


online_setting(
    "no such recipe", r"--recipe: there is no recipe 'dr_gpro'\n  → did you mean dr_grpo", command="rl --recipe dr_gpro"
)
online_setting(
    "a recipe unlike any", r"there is no recipe 'zzz'\n  → one of reinforce, rloo, .*grpo", command="rl --recipe zzz"
)
online_setting(
    "two recipes at once", r"--recipe: is ppo, but the command is trueup grpo\n  → trueup rl", "--recipe", "ppo"
)
online_setting("a group of one", r"--group-size: recipe grpo compares at least 2 completions", "--group-size", "1")
online_setting("nobody to bootstrap", r"--truncated-completions: only a critic", "--truncated-completions=bootstrapped")
online_setting("a critic without use", r"--critic: has no effect without a recipe", "--critic", "model", command="rloo")
online_setting("a clip of no values", r"--value-clip: has no effect without a recipe", "--value-clip", "0.2")
online_setting("dpo without a leash", r"--kl-coef: .*above 0", "--kl-coef", "0", command="rl --recipe online_dpo")
online_setting("a leash on nothing", r"--kl-target: has no effect", "--kl-target", "1", "--kl-coef", "0")
online_setting("an offline setting", r"--sample-tokens: has no effect without an offline loop", "--sample-tokens", "9")
online_setting("more parts than prompts", r"--num-mini-batches: 5 parts .* of 4 prompts", "--num-mini-batches", "5")
online_setting("dropout of a policy", r"--lora-dropout: ", "--lora-rank", "2", "--lora-dropout", "0.1")
online_setting("an adapter that moves its base", r"--reference-every: ", "--lora-rank", "2", "--reference-every", "2")
online_setting("a critic on an adapter", r"--critic: .*\n  → --critic MODEL", "--lora-rank", "2", command="ppo")
online_setting("greedy sampling", r"--temperature: is 0\.0, but must be above 0", "--temperature", "0", "--top-k", "5")
online_setting("top-k below nothing", r"--top-k: -1 is out of range", "--top-k=-1")
online_setting("top-p of nothing", r"--top-p: 0\.0 is out of range", "--top-p", "0")
online_setting("min-p above all", r"--min-p: 1\.5 is out of range", "--min-p", "1.5")
online_setting("sampling in no known precision", r"--rollout-dtype", "--rollout-dtype", "float16")
online_setting("a rollout too large for its room", r"max_batch_tokens: .*\n  → \d+ or more", "--max-batch-tokens", "6")
online_setting("answers longer than the context", r"--max-new-tokens: the model reads 128", "--max-new-tokens", "128")
online_setting("prompts longer than the room", r"asked\.jsonl: no prompt is left", "--max-new-tokens", "125")
online_setting("weights for other rewards", r"--reward-weights: 2 weights for 1 rewards", "--reward-weights", "1", "2")
online_setting("a weight that is none", r"--reward-weights: \(nan,\) are not all finite", "--reward-weights", "nan")
online_setting("no time for a reward", r"--reward-timeout: 0\.0 is out of range", "--reward-timeout", "0")
online_setting(
    "no such reward", r"nonsense: no such folder\n.*other rewards are exact, regex", "--reward", "./nonsense"
)
online_setting("no such reward file", r"--reward gone\.py: no such file", "--reward", "gone.py:f")
online_setting(
    "no such reward function", r"closeness\.py:f'?: has no function 'f'\n  → it has", "--reward=closeness.py:f"
)
online_setting(
    "a model that is no reward", r"model: is not a reward model: it has no score head", "--reward", "./model"
)
online_setting("a pattern that is none", r"--reward: '\(' is no regular expression", "--reward", "regex:(")
online_setting("no scores of steps", r"--reward: recipe grpo_process needs scores", command="rl --recipe grpo_process")
online_setting("no such critic", r"gone: no such folder", "--critic", "./gone", command="ppo")


def reward_fault(function: str, message: str, *flags: str) -> None:
    """A reward of ``closeness.py`` that fails when it is called."""
    fault(f"a reward that is {function}", message)(lambda home: online("--reward", f"closeness.py:{function}", *flags))


reward_fault("dividing", r"reward 'dividing', sample 0 \(.*asked\.jsonl:\d+.*\): raises ZeroDivisionError.*py:\d+")
reward_fault("wrong_length", r"reward 'wrong_length', sample 1 .*: gives 1 scores for 8 samples\n  → return one")
reward_fault("not_finite", r"reward 'not_finite', sample 0 .*: gives nan, not a finite number\n  → return None")
reward_fault("wordy", r"reward 'wordy', sample 0 .*: gives str 'good', not a number")
reward_fault("silent", r"none of the rewards applies \(silent: all None\)\n  → add a reward")
reward_fault("hanging", r"reward 'hanging', .*did not come back within 0\.2 s, at .*\n  →", "--reward-timeout", "0.2")


@fault("no prompts", r"--data: no prompts are given")
def _(home: Home) -> list[str]:
    return ["grpo", "--model", "model", *ONLINE, "--output", "out"]


@fault("no reward", r"--reward: no reward is given\n  → --reward exact")
def _(home: Home) -> list[str]:
    return ["grpo", "--model", "model", "--data", "asked.jsonl", "--max-new-tokens", "4", "--output", "out"]


@fault("a reward whose column is missing", r"exact.*'answer'|'answer'.*exact")
def _(home: Home) -> list[str]:
    return online("--reward", "exact", "--data", home.rows("d.jsonl", {"prompt": "1+1="}))


@fault("a reward file that does not parse", r"bad\.py:f'?: can't be imported: SyntaxError.*\n  → mend the code")
def _(home: Home) -> list[str]:
    return online("--reward", home.write("bad.py", "def f(:\n") + ":f")


@fault("rows without a prompt", r"d\.jsonl:2: ")
def _(home: Home) -> list[str]:
    return online("--data", home.rows("d.jsonl", {"prompt": "1+1="}, {"answer": "2"}))


@fault("no such recipe in a file", r"--recipe: there is no recipe 'gppo'\n  → did you mean ppo")
def _(home: Home) -> list[str]:
    return ["rl", "--config", home.write("c.yaml", "recipe: gppo\n")]


@fault("another verb's file", r"--recipe: is ppo, but the command is trueup grpo")
def _(home: Home) -> list[str]:
    return ["grpo", "--config", home.write("c.yaml", "recipe: ppo\n")]


@fault("another recipe", r"online/config\.yaml: .*other settings \(.*recipe: grpo then, rloo now")
def _(home: Home) -> list[str]:
    return resumed_online(command="rloo")


@fault("an offline run's folder", r"half/config\.yaml: this run was started with other settings")
def _(home: Home) -> list[str]:
    return resumed_online("--output", "half")


@fault("a changed setting of sampling", r"other settings \(max_batch_tokens: None then, 50 now\)")
def _(home: Home) -> list[str]:
    return resumed_online("--max-batch-tokens", "50")


@fault("another reward", r"other settings \(reward: \['closeness\.py:closeness'\] then, \['exact'\] now\)")
def _(home: Home) -> list[str]:
    return resumed_online("--reward", "exact")


@fault("changed code of a reward", r"online: not what this run was started with: rewards\n  → bring back the rewards")
def _(home: Home) -> list[str]:
    home.edit("closeness.py", lambda content: content.replace(b"/ 8", b"/ 9"))
    return resumed_online()


@fault("changed prompts", r"online: not what this run was started with: training data\n")
def _(home: Home) -> list[str]:
    home.edit("asked.jsonl", lambda content: content.replace(b"0+1=", b"1+0=", 1))
    return resumed_online()


@fault("changed answers", r"online: not what this run was started with: training data\n")
def _(home: Home) -> list[str]:
    home.edit("asked.jsonl", lambda content: content.replace(b'"answer": "3"', b'"answer": "4"', 1))
    return resumed_online()


@fault("a changed exam", r"online: not what this run was started with: held-out data\n")
def _(home: Home) -> list[str]:
    home.edit("exam.jsonl", lambda content: content + b'{"prompt": "3+3=", "answer": "6"}\n')
    return resumed_online()


def reward_model(home: Home, name: str) -> str:
    """A reward model of the tiny model's size."""
    made = load_reward_model(home.path / "model", dtype="float32", seed=1)
    merge_and_save(made.model, home.path / name)
    made.tokenizer.save_pretrained(home.path / name)
    return f"./{name}"


def trained_further(home: Home, name: str) -> None:
    path = home.path / name / "model.safetensors"
    save_file({name: 1.01 * tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


@fault("a reward model that was trained on", r"out: not what this run was started with: rewards\n")
def _(home: Home) -> list[str]:
    command = online("--reward", reward_model(home, "judge"), "--resume", "auto", "--quiet")
    assert run(command) == 0
    trained_further(home, "judge")
    return command


@fault("a critic that was trained on", r"out: not what this run was started with: critic\n")
def _(home: Home) -> list[str]:
    command = online("--critic", reward_model(home, "judge"), "--resume", "auto", "--quiet", command="ppo")
    assert run(command) == 0
    trained_further(home, "judge")
    return command


@fault("a full disk in the middle of a rollout", r"step-000004: no room to write it; step-000003 is whole\n  → free")
def _(home: Home) -> list[str]:
    home.patch.setattr("trueup.runs.checkpoint.sync_tree", full_disk)
    return resumed_online()


@fault("a full disk at the critic", r"no room to write it; there is no checkpoint yet")
def _(home: Home) -> list[str]:
    home.patch.setattr("trueup.trainers.policy.save_critic", full_disk)
    return online(command="ppo")


@fault("a full disk at the samples", r"out/samples\.jsonl: no room to write it\n  → free some space")
def _(home: Home) -> list[str]:
    home.patch.setattr(
        "trueup.runs.folder.RunFolder.samples", property(lambda folder: FullFile(folder.path, "samples"))
    )
    return online("--eval-data", "exam.jsonl")


@fault("a reward that fails later", r"reward 'closeness', .*: raises OSError: the disk with the answers is gone")
def _(home: Home) -> list[str]:
    home.write("broken", "")
    return resumed_online("--save-every", "99")


@fault(
    "no memory to sample",
    r"out of memory while sampling, with room for 48 tokens at once\n  → start anew with --max-batch-tokens 24",
)
def _(home: Home) -> list[str]:
    home.patch.setattr("trueup.rollout.torch_engine.TorchEngine._sample", no_memory)
    return online()


@fault("no memory to learn", r"with (\d+) tokens in one pass\n  → go on with --resume auto and --tokens-per-batch \d+")
def _(home: Home) -> list[str]:
    home.patch.setattr("trueup.trainers.policy.policy_loss", no_memory)
    return resumed_online()


@fault("no memory for one answer", r"(?s)with \d+ tokens in one pass, all of one row.*--max-new-tokens 2")
def _(home: Home) -> list[str]:
    home.patch.setattr("trueup.trainers.policy.policy_loss", no_memory)
    return online("--tokens-per-batch", "1")


@fault("no memory for the critic", r"out: out of memory\n  → go on with --resume auto and --tokens-per-batch 2048")
def _(home: Home) -> list[str]:
    home.patch.setattr("trueup.trainers.rollouts.critic_values", no_memory)
    return online(command="ppo")


@fault("a policy's losses that are not finite", r"out/bad_batches\.jsonl: 2 steps had a loss or gradient that is not")
def _(home: Home) -> list[str]:
    flags = ["--learning-rate", "1e30", "--optimizer", "sgd", "--max-skipped-steps", "2", "--inner-epochs", "4"]
    return online(*flags, "--max-steps", "4")


@fault("a critic's losses that are not finite", r"out/bad_batches\.jsonl: 2 steps had a loss or gradient that is not")
def _(home: Home) -> list[str]:
    flags = ["--critic-learning-rate", "1e30", "--optimizer", "sgd", "--max-skipped-steps", "2", "--inner-epochs", "4"]
    return online(*flags, "--max-steps", "4", "--num-mini-batches", "1", "--critic-warmup", "9", command="ppo")


@fault("a policy that can't be sampled from", r"logits are not finite .*\n  → look at the model's weights")
def _(home: Home) -> list[str]:
    return online("--learning-rate", "1e30", "--optimizer", "sgd", "--max-steps", "5")


def signal_in(home: Home, owner: Any, name: str, *numbers: int, after: int = 1) -> None:
    """The signals arrive in the middle of the ``after``-th call of a function."""
    called, count = getattr(owner, name), 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        for number in numbers if count == after else ():
            os.kill(os.getpid(), number)
            time.sleep(0.05)
        return called(*arguments, **options)

    home.patch.setattr(owner, name, interrupted)


SAMPLING = (TorchEngine, "_sample", 2)
SCORING = (Reward, "call", 1)
LEARNING = (policy, "learn", 1)
EVALUATION = (evaluation, "pass_at_k_metrics", 1)


def interrupts(name: str, place: tuple[Any, str, int], step: int) -> None:
    """Once, once by SIGTERM, and twice. ``step``: the one that is finished before the run stops."""
    owner, function, after = place
    for numbers, message, code in (
        ([signal.SIGINT], rf"interrupted after step {step}, which is saved\n  → --resume auto goes on", 130),
        ([signal.SIGTERM], rf"interrupted after step {step}, which is saved", 143),
        ([signal.SIGINT] * 2, r"stopped at once: --resume auto goes on from the last checkpoint", 130),
    ):

        @fault(f"{'+'.join(each.name for each in numbers)} in {name}", message, code=code)
        def _(home: Home, numbers: list[Any] = numbers) -> list[str]:
            signal_in(home, owner, function, *numbers, after=after)
            return resumed_online("--save-every", "99")


interrupts("learning", LEARNING, 4)
interrupts("sampling", SAMPLING, 5)
interrupts("scoring", SCORING, 5)
interrupts("evaluation", EVALUATION, 6)


# ------------------------------------------------------------------------------------------------------- the test


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, pairs: list[Any]) -> Path:
    """What every case begins with."""
    folder = tmp_path_factory.mktemp("origin")
    shutil.copytree(tiny_model, folder / "model")
    asked = [{"prompt": pair["prompt"], "answer": pair["chosen"]} for pair in pairs]
    for name, rows in {"pairs": pairs[:16], "held": pairs[16:], "asked": asked[:16], "exam": asked[16:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "closeness.py").write_text(CLOSENESS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TRUEUP_KEEP_MEMORY", "0")
        assert main(["sft", "--model", "model", "--data", "pairs.jsonl", *HALF, "--quiet"]) == 0
        assert main(["grpo", *HALF_ONLINE, "--quiet"]) == 0
    for name, last in (("half", 2), ("online", 3)):
        for path in (folder / name / "checkpoints").iterdir():
            if path.name > f"step-{last:06d}":
                shutil.rmtree(path)
    return folder


@pytest.fixture
def home(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    folder = Path(shutil.copytree(origin, tmp_path / "home"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TRUEUP_KEEP_MEMORY", "0")
    monkeypatch.setenv("TRUEUP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    home = Home(folder, monkeypatch)
    yield home
    for process in home.processes:
        process.kill()
        process.communicate()


def run(argv: list[str]) -> int:
    try:
        return main(argv)
    except SystemExit as left:
        return int(left.code or 0)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_whole(checkpoint: Path) -> bool:
    try:
        check_checkpoint(checkpoint)
    except CheckpointError:
        return False
    return True


def whole_checkpoints(folder: Path) -> set[str]:
    """Below ``folder``, by their paths."""
    return {str(path.relative_to(folder)) for path in folder.rglob("checkpoints/step-*") if is_whole(path)}


def check_nothing_half_written(folder: Path) -> None:
    """No temporary file, no lock, no unfinished checkpoint; settings and environment can be read; records are lines."""
    for path in folder.rglob("*"):
        assert not re.fullmatch(r"\..+", path.name), path
    for name in ("config.yaml", "environment.json"):
        if (folder / name).exists():
            text = (folder / name).read_text()
            assert values_from_yaml(text) if name == "config.yaml" else json.loads(text)
    for path in folder.glob("*.jsonl"):
        assert path.read_bytes().endswith(b"\n")
        assert all(json.loads(line) for line in path.read_text().splitlines())
    assert whole_checkpoints(folder) == {str(path.relative_to(folder)) for path in folder.glob("checkpoints/step-*")}


@pytest.mark.parametrize(("make", "message", "code"), FAULTS)
def test_fault(make: Make, message: str, code: int, home: Home, capfd: pytest.CaptureFixture[str]):
    argv = make(home)
    before = contents(home.path)
    safe = whole_checkpoints(home.path)
    assert run(argv) == code
    said = capfd.readouterr().err
    assert re.search(message, said), said
    assert "Traceback" not in said
    for process in home.processes:
        process.communicate(b"")
    after = contents(home.path)
    changed = {name for name in before if after.get(name) != before[name]}
    # A run that was resumed writes its own records; whatever else was there is as it was.
    assert {name for name in changed if not name.startswith(("half/", "online/", "out/"))} == set()
    assert safe <= whole_checkpoints(home.path)
    if "out" in argv and (home.path / "out").is_dir():
        check_nothing_half_written(home.path / "out")
    if code != 2 or not changed:
        return
    logs = {"metrics.jsonl", "samples.jsonl"}
    assert {Path(name).name for name in changed if name.endswith(".jsonl")} <= logs


def test_a_refused_resume_cuts_nothing(home: Home, capfd: pytest.CaptureFixture[str]):
    """What was logged after the last checkpoint is still there when the run can't go on."""
    before = (home.path / "half" / "metrics.jsonl").read_bytes()
    home.edit("held.jsonl", lambda content: content + GOOD.encode())
    assert run(resumed()) == 2
    assert "held-out data" in capfd.readouterr().err
    assert (home.path / "half" / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_costs_only_its_own_steps(home: Home, origin: Path):
    """Bit rot in the newest checkpoint: the one before is taken, with a warning, and the run ends as it would have."""
    home.edit("half/checkpoints/step-000002/state/state.pt", lambda content: content[:-9] + b"x" + content[-8:])
    with pytest.warns(UserWarning, match="kept as damaged-step-000002"):
        assert run(resumed("--quiet")) == 0
    times = re.compile(r', "step_seconds".*?(?=})')
    runs = [times.sub("", (folder / "half" / "metrics.jsonl").read_text()) for folder in (home.path, origin)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(("call", "saved"), [(1, "step-000004"), (2, "step-000006")])
def test_a_reward_that_fails_costs_no_step(
    call: int, saved: str, home: Home, origin: Path, capfd: pytest.CaptureFixture[str]
):
    """In the third rollout, or in the last evaluation: what was learned is saved, and the run ends as it would."""
    called, count = Reward.call, 0

    def failing(reward: Reward, samples: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            home.write("broken", "")
        return called(reward, samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reward, "call", failing)
        assert run(resumed_online("--save-every", "99")) == 2
    assert "the disk with the answers is gone" in capfd.readouterr().err
    assert sorted(path.name for path in home.path.glob("online/checkpoints/*"))[-1] == saved
    (home.path / "broken").unlink()
    assert run(resumed_online("--save-every", "99", "--quiet")) == 0
    assert metrics_of(home.path / "online") == metrics_of(origin / "online")


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """What a run measured, times apart."""
    return [
        {name: value for name, value in record.items() if not name.endswith(("_seconds", "_per_second"))}
        for record in read_lines(folder / "metrics.jsonl")
    ]


def test_an_interrupted_rollout_goes_on_as_if_nothing_had_been(home: Home, origin: Path):
    signal_in(home, TorchEngine, "_sample", signal.SIGINT, after=2)
    assert run(resumed_online("--save-every", "99", "--quiet")) == 130
    assert run(resumed_online("--save-every", "99", "--quiet")) == 0
    assert metrics_of(home.path / "online") == metrics_of(origin / "online")


def test_what_may_change_changes_nothing(home: Home, origin: Path):
    flags = ["--reward-timeout", "50", "--keep-checkpoints", "3", "--max-skipped-steps", "9"]
    assert run(resumed_online(*flags, "--quiet")) == 0
    assert metrics_of(home.path / "online") == metrics_of(origin / "online")


@pytest.mark.parametrize("command", ["grpo", "rl"])
def test_its_config_repeats_an_online_run(command: str, home: Home, origin: Path):
    assert run([command, "--config", "online/config.yaml", "--output", "out", "--quiet"]) == 0
    assert metrics_of(home.path / "out") == metrics_of(origin / "online")


def test_a_tracker_that_fails_harms_no_online_run(home: Home):
    class Broken:
        id = None

        def __init__(self, run: Any) -> None:
            raise ConnectionError("no network")

    home.patch.setitem(TRACKERS, "tensorboard", Broken)
    home.patch.setattr("trueup.runs.session.require_trackers", lambda names: None)
    with pytest.warns(UserWarning, match="tensorboard is switched off, the run goes on without it"):
        assert run(online("--tracker", "tensorboard", "--quiet")) == 0


def test_sampling_that_cuts_tokens_off_is_warned_of(home: Home):
    with pytest.warns(UserWarning, match=r"top_k, top_p in training: tokens that are never sampled"):
        assert run(online("--top-k", "5", "--top-p", "0.9", "--quiet")) == 0


def test_a_run_that_is_all_warm_up_says_so(home: Home, capfd: pytest.CaptureFixture[str]):
    assert run(online("--warmup-steps", "2", "--critic-warmup", "2", command="ppo --num-mini-batches 1")) == 0
    said = capfd.readouterr().out
    assert "all 2 steps are warm-up: the peak learning rate comes after step 2" in said
    assert "warm-up of the critic: the policy stays as it is" in said


def test_there_are_enough_of_them():
    assert len(FAULTS) >= 140

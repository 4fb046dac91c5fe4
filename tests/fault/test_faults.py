"""Every mistake ends in one message that says where and what to do, exit code 2, and nothing lost or half-written.

Each case is made in a folder of its own that holds a tiny model (``model``), pairs (``pairs.jsonl``), held-out pairs
(``held.jsonl``) and a run that was killed after its second checkpoint (``half``); the command runs inside it.
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
from trueup.models.scratch import make_model
from trueup.runs.checkpoint import check_checkpoint
from trueup.runs.settings import values_from_yaml

HALF = ["--output", "half", "--batch-size", "4", "--num-epochs", "2", "--save-every", "1", "--keep-checkpoints", "9"]
HALF += ["--eval-data", "held.jsonl", "--learning-rate", "1e-2", "--num-samples", "2", "--sample-tokens", "4"]


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
    home.patch.setattr("trueup.trainers.session.RunFolder.metrics", property(lambda folder: FullFile(folder.path)))
    return on("sft")


class FullFile(type(Path())):
    """``metrics.jsonl`` on a disk that is full."""

    def __new__(cls, folder: Path) -> FullFile:
        return super().__new__(cls, folder / "metrics.jsonl")

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


# ------------------------------------------------------------------------------------------------------- the test


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, pairs: list[Any]) -> Path:
    """What every case begins with."""
    folder = tmp_path_factory.mktemp("origin")
    shutil.copytree(tiny_model, folder / "model")
    for name, rows in (("pairs.jsonl", pairs[:16]), ("held.jsonl", pairs[16:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TRUEUP_KEEP_MEMORY", "0")
        assert main(["sft", "--model", "model", "--data", "pairs.jsonl", *HALF, "--quiet"]) == 0
    for path in (folder / "half" / "checkpoints").iterdir():
        if path.name > "step-000002":
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
    return {path.name for path in folder.glob("checkpoints/step-*") if is_whole(path)}


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
    assert whole_checkpoints(folder) == {path.name for path in folder.glob("checkpoints/step-*")}


@pytest.mark.parametrize(("make", "message", "code"), FAULTS)
def test_fault(make: Make, message: str, code: int, home: Home, capfd: pytest.CaptureFixture[str]):
    argv = make(home)
    before = contents(home.path)
    safe = whole_checkpoints(home.path / "half")
    assert run(argv) == code
    said = capfd.readouterr().err
    assert re.search(message, said), said
    assert "Traceback" not in said
    for process in home.processes:
        process.communicate(b"")
    after = contents(home.path)
    changed = {name for name in before if after.get(name) != before[name]}
    # A run that was resumed writes its own records; whatever else was there is as it was.
    assert {name for name in changed if not name.startswith("half/")} == set()
    assert safe <= whole_checkpoints(home.path / "half")
    if "out" in argv and (home.path / "out").is_dir():
        check_nothing_half_written(home.path / "out")
    if code != 2 or not changed:
        return
    assert {name for name in changed if name.endswith(".jsonl")} <= {"half/metrics.jsonl", "half/samples.jsonl"}


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


def test_there_are_enough_of_them():
    assert len(FAULTS) >= 40

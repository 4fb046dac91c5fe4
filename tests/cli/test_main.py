from __future__ import annotations

import ctypes
import os
import platform
import resource
import subprocess
import sys
import types
from dataclasses import dataclass

import pytest

import trueup
from trueup.cli import main as module
from trueup.cli.main import COMMANDS, Command, main
from trueup.cli.memory import keep_freed_memory
from trueup.errors import DataError
from trueup.runs.settings import to_yaml


@dataclass(frozen=True, kw_only=True)
class TrySettings:
    """Settings of a command that does what it is told."""

    outcome: str = "done"
    """What happens."""
    output: str = "x"
    """Where to."""


def attempt(settings: TrySettings) -> None:
    print(f"{settings.outcome} {settings.output}")
    match settings.outcome:
        case "mistake":
            raise DataError("not a row", where="data.jsonl:3", way_out="mend it")
        case "interrupt":
            raise KeyboardInterrupt
        case "bug":
            raise ZeroDivisionError("a bug")


@pytest.fixture
def try_command(monkeypatch):
    """A command ``try`` and a preset of it, without anything heavy."""
    fake = types.ModuleType("trueup_try")
    fake.__dict__.update(
        TrySettings=TrySettings,
        attempt=attempt,
        preset=lambda argv: TrySettings(output="preset"),
        __name__="trueup_try",
    )
    monkeypatch.setitem(sys.modules, "trueup_try", fake)
    monkeypatch.setitem(module.COMMANDS, "try", Command("Try", "trueup_try", "TrySettings", "attempt"))
    monkeypatch.setitem(
        module.COMMANDS, "try again", Command("Preset", "trueup_try", "TrySettings", "attempt", "preset")
    )
    monkeypatch.setenv("TRUEUP_KEEP_MEMORY", "0")


def test_a_command_runs_with_its_settings(try_command, capsys):
    assert main(["try", "--output", "there"]) == 0
    assert capsys.readouterr().out == "done there\n"


def test_the_longer_name_wins_and_a_preset_changes_defaults(try_command, capsys):
    assert main(["try", "again"]) == 0
    assert main(["try", "again", "--output", "mine"]) == 0
    assert capsys.readouterr().out == "done preset\ndone mine\n"


def test_a_run_s_config_repeats_it(try_command, capsys, tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(TrySettings(outcome="again")))
    assert main(["try", "--config", str(tmp_path / "config.yaml"), "--output", "elsewhere"]) == 0
    assert capsys.readouterr().out == "again elsewhere\n"


def test_a_mistake_is_one_message_without_traceback_and_code_2(try_command, capsys):
    assert main(["try", "--outcome", "mistake"]) == 2
    assert capsys.readouterr().err == "trueup: data.jsonl:3: not a row\n  → mend it\n"


def test_a_mistake_in_a_settings_file_is_code_2(try_command, capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("outptu: x\n")
    assert main(["try", "--config", str(tmp_path / "c.yaml")]) == 2
    assert capsys.readouterr().err == (
        f"trueup: {tmp_path / 'c.yaml'}:1: outptu: unknown setting\n  → did you mean output?\n"
    )


def test_a_parse_error_is_code_2(try_command, capsys):
    with pytest.raises(SystemExit) as raised:
        main(["try", "--outptu", "x"])
    assert raised.value.code == 2
    assert "--output" in capsys.readouterr().err


def test_an_interrupt_is_code_130(try_command, capsys):
    assert main(["try", "--outcome", "interrupt"]) == 130
    assert capsys.readouterr().err == "trueup: interrupted\n"


def test_a_bug_keeps_its_traceback(try_command):
    with pytest.raises(ZeroDivisionError):
        main(["try", "--outcome", "bug"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["stf"], "there is no command 'stf'\n  → did you mean sft?"),
        (["prefrence"], "did you mean preference?"),
        (["zzzz"], "`trueup --help` lists the commands"),
        (["data"], "'data' needs a second word\n  → trueup data check"),
        (["data", "chekc"], "there is no command 'data chekc'\n  → trueup data check"),
        (["--model", "x"], "there is no command '--model'"),
        ([], "usage: trueup COMMAND"),
    ],
)
def test_a_wrong_command_says_what_there_is(capsys, argv, message):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out and command.summary in out for name, command in COMMANDS.items())
    assert main(["data", "--help"]) == 0
    out = capsys.readouterr().out
    assert "data check" in out
    assert "sft" not in out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"trueup {trueup.__version__}\n"


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "trueup", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"trueup {trueup.__version__}\n")
    done = subprocess.run([sys.executable, "-m", "trueup", "stf"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")


ENDLESS = """
import sys, types
from dataclasses import dataclass
from trueup.cli import main as module

@dataclass
class Settings:
    pass

def endless(settings):
    while True:
        print("line")

sys.modules["endless"] = types.SimpleNamespace(Settings=Settings, endless=endless)
module.COMMANDS["endless"] = module.Command("Endless", "endless", "Settings", "endless")
sys.exit(module.main(["endless"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_reader_that_goes_away_ends_the_command_quietly():
    with subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


HEAVY = {"torch", "transformers", "numpy", "datasets", "pyarrow", "peft"}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_nothing_heavy(command):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "trueup", *command.split(), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: trueup")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "trueup" in imported
    assert not imported & HEAVY


@pytest.mark.skipif(os.getloadavg()[0] > 2 * (os.cpu_count() or 1), reason="too much else runs here to time anything")
@pytest.mark.parametrize("command", ["", "sft"])
def test_help_is_instant(command):
    """Half a second of processor time at most, the best of up to five tries."""
    seconds = []
    while len(seconds) < 5 and min(seconds, default=1) >= 0.5:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "trueup", *command.split(), "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 0.5


def test_the_allocator_is_left_alone_when_told_so(monkeypatch):
    monkeypatch.setenv("TRUEUP_KEEP_MEMORY", "0")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("touched"))
    assert keep_freed_memory() is False


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.delenv("TRUEUP_KEEP_MEMORY", raising=False)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("touched"))
    assert keep_freed_memory() is False


FAULTS = """
import resource
from trueup.cli.memory import keep_freed_memory

def faults_of_a_big_block():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = b"x" * 50_000_000
    del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory()
print(faults_of_a_big_block(), faults_of_a_big_block())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_used_again_without_page_faults():
    environment = {name: value for name, value in os.environ.items() if name != "TRUEUP_KEEP_MEMORY"}
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, env=environment, check=True)
    first, second = map(int, done.stdout.split())
    assert second < first / 10

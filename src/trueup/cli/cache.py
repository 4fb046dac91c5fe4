"""``trueup cache``: what is kept between runs, and how to be rid of it."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trueup.errors import SettingsError
from trueup.runs.settings import check_choices, check_range, check_used

DAY = 24 * 3600


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """List what is kept between runs: log-probs of references, models that came in a wheel."""

    clear: Literal["nothing", "reference", "models", "all"] = "nothing"
    """What to remove: log-probs of references, models, or all. A run that needs them makes them anew."""
    older_than: float = 0.0
    """With --clear: remove only what is older than this many days. Log-probs are as old as their last use."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, "older_than", at_least=0)
        check_used(self, self.clear != "nothing", "--clear", "older_than")


@dataclass(frozen=True)
class Entry:
    """A file or folder of the cache."""

    kind: str
    path: Path
    num_bytes: int
    days: float
    """Its age. Log-probs are made young again by every run that uses them."""
    about: str


def cache(settings: CacheSettings) -> None:
    """List the entries, or remove those that are asked for. Raises ``SettingsError`` for one that can't be removed."""
    from trueup.models.wheel import cache_folder

    found = entries(cache_folder())
    if settings.clear != "nothing":
        found = [each for each in found if settings.clear in (each.kind, "all") and each.days >= settings.older_than]
        for entry in found:
            remove(entry.path)
    for entry in found:
        print(f"{entry.kind:9}  {size(entry.num_bytes):>9}  {age(entry.days):>9}  {entry.about}")
    total = f"{len(found)} {'entry' if len(found) == 1 else 'entries'}, {size(sum(each.num_bytes for each in found))}"
    print(f"{cache_folder()}: {total}{'' if settings.clear == 'nothing' else ' removed'}")


def entries(folder: Path) -> list[Entry]:
    """What lies in the cache, the youngest first."""
    found = []
    for path in [*folder.glob("reference/*"), *folder.glob("models/*")]:
        with suppress(FileNotFoundError):  # a run is writing here, and renamed it
            days = (time.time() - path.stat().st_mtime) / DAY
            files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
            num_bytes = sum(each.stat().st_size for each in files)
            found.append(Entry(path.parent.name, path, num_bytes, days, about(path)))
    return sorted(found, key=lambda entry: entry.days)


def about(path: Path) -> str:
    """What an entry is: a model's name; of log-probs, the model and the data that they are of, as far as known."""
    if path.name.startswith("."):
        return f"left by a run that was killed, or being written: {path.name}"
    if path.suffix != ".safetensors":
        return path.name
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            known = file.metadata() or {}
    except (OSError, SafetensorError):
        return f"{path.name}, damaged"
    return ", ".join(known[name] for name in ("model", "data") if known.get(name)) or path.name


def remove(path: Path) -> None:
    """Delete a file or folder. Raises ``SettingsError``."""
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError as error:
        raise SettingsError(f"can't be removed ({error.strerror or error})", where=str(path)) from error


def size(num_bytes: int) -> str:
    """``1.2 MB``."""
    value, unit = num_bytes / 1e3, "kB"
    for larger in ("MB", "GB", "TB"):
        if value >= 1000:
            value, unit = value / 1000, larger
    return f"{value:,.1f} {unit}"


def age(days: float) -> str:
    """``3 days``; of less than two, hours."""
    return f"{days:.0f} days" if days >= 2 else f"{24 * days:.0f} hours"

"""The recipes' pages say what the code does: settings, commands, links and the tests that they name."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from trueup.cli.iterate import IterateSettings
from trueup.cli.main import COMMANDS
from trueup.recipes import RECIPES
from trueup.runs.settings import parse
from trueup.trainers.policy_settings import PolicySettings

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
PAGES = sorted((DOCS / "recipes").glob("*.md"))
TEXTS = {page.stem: page.read_text(encoding="utf-8") for page in PAGES}
TABLE = re.compile(r"^\| setting \| (?P<header>.*) \|\n\|[-|]+\|\n(?P<rows>(?:\|.*\|\n)+)", re.MULTILINE)
ITERATE = {name: value for name, value in vars(IterateSettings()).items() if name not in vars(PolicySettings())}


def effective(name: str) -> dict[str, Any]:
    """What a column of a settings table is about: a recipe's settings, or those that ``trueup iterate`` adds."""
    return ITERATE if name == "iterate" else vars(PolicySettings(**RECIPES[name].settings))


def documented() -> dict[str, dict[str, str]]:
    """Of each recipe the settings on its page, as they are written there."""
    found: dict[str, dict[str, str]] = {}
    for text in TEXTS.values():
        for table in TABLE.finditer(text):
            names = re.findall(r"`(\S+)`", table["header"])
            for row in table["rows"].splitlines():
                flag, *cells = (cell.strip() for cell in row.strip("|").split("|"))
                for name, cell in zip(names, cells, strict=False):
                    found.setdefault(name, {})[flag.strip("`").removeprefix("--").replace("-", "_")] = cell
    return found


def same(written: str, value: Any) -> bool:
    if isinstance(value, bool):
        return written == ("yes" if value else "no")
    if value is None or value == ():
        return written == "–"
    return type(value)(written.replace(",", "")) == value


def test_every_recipe_has_a_page() -> None:
    assert documented().keys() == {*RECIPES, "iterate"}
    rows = [line.split("|")[1] for line in TEXTS["index"].splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\S+)`", row)} == RECIPES.keys()


@pytest.mark.parametrize("name", [*RECIPES, "iterate"])
def test_the_settings_are_those_of_the_code(name: str) -> None:
    """All that the recipe sets is there, and whatever is there has its value, set or left as it is."""
    written, settings = documented()[name], effective(name)
    assert not (ITERATE if name == "iterate" else RECIPES[name].settings).keys() - {*written, "output"}
    wrong = {key: (cell, settings[key]) for key, cell in written.items() if not same(cell, settings[key])}
    assert not wrong


@pytest.mark.parametrize("name", RECIPES)
def test_the_parts_of_a_recipe_are_named(name: str) -> None:
    """Where the code of its equation is: the functions of its row."""
    (text,) = (text for text in TEXTS.values() if re.search(rf"\| setting \|.*`{re.escape(name)}`", text))
    row = RECIPES[name]
    assert all(f"`{part}`" in text for part in (row.advantages, row.surrogate, row.reduce))
    assert set(re.findall(r"arXiv (\d{4}\.\d{5})", row.source)) <= set(re.findall(r"\d{4}\.\d{5}", text))


def commands() -> list[str]:
    """Every ``trueup`` command on the pages, with lines that go on joined."""
    blocks = re.findall(r"```bash\n(.*?)```", "\n".join(TEXTS.values()), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("trueup ")]


@pytest.fixture
def common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of settings that the commands share, as the pages make it."""
    monkeypatch.chdir(tmp_path)
    files = re.findall(r"^cat > (\S+\.yaml) <<'END'\n(.*?)^END$", "".join(TEXTS.values()), re.DOTALL | re.MULTILINE)
    assert files
    for name, text in files:
        Path(name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line: str, common: None) -> None:
    words = shlex.split(line)[1:]
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    argv, command = words[len(name.split()) :], COMMANDS[name]
    module = import_module(command.module)
    default = getattr(module, command.defaults)(argv) if command.defaults else None
    settings = parse(getattr(module, command.settings), argv, f"trueup {name}", "", default)
    assert settings.output.startswith("runs/")


def test_every_recipe_has_a_run() -> None:
    run = {match for line in commands() for match in re.findall(r"^trueup rl --recipe (\S+)", line)}
    assert run == RECIPES.keys()


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_somewhere(page: Path) -> None:
    """To a file that there is, and to a heading that it has."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def anchors(page: Path) -> set[str]:
    """Of a page's headings, made as GitHub makes them."""
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_tests_that_pages_name_exist() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md"))
    code = "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", pages))
    assert named
    assert not {name for name in named if f"def {name}(" not in code}

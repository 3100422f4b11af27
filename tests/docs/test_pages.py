"""The pages are complete, current, and do what they say."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.core import TyperGroup
from typer.main import get_command

from persistence import errors
from persistence.cli.app import app
from tests.docs.pages import DOCS, blocks, commands
from tests.docs.running import NOT_RUN, OUTPUT, PARSERS, PageRun, is_left_out
from tests.support import ROOT, make_chat
from tests.warm import Warm

# Pages that begin with an empty folder. On the others the reader has conversations in chat.db already.
FROM_NOTHING = [ROOT / "README.md", DOCS / "quickstart.md", DOCS / "index.md"]
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def test_the_navigation_has_every_page() -> None:
    with (ROOT / "mkdocs.yml").open() as file:
        navigation = YAML(typ="safe").load(file)["nav"]

    def pages(entries: list[object]) -> Iterator[str]:
        for entry in entries:
            assert isinstance(entry, dict)
            for value in entry.values():
                yield from [value] if isinstance(value, str) else pages(value)

    assert sorted(pages(navigation)) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """On a copy: links and anchors that lead nowhere are errors."""
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(DOCS, tmp_path / "docs")
    builder = Path(sys.executable).with_name("zensical")
    result = subprocess.run(
        [builder, "build", "--strict"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "site" / "quickstart" / "index.html").exists()


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_of_pages_outside_the_site(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_error_has_its_entry() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    entries = dict(re.findall(r"^## ([\w-]+)\n\n\*Exit code (\d+)\.\*", page, re.MULTILINE))
    codes = {
        error.code: str(error.exit_code)
        for _, error in inspect.getmembers(errors, inspect.isclass)
        if issubclass(error, errors.PersistenceError)
    }
    assert entries == codes


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_real(page: Path) -> None:
    """Every ``persistence`` command line in a console block or in backticks names a command and options
    that exist; every ``make`` target too."""
    text = page.read_text()
    lines = [
        command.text for block in blocks(page) if block.language == "console" for command in commands(block)
    ]
    lines += re.findall(r"`(persistence [a-z][^`\n]*|make [a-z]+)`", text)
    makefile = (ROOT / "Makefile").read_text()
    for line in lines:
        if target := re.match(r"make (\w+)", line):
            assert f"\n{target[1]}:" in makefile, line
        if found := re.search(r"(?:^|\s)persistence ((?:schema )?[a-z][a-z-]*)(.*)", line):
            known = _options(found[1])
            for option in re.findall(r"--[a-z-]+", found[2]):
                assert option in known, line


@cache
def _options(command: str) -> set[str]:
    """What a command takes."""
    found = get_command(app)
    for name in command.split():
        assert isinstance(found, TyperGroup), command
        assert name in found.commands, f"there is no command {command!r}"
        found = found.commands[name]
    return {option for parameter in found.params for option in parameter.opts} | {"--debug", "--help"}


def test_extras_exist() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    for page in PAGES:
        for names in re.findall(r"langgraph-persistence\[([\w,-]+)\]", page.read_text()):
            assert set(names.split(",")) <= extras.keys(), f"{page.name}: {names}"


def test_blocks_are_left_out_for_a_known_reason_only() -> None:
    reasons: Counter[str] = Counter()
    for block in (block for page in PAGES for block in blocks(page)):
        known = {OUTPUT, "console", "bash", "python", "sql", *PARSERS}
        assert block.language in known or is_left_out(block), f"{block}: how to run {block.language!r}?"
        if block.language == OUTPUT:
            assert not re.search(r"^\$ ", block.text, re.MULTILINE), (
                f"{block}: commands are in console blocks"
            )
        if block.remark.startswith("not run"):
            reasons[block.remark.removeprefix("not run: ")] += 1
    assert reasons.keys() <= NOT_RUN.keys()
    assert all(reasons[reason] <= most for reason, most in NOT_RUN.items()), reasons


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.timeout(300)
def test_every_block_runs(page: Path, open_folder: Path, warm: Warm, request: pytest.FixtureRequest) -> None:
    """All blocks of the page, one after the other, as a reader would run them."""
    if all(map(is_left_out, blocks(page))):
        return  # nothing to run: no database is needed
    postgres_dsn = request.getfixturevalue("postgres_dsn")
    run = PageRun(page, postgres_dsn)
    if page not in FROM_NOTHING:
        make_chat(open_folder)
    try:
        run.run(open_folder, warm.bin)
    finally:
        run.drop_roles(postgres_dsn)

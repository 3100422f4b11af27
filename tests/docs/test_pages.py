"""The pages are complete, current, and do what they say."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from persistence import errors
from tests.docs.pages import DOCS, Block, Command, blocks, commands
from tests.support import ROOT, clean_environment

# Pages that a reader follows from top to bottom: all their blocks run, in order, in one folder.
WALKTHROUGHS = [ROOT / "README.md", DOCS / "quickstart.md", DOCS / "index.md"]
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
        if found := re.search(r"(?:^|\s)persistence ((?:schema )?[a-z]+)(.*)", line):
            help_text = _help(found[1])
            for option in re.findall(r"--[a-z-]+", found[2]):
                assert option in help_text, line


_known_help: dict[str, str] = {}


def _help(command: str) -> str:
    if command not in _known_help:
        program = Path(sys.executable).with_name("persistence")
        result = subprocess.run(
            [program, *command.split(), "--help"],
            env=clean_environment() | {"COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, f"persistence {command}: {result.stderr}"
        _known_help[command] = result.stdout + " --debug"
    return _known_help[command]


@pytest.mark.parametrize("page", WALKTHROUGHS, ids=lambda page: page.name)
@pytest.mark.timeout(300)
def test_walkthrough(page: Path, tmp_path: Path) -> None:
    """All blocks of the page, one after the other, as a reader would run them."""
    script = ["set -eu"]
    checked: list[Command] = []
    for number, block in enumerate(blocks(page)):
        if block.language == "python":
            script += _python(block, number)
        elif block.language == "console":
            for command in commands(block):
                if not _is_installation(command):
                    script += [f"echo '@@ {len(checked)}'", command.text]
                    checked.append(command)
    result = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=tmp_path,
        env=clean_environment() | {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    outputs = re.split(r"^@@ \d+\n", result.stdout, flags=re.MULTILINE)[1:]
    for command, output in zip(checked, outputs, strict=True):
        for line in command.expected:
            assert line in output.splitlines(), f"{command.block}: {command.text} printed {output!r}"


def _python(block: Block, number: int) -> list[str]:
    """Write the file; run it, unless it has a name, by which the page runs it."""
    name = block.file_name or f"block_{number}.py"
    lines = [f"cat > {name} <<'END_OF_BLOCK'", block.text.rstrip("\n"), "END_OF_BLOCK"]
    return lines if block.file_name else [*lines, f"python {name}"]


def _is_installation(command: Command) -> bool:
    """Commands whose effect other tests show: the wheel's installation, and make in a fresh clone."""
    if found := re.fullmatch(r'pip install "langgraph-persistence\[(\w+)\]"', command.text):
        with (ROOT / "pyproject.toml").open("rb") as file:
            assert found[1] in tomllib.load(file)["project"]["optional-dependencies"]
        return True
    return command.text in ("make demo", "make test")

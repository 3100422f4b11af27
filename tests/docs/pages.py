"""Reads the code blocks of a page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

DOCS = ROOT / "docs"

_BLOCK = re.compile(
    r"^(?P<comment> *<!-- (?P<remark>[^\n]*) -->\n)?"
    r"(?P<indent> *)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?[^\n]*\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.M | re.S,
)
_NAME = re.compile(r"# ([\w./-]+\.\w+)\n")


@dataclass(frozen=True)
class Block:
    """One code block."""

    page: Path
    line: int
    language: str
    text: str
    title: str | None
    remark: str
    """What an HTML comment directly above it says."""

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def file_name(self) -> str | None:
        """What the title or the first line calls the file, ``# chat.py``."""
        found = _NAME.match(self.text)
        return self.title or (found[1] if found else None)


@dataclass
class Command:
    """One command of a console block, and the output that the page promises."""

    block: Block
    text: str
    expected: list[str]


def blocks(page: Path) -> list[Block]:
    """The page's code blocks, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, match.start("indent")) + 1,
            match["language"],
            _dedent(match),
            match["title"],
            match["remark"] or "",
        )
        for match in _BLOCK.finditer(text)
    ]


def commands(block: Block) -> list[Command]:
    """The commands of a console block: lines after ``$``; what follows is output."""
    found: list[Command] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append(Command(block, line.removeprefix("$ "), []))
        elif found and found[-1].text.endswith("\\"):
            found[-1].text += "\n" + line
        elif line.strip():
            assert found, f"{block}: a console block begins with a command"
            found[-1].expected.append(line)
    return found


def _dedent(match: re.Match[str]) -> str:
    indent = match["indent"]
    return "".join(line.removeprefix(indent) for line in match["text"].splitlines(keepends=True))

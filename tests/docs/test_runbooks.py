"""Each runbook does what it says: its commands, followed literally, against a real Postgres."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, Block, Command, blocks, commands
from tests.docs.running import PageRun
from tests.support import clean_environment
from tests.warm import Warm

PAGE = DOCS / "runbooks.md"
TALK = "python chat.py"


# What the application says at the end of each section. The sections of a story follow one another: each
# begins where the ones before it have left both databases.
STORIES = {
    "there, back, lost and found": {
        "Cut-over": "4 messages so far",
        "What was written is to be kept": "6 messages so far",
        "Data recovery": "",
        "Beforehand": "",
        "From an archive": "6 messages so far",
        "From a dump or a copy of the file": "",
        "Permanent rollback": "6 messages so far",
    },
    "there and back at once": {
        "Rollback within five minutes": "",
        "Nothing was written since": "4 messages so far",
    },
    "for good, while the application runs": {
        "Permanent rollback while the application runs": "4 messages so far",
    },
    "while the application runs": {
        "Cut-over while the application runs": "4 messages so far",
        "What was written is to be kept": "6 messages so far",
    },
}
BEFORE = {
    "there, back, lost and found": [],
    "there and back at once": ["persistence cut-over env:SQLITE env:POSTGRES", "chmod a-w chat.db"],
    "for good, while the application runs": [
        "persistence migrate env:SQLITE env:POSTGRES",
        "SQLITE=$POSTGRES python live.py & live=$!",
        "until [ -s stored ]; do sleep 0.1; done",
    ],
    "while the application runs": [
        "python live.py & live=$!",
        "until [ -s stored ]; do sleep 0.1; done",
    ],
}
AFTER = {
    # The page's warning: as the target of a rollback the old file is a conflict.
    "there, back, lost and found": ["! persistence migrate env:POSTGRES env:SQLITE 2>refused"],
    "there and back at once": [],
    # The application has found its database sealed, and what it was told is stored is in the new one.
    "for good, while the application runs": [
        "wait $live",
        "python stored.py chat-back.db",
        "python items.py chat-back.db",
    ],
    "while the application runs": [
        "wait $live",
        "python stored.py chat-after.db",
        "python items.py chat-after.db",
    ],
}
LIVE = """
import os
import time
import persistence
from langgraph.graph import START, MessagesState, StateGraph
from persistence.errors import SealedError
builder = StateGraph(MessagesState)
builder.add_node("reply", lambda state: {"messages": [("ai", "yes")]})
builder.add_edge(START, "reply")
with persistence.open(os.environ["SQLITE"]) as db, open("stored", "w", buffering=1) as stored:
    graph = builder.compile(checkpointer=db.checkpointer)
    for turn in range(100_000):
        thread = {"configurable": {"thread_id": f"live {turn % 7}"}}
        try:
            graph.invoke({"messages": [("user", f"{turn}")]}, thread)
            db.store.put(("live",), f"{turn % 7}", {"turn": turn})
        except SealedError:
            break
        print(turn, file=stored)
        time.sleep(0.01)
    else:
        raise SystemExit("never sealed")
"""
STORED = """
import sys
import persistence
with persistence.open("sqlite:///" + sys.argv[1]) as db:
    there = set()
    for number in range(7):
        found = db.checkpointer.get_tuple({"configurable": {"thread_id": f"live {number}"}})
        messages = found.checkpoint["channel_values"]["messages"] if found else []
        there |= {message.content for message in messages if message.type == "human"}
stored = {line.strip() for line in open("stored")}
assert stored and stored <= there, stored - there
"""
ITEMS = """
import sys
import persistence
with persistence.open("sqlite:///" + sys.argv[1]) as db:
    items = {item.value["turn"] for item in db.store.search(("live",))}
assert set(map(int, list(open("stored"))[-7:])) == items, items
"""


def heading_of(block: Block) -> str:
    """The nearest heading above a block."""
    lines = block.page.read_text().splitlines()[: block.line]
    return next(found[1] for line in reversed(lines) if (found := re.match(r"##+ (.*)", line)))


def sections() -> dict[str, list[Block]]:
    """The page's blocks by the heading they stand under; those above the first one under none."""
    found: dict[str, list[Block]] = {}
    first = PAGE.read_text().split("\n## ")[0].count("\n")
    for block in blocks(PAGE):
        found.setdefault("" if block.line <= first else heading_of(block), []).append(block)
    return found


def test_every_section_is_in_a_story() -> None:
    told = {heading for story in STORIES.values() for heading in story}
    assert sections().keys() - {""} <= told
    assert all(block.language in ("console", "python") for block in blocks(PAGE))
    assert all(block.remark == "run by tests/docs/test_runbooks.py" for block in blocks(PAGE))


@pytest.mark.parametrize("story", STORIES)
def test_runbooks(story: str, tmp_path: Path, postgres_dsn: str, warm: Warm) -> None:
    found = sections()
    (exports,), (program,) = (
        [block for block in found[""] if block.language == language] for language in ("console", "python")
    )
    assert program.file_name == "chat.py"
    for name, text in (
        ("chat.py", program.text),
        ("live.py", LIVE),
        ("stored.py", STORED),
        ("items.py", ITEMS),
    ):
        (tmp_path / name).write_text(text)
    lines = ["set -eu", *(command.text for command in commands(exports))]
    lines += [f"PERSISTENCE_DSN=$SQLITE {TALK}", *BEFORE[story]]
    checked: list[tuple[str, Command]] = []
    for heading in STORIES[story]:
        for block in found.get(heading, []):
            for command in commands(block):
                lines += [f"echo '@@ {len(checked)}'", command.text]
                checked.append((heading, command))
    lines += ["echo '@@ end'", *AFTER[story]]
    script = PageRun(PAGE, postgres_dsn).own("\n".join(lines))
    result = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=clean_environment() | {"PATH": f"{warm.bin}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    outputs = re.split(r"^@@ \w+\n", result.stdout, flags=re.MULTILINE)[1:-1]
    said = dict.fromkeys(STORIES[story], "")
    for (heading, command), output in zip(checked, outputs, strict=True):
        for line in command.expected:
            assert line in output.splitlines(), f"{command.block}: {command.text} printed {output!r}"
        if command.text == TALK:
            said[heading] = output.strip()
    assert said == STORIES[story]
    if (tmp_path / "refused").exists():
        refused = (tmp_path / "refused").read_text()
        assert "already has thread '1'" in refused
        assert "a file that does not exist yet" in refused

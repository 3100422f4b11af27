"""What tests of several folders share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

from langchain_core.messages import HumanMessage
from langgraph.checkpoint.sqlite import SqliteSaver
from psycopg.conninfo import conninfo_to_dict

from examples.trip_planner import build

ROOT = Path(__file__).resolve().parent.parent
COMMAND = str(Path(sys.executable).with_name("persistence"))

Result = subprocess.CompletedProcess[str]


def clean_environment() -> dict[str, str]:
    """The environment without settings of the person who runs the tests."""
    return {k: v for k, v in os.environ.items() if not k.upper().startswith(("PERSISTENCE_", "PG"))}


def make_chat(folder: Path) -> Path:
    """A SQLite database as the official saver writes it: one conversation over, one at a question."""
    path = folder / "chat.db"
    with SqliteSaver.from_conn_string(str(path)) as saver:
        graph = build(saver)
        for thread, text in (("bob", "Hello"), ("alice", "3 nights in Lisbon")):
            graph.invoke({"messages": [HumanMessage(text)]}, {"configurable": {"thread_id": thread}})
    return path


def query_form(conninfo: str) -> str:
    """The end of a URL: libpq accepts every keyword in a URL's query, socket folders included."""
    return "/?" + "&".join(f"{k}={quote(str(v), safe='')}" for k, v in conninfo_to_dict(conninfo).items())

"""What tests of several folders share."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import psycopg
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.sqlite import SqliteSaver
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from examples.trip_planner import build

ROOT = Path(__file__).resolve().parent.parent
COMMAND = str(Path(sys.executable).with_name("persistence"))

Result = subprocess.CompletedProcess[str]


def clean_environment() -> dict[str, str]:
    """The environment without settings of the person who runs the tests, for a machine of any speed."""
    plain = {k: v for k, v in os.environ.items() if not k.upper().startswith(("PERSISTENCE_", "PG"))}
    return plain | {"PERSISTENCE_HEALTH_TIMEOUT": "60"}


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


@contextmanager
def fresh_database(server: str, template: str | None = None) -> Iterator[str]:
    """DSN of a database of its own on a Postgres server, empty or a copy of another; dropped afterwards."""
    name = f"t_{uuid.uuid4().hex[:12]}"
    make = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
    if template is not None:
        make += sql.SQL(" TEMPLATE {}").format(sql.Identifier(str(conninfo_to_dict(template)["dbname"])))
    with psycopg.connect(server, autocommit=True) as conn:
        conn.execute(make)
    try:
        yield "postgresql://" + query_form(make_conninfo(server, dbname=name))
    finally:
        with psycopg.connect(server, autocommit=True) as conn:
            conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

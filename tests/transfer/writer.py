"""An application that goes on writing while its database is moved: ``python -m tests.transfer.writer``.

It runs graphs in several threads, replaces rows, deletes conversations, and makes some of them again. Each
line that it prints was acknowledged by the saver: ``+ thread checkpoint`` is there, ``- thread`` is gone. It
ends when the file is sealed, or its standard input is closed.
"""

from __future__ import annotations

import random
import sqlite3
import sys
import threading
from collections import Counter
from typing import Any

import psycopg
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Command
from psycopg import Connection
from psycopg.rows import DictRow, dict_row
from psycopg_pool import ConnectionPool

import persistence
from persistence.errors import SealedError
from tests.transfer import graphs

WORKERS = 3
TURNS = 5
"""Of a conversation, whose state doubles with each."""
_printing = threading.Lock()
_over = threading.Event()


def say(*words: str) -> None:
    """Print a line at once."""
    with _printing:
        sys.stdout.write(" ".join(words) + "\n")
        sys.stdout.flush()


def talk(saver: Any, thread: str, choose: random.Random) -> None:
    """A turn of a conversation, and now and then an edit, an answer, or a row that is put again."""
    graph = graphs.chat(saver)
    place = graphs.config(thread)
    graph.invoke({"messages": [HumanMessage(f"question {choose.random()}")]}, place)
    if choose.random() < 0.5:
        graph.invoke(Command(resume="yes"), place)
    if choose.random() < 0.2:
        graph.update_state(place, {"note": f"edited {choose.random()}"})
    found = saver.get_tuple(place)
    if choose.random() < 0.2:
        where = {"configurable": {**found.config["configurable"]}}
        where["configurable"].pop("checkpoint_id")
        saver.put(where, found.checkpoint, {**found.metadata, "again": choose.random()}, {})
        saver.put_writes(found.config, [("__error__", f"failed {choose.random()}")], "task")
        saver.put_writes(found.config, [("__error__", f"failed {choose.random()}")], "task")
    say("+", thread, found.checkpoint["id"])


def work(saver: Any, number: int) -> None:
    """One worker's conversations, until the file refuses them."""
    choose = random.Random(number)  # noqa: S311 - which one, not a secret
    turns = Counter[str]()
    try:
        while not _over.is_set():
            thread = f"live {number} {choose.randrange(4)}"
            turns[thread] += 1
            if choose.random() < 0.15 or turns[thread] > TURNS:
                saver.delete_thread(thread)
                say("-", thread)
                turns[thread] = 0
            talk(saver, thread, choose)
            _over.wait(choose.uniform(0, 0.2))
    except (sqlite3.IntegrityError, psycopg.IntegrityError, SealedError) as error:
        assert "has moved" in str(error)
        _over.set()


def main(path: str, kind: str) -> None:
    """Open the file, or the Postgres database, with LangGraph's own saver, or with ours."""
    if "://" in path:
        open_postgres(path, kind)
    elif kind == "official":
        with SqliteSaver.from_conn_string(path) as saver:
            saver.conn.execute("PRAGMA busy_timeout = 60000")
            saver.serde = graphs.serde()
            saver.setup()
            run(saver)
    else:
        with persistence.open(f"sqlite:///{path}?busy_timeout=60") as db:
            run(db.checkpointer)


def open_postgres(dsn: str, kind: str) -> None:
    if kind == "official":
        options = {"autocommit": True, "row_factory": dict_row}
        with ConnectionPool[Connection[DictRow]](dsn, kwargs=options, min_size=WORKERS) as pool:
            run(PostgresSaver(pool, serde=graphs.serde()))
    else:
        with persistence.open(dsn) as db:
            run(db.checkpointer)


def _stop() -> None:
    sys.stdin.read()
    _over.set()


def run(saver: Any) -> None:
    """Work until the end."""
    workers = [threading.Thread(target=work, args=(saver, number)) for number in range(WORKERS)]
    for worker in workers:
        worker.start()
    threading.Thread(target=_stop, daemon=True).start()
    for worker in workers:
        worker.join()
    say("end")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

"""An application that goes on writing to its store: ``python -m tests.transfer.store_writer``.

It puts, replaces and deletes items, with times to live and without, and reads some, which puts off when they
expire. Each line that it prints was acknowledged: ``+ key number`` is there, ``- key`` is gone. It ends when
the file, or the Postgres database, is sealed, or its standard input is closed.
"""

from __future__ import annotations

import random
import sqlite3
import sys
import threading
from typing import Any

import psycopg
from langgraph.store.postgres import PostgresStore
from langgraph.store.sqlite import SqliteStore

import persistence
from persistence.errors import SealedError
from tests.transfer.writer import say

NAMESPACE = ("live", "ü")
TTL: Any = {"refresh_on_read": True, "default_ttl": None}
_over = threading.Event()


def work(store: Any, number: int) -> None:
    """One worker's items, until they are refused."""
    choose = random.Random(number)  # noqa: S311 - which one, not a secret
    turn = 0
    try:
        while not _over.is_set():
            key = f"{number}.{choose.randrange(12)}"
            turn += 1
            if choose.random() < 0.2:
                store.delete(NAMESPACE, key)
                say("-", key)
                continue
            store.put(NAMESPACE, key, {"n": turn}, ttl=choose.choice([None, 60.0]))
            say("+", key, str(turn))
            store.get(NAMESPACE, f"{number}.{choose.randrange(12)}")
            _over.wait(choose.uniform(0, 0.02))
    except (sqlite3.IntegrityError, psycopg.IntegrityError, SealedError) as error:
        assert "has moved" in str(error)
        _over.set()


def _stop() -> None:
    sys.stdin.read()
    _over.set()


def main(path: str, kind: str) -> None:
    """Open the store with LangGraph's own class, once for each worker, or with ours."""
    threading.Thread(target=_stop, daemon=True).start()
    in_postgres = "://" in path
    if kind == "ours":
        with persistence.open(path if in_postgres else f"sqlite:///{path}?busy_timeout=60") as db:
            run([db.store, db.store])
        return
    if in_postgres:
        with (
            PostgresStore.from_conn_string(path, ttl=TTL) as first,
            PostgresStore.from_conn_string(path, ttl=TTL) as second,
        ):
            run([first, second])
        return
    with (
        SqliteStore.from_conn_string(path, ttl=TTL) as one,
        SqliteStore.from_conn_string(path, ttl=TTL) as two,
    ):
        for store in (one, two):
            store.conn.execute("PRAGMA busy_timeout = 60000")
            store.setup()
        run([one, two])


def run(stores: list[Any]) -> None:
    """Work until the end."""
    workers = [threading.Thread(target=work, args=(store, number)) for number, store in enumerate(stores)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    say("end")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

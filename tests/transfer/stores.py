"""Stores to move, written by LangGraph's own, and ways to compare what they give back."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import psycopg
from langgraph.store.base import BaseStore, Item
from langgraph.store.postgres import PostgresStore
from langgraph.store.sqlite import SqliteStore

import persistence
from persistence.transfer import Options

STORE = Options(include=["store"])
BOTH = Options(include=["checkpoints", "store"])
LIMIT = 1_000_000
Found = dict[tuple[tuple[str, ...], str], tuple[Any, ...]]


def put_some(store: BaseStore) -> None:
    """Items of many kinds: nested, in other scripts, expired, with and without a time to live."""
    for number in range(12):
        store.put(("users", str(number % 3), "memories"), f"k{number}", {"n": number, "text": f"é {number}"})
    store.put(("users",), "profile", {"nested": [{"a": [1.5, None, True]}, "日本"], "": {}, "big": 2**63 - 1})
    store.put(("users",), "soon", {"x": 1}, ttl=120)
    store.put(("users",), "gone", {"x": 1}, ttl=1)
    store.put(("Users",), "", {"empty": "key"})
    store.put(("ü ber", "'quoted\" \\ % _"), "k\n", {})


def fill(path: Path) -> Path:
    """A SQLite file with an official store; times with and without a fraction."""
    with SqliteStore.from_conn_string(str(path)) as store:
        store.setup()
        put_some(store)
    age(path)
    return path


def age(path: Path) -> None:
    """Times as they come about: an item that has expired, one that was read, one in another zone."""
    with closing(sqlite3.connect(path)) as conn, conn:
        conn.execute("UPDATE store SET expires_at = '2020-01-01 00:00:00' WHERE key = 'gone'")
        conn.execute("UPDATE store SET updated_at = '2026-02-03 04:05:06.000007' WHERE key = 'k1'")
        conn.execute(
            "UPDATE store SET created_at = '2026-02-03T04:05:06+05:30', updated_at = NULL WHERE key = 'k2'"
        )


@contextmanager
def sqlite_store(path: Path) -> Iterator[SqliteStore]:
    with SqliteStore.from_conn_string(str(path)) as store:
        yield store


@contextmanager
def postgres_store(dsn: str, schema: str | None = None) -> Iterator[PostgresStore]:
    """The official store; with a search path, since it knows no schemas."""
    option = f"&options=-csearch_path%3D{schema}" if schema else ""
    with PostgresStore.from_conn_string(dsn + option) as store:
        yield store


def official(side: Path | str) -> AbstractContextManager[BaseStore]:
    """LangGraph's own store in a SQLite file, or in a Postgres database."""
    return sqlite_store(side) if isinstance(side, Path) else postgres_store(side)


def dsn_of(side: Path | str) -> str:
    """The DSN of a file, or of a database."""
    return f"sqlite:///{side}" if isinstance(side, Path) else side


def found(store: BaseStore) -> Found:
    """Every item, by search, get and list_namespaces. SQLite's times name no zone; they are UTC."""
    items = store.search((), limit=LIMIT, refresh_ttl=False)
    assert sorted({item.namespace for item in items}) == sorted(store.list_namespaces(limit=LIMIT))
    for item in items:
        assert _plain(store.get(item.namespace, item.key, refresh_ttl=False)) == _plain(item)
    return {(item.namespace, item.key): _plain(item) for item in items}


def _plain(item: Item | None) -> tuple[Any, ...]:
    assert item is not None
    return (item.value, *(at and _utc(at) for at in (item.created_at, item.updated_at)))


def official_items_of(dsn: str) -> Found:
    """What LangGraph's own store finds."""
    if dsn.startswith("sqlite:///"):
        with sqlite_store(Path(dsn.removeprefix("sqlite:///"))) as store:
            return found(store)
    dsn, _, schema = dsn.partition("&schema=")
    with postgres_store(dsn, schema) as official:
        return found(official)


def items_of(dsn: str) -> Found:
    """What both stores find, LangGraph's and ours."""
    with persistence.open(dsn) as db:
        ours = found(cast(BaseStore, db.store))
    assert official_items_of(dsn) == ours
    return ours


def times_to_live(dsn: str) -> dict[tuple[str, str], tuple[datetime | None, float | None]]:
    """What no store shows: when an item expires, and its time to live."""
    if dsn.startswith("sqlite:///"):
        with closing(sqlite3.connect(dsn.removeprefix("sqlite:///"))) as conn:
            rows = conn.execute("SELECT prefix, key, expires_at, ttl_minutes FROM store").fetchall()
        return {(p, k): (at and _utc(datetime.fromisoformat(at)), ttl) for p, k, at, ttl in rows}
    dsn, _, schema = dsn.partition("&schema=")
    with psycopg.connect(dsn) as pg:
        query = f'SELECT prefix, key, expires_at, ttl_minutes FROM "{schema or "public"}".store'
        return {(p, k): (at, ttl) for p, k, at, ttl in pg.execute(query.encode())}


def _utc(at: datetime) -> datetime:
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def rows(path: Path) -> Mapping[str, Sequence[Any]]:
    """Every row of a SQLite store."""
    with closing(sqlite3.connect(path)) as conn:
        return {
            "store": conn.execute("SELECT * FROM store ORDER BY 1, 2").fetchall(),
            "ledger": conn.execute(
                "SELECT batch_no, digest FROM persistence_transfer_batches ORDER BY 1"
            ).fetchall(),
        }

"""What somebody in the database can do, and cannot: the table in docs/security.md, claim by claim."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import ormsgpack
import psycopg
import pytest
from langgraph.checkpoint.serde.jsonplus import EXT_CONSTRUCTOR_SINGLE_ARG

import persistence
from persistence.errors import EncryptionError
from persistence.settings import Settings
from persistence.testing.subject import at, bare

KEY = "k" * 32
SECRET = "only for Ada"


class Attacker:
    """Has the database, not the key."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.is_postgres = dsn.startswith("postgresql")
        self.writes = "checkpoint_writes" if self.is_postgres else "writes"
        self.write = "blob" if self.is_postgres else "value"
        # Where a checkpoint's values are.
        self.values, self.value = (
            ("checkpoint_blobs", "blob") if self.is_postgres else ("checkpoints", "checkpoint")
        )

    def run(self, statement: str, *parameters: object) -> list[Any]:
        if self.is_postgres:
            with psycopg.connect(self.dsn, autocommit=True) as conn:
                cursor = conn.execute(statement.replace("?", "%s").encode(), parameters)
                return cursor.fetchall() if cursor.description else []
        with closing(sqlite3.connect(self.dsn.removeprefix("sqlite:///"), isolation_level=None)) as conn:
            return conn.execute(statement, parameters).fetchall()

    def swap(self, table: str, column: str) -> None:
        """Exchange a value of the threads ``ada`` and ``bob``."""
        look = f"SELECT {column} FROM {table} WHERE thread_id = ?"
        ((ada,),), ((bob,),) = self.run(look, "ada"), self.run(look, "bob")
        self.replace(table, column, "ada", bob)
        self.replace(table, column, "bob", ada)

    def replace(self, table: str, column: str, thread: str, value: object) -> None:
        self.run(f"UPDATE {table} SET {column} = ? WHERE thread_id = ?", value, thread)


@pytest.fixture(params=["sqlite", "postgres"])
def attacker(request: pytest.FixtureRequest, tmp_path: Path) -> Attacker:
    if request.param == "postgres":
        return Attacker(request.getfixturevalue("postgres_dsn"))
    return Attacker(f"sqlite:///{tmp_path}/chat.db")


Open = Callable[..., persistence.Persistence]


@pytest.fixture
def open_(attacker: Attacker) -> Iterator[Open]:
    """Open the database as the application; one checkpoint and one write are in each of two threads."""
    settings: dict[str, Any] = {"encryption_key": KEY, "strict_msgpack": True}
    with persistence.open(attacker.dsn, settings=Settings(**settings)) as db:
        assert db.checkpointer is not None
        for name, value in (("ada", SECRET), ("bob", "for Bob")):
            stored = db.checkpointer.put(at(name), bare("1", {"x": [value]}), {}, {"x": 1})
            db.checkpointer.put_writes(stored, [("answer", [value])], "task")
        yield lambda **more: persistence.open(attacker.dsn, settings=Settings(**settings | more))


def read(open_: Open, thread: str, **settings: Any) -> tuple[Any, Any]:
    """A thread's value and write, read anew."""
    with open_(**settings) as db:
        assert db.checkpointer is not None
        found = db.checkpointer.get_tuple(at(thread))
        assert found is not None
        return found.checkpoint["channel_values"].get("x"), [write[2] for write in found.pending_writes or []]


def test_values_cannot_be_read_and_what_the_page_names_can(attacker: Attacker, open_: Open) -> None:
    assert read(open_, "ada") == ([SECRET], [[SECRET]])
    rows = [
        attacker.run(f"SELECT * FROM {table}") for table in {"checkpoints", attacker.values, attacker.writes}
    ]
    assert SECRET not in repr(rows)
    assert "ada" in repr(rows)
    assert "answer" in repr(rows), "the channel of a write"
    names = "channel_versions" in repr(rows)
    assert names is attacker.is_postgres, "on Postgres the checkpoint but for its values"


def test_changed_value_is_refused(attacker: Attacker, open_: Open) -> None:
    for table, column in ((attacker.values, attacker.value), (attacker.writes, attacker.write)):
        ((value,),) = attacker.run(f"SELECT {column} FROM {table} WHERE thread_id = ?", "ada")
        for position in (0, 20, len(value) - 1):
            changed = bytearray(value)
            changed[position] ^= 1
            attacker.replace(table, column, "ada", bytes(changed))
            with pytest.raises(EncryptionError):
                read(open_, "ada")
        attacker.replace(table, column, "ada", value)
        assert read(open_, "ada") == ([SECRET], [[SECRET]])


def test_plaintext_value_is_refused(attacker: Attacker, open_: Open) -> None:
    forged = ormsgpack.packb(["forged"])
    attacker.replace(attacker.writes, "type", "ada", "msgpack")
    attacker.replace(attacker.writes, attacker.write, "ada", forged)
    with pytest.raises(EncryptionError):
        read(open_, "ada")
    assert read(open_, "ada", allow_plaintext=True) == ([SECRET], [["forged"]])
    if attacker.is_postgres:
        values = "jsonb_set(checkpoint, '{channel_values}', '{\"x\": \"forged\"}')"
        attacker.run(f"UPDATE checkpoints SET checkpoint = {values}")
    else:
        forged = ormsgpack.packb({**bare("1", {"x": ["forged"]})})
        attacker.run("UPDATE checkpoints SET type = 'msgpack', checkpoint = ?", forged)
    with pytest.raises(EncryptionError):
        read(open_, "bob")


def test_value_of_another_row_is_accepted(attacker: Attacker, open_: Open) -> None:
    attacker.swap(attacker.values, attacker.value)
    assert read(open_, "ada") == (["for Bob"], [[SECRET]])
    assert read(open_, "bob") == ([SECRET], [["for Bob"]])
    attacker.swap(attacker.writes, attacker.write)
    assert read(open_, "bob") == ([SECRET], [[SECRET]]), "an answer that was given elsewhere"


def test_older_value_is_accepted(attacker: Attacker, open_: Open) -> None:
    look = f"SELECT {attacker.value} FROM {attacker.values} WHERE thread_id = ?"
    ((old,),) = attacker.run(look, "ada")
    with open_() as db:
        assert db.checkpointer is not None
        db.checkpointer.put(at("ada"), bare("1", {"x": ["newer"]}, {"x": 2}), {}, {"x": 2})
    assert read(open_, "ada")[0] == ["newer"]
    attacker.replace(attacker.values, attacker.value, "ada", old)
    assert read(open_, "ada")[0] == [SECRET]


def test_thread_is_shown_under_another_id(attacker: Attacker, open_: Open) -> None:
    for table in {"checkpoints", attacker.values, attacker.writes}:
        attacker.run(f"UPDATE {table} SET thread_id = 'mallory' WHERE thread_id = 'ada'")
    assert read(open_, "mallory") == ([SECRET], [[SECRET]])


def test_type_beside_a_value_is_not_protected(attacker: Attacker, open_: Open) -> None:
    attacker.replace(attacker.writes, "type", "ada", "null+aes")
    assert read(open_, "ada") == ([SECRET], [None])
    attacker.replace(attacker.writes, "type", "ada", "bytes+aes")
    assert read(open_, "ada")[1] == [ormsgpack.packb([SECRET])]


def test_value_that_runs_code(attacker: Attacker, open_: Open, tmp_path: Path) -> None:
    """``os.mkdir``, as the bytes of a value: with a key refused, strict harmless, else it is called."""
    made = tmp_path / "made"
    call = ormsgpack.packb(("os", "mkdir", str(made)))
    value = ormsgpack.packb([ormsgpack.Ext(EXT_CONSTRUCTOR_SINGLE_ARG, call)])
    attacker.replace(attacker.writes, "type", "ada", "msgpack")
    attacker.replace(attacker.writes, attacker.write, "ada", value)
    with pytest.raises(EncryptionError):
        read(open_, "ada", strict_msgpack=False)
    read(open_, "ada", allow_plaintext=True)
    assert not made.exists()
    read(open_, "ada", allow_plaintext=True, strict_msgpack=False)
    assert made.exists(), "LangGraph's default; the page warns of it"

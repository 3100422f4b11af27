"""Rows in other formats than today's msgpack: encrypted, JSON of the first savers, pickled."""

from __future__ import annotations

import json
import pickle
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Command

import persistence
from persistence import transfer
from persistence.errors import SourceError, TransferError
from persistence.settings import Settings, get_settings
from persistence.transfer import Options
from tests.transfer import graphs, make
from tests.transfer.conftest import by_thread, postgres_tuples, sqlite_tuples, without_carried_snapshots

KEY = "0123456789abcdef"
OLD_KEY = "fedcba9876543210"
SECRET = "the secret word"


def sealing(key: str = KEY) -> EncryptedSerializer:
    return EncryptedSerializer.from_pycryptodome_aes(graphs.serde(), key=key.encode())


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PERSISTENCE_ENCRYPTION_KEY", KEY)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


@pytest.fixture
def encrypted(tmp_path: Path) -> Path:
    """What the official saver wrote with a key: every kind of graph, and scalars under one version."""
    path = tmp_path / "encrypted.db"
    with SqliteSaver.from_conn_string(str(path)) as saver:
        saver.serde = sealing()
        graph, log = graphs.chat(saver), graphs.log(saver)
        graph.invoke({"messages": [HumanMessage(SECRET)]}, graphs.config("chat"))
        graph.invoke(Command(resume=SECRET), graphs.config("chat"))
        graph.invoke({"messages": [HumanMessage(SECRET)]}, graphs.config("chat"))
        for _ in range(3):
            log.invoke({"lines": [SECRET]}, graphs.config("log"))
        for values in ({"c": 1}, {"c": SECRET}, {}, {"c": [SECRET]}, {"c": None, "free": SECRET}):
            make.put(saver, "in place", values, versions={"c": "1"})
    return path


def sealed_tuples(saver: Any) -> dict[str, list[CheckpointTuple]]:
    saver.serde = sealing()
    return by_thread([without_carried_snapshots(item) for item in saver.list(None)])


def dump(dsn: str, *ignored: str) -> str:
    """Everything that LangGraph's tables and ours hold."""
    with psycopg.connect(dsn) as conn:
        tables = conn.execute(
            "SELECT quote_ident(schemaname) || '.' || quote_ident(tablename) FROM pg_tables"
            " WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        ).fetchall()
        rows = [conn.execute(f"SELECT t::text FROM {name} t".encode()).fetchall() for (name,) in tables]
    return str(rows)


def is_in(text: str, dumped: str) -> bool:
    return text in dumped or text.encode().hex() in dumped


@pytest.mark.usefixtures("key")
def test_an_encrypted_source_is_encrypted_again(encrypted: Path, postgres_dsn: str, tmp_path: Path) -> None:
    report = transfer.migrate(encrypted, postgres_dsn)
    assert report.verified
    everything = dump(postgres_dsn)
    assert not is_in(SECRET, everything)
    assert not is_in("answer 1", everything)
    with psycopg.connect(postgres_dsn) as conn:
        kinds = conn.execute(
            "SELECT DISTINCT type FROM checkpoint_blobs UNION SELECT type FROM checkpoint_writes"
        ).fetchall()
        held = conn.execute("SELECT checkpoint -> 'channel_values' FROM checkpoints").fetchall()
    assert all(kind.endswith("+aes") for (kind,) in kinds)
    assert all(value is True or "__persistence__" in value for (row,) in held for value in row.values())
    with SqliteSaver.from_conn_string(str(encrypted)) as saver:
        expected = sealed_tuples(saver)
    with PostgresSaver.from_conn_string(postgres_dsn) as other:
        found = sealed_tuples(other)
    assert found["chat"] == expected["chat"]
    assert found["log"] == expected["log"]
    with persistence.open(postgres_dsn) as db:
        assert db.checkpointer is not None
        ours = [item.checkpoint["channel_values"] for item in db.checkpointer.list(graphs.config("in place"))]
    assert ours == [{"c": None, "free": SECRET}, {"c": [SECRET]}, {}, {"c": SECRET}, {"c": 1}]
    back = tmp_path / "back.db"
    assert transfer.migrate(postgres_dsn, f"sqlite:///{back}").verified
    with SqliteSaver.from_conn_string(str(back)) as saver:
        assert sealed_tuples(saver) == expected
    assert SECRET.encode() not in back.read_bytes()
    assert transfer.verify(encrypted, postgres_dsn).equal
    assert transfer.migrate(encrypted, postgres_dsn).already_done


@pytest.mark.usefixtures("key")
def test_an_interrupted_run_goes_on(
    encrypted: Path, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batches are told by what they hold, not by the ciphertext, which is another one each time."""
    monkeypatch.setattr("persistence.transfer.engine.BATCH_RECORDS", 9)

    def stop(phase: transfer.Phase, done: int, total: int, unit_bytes: int) -> None:
        if phase == "write" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer.migrate(encrypted, postgres_dsn, progress=stop)
    report = transfer.migrate(encrypted, postgres_dsn)
    assert report.batches_skipped > 0
    assert report.batches_written > 0
    assert report.verified


def test_a_key_that_is_missing_wrong_or_old(
    encrypted: Path, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(transfer.RefusedError, match=r"encrypted .*PERSISTENCE_ENCRYPTION_KEY is not set"):
        transfer.migrate(encrypted, postgres_dsn)
    wrong = Settings(encryption_key="another key 1234")
    with pytest.raises(transfer.RefusedError, match="cannot be decrypted"):
        transfer.migrate(encrypted, postgres_dsn, settings=wrong)
    changed = Settings(encryption_key=OLD_KEY, encryption_old_keys=KEY)
    assert transfer.migrate(encrypted, postgres_dsn, settings=changed).verified
    with PostgresSaver.from_conn_string(postgres_dsn) as saver:  # under the new key alone
        saver.serde = sealing(OLD_KEY)
        assert len(list(saver.list(None))) > 20


@pytest.mark.usefixtures("key")
def test_plaintext_is_refused_where_there_is_a_key(filled: Path, postgres_dsn: str, tmp_path: Path) -> None:
    with pytest.raises(transfer.RefusedError, match="not encrypted although a key is set"):
        transfer.migrate(filled, postgres_dsn)
    allowed = f"sqlite:///{filled}?allow_plaintext=true"
    assert transfer.migrate(allowed, postgres_dsn).verified
    assert not is_in("answer 1", dump(postgres_dsn))
    with PostgresSaver.from_conn_string(postgres_dsn) as saver:
        found = sealed_tuples(saver)
    expected = by_thread([without_carried_snapshots(item) for item in sqlite_tuples(filled)])
    assert {thread: found[thread] for thread in expected} == expected
    with psycopg.connect(postgres_dsn) as conn:  # somebody puts plaintext in its place
        conn.execute("UPDATE checkpoint_writes SET type = 'msgpack', blob = '\\xc0'")
    with pytest.raises(transfer.RefusedError, match="not encrypted although a key is set"):
        transfer.migrate(postgres_dsn, f"sqlite:///{tmp_path / 'a.db'}")


@pytest.mark.usefixtures("key")
def test_decrypt(encrypted: Path, postgres_dsn: str, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    with pytest.raises(TransferError, match="an archive would hold the values in plaintext"):
        transfer.export(encrypted, archive)
    with pytest.raises(TransferError, match="an archive would hold the values in plaintext"):
        transfer.migrate(encrypted, postgres_dsn, archive=archive)
    assert not archive.exists()
    transfer.export(encrypted, archive, options=Options(decrypt=True))
    assert transfer.verify(encrypted, archive).equal
    assert transfer.import_(archive, postgres_dsn).verified  # encrypts
    assert not is_in(SECRET, dump(postgres_dsn))
    plain = f"{postgres_dsn}&schema=plain"
    assert transfer.migrate(encrypted, plain, options=Options(decrypt=True)).verified
    with psycopg.connect(postgres_dsn) as conn:
        kinds = conn.execute("SELECT DISTINCT type FROM plain.checkpoint_blobs").fetchall()
    assert not any("+" in kind for (kind,) in kinds)
    assert transfer.verify(encrypted, f"{plain}&allow_plaintext=true").equal


LC1 = {"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", "HumanMessage"]}
OLD = {
    "plain": {"a": [1, 2.5, None, "text", {"b": True}]},
    "text": "short",
    "none": None,
    "message": [{**LC1, "kwargs": {"content": "hello", "type": "human", "id": "m1"}}],
    "bytes": {
        "lc": 2,
        "type": "constructor",
        "id": ["builtins", "bytes"],
        "method": "fromhex",
        "args": ["00ff"],
    },
    "when": {
        "lc": 2,
        "type": "constructor",
        "id": ["datetime", "datetime"],
        "method": "fromisoformat",
        "args": ["2024-09-01T00:00:00+00:00"],
    },
    "price": {"lc": 2, "type": "constructor", "id": ["decimal", "Decimal"], "args": ["9.90"]},
    "set": {"lc": 2, "type": "constructor", "id": ["builtins", "set"], "args": [[1]]},
    "person": {
        "lc": 2,
        "type": "constructor",
        "id": ["not_there", "Person"],
        "kwargs": {"name": "Zoë"},
    },
    "send": {
        "lc": 2,
        "type": "constructor",
        "id": ["langgraph", "constants", "Send"],
        "kwargs": {"node": "n", "arg": 1},
    },
}


def old_row(saver: SqliteSaver, thread: str, values: dict[str, Any], *, kind: str = "json") -> None:
    make.put(saver, thread, {}, versions=dict.fromkeys(values, "1"))
    row = saver.conn.execute("SELECT checkpoint FROM checkpoints WHERE thread_id = ?", [thread]).fetchone()
    checkpoint = JsonPlusSerializer().loads_typed(("msgpack", row[0])) | {"channel_values": values}
    saver.conn.execute(
        "UPDATE checkpoints SET type = ?, checkpoint = ? WHERE thread_id = ?",
        [kind, json.dumps(checkpoint).encode(), thread],
    )
    saver.put_writes(
        {"configurable": {"thread_id": thread, "checkpoint_ns": "", "checkpoint_id": checkpoint["id"]}},
        [("c", 1)],
        "task",
    )
    saver.conn.execute(
        "UPDATE writes SET type = ?, value = ? WHERE thread_id = ?",
        [kind, json.dumps(OLD["message"]).encode(), thread],
    )
    saver.conn.commit()


def test_json_becomes_msgpack(tmp_path: Path, postgres_dsn: str) -> None:
    path, back = tmp_path / "a.db", tmp_path / "back.db"
    with make.database(path) as saver:
        old_row(saver, "t", OLD)
    report = transfer.migrate(path, postgres_dsn)
    assert report.verified
    told = {(finding.kind, finding.severity, finding.count) for finding in report.findings}
    assert told == {("json", "note", 2), ("old-format", "note", 1)}
    (found,) = postgres_tuples(postgres_dsn)
    values = found.checkpoint["channel_values"]
    assert values["plain"] == OLD["plain"]
    assert values["message"] == [HumanMessage("hello", id="m1")]
    assert (values["text"], values["none"], values["bytes"]) == ("short", None, b"\x00\xff")
    assert values["when"].isoformat() == "2024-09-01T00:00:00+00:00"
    assert str(values["price"]) == "9.90"
    assert values["set"] == {1}
    assert values["send"].node == "n"
    assert values["person"] == {"name": "Zoë"}  # its module is not there, and nobody asked for it
    assert found.pending_writes == [("task", "c", [HumanMessage("hello", id="m1")])]
    with psycopg.connect(postgres_dsn) as conn:
        blobs = conn.execute("SELECT DISTINCT type FROM checkpoint_blobs ORDER BY 1").fetchall()
    assert blobs == [("bytes",), ("msgpack",)]
    assert transfer.migrate(postgres_dsn, f"sqlite:///{back}").verified
    assert sqlite_tuples(back) == [found]
    with closing(sqlite3.connect(back)) as conn:
        assert conn.execute("SELECT type FROM checkpoints").fetchall() == [("msgpack",)]
    assert transfer.verify(path, back).equal


def test_json_that_was_never_whole(tmp_path: Path, postgres_dsn: str) -> None:
    path = tmp_path / "a.db"
    lost = {"lc": 1, "type": "not_implemented", "id": ["app", "Thing"], "repr": "Thing()"}
    with make.database(path) as saver:
        old_row(saver, "t", {"c": lost})
        old_row(saver, "u", {"c": 2**70})
    with pytest.raises(transfer.RefusedError) as refused:
        transfer.migrate(path, postgres_dsn)
    assert "could not serialise: 'not_implemented' of app.Thing" in str(refused.value)
    assert "has no msgpack form" in str(refused.value)


def test_json_that_a_user_sent_calls_nothing(tmp_path: Path, postgres_dsn: str) -> None:
    """Today's saver reads it as a mapping. Were it made msgpack of a constructor, reading would call it."""
    evil: list[dict[str, Any]] = [
        {"lc": 2, "id": ["os", "mkdir"], "args": ["made"]},
        {"lc": 1, "id": ["os", "mkdir"], "kwargs": {"path": "made"}},
        {"lc": 2, "id": ["pathlib", "Path"], "method": "mkdir", "args": ["made"]},
        {"lc": 2, "id": ["os", "mkdir"], "method": [None, "construct"], "kwargs": {"path": "made"}},
    ]
    values = {"c": [one | {"type": "constructor"} for one in evil]}
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        old_row(saver, "t", values)
    assert transfer.migrate(path, postgres_dsn).verified
    (found,) = postgres_tuples(postgres_dsn)
    assert found.checkpoint["channel_values"] == values
    assert not Path("made").exists()


def test_json_that_only_looks_like_a_constructor(tmp_path: Path) -> None:
    odd: list[dict[str, Any]] = [
        {"lc": 2, "id": [1, 2]},
        {"lc": 2, "id": [["a"], "b"], "args": [1]},
        {"lc": 1, "id": ["a", ["b"]]},
        {"lc": 2, "id": ["app", "Thing"], "args": 5},
        {"lc": 2, "id": ["app", "Thing"], "method": []},
        {"lc": 2, "id": ["app", "Thing"], "method": [{}]},
        {"lc": 2, "id": ["builtins", "bytes"], "method": "fromhex", "args": [5]},
    ]
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        for number, one in enumerate(odd):
            old_row(saver, f"t{number}", {"c": one | {"type": "constructor"}})
    with pytest.raises(transfer.RefusedError) as refused:
        transfer.export(path, tmp_path / "archive")
    assert sum(problem.count for problem in refused.value.problems) == len(odd)


def test_json_in_postgres(tmp_path: Path, postgres_dsn: str) -> None:
    """As the first Postgres savers wrote it; the database cannot hash what it would become."""
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        make.put(saver, "t", {"c": [1]}, versions={"c": "1"})
    transfer.migrate(path, postgres_dsn)
    message = json.dumps(OLD["message"]).encode()
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("UPDATE checkpoint_blobs SET type = 'json', blob = %s", [message])
    target = tmp_path / "b.db"
    assert transfer.migrate(postgres_dsn, f"sqlite:///{target}").verified
    (found,) = sqlite_tuples(target)
    assert found.checkpoint["channel_values"] == {"c": [HumanMessage("hello", id="m1")]}


def pickled(saver: SqliteSaver) -> None:
    """What only pickle can hold, as the official saver with a fallback stores it."""
    saver.serde = JsonPlusSerializer(pickle_fallback=True)
    make.put(saver, "t", {"big": 2**70, "list": [1], "text": "x"})
    place = {"thread_id": "t", "checkpoint_ns": "", "checkpoint_id": "1"}
    saver.put_writes({"configurable": place}, [("c", 2**70)], "task")


class Mischief:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def test_pickle_runs_no_code_unasked(tmp_path: Path, postgres_dsn: str) -> None:
    path, touched = tmp_path / "a.db", tmp_path / "touched"
    with make.database(path) as saver:
        make.put(saver, "t", {"c": 1})
        saver.put_writes(
            {"configurable": {"thread_id": "t", "checkpoint_ns": "", "checkpoint_id": "1"}},
            [("c", 1)],
            "task",
        )
    mischief = pickle.dumps(Mischief(touched))
    make.execute(path, "UPDATE writes SET type = 'pickle', value = ?", mischief)
    assert transfer.migrate(path, postgres_dsn, options=Options(allow_pickle=True)).verified
    make.execute(path, "UPDATE checkpoints SET type = 'pickle', checkpoint = ?", mischief)
    with pytest.raises(transfer.RefusedError, match=r"^2 rows"):
        transfer.migrate(path, postgres_dsn)
    assert not touched.exists()
    with pytest.raises(transfer.RefusedError, match="cannot be unpickled"):
        transfer.migrate(path, postgres_dsn, options=Options(allow_pickle=True))
    assert touched.exists()


def test_pickle_needs_a_word(tmp_path: Path, postgres_dsn: str) -> None:
    path, archive = tmp_path / "a.db", tmp_path / "archive"
    with make.database(path) as saver:
        pickled(saver)
    with pytest.raises(transfer.RefusedError, match="'pickle', which runs code when it is read"):
        transfer.migrate(path, postgres_dsn)
    allowed = Options(allow_pickle=True)
    assert transfer.migrate(path, postgres_dsn, options=allowed).verified
    with PostgresSaver.from_conn_string(postgres_dsn) as other:
        other.serde = JsonPlusSerializer(pickle_fallback=True)
        (found,) = other.list(None)
    with SqliteSaver.from_conn_string(str(path)) as saver:
        saver.serde = JsonPlusSerializer(pickle_fallback=True)
        assert list(saver.list(None)) == [found]
    assert found.checkpoint["channel_values"]["big"] == 2**70
    assert transfer.verify(path, postgres_dsn, allow_pickle=True).equal
    with pytest.raises(transfer.RefusedError, match="'pickle'"):
        transfer.export(path, archive)
    transfer.export(path, archive, options=allowed)
    assert transfer.verify_archive(archive).verified
    with pytest.raises(transfer.RefusedError, match="'pickle'"):
        transfer.import_(archive, f"{postgres_dsn}&schema=other")
    assert transfer.import_(archive, f"{postgres_dsn}&schema=other", options=allowed).verified
    with pytest.raises(transfer.RefusedError, match="a checkpoint in SQLite has one format"):
        transfer.import_(archive, f"sqlite:///{tmp_path / 'b.db'}", options=allowed)


def test_pickled_writes_go_into_a_file(tmp_path: Path, postgres_dsn: str) -> None:
    """And are merged and taken out again, as they are: their code runs only where the saver loads them."""
    path, touched = tmp_path / "b.db", tmp_path / "touched"
    target, allowed = f"sqlite:///{path}", Options(allow_pickle=True)
    with PostgresSaver.from_conn_string(postgres_dsn) as saver:
        saver.setup()
        saver.serde = JsonPlusSerializer(pickle_fallback=True)
        for thread, value in (("t", 2**70), ("mischief", Mischief(touched))):
            make.put(saver, thread, {"c": [1]}, id="1")
            place = {"thread_id": thread, "checkpoint_ns": "", "checkpoint_id": "1"}
            saver.put_writes({"configurable": place}, [("c", value)], "task")
        expected = list(saver.list(graphs.config("t")))
        with pytest.raises(transfer.RefusedError, match="'pickle', which runs code when it is read"):
            transfer.migrate(postgres_dsn, target)
        first = transfer.migrate(postgres_dsn, target, options=allowed)
        assert transfer.verify(postgres_dsn, target, allow_pickle=True).equal
        for thread in ("t", "mischief"):
            make.put(saver, thread, {"c": [1]}, id="2")
    second = transfer.migrate(postgres_dsn, target, options=replace(allowed, on_conflict="merge"))
    assert (first.verified, second.verified) == (True, True)
    transfer.undo(str(second.run_id), target)
    with SqliteSaver.from_conn_string(str(path)) as other:
        other.serde = JsonPlusSerializer(pickle_fallback=True)
        assert list(other.list(graphs.config("t"))) == expected
    assert [write[2] for write in expected[0].pending_writes or []] == [2**70]
    with closing(sqlite3.connect(path)) as conn, conn:
        conn.execute(
            "UPDATE checkpoints SET type = 'pickle', checkpoint ="
            " (SELECT value FROM writes WHERE thread_id = 'mischief')"
        )
    with pytest.raises(SourceError, match="runs code"):
        transfer.migrate(postgres_dsn, target, options=replace(allowed, on_conflict="merge"))
    with pytest.raises(TransferError, match="runs code"):
        transfer.undo(str(first.run_id), target)
    assert not touched.exists()
    make.execute(path, "DELETE FROM checkpoints")
    assert transfer.undo(str(first.run_id), target).writes == 2

"""The depths of a comparison: checksums, digests, and what LangGraph's own savers return."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import ormsgpack
import psycopg
import pytest
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.types import TASKS
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Send
from pydantic import BaseModel, SecretStr

from persistence import transfer
from persistence.errors import ArchiveError, ConfigurationError, EncryptionError, UnsupportedError
from persistence.settings import Settings
from persistence.transfer.semantic import same
from tests.transfer import graphs, make

SEMANTIC = transfer.Check(depth="semantic")
KEY = b"0123456789abcdef"
# The classes of the graphs in this folder, so that reading them warns nobody.
ALLOWED = Settings(
    allowed_msgpack=[f"tests.transfer.graphs:{name}" for name in ("Colour", "Profile", "Money")],
    strict_msgpack=True,
)


def semantic(left: Any, right: Any, settings: Settings = ALLOWED) -> transfer.Verdict:
    return transfer.verify(left, right, check=SEMANTIC, settings=settings)


def test_savers_agree(filled: Path, postgres_dsn: str, tmp_path: Path) -> None:
    """DeltaChannel threads too: the snapshots that the Postgres saver carries on are no difference."""
    transfer.migrate(filled, postgres_dsn)
    transfer.migrate(postgres_dsn, f"sqlite:///{tmp_path}/back.db")
    for left, right in ((filled, postgres_dsn), (postgres_dsn, filled), (filled, tmp_path / "back.db")):
        verdict = semantic(left, right)
        assert verdict.equal, verdict.differences
        assert verdict.threads == verdict.total_threads == 4
        assert verdict.checkpoints == transfer.verify(filled, filled).checkpoints
        assert json.loads(verdict.to_json())["depth"] == "semantic"


def test_semantic_leaves_no_trace(database: Path, tmp_path: Path) -> None:
    """Opened read-only: the file has the same bytes, and no log beside it, in either journal mode."""
    for mode in ("WAL", "DELETE"):
        make.execute(database, f"PRAGMA journal_mode = {mode}")
        before = database.read_bytes(), sorted(path.name for path in database.parent.iterdir())
        assert semantic(database, database).equal
        assert (database.read_bytes(), sorted(path.name for path in database.parent.iterdir())) == before


CHANGES = {
    "value": (
        "UPDATE checkpoint_blobs SET blob = %s WHERE thread_id = 'log' AND channel = 'lines'",
        [ormsgpack.packb(["other"])],
        "channel 'lines'",
    ),
    "type of a scalar": (
        "UPDATE checkpoints SET checkpoint = jsonb_set(checkpoint, '{channel_values,other}', '1.0')"
        " WHERE thread_id = 'log' AND checkpoint -> 'channel_values' ->> 'other' = '1'",
        [],
        "channel 'other': the value differs",
    ),
    "metadata": (
        "UPDATE checkpoints SET metadata = metadata || '{\"step\": 99}' WHERE thread_id = 'log'",
        [],
        "the metadata differs in step",
    ),
    "parent": (
        "UPDATE checkpoints SET parent_checkpoint_id = 'x' WHERE thread_id = 'log'",
        [],
        "the parent is",
    ),
    "write": (
        "UPDATE checkpoint_writes SET type = 'null' WHERE thread_id = 'log' AND channel = 'lines'",
        [],
        "channel 'lines': pending write",
    ),
    "checkpoint": (
        "DELETE FROM checkpoints WHERE ctid = (SELECT ctid FROM checkpoints WHERE thread_id = 'log' LIMIT 1)",
        [],
        "the checkpoint is missing in postgresql",
    ),
    "damaged value": (
        "UPDATE checkpoint_blobs SET type = 'x' WHERE thread_id = 'log' AND channel = 'lines'",
        [],
        "LangGraph's saver cannot read it from postgresql",
    ),
}


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    """One thread of a DeltaChannel graph."""
    path = tmp_path / "delta.db"
    with SqliteSaver.from_conn_string(str(path)) as saver:
        graph = graphs.log(saver)
        for _ in range(5):
            graph.invoke({"lines": ["asked"]}, graphs.config("log"))
    return path


def test_a_change_is_named(delta: Path, postgres_dsn: str) -> None:
    transfer.migrate(delta, postgres_dsn)
    clean = psycopg.connect(postgres_dsn)
    with closing(clean):
        for name, (statement, args, named) in CHANGES.items():
            clean.execute("BEGIN")
            clean.execute(statement.encode(), args)
            clean.execute("COMMIT")
            verdict = semantic(delta, postgres_dsn)
            assert verdict.differing_threads == 1, name
            assert any(named in str(found) for found in verdict.differences), (name, verdict.differences)
            assert verdict.differences[0].checkpoint_id, name
            clean.execute("TRUNCATE checkpoints, checkpoint_blobs, checkpoint_writes")
            clean.commit()
            transfer.migrate(delta, postgres_dsn, verify=False)
    assert semantic(delta, postgres_dsn).equal


def test_a_snapshot_without_origin_is_a_difference(delta: Path, postgres_dsn: str, tmp_path: Path) -> None:
    """Only what an earlier checkpoint of the other side holds is a habit of the saver."""
    transfer.migrate(delta, postgres_dsn)
    other = Path(shutil.copy(delta, tmp_path / "other.db"))
    with SqliteSaver.from_conn_string(str(other)) as saver:
        for item in list(saver.list(graphs.config("log"))):
            if "lines" in item.checkpoint["channel_values"]:
                del item.checkpoint["channel_values"]["lines"]
                type_, data = saver.serde.dumps_typed(item.checkpoint)
                saver.conn.execute(
                    "UPDATE checkpoints SET type = ?, checkpoint = ? WHERE checkpoint_id = ?",
                    (type_, data, item.checkpoint["id"]),
                )
        saver.conn.commit()
    verdict = semantic(other, postgres_dsn)
    assert "channel 'lines': the value is missing in sqlite" in str(verdict.differences[0])


def test_sends_of_an_old_format(tmp_path: Path, postgres_dsn: str) -> None:
    """The Postgres saver moves pending sends into a channel as it reads; the SQLite one leaves them."""
    path = tmp_path / "old.db"
    with make.database(path) as saver:
        parent = make.put(saver, "t", {"a": 1}, id="1", v=3)
        config: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": "", "checkpoint_id": parent}}
        saver.put_writes(config, [(TASKS, Send("n", {"x": 1})), (TASKS, Send("n", {"x": 2}))], "task", "p")
        make.put(saver, "t", {"a": 2}, versions={"a": "2"}, id="2", v=3, parent=parent)
    transfer.migrate(path, postgres_dsn)
    assert semantic(path, postgres_dsn).equal
    assert semantic(postgres_dsn, path).equal
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("UPDATE checkpoint_writes SET blob = %s WHERE idx = 1", [ormsgpack.packb("x")])
    assert {found.channel for found in semantic(path, postgres_dsn).differences} == {TASKS}


def test_sends_of_an_old_format_in_the_order_of_a_database_that_does_not_sort_by_bytes(
    tmp_path: Path, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LangGraph's saver has the database sort them: English puts a before B, bytes B before a."""
    path = tmp_path / "old.db"
    with make.database(path) as saver:
        parent = make.put(saver, "t", {"a": 1}, id="1", v=3)
        config: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": "", "checkpoint_id": parent}}
        for task in "aB":
            saver.put_writes(config, [(TASKS, Send(task, 1))], task)
        make.put(saver, "t", {"a": 2}, versions={"a": "2"}, id="2", v=3, parent=parent)
    transfer.migrate(path, postgres_dsn)
    english = PostgresSaver.SELECT_PENDING_SENDS_SQL.replace("task_id, idx)", "lower(task_id), idx)")
    assert english != PostgresSaver.SELECT_PENDING_SENDS_SQL
    monkeypatch.setattr(PostgresSaver, "SELECT_PENDING_SENDS_SQL", english)
    assert semantic(path, postgres_dsn).equal
    assert semantic(postgres_dsn, path).equal
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("UPDATE checkpoint_writes SET task_id = 'A' WHERE task_id = 'a'")
    assert {found.channel for found in semantic(path, postgres_dsn).differences} == {TASKS}


def test_rows_that_no_graph_writes(tmp_path: Path, postgres_dsn: str) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        for thread in ("bare", "list", "deep"):
            make.put(saver, thread, {"c": [1]})
    make.execute(path, "UPDATE checkpoints SET checkpoint = x'81a17604' WHERE thread_id = 'bare'")
    make.execute(path, "UPDATE checkpoints SET metadata = '[1]' WHERE thread_id = 'list'")
    assert transfer.migrate(path, postgres_dsn).verified
    assert semantic(path, postgres_dsn).equal
    deep = '{"a": ' + "[" * 600 + "]" * 600 + "}"
    make.execute(path, "UPDATE checkpoints SET metadata = ? WHERE thread_id = 'deep'", deep)
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("UPDATE checkpoints SET metadata = %s WHERE thread_id = 'deep'", [deep])
    verdict = semantic(path, postgres_dsn)
    assert "thread 'deep'" in (said := str(verdict.differences[0]))
    assert "cannot be compared: RecursionError" in said


def test_encrypted_rows_need_the_key(tmp_path: Path) -> None:
    """Each encryption of the same value has other bytes; what they mean is compared."""
    serde = EncryptedSerializer.from_pycryptodome_aes(key=KEY)
    one, other = tmp_path / "one.db", tmp_path / "other.db"
    for path in (one, other):
        with make.database(path) as saver:
            saver.serde = serde
            make.put(saver, "t", {"a": ["secret"]}, id="1", ts="now")
    settings = Settings(encryption_key=SecretStr(KEY.decode()))
    assert semantic(one, other, settings=settings).equal
    with pytest.raises(
        EncryptionError, match=r"thread 't', checkpoint '1': a stored value is encrypted .* no key is set"
    ):
        semantic(one, other)
    with make.database(other) as saver:
        saver.serde = serde
        make.put(saver, "t", {"a": ["other"]}, id="1", ts="now")
    assert "channel 'a': the value differs" in str(semantic(one, other, settings=settings).differences[0])


class Loose(BaseModel):
    content: Any


@dataclass
class Plain:
    content: Any


EQUAL = [
    ({"a": [1, 2.0, None]}, {"a": [1, 2.0, None]}),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    (float("nan"), float("nan")),
    ({1, 2, "x"}, {"x", 2, 1}),
    (Loose(content={"b", "a"}), Loose(content={"a", "b"})),
    (Plain([Decimal("1.0")]), Plain([Decimal("1.0")])),
]
DIFFERENT = [
    (1, 1.0),
    (1, True),
    ([1], (1,)),
    (0.0, -0.0),
    ({1: "x"}, {1.0: "x"}),
    ({1, 2}, {1.0, 2}),
    (b"x", bytearray(b"x")),
    (Loose(content=1), Loose(content=1.0)),
    (Plain(1), Plain(True)),
    (Plain({"a": 1}), Loose(content={"a": 1})),
    (Decimal("1.0"), Decimal("1.00")),
    (graphs.Colour.RED, "red"),
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_same(one: Any, other: Any) -> None:
    assert same(one, other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_not_same(one: Any, other: Any) -> None:
    assert not same(one, other)


def test_checksums_alone(filled: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    transfer.export(filled, archive)
    check = transfer.verify_archive(archive, check=transfer.Check(depth="checksums"))
    assert (check.depth, check.parts, check.sampled) == ("checksums", 1, False)
    part = archive / "part-000001.msgpack.zst"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(ArchiveError, match="checksum does not match"):
        transfer.verify_archive(archive, check=transfer.Check(depth="checksums"))


def test_depths_that_do_not_fit(filled: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    transfer.export(filled, archive)
    with pytest.raises(UnsupportedError, match="no saver of LangGraph's"):
        semantic(filled, archive)
    with pytest.raises(ConfigurationError, match="checksums"):
        transfer.verify(filled, archive, check=transfer.Check(depth="checksums"))
    with pytest.raises(ConfigurationError, match="two sides"):
        transfer.verify_archive(archive, check=SEMANTIC)


def test_memory_of_the_details(tmp_path: Path) -> None:
    """A long thread that differs in one place is merged, not held."""
    import tracemalloc

    path = tmp_path / "long.db"
    with make.database(path) as saver:
        saver.conn.execute("PRAGMA synchronous = OFF")
        for number in range(1500):
            make.put(saver, "t", {}, metadata={"text": f"{number} " + "x" * 10_000})
    other = Path(shutil.copy(path, tmp_path / "other.db"))
    with closing(sqlite3.connect(other)) as conn, conn:
        conn.execute("DELETE FROM checkpoints WHERE rowid = 1400")
    tracemalloc.start()
    verdict = transfer.verify(path, other)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [found.detail for found in verdict.differences] == [
        f"the checkpoint is missing in sqlite:///{other}"
    ]
    assert peak < 8_000_000

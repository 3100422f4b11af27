"""What cannot be moved is found before anything is written, and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.sqlite import SqliteSaver

import persistence
from persistence import transfer
from persistence.errors import SchemaError
from tests.transfer import make


def config(thread: str, checkpoint_id: str = "c") -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": "", "checkpoint_id": checkpoint_id}}


def nul_in_thread(saver: SqliteSaver) -> None:
    make.put(saver, "bad\0", {})


def nul_in_task(saver: SqliteSaver) -> None:
    saver.put_writes(config("bad"), [("c", 1)], "task\0")


def backslash_in_channel(saver: SqliteSaver) -> None:
    make.put(saver, "bad", {"a\\b": [1]})


def backslash_in_task(saver: SqliteSaver) -> None:
    saver.put_writes(config("bad"), [("c", 1)], "task\\x41")


def nul_in_metadata(saver: SqliteSaver) -> None:
    make.put(saver, "bad", {}, metadata={"key": ["a\0b"]})


def nan_in_metadata(saver: SqliteSaver) -> None:
    make.put(saver, "bad", {}, metadata={"key": float("nan")})


def bytes_in_body(saver: SqliteSaver) -> None:
    make.put(saver, "bad", {}, updated_channels=[b"raw"])


def type_in_body(saver: SqliteSaver) -> None:
    make.put(saver, "bad", {}, updated_channels=[{1, 2}])


def long_thread(saver: SqliteSaver) -> None:
    make.put(saver, "b" * 3000, {})


def unknown_type(saver: SqliteSaver) -> None:
    make.put(saver, "bad", {})
    saver.conn.execute("UPDATE checkpoints SET type = 'cbor' WHERE thread_id = 'bad'")
    saver.conn.commit()


def damaged_json(saver: SqliteSaver) -> None:
    make.put(saver, "bad", {})
    saver.conn.execute("UPDATE checkpoints SET type = 'json', checkpoint = x'7b' WHERE thread_id = 'bad'")
    saver.conn.commit()


def pickled_write(saver: SqliteSaver) -> None:
    saver.put_writes(config("bad"), [("c", 1)], "task")
    saver.conn.execute("UPDATE writes SET type = 'pickle'")
    saver.conn.commit()


def damaged_checkpoint(saver: SqliteSaver) -> None:
    make.put(saver, "bad", {"c": "value"})
    saver.conn.execute(
        "UPDATE checkpoints SET checkpoint = substr(checkpoint, 1, 40) WHERE thread_id = 'bad'"
    )
    saver.conn.commit()


def damaged_metadata(saver: SqliteSaver) -> None:
    make.put(saver, "bad", {})
    saver.conn.execute("UPDATE checkpoints SET metadata = '{' WHERE thread_id = 'bad'")
    saver.conn.commit()


def encrypted(saver: SqliteSaver) -> None:
    saver.serde = EncryptedSerializer.from_pycryptodome_aes(key=b"0123456789abcdef")
    make.put(saver, "bad", {})


def deep_value(saver: SqliteSaver) -> None:
    make.put(saver, "bad", {})
    row = b"\x81\xaechannel_values\x81\xa1c" + b"\x91" * 5000 + b"\xc0"
    saver.conn.execute("UPDATE checkpoints SET checkpoint = ? WHERE thread_id = 'bad'", [row])
    saver.conn.commit()


def no_format_version(saver: SqliteSaver) -> None:
    make.put(saver, "bad", {})
    saver.conn.execute("UPDATE checkpoints SET checkpoint = x'80' WHERE thread_id = 'bad'")
    saver.conn.commit()


CASES: dict[Callable[[SqliteSaver], None], str] = {
    nul_in_thread: "NUL",
    nul_in_task: "NUL",
    backslash_in_channel: "backslash",
    backslash_in_task: "backslash",
    nul_in_metadata: "metadata holds the NUL",
    nan_in_metadata: "metadata is not JSON",
    bytes_in_body: "bytes is not JSON",
    type_in_body: "Ext is not JSON",
    long_thread: "index",
    unknown_type: "'cbor', which is not known",
    damaged_json: "the JSON cannot be read",
    pickled_write: "'pickle'",
    damaged_checkpoint: "truncated",
    damaged_metadata: "metadata is not JSON",
    encrypted: "encrypted",
    deep_value: "recursion",
    no_format_version: "format version",
}


@pytest.mark.parametrize(("make_bad", "reason"), CASES.items(), ids=[case.__name__ for case in CASES])
def test_refused_before_anything_is_written(
    tmp_path: Path, postgres_dsn: str, make_bad: Callable[[SqliteSaver], None], reason: str
) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        make.put(saver, "a good one", {"c": [1]})
        make_bad(saver)
    with pytest.raises(transfer.RefusedError) as refused:
        transfer.migrate(path, postgres_dsn)
    assert reason in str(refused.value)
    assert "thread 'b" in str(refused.value)
    assert refused.value.exit_code == 6
    with psycopg.connect(postgres_dsn) as conn:
        assert conn.execute("SELECT to_regclass('checkpoints')").fetchone() == (None,)


def test_the_message_counts_and_names_the_first(tmp_path: Path, postgres_dsn: str) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        for number in range(10):
            make.put(saver, f"bad {number}", {}, metadata={"key": ["\0"]})
        make.put(saver, "worse", {"a\\b": [1]})
    with pytest.raises(transfer.RefusedError) as refused:
        transfer.migrate(path, postgres_dsn)
    assert str(refused.value).startswith("11 rows of ")
    assert "10 x the metadata holds the NUL" in str(refused.value)
    assert [problem.count for problem in refused.value.problems] == [10, 1]
    assert len(refused.value.problems[0].examples) == 3


def test_scalars_may_differ_under_one_version(tmp_path: Path, postgres_dsn: str) -> None:
    """They stand in each checkpoint itself, so Postgres holds them all."""
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        for value in ({"c": 1}, {"c": "two"}, {}, {"c": None}):
            make.put(saver, "t", value, versions={"c": "1"})
    assert transfer.migrate(path, postgres_dsn).verified
    with psycopg.connect(postgres_dsn) as conn:
        found = conn.execute(
            "SELECT checkpoint -> 'channel_values' FROM checkpoints ORDER BY checkpoint_id"
        ).fetchall()
    assert [row[0] for row in found] == [{"c": 1}, {"c": "two"}, {}, {"c": None}]


def test_an_archive_can_hold_what_postgres_cannot(tmp_path: Path, postgres_dsn: str) -> None:
    path, archive = tmp_path / "a.db", tmp_path / "archive"
    with make.database(path) as saver:
        nul_in_metadata(saver)
        nul_in_thread(saver)
    transfer.export(path, archive)
    assert transfer.verify(path, archive).equal
    with pytest.raises(transfer.RefusedError, match=r"^2 rows"):
        transfer.import_(archive, postgres_dsn)


def test_an_export_that_is_refused_leaves_no_archive(tmp_path: Path) -> None:
    path, archive = tmp_path / "a.db", tmp_path / "archive"
    with make.database(path) as saver:
        nan_in_metadata(saver)
    with pytest.raises(transfer.RefusedError):
        transfer.export(path, archive)
    assert not archive.exists()


@pytest.mark.parametrize("other", ["bigint", "smallint"])
def test_a_column_of_another_type_is_named(tmp_path: Path, postgres_dsn: str, other: str) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        make.put(saver, "bad", {"a": [1]})
        saver.put_writes(config("bad"), [("a", 1)], "task")
    persistence.open(postgres_dsn).close()
    with psycopg.connect(postgres_dsn, autocommit=True) as conn:
        conn.execute(f"ALTER TABLE checkpoint_writes ALTER idx TYPE {other}".encode())
    with pytest.raises(SchemaError, match="LangGraph gives it: COPY checkpoint_writes, line 1, column idx"):
        transfer.migrate(path, postgres_dsn)

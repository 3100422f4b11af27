"""SQLite as the target: what the official Postgres saver listed, the official SQLite saver lists."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import Checkpoint, empty_checkpoint
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Command

import persistence
from persistence import schema, transfer
from persistence.errors import ConflictError, ConnectError, TransferError
from persistence.registry import provider_for
from tests.transfer import graphs, make
from tests.transfer.conftest import (
    by_thread,
    file_rows,
    postgres_tuples,
    rows,
    sqlite_tuples,
    without_carried_snapshots,
)
from tests.transfer.test_values import finite_json, names, strict, values, versions


def dsn(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder / "new é.db"


def assert_listed_the_same(postgres_dsn: str, path: Path) -> None:
    """By the official savers, every thread."""
    theirs, ours = by_thread(postgres_tuples(postgres_dsn)), by_thread(sqlite_tuples(path))
    assert ours.keys() == theirs.keys()
    for thread, tuples in theirs.items():
        if thread == "log":
            assert [*map(without_carried_snapshots, ours[thread])] == [
                *map(without_carried_snapshots, tuples)
            ]
        else:
            assert ours[thread] == tuples


@pytest.mark.parametrize("by_archive", [False, True], ids=["direct", "archive"])
def test_there_and_back(
    filled: Path, postgres_dsn: str, target: Path, tmp_path: Path, by_archive: bool
) -> None:
    transfer.migrate(filled, postgres_dsn)
    report = transfer.migrate(postgres_dsn, dsn(target), archive=tmp_path / "a" if by_archive else None)
    assert report.verified
    assert_listed_the_same(postgres_dsn, target)
    assert sqlite_tuples(target) == sqlite_tuples(filled)
    for other in (filled, postgres_dsn):
        assert transfer.verify(other, target).equal
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    again = transfer.migrate(postgres_dsn, dsn(target))
    assert again.already_done
    assert again.verified


def test_between_files(filled: Path, target: Path) -> None:
    before = filled.read_bytes()
    assert transfer.migrate(filled, dsn(target)).verified
    assert sqlite_tuples(target) == sqlite_tuples(filled)
    assert filled.read_bytes() == before


def test_rollback_keeps_what_was_written_since(filled: Path, postgres_dsn: str, target: Path) -> None:
    """The application wrote on Postgres, by our saver and by the official one, and goes on in a new file."""
    transfer.migrate(filled, postgres_dsn)
    with persistence.open(postgres_dsn) as db:
        assert db.checkpointer is not None
        graph = graphs.chat(db.checkpointer)
        graph.invoke(Command(resume="on Postgres"), graphs.config("chat 1 é"))
        graph.invoke({"messages": [HumanMessage("later")]}, graphs.config("new"))
        graphs.log(db.checkpointer).invoke({"lines": ["on Postgres"]}, graphs.config("log"))
    with PostgresSaver.from_conn_string(postgres_dsn) as saver:
        saver.serde = graphs.serde()
        graphs.chat(saver).invoke({"messages": [HumanMessage("more")]}, graphs.config("chat 1 é"))
        saver.delete_thread("chat 2 é")
        expected = {t: graphs.chat(saver).get_state(graphs.config(t)) for t in ("chat 1 é", "new")}
        lines = graphs.log(saver).get_state(graphs.config("log"))
    assert transfer.migrate(postgres_dsn, dsn(target)).verified
    assert_listed_the_same(postgres_dsn, target)
    with SqliteSaver.from_conn_string(str(target)) as saver:
        saver.serde = graphs.serde()
        graph = graphs.chat(saver)
        assert {t: graph.get_state(graphs.config(t)) for t in expected} == expected
        assert graphs.log(saver).get_state(graphs.config("log")) == lines
        state = graph.get_state(graphs.config("new"))
        assert state.interrupts
        after = graph.invoke(Command(resume="on SQLite again"), graphs.config("new"))
        assert after["found"] == [*state.values["found"], "on SQLite again"]
    assert "chat 2 é" not in by_thread(sqlite_tuples(target))


def test_the_old_file_is_a_conflict_and_stays_as_it_is(database: Path, postgres_dsn: str) -> None:
    transfer.migrate(database, postgres_dsn)
    with PostgresSaver.from_conn_string(postgres_dsn) as saver:
        graphs.log(saver).invoke({"lines": ["later"]}, graphs.config("log"))
    before, beside = database.read_bytes(), {path.name for path in database.parent.iterdir()}
    with pytest.raises(ConflictError, match="already has thread 'chat 0 é'") as raised:
        transfer.migrate(postgres_dsn, dsn(database))
    assert "a file that does not exist yet" in str(raised.value.hint)
    with pytest.raises(ConflictError):
        transfer.migrate(database, dsn(database))
    assert database.read_bytes() == before
    assert {path.name for path in database.parent.iterdir()} == beside


def test_beside_other_threads(filled: Path, target: Path) -> None:
    with make.database(target) as saver:
        make.put(saver, "another", {"c": ["x"]})
    assert transfer.migrate(filled, dsn(target)).verified
    assert set(by_thread(sqlite_tuples(target))) == {"another", *by_thread(sqlite_tuples(filled))}


@pytest.fixture
def roundabout(tmp_path: Path, postgres_dsn: str) -> Iterator[tuple[Any, Any, str, Path]]:
    """Our savers on two schemas, the second's DSN, and an empty SQLite file: all have tables, to be quick."""
    there, template = f"{postgres_dsn}&schema=there", tmp_path / "template.db"
    for place in (postgres_dsn, there, dsn(template)):
        schema.setup(provider_for(place))
    with persistence.open(postgres_dsn) as one, persistence.open(there) as other:
        yield one.checkpointer, other.checkpointer, there, template


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    channels=st.dictionaries(names, st.tuples(values | st.binary().map(bytearray), versions), max_size=4),
    metadata=st.dictionaries(names.filter(lambda key: key != "writes"), finite_json, max_size=4),
    pending=st.lists(st.tuples(names, values | st.binary().map(bytearray)), max_size=3),
    ns=names,
)
def test_any_value(
    roundabout: tuple[Any, Any, str, Path],
    postgres_dsn: str,
    channels: dict[str, tuple[Any, Any]],
    metadata: dict[str, Any],
    pending: list[tuple[str, Any]],
    ns: str,
) -> None:
    """Written on Postgres, through SQLite and back to Postgres: same tuples of same types, same digests."""
    saver, other, there, template = roundabout
    name = uuid.uuid4().hex
    checkpoint = {
        **empty_checkpoint(),
        "channel_values": {channel: value for channel, (value, _) in channels.items()},
        "channel_versions": {channel: version for channel, (_, version) in channels.items()},
    }
    config = {"configurable": {"thread_id": name, "checkpoint_ns": ns}}
    config = saver.put(config, checkpoint, metadata, checkpoint["channel_versions"])
    saver.put_writes(config, pending, "task", "path é")
    path, back = (Path(shutil.copy(template, template.with_name(f"{name}{end}"))) for end in ("1", "2"))
    assert transfer.migrate(postgres_dsn, dsn(path)).verified
    (mine,), (theirs,) = sqlite_tuples(path), postgres_tuples(postgres_dsn, name)
    assert mine == theirs
    for part in ("channel_values", "channel_versions"):
        assert strict(mine.checkpoint[part]) == strict(theirs.checkpoint[part])
    assert strict([*map(list, mine.pending_writes or ())]) == strict(
        [*map(list, theirs.pending_writes or ())]
    )
    assert transfer.migrate(path, there).verified
    transfer.migrate(there, dsn(back), verify=False)
    assert file_rows(back) == file_rows(path)
    assert transfer.verify(back, postgres_dsn).equal
    saver.delete_thread(name)
    other.delete_thread(name)


def test_orphans_and_broken_parents_move_too(postgres_dsn: str, target: Path) -> None:
    with PostgresSaver.from_conn_string(postgres_dsn) as saver:
        saver.setup()
        put(saver, "t", {"c": [1]}, parent="no such checkpoint")
        gone: Any = {"configurable": {"thread_id": "w", "checkpoint_ns": "x", "checkpoint_id": "gone"}}
        saver.put_writes(gone, [("a", 1), ("b", None), ("__interrupt__", [2])], "task", "~path")
    with psycopg.connect(postgres_dsn) as conn:
        # No checkpoint can show these, so they are no content; the second thread has nothing else.
        conn.execute("INSERT INTO checkpoint_blobs VALUES ('t', 'x', 'c', '1', 'msgpack', '\\x90')")
        conn.execute("INSERT INTO checkpoint_blobs VALUES ('z', '', 'c', '1', 'pickle', '\\x90')")
    report = transfer.migrate(postgres_dsn, dsn(target))
    assert (report.totals.threads, report.totals.checkpoints, report.totals.writes) == (2, 1, 3)
    assert_listed_the_same(postgres_dsn, target)
    assert [row[:7] for row in file_rows(target)["writes"]] == [
        ("w", "x", "gone", "task", "~path", idx, channel)
        for idx, channel in ((-3, "__interrupt__"), (0, "a"), (1, "b"))
    ]
    assert file_rows(target)["checkpoints"][0][3] == "no such checkpoint"
    assert transfer.migrate(postgres_dsn, other_schema(postgres_dsn)).verified


def put(saver: PostgresSaver, thread: str, values: dict[str, Any], *, parent: str | None = None) -> str:
    """Store one checkpoint with the official saver; gives its id."""
    return make.put(cast(SqliteSaver, saver), thread, values, parent=parent)


BLOB = "INSERT INTO checkpoint_blobs VALUES ('bad', '', 'c', '1.0', '{}', '{}')"
REFUSED = {
    "json": (BLOB.format("json", "{"), "the JSON cannot be read"),
    "pickle": (BLOB.format("pickle", "N."), "channel 'c' has the serializer type 'pickle'"),
    "unknown": (BLOB.format("cbor", "x"), "channel 'c' has the serializer type 'cbor', which is not known"),
    "encrypted": (BLOB.format("msgpack+aes", "x"), "channel 'c' is encrypted"),
    "two values": (BLOB.format("msgpack", "\\x9090"), "channel 'c' is no valid msgpack: "),
    "half a value": (BLOB.format("msgpack", "\\x91"), "channel 'c' is no valid msgpack: "),
    "nothing": (BLOB.format("msgpack", ""), "channel 'c' is no valid msgpack: "),
    "None as msgpack": (BLOB.format("msgpack", "\\xc0"), "would give it back as 'null'"),
    "bytes as msgpack": (BLOB.format("msgpack", "\\xc400"), "would give it back as 'bytes'"),
    "null with data": (BLOB.format("null", "x"), "would give it back as 'null'"),
    "deep": (BLOB.format("msgpack", "\\x" + "91" * 5000 + "c0"), "recursion"),
    "large number": (
        f"UPDATE checkpoints SET checkpoint = jsonb_set(checkpoint, '{{v}}', '{10**30}')"
        " WHERE thread_id = 'bad'",
        "the checkpoint has no msgpack form",
    ),
    "write": ("UPDATE checkpoint_writes SET type = 'cbor'", "write to channel 'w' has the serializer type"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_written(
    postgres_dsn: str, target: Path, change: str, reason: str
) -> None:
    with PostgresSaver.from_conn_string(postgres_dsn) as saver:
        saver.setup()
        put(saver, "a good one", {"c": [1]})
        bad = put(saver, "bad", {"c": 5} if "INSERT" not in change else {"other": 1, "c": None})
        config: Any = {"configurable": {"thread_id": "bad", "checkpoint_ns": "", "checkpoint_id": bad}}
        saver.put_writes(config, [("w", 1)], "task")
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute(change.encode())
    with pytest.raises(transfer.RefusedError) as refused:
        transfer.migrate(postgres_dsn, dsn(target))
    assert reason in str(refused.value)
    assert f"thread 'bad', checkpoint {bad!r}" in str(refused.value)
    assert list(target.parent.iterdir()) == []


def test_a_state_changed_in_place_comes_back_from_postgres(postgres_dsn: str, target: Path) -> None:
    """Our Postgres saver keeps a second value of a version, and one without a version; SQLite has room."""
    first: Checkpoint = {
        **empty_checkpoint(),
        "id": "1",
        "channel_values": {"items": [1], "free": [9]},
        "channel_versions": {"items": "1"},
    }
    second: Checkpoint = {**first, "id": "2", "channel_values": {"items": [1, 2]}}
    with persistence.open(postgres_dsn) as db:
        config: RunnableConfig = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
        assert db.checkpointer is not None
        for checkpoint in (first, second):
            config = db.checkpointer.put(config, checkpoint, {}, {"items": "1"})
    assert transfer.migrate(postgres_dsn, dsn(target)).verified
    assert [item.checkpoint["channel_values"] for item in sqlite_tuples(target)] == [
        {"items": [1, 2]},
        {"items": [1], "free": [9]},
    ]


SCRIPT = """
import sys
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from persistence import transfer

def refuse(*args):
    raise AssertionError("deserialised")

JsonPlusSerializer.loads_typed = JsonPlusSerializer.dumps_typed = refuse
assert transfer.migrate(sys.argv[1], sys.argv[2]).verified
assert not [name for name in sys.modules if name.split(".")[0] == "tests"]
"""


def test_no_value_is_deserialised(filled: Path, postgres_dsn: str, target: Path) -> None:
    transfer.migrate(filled, postgres_dsn)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, postgres_dsn, dsn(target)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert len(sqlite_tuples(target)) == len(sqlite_tuples(filled))


# Each statement changes one row of one thread in the target; the difference must name it so.
THREAD = "chat 0 é"
CHANGES = {
    "value": (
        "UPDATE checkpoints SET checkpoint = spoiled(checkpoint) WHERE rowid ="
        " (SELECT max(rowid) FROM checkpoints WHERE thread_id = '{t}' AND checkpoint_ns = '')",
        "channel 'price': the value differs",
    ),
    "metadata": (
        "UPDATE checkpoints SET metadata = '{{}}' WHERE rowid ="
        " (SELECT max(rowid) FROM checkpoints WHERE thread_id = '{t}')",
        "the metadata differs in",
    ),
    "parent": (
        "UPDATE checkpoints SET parent_checkpoint_id = 'x' WHERE rowid ="
        " (SELECT max(rowid) FROM checkpoints WHERE thread_id = '{t}')",
        "the parent is",
    ),
    "checkpoint missing": (
        "DELETE FROM checkpoints WHERE rowid = (SELECT max(rowid) FROM checkpoints WHERE thread_id = '{t}')",
        "the checkpoint is missing in sqlite",
    ),
    "write value": (
        "UPDATE writes SET value = x'c3' WHERE rowid ="
        " (SELECT max(rowid) FROM writes WHERE thread_id = '{t}' AND channel = 'found')",
        "channel 'found': write",
    ),
    "write path": (
        "UPDATE writes SET task_path = 'x' WHERE rowid ="
        " (SELECT max(rowid) FROM writes WHERE thread_id = '{t}')",
        "differs in task_path",
    ),
    "write missing": (
        "DELETE FROM writes WHERE rowid = (SELECT max(rowid) FROM writes WHERE thread_id = '{t}')",
        "is missing in sqlite",
    ),
}


@pytest.fixture(scope="session")
def rolled_back(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An archive and the file that it was imported into; not to be changed."""
    folder = tmp_path_factory.mktemp("rolled back")
    transfer.export(filled, folder / "archive")
    transfer.import_(folder / "archive", dsn(folder / "chat.db"))
    return folder / "archive", folder / "chat.db"


@pytest.mark.parametrize(("change", "named"), CHANGES.values(), ids=CHANGES)
def test_a_changed_row_is_named(
    rolled_back: tuple[Path, Path], target: Path, change: str, named: str
) -> None:
    archive, path = rolled_back
    shutil.copy(path, target)
    assert transfer.verify(archive, target).equal
    with closing(sqlite3.connect(target)) as conn, conn:
        conn.create_function("spoiled", 1, lambda blob: blob.replace(b"CHF", b"EUR"))
        assert conn.execute(change.format(t=THREAD)).rowcount == 1
    verdict = transfer.verify(archive, target)
    assert verdict.differing_threads == 1
    assert named in str(verdict.differences[0]), verdict.differences
    assert f"thread {THREAD!r}" in str(verdict.differences[0])


def folder(path: Path) -> None:
    path.mkdir()


def text(path: Path) -> None:
    path.write_text("This is not a database, only a text that is long enough for a header.\n" * 20)


def no_folder(path: Path) -> None:
    path.parent.rmdir()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(folder, "not a file but a folder"), (text, "not a SQLite database"), (no_folder, "does not exist")],
    ids=["folder", "text", "no folder"],
)
def test_what_is_no_place_for_a_database(filled: Path, target: Path, spoil: Any, reason: str) -> None:
    spoil(target)
    with pytest.raises(ConnectError, match=reason):
        transfer.migrate(filled, dsn(target))
    assert not target.with_name(f"{target.name}-transfer").exists()


def test_a_name_that_no_file_can_have(filled: Path, tmp_path: Path) -> None:
    with pytest.raises(ConnectError, match="File name too long"):
        transfer.migrate(filled, dsn(tmp_path / f"{'x' * 300}.db"))


def test_in_memory_is_refused(filled: Path) -> None:
    with pytest.raises(TransferError, match="is in memory"):
        transfer.migrate(filled, "sqlite://")


def other_schema(postgres_dsn: str) -> str:
    """A schema with tables, in the same database."""
    other = f"{postgres_dsn}&schema=other"
    schema.setup(provider_for(other))
    return other


def test_another_schema_of_the_database_that_is_read_must_be_set_up(filled: Path, postgres_dsn: str) -> None:
    """CREATE INDEX CONCURRENTLY would wait for the source's snapshot, for ever."""
    transfer.migrate(filled, postgres_dsn)
    with pytest.raises(TransferError, match="its tables are not complete") as raised:
        transfer.migrate(postgres_dsn, f"{postgres_dsn}&schema=other")
    assert "persistence setup" in str(raised.value.hint)


def test_a_postgres_database_moves_to_another(filled: Path, postgres_dsn: str) -> None:
    one, other = postgres_dsn, other_schema(postgres_dsn)
    transfer.migrate(filled, one)
    with PostgresSaver.from_conn_string(one) as saver:
        saver.serde = graphs.serde()
        graphs.chat(saver).invoke(Command(resume="on Postgres"), graphs.config("chat 1 é"))
    assert transfer.migrate(one, other).verified
    assert rows(postgres_dsn, "other") == rows(postgres_dsn)
    assert transfer.verify(one, other).equal
    assert transfer.migrate(one, other).already_done
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("UPDATE other.checkpoint_blobs SET blob = blob || 'x' WHERE channel = 'price'")
    assert "channel 'price': the value differs" in str(transfer.verify(one, other).differences[0])
    with pytest.raises(ConflictError, match="are the same database"):
        transfer.migrate(one, one)

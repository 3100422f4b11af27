"""A dry run says what a move would do, and leaves everything as it was."""

from __future__ import annotations

import hashlib
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.sqlite import SqliteSaver

from persistence import schema, transfer
from persistence.errors import SchemaError
from persistence.registry import provider_for
from persistence.transfer.survey import Finding
from tests.transfer import make
from tests.transfer.targets import Target
from tests.transfer.test_refusals import CASES


def put(saver: SqliteSaver, thread: str, values: Any, **more: Any) -> str:
    """A checkpoint in the present format."""
    return make.put(saver, thread, values, **({"v": 4} | more))


def found(plan: transfer.Plan) -> dict[str, Finding]:
    """The plan's findings by kind, but for the tables of a fresh target."""
    return {finding.kind: finding for finding in plan.findings if finding.kind != "target-setup"}


def files(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file of a folder: its content and the moment of its last change."""
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def dump(dsn: str) -> list[Any]:
    """Every row of every table, every relation and every sequence of a database."""
    with psycopg.connect(dsn) as conn:
        relations = conn.execute(
            "SELECT n.nspname, c.relname, c.relkind, c.relnatts FROM pg_class c JOIN pg_namespace n"
            " ON n.oid = c.relnamespace WHERE n.nspname NOT LIKE 'pg\\_%' AND n.nspname <>"
            " 'information_schema' ORDER BY 1, 2"
        ).fetchall()
        rows = [
            conn.execute(f'SELECT t::text FROM "{space}"."{name}" t ORDER BY 1'.encode()).fetchall()
            for space, name, kind, _ in relations
            if kind == b"r" or kind == "r"
        ]
        sequences = conn.execute("SELECT * FROM pg_sequences").fetchall()
    return [relations, rows, sequences]


def test_it_says_what_the_move_then_does(database: Path, postgres_dsn: str) -> None:
    plan = transfer.plan(database, postgres_dsn)
    assert plan.would_move
    assert plan.exit_code == 0
    assert found(plan) == {}
    report = transfer.migrate(database, postgres_dsn)
    assert plan.totals == report.totals
    assert plan.fingerprint == report.fingerprint
    assert plan.sizes == report.sizes
    assert plan.target_bytes == plan.totals.bytes < plan.totals.bytes_referenced
    with closing(sqlite3.connect(database)) as conn:
        (checkpoints, largest, threads) = conn.execute(
            "SELECT count(*), max(length(checkpoint)), count(DISTINCT thread_id) FROM checkpoints"
        ).fetchone()
    sizes = plan.sizes
    assert sum(bucket.checkpoints for bucket in sizes.histogram) == checkpoints
    assert sizes.largest_checkpoint is not None
    assert 0.5 < sizes.largest_checkpoint.bytes / largest < 2
    assert sizes.histogram[-1].below / 2 <= sizes.largest_checkpoint.bytes < sizes.histogram[-1].below
    assert len(sizes.largest_threads) == threads
    assert sum(thread.bytes for thread in sizes.largest_threads) == plan.totals.bytes
    assert sum(thread.checkpoints for thread in sizes.largest_threads) == checkpoints
    assert sizes.largest_threads == sorted(sizes.largest_threads, key=lambda t: -t.bytes)


def test_nothing_is_written_to_postgres(database: Path, postgres_dsn: str) -> None:
    before, source = dump(postgres_dsn), files(database.parent)
    transfer.plan(database, postgres_dsn)
    assert dump(postgres_dsn) == before
    assert files(database.parent) == source


@pytest.mark.parametrize("is_there", [False, True])
def test_nothing_is_written_to_sqlite(database: Path, tmp_path: Path, is_there: bool) -> None:
    folder = tmp_path / "target"
    folder.mkdir()
    if is_there:
        with make.database(folder / "t.db") as saver:
            make.put(saver, "another", {"c": [1]})
    before, source = files(folder), files(database.parent)
    plan = transfer.plan(database, f"sqlite:///{folder}/t.db")
    assert plan.would_move
    assert plan.target_bytes == plan.totals.bytes_referenced
    assert files(folder) == before
    assert files(database.parent) == source


def test_a_log_that_a_crash_left_in_the_target_stays(database: Path, tmp_path: Path) -> None:
    folder = tmp_path / "target"
    folder.mkdir()
    crash = (
        "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('PRAGMA journal_mode = WAL');"
        "c.execute('CREATE TABLE t (x)'); c.commit(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", crash, str(folder / "t.db")], check=False)
    before = files(folder)
    assert str(folder / "t.db-wal") in before
    transfer.plan(database, f"sqlite:///{folder}/t.db")
    after = files(folder)
    for name in ("t.db", "t.db-wal"):
        assert after[str(folder / name)] == before[str(folder / name)]


def test_an_export_makes_no_folder(database: Path, tmp_path: Path) -> None:
    plan = transfer.plan(database, tmp_path / "a" / "copy")
    assert plan.would_move
    assert not (tmp_path / "a").exists()
    transfer.export(database, tmp_path / "copy")
    assert found(transfer.plan(database, tmp_path / "copy"))["archive"].severity == "refused"
    before = files(tmp_path / "copy")
    stored = transfer.plan(tmp_path / "copy", tmp_path / "again")
    assert stored.fingerprint == plan.fingerprint
    assert files(tmp_path / "copy") == before


@pytest.mark.parametrize("case", CASES, ids=[case.__name__ for case in CASES])
def test_what_the_move_refuses_is_foretold(
    tmp_path: Path, postgres_dsn: str, case: Callable[[SqliteSaver], None]
) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        make.put(saver, "a good one", {"c": [1]})
        case(saver)
    plan = transfer.plan(path, postgres_dsn)
    try:
        transfer.migrate(path, postgres_dsn)
    except transfer.RefusedError as error:
        assert not plan.would_move
        assert plan.exit_code == error.exit_code
        refused = [finding for finding in plan.findings if finding.severity == "refused"]
        assert sum(f.count for f in refused) == sum(p.count for p in error.problems)
        assert all(finding.advice and finding.examples for finding in refused)
    else:
        assert plan.would_move


def test_everything_is_listed_at_once(tmp_path: Path, postgres_dsn: str) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        for thread in ("a\0", "b\0", "x" * 3000):
            put(saver, thread, {})
        put(saver, "bad", {"a\\b": [1]})
        put(saver, "bad", {}, metadata={"key": float("nan")})
        put(saver, "bad", {"c": [1]}, versions={})
        put(saver, "bad", {}, parent="gone")
    plan = transfer.plan(path, postgres_dsn)
    assert {kind: finding.count for kind, finding in found(plan).items()} == {
        "nul": 2,
        "long-id": 1,
        "backslash": 1,
        "not-json": 1,
        "no-version": 1,
        "parent-missing": 1,
    }
    assert [f.severity for f in plan.findings] == sorted(
        (f.severity for f in plan.findings), key=["refused", "conflict", "note"].index
    )


def notes(path: Path, target: Any) -> dict[str, Finding]:
    plan = transfer.plan(path, target)
    assert plan.would_move, plan.findings
    return found(plan)


def test_old_formats(tmp_path: Path, postgres_dsn: str) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        put(saver, "new", {"c": [1]})
        for version in (1, 2, 3):
            put(saver, f"old {version}", {"c": [1]}, v=version)
    (finding,) = notes(path, postgres_dsn).values()
    assert (finding.kind, finding.severity, finding.count) == ("old-format", "note", 3)
    assert "'old 1'" in finding.examples[0]
    assert "format version 1" in finding.examples[0]


def test_writes_without_a_checkpoint(tmp_path: Path, postgres_dsn: str) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        there = put(saver, "a", {"c": [1]}, ns="inner")
        saver.put_writes(_at("a", "inner", there), [("c", 1)], "task")
        saver.put_writes(_at("a", "", there), [("c", 1), ("d", 2)], "task")
        saver.put_writes(_at("b", "", "gone"), [("c", 1)], "task")
    (finding,) = notes(path, postgres_dsn).values()
    assert (finding.kind, finding.count) == ("orphaned-write", 3)


def test_broken_lineage(tmp_path: Path, postgres_dsn: str) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        first = put(saver, "fine", {})
        put(saver, "fine", {}, parent=first)
        put(saver, "missing", {}, parent="gone")
        put(saver, "missing", {}, ns="inner", parent=put(saver, "missing", {}))
        put(saver, "self", {}, id="s", parent="s")
        for child, parent in (("1", "3"), ("2", "1"), ("3", "2"), ("4", "3")):
            put(saver, "circle", {}, id=child, parent=parent)
        put(saver, "later", {}, id="1", parent="2")
        put(saver, "later", {}, id="2")
    kinds = notes(path, postgres_dsn)
    assert {kind: finding.count for kind, finding in kinds.items()} == {
        "parent-missing": 2,
        "own-parent": 1,
        "parent-cycle": 1,
    }
    assert "thread 'circle', checkpoint '1'" in kinds["parent-cycle"].examples[0]
    assert "'gone'" in kinds["parent-missing"].examples[0]


def test_a_state_changed_in_place(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        for state in (["a"], ["a", "b"]):
            put(saver, "a", {"state": state}, versions={"state": "1"})
            put(saver, "b", {"state": state}, versions={"state": str(len(state))})
    (finding,) = notes(path, tmp_path / "archive").values()
    assert (finding.kind, finding.count) == ("changed-in-place", 1)
    assert "thread 'a'" in finding.examples[0]
    assert "channel 'state'" in finding.examples[0]


def test_rows_of_old_and_other_serializers_in_postgres(
    filled: Path, postgres_dsn: str, tmp_path: Path
) -> None:
    transfer.migrate(filled, postgres_dsn)
    with psycopg.connect(postgres_dsn) as conn:
        for number, type_ in enumerate(("json", "pickle", "msgpack+aes", "cbor")):
            conn.execute(
                "INSERT INTO checkpoint_writes (thread_id, checkpoint_ns, checkpoint_id, task_id, idx,"
                " channel, type, blob) SELECT thread_id, checkpoint_ns, checkpoint_id, 'mine', %s, 'c', %s,"
                " 'x'"
                " FROM checkpoints ORDER BY 1, 2, 3 LIMIT 1",
                [number, type_],
            )
    refused = transfer.plan(postgres_dsn, f"sqlite:///{tmp_path}/t.db")
    assert {f.kind for f in refused.findings if f.severity == "refused"} == {
        "damaged",  # 'x' is not JSON
        "pickle",
        "encrypted",
        "unknown-type",
    }
    allowed = transfer.plan(
        postgres_dsn, f"sqlite:///{tmp_path}/t.db", options=transfer.Options(allow_pickle=True)
    )
    assert found(allowed)["pickle"].severity == "note"


def test_encrypted_rows(tmp_path: Path, postgres_dsn: str) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        saver.serde = EncryptedSerializer.from_pycryptodome_aes(key=b"0123456789abcdef")
        make.put(saver, "a", {})
    assert found(transfer.plan(path, postgres_dsn))["encrypted"].severity == "refused"


def test_threads_that_are_there(database: Path, tmp_path: Path, postgres_dsn: str) -> None:
    some = tmp_path / "some.db"
    with make.database(some) as saver:
        make.put(saver, "log", {"c": [1]})
        make.put(saver, "chat 1 é", {"c": [1]})
    transfer.migrate(some, postgres_dsn)
    plan = transfer.plan(database, postgres_dsn)
    conflict = found(plan)["existing-threads"]
    assert (conflict.severity, conflict.count) == ("conflict", 2)
    assert conflict.examples == ["thread 'chat 1 é'", "thread 'log'"]
    assert not plan.would_move
    assert plan.exit_code == 6
    assert "to skip, replace (undo does not bring back what is replaced) or merge" in conflict.advice
    choices: tuple[transfer.OnConflict, ...] = ("skip", "replace")
    for choice in choices:
        advised = transfer.plan(database, postgres_dsn, options=transfer.Options(on_conflict=choice))
        note = found(advised)["existing-threads"]
        assert (note.severity, "undo does not bring it back" in note.advice) == ("note", choice == "replace")
    others = transfer.Options(select=transfer.Selection(threads=["chat 0 é"]))
    assert transfer.plan(database, postgres_dsn, options=others).would_move


def test_a_move_that_is_finished_or_was_interrupted(database: Path, postgres_dsn: str) -> None:
    transfer.migrate(database, postgres_dsn)
    plan = transfer.plan(database, postgres_dsn)
    assert plan.would_move
    assert set(found(plan)) == {"finished-run"}
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("UPDATE persistence_transfers SET state = 'running'")
    assert set(found(transfer.plan(database, postgres_dsn))) == {"interrupted-run"}
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("UPDATE persistence_transfers SET state = 'finished'")
        for table in ("checkpoints", "checkpoint_blobs", "checkpoint_writes"):
            conn.execute(f"DELETE FROM {table} WHERE thread_id = 'log'".encode())
    plan = transfer.plan(database, postgres_dsn)
    assert (found(plan)["existing-threads"].severity, plan.exit_code) == ("conflict", 6)


def test_a_ledger_of_an_older_version(database: Path, target: Target) -> None:
    """Its tables are upgraded by the move; until then the plan does without what they lack."""
    provider = provider_for(target.dsn)
    transfer.migrate(database, target.dsn)
    schema.downgrade(provider, "0002")
    plan = transfer.plan(database, target.dsn)
    assert schema.current(provider) == "0002"
    assert [finding.kind for finding in plan.findings if finding.kind != "target-setup"] == ["finished-run"]
    assert transfer.migrate(database, target.dsn).already_done

    target.execute("UPDATE persistence_transfers SET state = 'running'")
    schema.downgrade(provider, "0002")
    assert found(transfer.plan(database, target.dsn)).keys() == {"interrupted-run"}
    with make.database(database) as saver:
        make.put(saver, "log", {"c": ["more"]})
    assert found(transfer.plan(database, target.dsn))["existing-threads"].severity == "conflict"


def test_tables_that_differ(database: Path, postgres_dsn: str) -> None:
    fresh = transfer.plan(database, postgres_dsn)
    assert {f.kind: f.severity for f in fresh.findings} == {"target-setup": "note"}
    provider = provider_for(postgres_dsn)
    schema.setup(provider)
    assert transfer.plan(database, postgres_dsn).findings == []
    schema.downgrade(provider, "0001")
    older = transfer.plan(database, postgres_dsn)
    assert {f.kind: f.severity for f in older.findings} == {"target-setup": "note"}
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("DROP INDEX checkpoint_writes_thread_id_idx")
    drifted = found(transfer.plan(database, postgres_dsn))["target-schema"]
    assert drifted.severity == "refused"
    assert "persistence setup --repair" in drifted.advice
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("UPDATE persistence_alembic_version SET version_num = '9999'")
    newer = transfer.plan(database, postgres_dsn)
    assert found(newer)["target-schema"].severity == "refused"
    assert "older than the database" in found(newer)["target-schema"].what


def test_a_source_of_an_old_saver(database: Path, tmp_path: Path) -> None:
    make.execute(database, "ALTER TABLE writes DROP COLUMN task_path")
    assert notes(database, tmp_path / "archive")["source-schema"].examples == [
        "table writes has no column task_path"
    ]


def test_an_archive_in_between(database: Path, tmp_path: Path, postgres_dsn: str) -> None:
    transfer.export(database, tmp_path / "copy")
    assert transfer.plan(database, postgres_dsn, archive=tmp_path / "copy").would_move
    make.execute(database, "DELETE FROM checkpoints WHERE thread_id = 'log'")
    plan = transfer.plan(database, postgres_dsn, archive=tmp_path / "copy")
    assert "holds something else" in found(plan)["archive"].what


def test_against_postgres_nothing_remains(database: Path, postgres_dsn: str) -> None:
    with pytest.raises(SchemaError, match="persistence setup"):
        transfer.plan(database, postgres_dsn, against_target=True)
    schema.setup(provider_for(postgres_dsn))
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("CREATE SEQUENCE numbers")
        conn.execute("SELECT nextval('numbers')")
    before = dump(postgres_dsn)
    plan = transfer.plan(database, postgres_dsn, against_target=True)
    assert plan.rehearsed
    assert plan.would_move
    assert plan.estimate.measured
    assert dump(postgres_dsn) == before
    transfer.migrate(database, postgres_dsn)


def test_postgres_itself_judges(database: Path, postgres_dsn: str) -> None:
    """Rules of the target that only it knows, also one that it looks at no sooner than at the commit."""
    schema.setup(provider_for(postgres_dsn))
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("ALTER TABLE checkpoint_writes ADD CONSTRAINT no_log CHECK (thread_id <> 'log')")
    assert transfer.plan(database, postgres_dsn).would_move
    before = dump(postgres_dsn)
    judged = transfer.plan(database, postgres_dsn, against_target=True)
    assert "no_log" in found(judged)["target-refused"].what
    assert judged.exit_code == 6
    assert dump(postgres_dsn) == before
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("ALTER TABLE checkpoint_writes DROP CONSTRAINT no_log")
        conn.execute("CREATE TABLE tenants (id text PRIMARY KEY)")
        conn.execute(
            "ALTER TABLE checkpoints ADD CONSTRAINT tenant FOREIGN KEY (thread_id) REFERENCES tenants"
            " DEFERRABLE INITIALLY DEFERRED"
        )
    judged = transfer.plan(database, postgres_dsn, against_target=True)
    assert "tenant" in found(judged)["target-refused"].what
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute(
            "CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN"
            " RAISE EXCEPTION 'no answer from postgresql://app:sesame@audit/db'; END$$"
        )
        conn.execute("CREATE TRIGGER tell BEFORE INSERT ON checkpoints EXECUTE FUNCTION tell()")
    judged = transfer.plan(database, postgres_dsn, against_target=True)
    assert "no answer from postgresql://app:***@audit/db" in found(judged)["target-refused"].what


def test_against_sqlite_nothing_remains(database: Path, tmp_path: Path) -> None:
    folder = tmp_path / "target"
    folder.mkdir()
    target = f"sqlite:///{folder}/t.db"
    with pytest.raises(SchemaError, match="persistence setup"):
        transfer.plan(database, target, against_target=True)
    assert list(folder.iterdir()) == []
    schema.setup(provider_for(target))
    before = {name: content for name, (content, _) in files(folder).items()}
    plan = transfer.plan(database, target, against_target=True)
    assert plan.rehearsed
    assert plan.would_move
    assert plan.estimate.measured
    assert {name: content for name, (content, _) in files(folder).items()} == before
    make.execute(
        folder / "t.db",
        "CREATE TRIGGER t BEFORE INSERT ON writes BEGIN SELECT RAISE(ABORT, 'not on a Friday'); END",
    )
    judged = transfer.plan(database, target, against_target=True)
    assert "not on a Friday" in found(judged)["target-refused"].what


def notes_of(plan: transfer.Plan) -> dict[str, Finding]:
    assert plan.would_move, plan.findings
    return found(plan)


def _at(thread: str, ns: str, checkpoint_id: str) -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": ns, "checkpoint_id": checkpoint_id}}


def test_memory_stays_bounded_by_a_namespace(tmp_path: Path) -> None:
    """Thousands of threads leave no more behind than the ten largest."""
    from persistence.transfer.chunks import chunked
    from persistence.transfer.records import Checkpoint
    from persistence.transfer.survey import Survey

    survey = Survey()
    records = []
    for number in range(5_000):
        for step in range(3):
            records.append(Checkpoint(f"{number:06}", "", str(step), None, b'{"v":4}', b"{}", {}, ()))
    for chunk in chunked(records):
        survey.take(chunk)
    survey.end()
    held = [value for value in vars(survey).values() if isinstance(value, dict | list)]
    assert sum(map(len, held)) < 20

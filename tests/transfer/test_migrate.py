"""The main job: what the official SQLite saver listed, the official Postgres saver lists."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Command

from persistence import transfer
from persistence.errors import ArchiveError, ConflictError, VerificationError
from tests.transfer import graphs
from tests.transfer.conftest import (
    by_thread,
    postgres_tuples,
    rows,
    sqlite_tuples,
    without_carried_snapshots,
)


@pytest.mark.parametrize("by_archive", [False, True], ids=["direct", "archive"])
def test_official_savers_list_the_same(
    filled: Path, postgres_dsn: str, tmp_path: Path, by_archive: bool
) -> None:
    report = transfer.migrate(filled, postgres_dsn, archive=tmp_path / "archive" if by_archive else None)
    ours, theirs = by_thread(sqlite_tuples(filled)), by_thread(postgres_tuples(postgres_dsn))
    assert ours.keys() == theirs.keys()
    for thread, tuples in ours.items():
        if thread == "log":
            assert [*map(without_carried_snapshots, tuples)] == [
                *map(without_carried_snapshots, theirs[thread])
            ]
        else:
            assert tuples == theirs[thread]
    assert report.verified
    assert report.totals.threads == len(ours)
    assert report.totals.checkpoints == sum(map(len, ours.values()))
    assert report.totals.writes == sum(
        len(item.pending_writes or ()) for tuples in ours.values() for item in tuples
    )
    assert report.totals.bytes_saved > 0
    # Namespaces, forks and interrupts really are among what was compared.
    everything = [item for tuples in ours.values() for item in tuples]
    assert {item.config["configurable"]["checkpoint_ns"] for item in everything} > {""}
    assert any(write[1] == "__interrupt__" for item in everything for write in item.pending_writes or ())


def test_whatever_a_database_sets_for_its_sessions(filled: Path, postgres_dsn: str, tmp_path: Path) -> None:
    odd = {
        "client_encoding": "LATIN1",
        "bytea_output": "escape",
        "standard_conforming_strings": "off",
        "DateStyle": "German",
        "extra_float_digits": "-15",
        "lock_timeout": "10ms",
        "idle_in_transaction_session_timeout": "50ms",
        "default_transaction_isolation": "serializable",
        "row_security": "off",
    }
    with psycopg.connect(postgres_dsn) as conn:
        for name, value in odd.items():
            text = f"ALTER DATABASE {conn.info.dbname} SET {name} = '{value}'"
            conn.execute(text.encode())
    assert transfer.migrate(filled, postgres_dsn).verified
    assert transfer.migrate(postgres_dsn, f"sqlite:///{tmp_path / 'back.db'}").verified
    assert transfer.verify(filled, tmp_path / "back.db").equal


def test_types_survive(filled: Path, postgres_dsn: str) -> None:
    transfer.migrate(filled, postgres_dsn)
    with PostgresSaver.from_conn_string(postgres_dsn) as saver:
        saver.serde = graphs.serde()
        values = graphs.chat(saver).get_state(graphs.config("chat 1 é")).values
    assert isinstance(values["profile"], graphs.Profile)
    assert isinstance(values["price"], graphs.Money)
    assert values["colour"] is graphs.Colour.RED
    assert values["raw"] == b"\0\xff" * values["turn"]
    assert values["note"] is None
    assert type(values["ratio"]) is float


def test_delta_channel_history(filled: Path, postgres_dsn: str) -> None:
    transfer.migrate(filled, postgres_dsn)
    with (
        SqliteSaver.from_conn_string(str(filled)) as one,
        PostgresSaver.from_conn_string(postgres_dsn) as other,
    ):
        configs = [item.config for item in one.list(graphs.config("log"))]
        assert len(configs) > 10
        for config in configs:
            mine = graphs.log(one).get_state(config)
            theirs = graphs.log(other).get_state(config)
            assert mine == theirs
            assert one.get_delta_channel_history(config=config, channels=["lines"]) == (
                other.get_delta_channel_history(config=config, channels=["lines"])
            )


def test_conversation_goes_on(filled: Path, postgres_dsn: str) -> None:
    transfer.migrate(filled, postgres_dsn)
    with PostgresSaver.from_conn_string(postgres_dsn) as saver:
        saver.serde = graphs.serde()
        graph = graphs.chat(saver)
        config = graphs.config("chat 1 é")
        assert graph.get_state(config).interrupts[0].value["question"] == "go on?"
        before = graph.get_state(config).values
        after = graph.invoke(Command(resume="on Postgres"), config)
        assert after["found"] == [*before["found"], "on Postgres"]
        graph.invoke({"messages": [HumanMessage("more")]}, config)
        assert len(graph.get_state(config).values["messages"]) == len(before["messages"]) + 2
        delta = graphs.log(saver)
        lines = delta.get_state(graphs.config("log")).values["lines"]
        assert delta.invoke({"lines": ["asked"]}, graphs.config("log"))["lines"][: len(lines)] == lines


def test_again_changes_nothing(filled: Path, postgres_dsn: str) -> None:
    first = transfer.migrate(filled, postgres_dsn)
    before = rows(postgres_dsn)
    second = transfer.migrate(filled, postgres_dsn)
    assert second.already_done
    assert second.verified
    assert second.run_id == first.run_id
    assert second.batches_written == 0
    assert rows(postgres_dsn) == before


def test_threads_that_exist_are_a_conflict(database: Path, postgres_dsn: str) -> None:
    with PostgresSaver.from_conn_string(postgres_dsn) as saver:
        saver.setup()
        saver.serde = graphs.serde()
        graphs.log(saver).invoke({"lines": ["theirs"]}, graphs.config("log"))
    before = rows(postgres_dsn)
    with pytest.raises(ConflictError, match="'log'"):
        transfer.migrate(database, postgres_dsn)
    assert rows(postgres_dsn) == before


def test_beside_other_threads(filled: Path, postgres_dsn: str) -> None:
    with PostgresSaver.from_conn_string(postgres_dsn) as saver:
        saver.setup()
        graphs.log(saver).invoke({"lines": ["theirs"]}, graphs.config("another"))
    assert transfer.migrate(filled, postgres_dsn).verified
    assert "another" in by_thread(postgres_tuples(postgres_dsn))


def test_after_the_target_was_emptied(filled: Path, postgres_dsn: str) -> None:
    first = transfer.migrate(filled, postgres_dsn)
    before = rows(postgres_dsn)
    with psycopg.connect(postgres_dsn) as conn:
        for table in before:
            conn.execute(f"TRUNCATE {table}".encode())
    second = transfer.migrate(filled, postgres_dsn)
    assert not second.already_done
    assert second.run_id != first.run_id
    assert rows(postgres_dsn) == before


def test_after_some_threads_were_deleted_from_the_target(filled: Path, postgres_dsn: str) -> None:
    transfer.migrate(filled, postgres_dsn)
    gone = sorted(by_thread(postgres_tuples(postgres_dsn)))[0]
    with PostgresSaver.from_conn_string(postgres_dsn) as saver:
        saver.delete_thread(gone)
    before = rows(postgres_dsn)
    with pytest.raises(ConflictError, match=re.escape(f"longer there, thread {gone!r}")):
        transfer.migrate(filled, postgres_dsn)
    assert rows(postgres_dsn) == before


def test_a_copy_that_failed_verification_can_be_deleted_and_repeated(
    filled: Path, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("persistence.transfer.api.verify_copy", killed)
        transfer.migrate(filled, postgres_dsn)
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("UPDATE checkpoint_blobs SET blob = blob || 'x'")
    with pytest.raises(VerificationError):
        transfer.migrate(filled, postgres_dsn)
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("TRUNCATE checkpoints, checkpoint_blobs, checkpoint_writes")
    assert transfer.migrate(filled, postgres_dsn).verified


def test_a_source_that_has_grown_is_a_conflict(database: Path, postgres_dsn: str) -> None:
    transfer.migrate(database, postgres_dsn)
    with SqliteSaver.from_conn_string(str(database)) as saver:
        graphs.log(saver).invoke({"lines": ["later"]}, graphs.config("log"))
    before = rows(postgres_dsn)
    with pytest.raises(ConflictError):
        transfer.migrate(database, postgres_dsn)
    assert rows(postgres_dsn) == before


def test_no_threads(tmp_path: Path, postgres_dsn: str) -> None:
    path = tmp_path / "new.db"
    with SqliteSaver.from_conn_string(str(path)) as saver:
        saver.setup()
    report = transfer.migrate(path, postgres_dsn)
    assert report.totals.threads == 0
    assert report.verified
    assert transfer.migrate(path, postgres_dsn).already_done


def test_configured_schema(filled: Path, postgres_dsn: str) -> None:
    dsn = f"{postgres_dsn}&schema=App%20Data"
    assert transfer.migrate(filled, dsn).verified
    with psycopg.connect(postgres_dsn) as conn:
        count = conn.execute('SELECT count(*) FROM "App Data".checkpoints').fetchone()
        public = conn.execute("SELECT to_regclass('public.checkpoints')").fetchone()
    assert count == (len(sqlite_tuples(filled)),)
    assert public == (None,)
    assert transfer.verify(filled, dsn).equal
    assert transfer.migrate(filled, dsn).already_done


def test_archive_that_exists_is_used_if_it_holds_the_same(
    database: Path, postgres_dsn: str, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    transfer.export(database, archive)
    report = transfer.migrate(database, postgres_dsn, archive=archive)
    assert report.source.endswith("chat.db")
    assert report.verified
    shutil.rmtree(archive)
    transfer.export(database, archive)
    with SqliteSaver.from_conn_string(str(database)) as saver:
        graphs.log(saver).invoke({"lines": ["later"]}, graphs.config("log"))
    with pytest.raises(ArchiveError, match="something else"):
        transfer.migrate(database, postgres_dsn, archive=archive)


def test_progress_reaches_its_total(filled: Path, postgres_dsn: str) -> None:
    told: list[tuple[Any, ...]] = []
    transfer.migrate(filled, postgres_dsn, progress=lambda *args: told.append(args))
    for phase in ("read", "write", "verify"):
        steps = [args[1:] for args in told if args[0] == phase]
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1] == len(sqlite_tuples(filled))

"""Several values under one version, as a graph leaves them in SQLite that changes its state in place."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

import psycopg
import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, StateGraph

import persistence
from persistence import schema, transfer
from persistence.registry import provider_for
from tests.transfer import graphs, make
from tests.transfer.conftest import by_thread, postgres_tuples, rows, sqlite_tuples

ABSENT = object()
HELD: dict[str, Any] = {
    "list": ["a" * 3],
    "other": ["b"],
    "absent": ABSENT,
    "scalar": 5,
    "true": True,
    "none": None,
    "delta": _DeltaSnapshot(["c"]),
    "long": "text " * 300,
}


class State(TypedDict, total=False):
    notes: list[str]
    turn: int


def mutating(saver: BaseCheckpointSaver[Any]) -> Any:
    """A graph whose node appends to its state and does not return it."""

    def work(state: State) -> State:
        state["notes"].append(f"turn {state.get('turn', 0)}")
        return {"turn": state.get("turn", 0) + 1}

    graph = StateGraph(State)
    graph.add_node("work", work)
    graph.add_node("again", work)
    graph.add_edge(START, "work")
    graph.add_edge("work", "again")
    return graph.compile(checkpointer=saver)


@pytest.fixture(scope="module")
def combined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thread for every order in which three checkpoints can hold different things under one version."""
    path = tmp_path_factory.mktemp("in place") / "chat.db"
    fill(path, itertools.product(HELD, repeat=3))
    return path


def fill(path: Path, threads: Iterable[tuple[str, ...]]) -> None:
    with make.database(path) as saver:
        saver.conn.execute("PRAGMA synchronous = OFF")
        for names in threads:
            for name in names:
                values = {} if HELD[name] is ABSENT else {"c": HELD[name]}
                make.put(saver, " ".join(names), values, versions={"c": "1"})
        graph = mutating(saver)
        for _ in range(3):
            graph.invoke({"notes": ["begun"]}, graphs.config("mutated"))
            graph.invoke({"turn": 0}, graphs.config("mutated"))


@pytest.fixture
def moved(combined: Path, postgres_dsn: str) -> transfer.Report:
    return transfer.migrate(combined, postgres_dsn)


def held(item: Any) -> Any:
    value = item.checkpoint["channel_values"].get("c", ABSENT)
    return value.value if isinstance(value, _DeltaSnapshot) else value


def test_our_saver_reads_every_value(moved: transfer.Report, combined: Path, postgres_dsn: str) -> None:
    assert moved.verified
    with persistence.open(postgres_dsn) as db:
        assert db.checkpointer is not None
        ours = by_thread(list(db.checkpointer.list(None)))
    expected = by_thread(sqlite_tuples(combined))
    assert ours.keys() == expected.keys()
    compared = 0
    for thread, tuples in expected.items():
        for mine, theirs in zip(ours[thread], tuples, strict=True):
            if "delta" in thread and held(theirs) is ABSENT:
                continue  # Postgres savers show a snapshot also where SQLite has nothing
            assert mine == theirs, thread
            assert type(held(mine)) is type(held(theirs)), thread
            compared += 1
    assert compared > 1300


def test_a_semantic_comparison_knows_them(moved: transfer.Report, combined: Path, postgres_dsn: str) -> None:
    """What LangGraph's saver shows of them is no difference, where ours reads the other side's values."""
    semantic = transfer.Check(depth="semantic")
    some = transfer.Selection(match=["other *", "absent *", "mutated"])
    verdict = transfer.verify(combined, postgres_dsn, check=semantic, select=some)
    # What is left: a snapshot that the Postgres savers show before the checkpoint that took it, too.
    taken_late = re.compile("absent .*delta")
    assert all(taken_late.search(found.thread_id) for found in verdict.differences)
    assert verdict.beside > 100
    shown = f"LangGraph's saver shows {verdict.beside:,} values of states changed in place otherwise"
    assert verdict.summary().endswith(shown)
    only = transfer.Selection(threads=["other list scalar"])
    back = transfer.verify(postgres_dsn, combined, check=semantic, select=only)
    assert (back.equal, back.beside) == (True, 2)
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute(
            "UPDATE checkpoints SET checkpoint = replace(checkpoint::text, 'kaFi', 'kaFj')::jsonb"
            " WHERE thread_id = 'other list scalar'"
        )
    changed = transfer.verify(combined, postgres_dsn, check=semantic, select=only)
    assert [(found.channel, found.detail) for found in changed.differences] == [("c", "the value differs")]
    assert changed.beside == 1


def test_the_official_saver_goes_on_from_the_newest(
    moved: transfer.Report, combined: Path, postgres_dsn: str
) -> None:
    theirs = by_thread(postgres_tuples(postgres_dsn))
    for thread, tuples in by_thread(sqlite_tuples(combined)).items():
        snapshot = "delta" in thread  # which the official saver shows in later checkpoints, too
        if not (snapshot and held(tuples[0]) is ABSENT):
            assert theirs[thread][0] == tuples[0], thread
        assert [item.config for item in theirs[thread]] == [item.config for item in tuples]
        if held(tuples[0]) is not ABSENT:  # then all have the newest one
            assert {str(held(item)) for item in theirs[thread][:3]} >= {str(held(tuples[0]))}
    older = [item.checkpoint["channel_values"]["c"] for item in theirs["list none scalar"]]
    assert older == [5, 5, 5]
    assert [item.checkpoint["channel_values"].get("c") for item in theirs["absent scalar list"]] == [
        ["aaa"]
    ] * 3


def test_a_graph_goes_on(moved: transfer.Report, combined: Path, postgres_dsn: str, tmp_path: Path) -> None:
    path = Path(shutil.copy(combined, tmp_path / "on.db"))
    with (
        SqliteSaver.from_conn_string(str(path)) as one,
        PostgresSaver.from_conn_string(postgres_dsn) as other,
    ):
        states = [mutating(saver).get_state(graphs.config("mutated")) for saver in (one, other)]
        assert states[0] == states[1]
        results = [mutating(saver).invoke({"turn": 9}, graphs.config("mutated")) for saver in (one, other)]
    assert results[0] == results[1]
    assert results[0]["notes"][-1] == "turn 10"


def test_any_way_and_back(moved: transfer.Report, combined: Path, postgres_dsn: str, tmp_path: Path) -> None:
    other, third = f"{postgres_dsn}&schema=other", f"{postgres_dsn}&schema=third"
    schema.setup(provider_for(other))
    assert transfer.migrate(postgres_dsn, other).verified
    assert rows(postgres_dsn, "other") == rows(postgres_dsn)
    archive, again = tmp_path / "archive", tmp_path / "again"
    transfer.export(combined, archive)
    transfer.export(postgres_dsn, again)
    assert transfer.import_(archive, third).verified
    assert rows(postgres_dsn, "third") == rows(postgres_dsn)
    back = tmp_path / "back.db"
    assert transfer.import_(again, f"sqlite:///{back}").verified
    assert transfer.verify(combined, back).equal
    assert sqlite_tuples(back) == sqlite_tuples(combined)
    assert transfer.migrate(combined, f"sqlite:///{tmp_path / 'same.db'}").verified


def test_workers_know_what_was_chosen(
    moved: transfer.Report, combined: Path, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.transfer.engine.SEGMENT_BATCHES", 1)
    monkeypatch.setattr("persistence.transfer.engine.BATCH_RECORDS", 300)
    shared = f"{postgres_dsn}&schema=shared"
    assert transfer.migrate(combined, shared, options=transfer.Options(workers=2)).verified
    assert rows(postgres_dsn, "shared") == rows(postgres_dsn)


def test_our_saver_writes_and_the_transfer_reads(postgres_dsn: str, tmp_path: Path) -> None:
    """What our Postgres saver stored under one version: there the oldest value is the blob."""
    other = f"{postgres_dsn}&schema=other"
    with persistence.open(postgres_dsn) as db:
        assert db.checkpointer is not None
        graph = mutating(db.checkpointer)
        for _ in range(2):
            graph.invoke({"notes": ["begun"]}, graphs.config("t"))
        make.put(db.checkpointer, "u", {"c": [1]}, versions={"c": "1"})
        make.put(db.checkpointer, "u", {"c": [1, 2], "free": {"x"}}, versions={"c": "1"})
        mine = by_thread(list(db.checkpointer.list(None)))
    schema.setup(provider_for(other))
    assert transfer.migrate(postgres_dsn, other).verified
    with persistence.open(other) as db:
        assert db.checkpointer is not None
        assert by_thread(list(db.checkpointer.list(None))) == mine
    assert transfer.migrate(other, f"sqlite:///{tmp_path / 'back.db'}").verified
    assert by_thread(sqlite_tuples(tmp_path / "back.db")) == mine


def test_a_value_without_a_version(tmp_path: Path, postgres_dsn: str) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        make.put(saver, "t", {"c": [1], "text": "short", "n": 1}, versions={"n": "1"})
    report = transfer.migrate(path, postgres_dsn)
    assert report.verified
    (note,) = [found for found in report.findings if found.kind == "no-version"]
    assert note.count == 1
    assert note.examples[0].endswith("channel 'c'")
    with persistence.open(postgres_dsn) as db:
        assert db.checkpointer is not None
        assert list(db.checkpointer.list(None)) == sqlite_tuples(path)
    assert transfer.migrate(postgres_dsn, f"sqlite:///{tmp_path / 'back.db'}").verified


def test_the_report_tells(moved: transfer.Report) -> None:
    (note,) = [found for found in moved.findings if found.kind == "changed-in-place"]
    assert note.count > 400
    assert "shows the newest value" in note.advice


def test_too_much_for_a_row(tmp_path: Path, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persistence.backends.postgres.transfer_preflight._JSON_BYTES", 5_000)
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        make.put(saver, "large blob", {"c": ["x" * 9_000]}, versions={"c": "1"})
        make.put(saver, "t", {"c": ["x" * 9_000]}, versions={"c": "1"})
        make.put(saver, "t", {"c": ["x"]}, versions={"c": "1"})
    with pytest.raises(transfer.RefusedError, match=r"1 x .* too large for JSONB .*thread 't'"):
        transfer.migrate(path, postgres_dsn)
    with psycopg.connect(postgres_dsn) as conn:
        assert conn.execute("SELECT to_regclass('checkpoints')").fetchone() == (None,)


def test_batches_count_what_rows_repeat(
    tmp_path: Path, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that many rows repeat as a marker must not make one huge batch."""
    monkeypatch.setattr("persistence.transfer.engine.BATCH_BYTES", 300_000)
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        for number in range(30):
            make.put(saver, "t", {"c": [number // 29] * 100_000}, versions={"c": "1"})
    assert transfer.migrate(path, postgres_dsn).batches_written >= 10

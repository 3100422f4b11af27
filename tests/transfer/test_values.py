"""Any value that the official SQLite saver can hold arrives as the official savers see it."""

from __future__ import annotations

import json
import math
import uuid
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langgraph.checkpoint.sqlite import SqliteSaver

from persistence import transfer
from tests.transfer import make
from tests.transfer.conftest import postgres_tuples, sqlite_tuples

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
integers = st.integers(-(2**63), 2**64 - 1)
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\\"), max_size=20)
scalars = (
    st.none()
    | st.booleans()
    | integers
    | st.floats(allow_nan=False)
    | text
    | text.map(lambda part: part * 50)
    | st.binary()
)
values = st.recursive(
    scalars | st.sets(integers, max_size=3) | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(integers | text, inner, max_size=3),
    max_leaves=5,
)
storable = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | storable,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(storable, inner, max_size=3),
    max_leaves=5,
)
finite_json = json_values.filter(lambda value: "Infinity" not in json.dumps(value))
versions = storable | st.integers(0, 2**63) | st.floats(0, 1e300)


def strict(value: Any) -> Any:
    """A form in which equal also means of the same type, and 0.0 is not -0.0."""
    if isinstance(value, dict):
        return {(type(k), k): strict(v) for k, v in value.items()}
    if isinstance(value, list):
        return [strict(item) for item in value]
    if isinstance(value, float):
        return float, math.copysign(1, value), value
    return type(value), value


# One database for all examples: each has a thread of its own.
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    channels=st.dictionaries(names, st.tuples(values, versions), max_size=4),
    metadata=st.dictionaries(storable.filter(lambda key: key != "writes"), finite_json, max_size=4),
    pending=st.lists(st.tuples(names, values), max_size=3),
    ns=storable,
)
def test_any_value(
    tmp_path: Path,
    postgres_dsn: str,
    channels: dict[str, tuple[Any, Any]],
    metadata: dict[str, Any],
    pending: list[tuple[str, Any]],
    ns: str,
) -> None:
    name = uuid.uuid4().hex
    path = tmp_path / f"{name}.db"
    with make.database(path) as saver:
        checkpoint_id = make.put(
            saver,
            name,
            {channel: value for channel, (value, _) in channels.items()},
            versions={channel: version for channel, (_, version) in channels.items()},
            metadata=metadata,
            ns=ns,
        )
        config: Any = {
            "configurable": {"thread_id": name, "checkpoint_ns": ns, "checkpoint_id": checkpoint_id}
        }
        saver.put_writes(config, pending, "task", "path é")
    assert transfer.migrate(path, postgres_dsn).verified
    mine = sqlite_tuples(path)
    theirs = postgres_tuples(postgres_dsn, name)
    assert mine == theirs
    for one, other in zip(mine, theirs, strict=True):
        for part in ("channel_values", "channel_versions"):
            assert strict(one.checkpoint[part]) == strict(other.checkpoint[part])
        assert strict([list(write) for write in one.pending_writes or ()]) == strict(
            [list(write) for write in other.pending_writes or ()]
        )


@pytest.mark.parametrize("version", ["1", 1, 1.0, 0.1, 1e16, 1e22, 5e-324, 2**63, "", "é'\"\\"])
def test_versions_find_their_values(tmp_path: Path, postgres_dsn: str, version: Any) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        make.put(saver, "t", {"c": ["not a scalar"]}, versions={"c": version})
    transfer.migrate(path, postgres_dsn)
    (mine,), (theirs,) = sqlite_tuples(path), postgres_tuples(postgres_dsn)
    assert theirs.checkpoint["channel_values"] == {"c": ["not a scalar"]}
    assert strict(theirs.checkpoint["channel_versions"]) == strict(mine.checkpoint["channel_versions"])


EDGES = [
    *(-0.0, 0.0, 1.0, 1e15, 1e16, 1e22, 5e-324, 1e-5, 0.1, float("inf"), 2**63, 2**64 - 1, -(2**63)),
    *("", "\0", "\\u0000", "a\0b", "\ufffe\uffff\U0010ffff", "x" * 512, "x" * 513, "é" * 300),
    *(True, False, None, b"", b"\0", [], {}, [None], {"": None}, {1: 2, None: 3}),
]


def test_edges(tmp_path: Path, postgres_dsn: str) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        make.put(saver, "t", {f"channel {n}": value for n, value in enumerate(EDGES)})
        config: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": "", "checkpoint_id": "other"}}
        saver.put_writes(config, [(f"channel {n}", value) for n, value in enumerate(EDGES)], "task")
    transfer.migrate(path, postgres_dsn)
    (mine,), (theirs,) = sqlite_tuples(path), postgres_tuples(postgres_dsn)
    assert strict(theirs.checkpoint["channel_values"]) == strict(mine.checkpoint["channel_values"])
    assert [strict(theirs.checkpoint["channel_values"][f"channel {n}"]) for n in range(len(EDGES))] == [
        strict(value) for value in EDGES
    ]


def test_a_value_is_stored_once_per_version(tmp_path: Path, postgres_dsn: str) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        for step in range(5):
            make.put(
                saver,
                "t",
                {"same": ["x"], "new": [step], "short": "s", "long": "l" * 1000},
                versions={"same": "1", "new": str(step), "short": "1", "long": "1"},
            )
    report = transfer.migrate(path, postgres_dsn)
    with psycopg.connect(postgres_dsn) as conn:
        blobs = conn.execute("SELECT channel, version FROM checkpoint_blobs ORDER BY 1, 2").fetchall()
    assert blobs == [("long", "1"), *(("new", str(n)) for n in range(5)), ("same", "1")]
    assert report.totals.values == 7
    assert sqlite_tuples(path) == postgres_tuples(postgres_dsn)


def test_orphans_and_broken_parents_move_too(tmp_path: Path, postgres_dsn: str) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        make.put(saver, "t", {}, parent="no such checkpoint")
        config: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": "x", "checkpoint_id": "gone"}}
        saver.put_writes(config, [("a", 1), ("b", None), ("__interrupt__", [2])], "task")
        orphan_only: Any = {"configurable": {"thread_id": "w", "checkpoint_ns": "", "checkpoint_id": "gone"}}
        saver.put_writes(orphan_only, [("a", b"raw")], "task", "~path")
    report = transfer.migrate(path, postgres_dsn)
    assert (report.totals.threads, report.totals.checkpoints, report.totals.writes) == (2, 1, 4)
    with psycopg.connect(postgres_dsn) as conn:
        found = conn.execute(
            "SELECT thread_id, checkpoint_ns, idx, channel, type, blob, task_path FROM checkpoint_writes"
            " ORDER BY thread_id, idx"
        ).fetchall()
        parents = conn.execute("SELECT parent_checkpoint_id FROM checkpoints").fetchall()
    assert [row[:5] for row in found] == [
        ("t", "x", -3, "__interrupt__", "msgpack"),
        ("t", "x", 0, "a", "msgpack"),
        ("t", "x", 1, "b", "null"),
        ("w", "", 0, "a", "bytes"),
    ]
    assert found[3][5:] == (b"raw", "~path")
    assert parents == [("no such checkpoint",)]
    assert transfer.verify(path, postgres_dsn).equal


def test_many_batches(tmp_path: Path, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persistence.transfer.engine.BATCH_RECORDS", 7)
    path = tmp_path / "a.db"
    with SqliteSaver.from_conn_string(str(path)) as saver:
        for number in range(30):
            make.put(
                saver, f"t{number % 4}", {"a": [number], "b": "b" * number}, versions={"a": number, "b": 1}
            )
    report = transfer.migrate(path, postgres_dsn)
    assert report.totals.values == 30
    # A batch ends with its segment, here a thread: 8, 8, 7 and 7 checkpoints, each with a value.
    assert report.batches_written == sum(math.ceil(2 * checkpoints / 7) for checkpoints in (8, 8, 7, 7))
    assert report.verified

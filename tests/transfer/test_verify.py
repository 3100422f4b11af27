"""Verification finds any single change, and names it."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import Checkpoint, empty_checkpoint
from langgraph.checkpoint.postgres import PostgresSaver

import persistence
from persistence import schema, transfer
from persistence.errors import VerificationError
from persistence.registry import provider_for
from tests.transfer import graphs, make

THREAD = "chat 0 é"

# Each statement changes one row of one thread in Postgres; the difference must name it so.
CHANGES = {
    "blob": (
        "UPDATE checkpoint_blobs SET blob = blob || 'x' WHERE thread_id = '{t}' AND channel = 'profile'",
        "channel 'profile': the value differs",
    ),
    "blob type": (
        "UPDATE checkpoint_blobs SET type = 'bytearray' WHERE thread_id = '{t}' AND channel = 'raw'",
        "channel 'raw': the value differs",
    ),
    "blob missing": (
        "DELETE FROM checkpoint_blobs WHERE thread_id = '{t}' AND channel = 'price'",
        "channel 'price': the value is missing in postgresql",
    ),
    "scalar": (
        "UPDATE checkpoints SET checkpoint = jsonb_set(checkpoint, '{{channel_values,turn}}', '99')"
        " WHERE thread_id = '{t}' AND checkpoint -> 'channel_values' ? 'turn'",
        "channel 'turn': the value differs",
    ),
    "scalar type": (
        "UPDATE checkpoints SET checkpoint = jsonb_set(checkpoint, '{{channel_values,turn}}', '1.0')"
        " WHERE thread_id = '{t}' AND checkpoint -> 'channel_values' ->> 'turn' = '1'",
        "channel 'turn': the value differs",
    ),
    "null is not absent": (
        "UPDATE checkpoints SET checkpoint = checkpoint #- '{{channel_values,note}}' WHERE thread_id = '{t}'",
        "channel 'note': the value is missing in postgresql",
    ),
    "version": (
        "UPDATE checkpoints SET checkpoint = jsonb_set(checkpoint, '{{channel_versions,done}}', '\"0\"')"
        " WHERE thread_id = '{t}' AND checkpoint -> 'channel_versions' ? 'done'",
        "the checkpoint differs in channel_versions",
    ),
    "versions seen": (
        "UPDATE checkpoints SET checkpoint = jsonb_set(checkpoint, '{{versions_seen}}', '{{}}')"
        " WHERE thread_id = '{t}'",
        "the checkpoint differs in versions_seen",
    ),
    "metadata": (
        "UPDATE checkpoints SET metadata = metadata || '{{\"step\": 99}}' WHERE thread_id = '{t}'",
        "the metadata differs in step",
    ),
    "parent": (
        "UPDATE checkpoints SET parent_checkpoint_id = NULL WHERE thread_id = '{t}' AND checkpoint_ns = ''",
        "the parent is",
    ),
    "namespace": (
        "UPDATE checkpoints SET checkpoint_ns = 'other' WHERE thread_id = '{t}' AND checkpoint_ns = 'inner'",
        "namespace 'inner', checkpoint",
    ),
    "checkpoint missing": (
        "DELETE FROM checkpoints WHERE ctid = (SELECT ctid FROM checkpoints WHERE thread_id = '{t}' LIMIT 1)",
        "the checkpoint is missing in postgresql",
    ),
    "write value": (
        "UPDATE checkpoint_writes SET blob = blob || 'x' WHERE thread_id = '{t}' AND channel = 'found'",
        "channel 'found': write",
    ),
    "write path": (
        "UPDATE checkpoint_writes SET task_path = 'x' WHERE thread_id = '{t}'",
        "differs in task_path",
    ),
    "write missing": (
        "DELETE FROM checkpoint_writes WHERE thread_id = '{t}' AND channel = 'colour'",
        "is missing in postgresql",
    ),
    "thread missing": (
        "WITH a AS (DELETE FROM checkpoints WHERE thread_id = '{t}'),"
        " b AS (DELETE FROM checkpoint_blobs WHERE thread_id = '{t}')"
        " DELETE FROM checkpoint_writes WHERE thread_id = '{t}'",
        f"thread '{THREAD}': missing in postgresql",
    ),
}


@pytest.mark.parametrize(("change", "named"), CHANGES.values(), ids=CHANGES)
def test_a_change_is_named(filled: Path, postgres_dsn: str, change: str, named: str) -> None:
    transfer.migrate(filled, postgres_dsn)
    assert transfer.verify(filled, postgres_dsn).equal
    with psycopg.connect(postgres_dsn) as conn:
        assert conn.execute(change.format(t=THREAD).encode()).rowcount > 0
    verdict = transfer.verify(filled, postgres_dsn)
    assert not verdict.equal
    assert verdict.differing_threads == 1
    assert {difference.thread_id for difference in verdict.differences} == {THREAD}
    assert named in str(verdict.differences[0]), verdict.differences
    with pytest.raises(VerificationError, match="1 of 4 threads"):
        verdict.require()


def test_extra_threads(filled: Path, postgres_dsn: str) -> None:
    transfer.migrate(filled, postgres_dsn)
    with PostgresSaver.from_conn_string(postgres_dsn) as saver:
        graphs.log(saver).invoke({"lines": ["theirs"]}, graphs.config("another"))
    verdict = transfer.verify(filled, postgres_dsn)
    assert [str(difference) for difference in verdict.differences] == [
        f"thread 'another': missing in {verdict.left}"
    ]
    assert transfer.verify(filled, postgres_dsn, subset=True).equal


@pytest.mark.parametrize("limit", [-1, 1_000_000_000])
def test_a_migration_that_differs_says_so(
    filled: Path, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """What the target does to the rows is found: nothing is believed because it was sent."""
    monkeypatch.setattr("persistence.transfer.ahead.LIMIT", limit)
    schema.setup(provider_for(postgres_dsn))
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute(
            "CREATE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN NEW.idx = NEW.idx + 1000; RETURN NEW; END $$"
        )
        conn.execute(
            "CREATE TRIGGER spoil BEFORE INSERT ON checkpoint_writes"
            " FOR EACH ROW WHEN (NEW.channel = 'colour') EXECUTE FUNCTION spoil()"
        )
    with pytest.raises(VerificationError, match="write"):
        transfer.migrate(filled, postgres_dsn)
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("UPDATE checkpoint_writes SET idx = idx - 1000 WHERE channel = 'colour'")
    report = transfer.migrate(filled, postgres_dsn)
    assert report.verified
    assert report.batches_written == 0


def test_two_files(filled: Path, database: Path) -> None:
    assert transfer.verify(filled, database).equal
    make.execute(database, "UPDATE checkpoints SET metadata = '{}' WHERE thread_id = 'log'")
    verdict = transfer.verify(filled, database)
    assert verdict.differing_threads == 1
    assert "the metadata differs" in str(verdict.differences[0])


def test_key_order_and_spelling_of_json_are_no_difference(tmp_path: Path) -> None:
    one, other = tmp_path / "one.db", tmp_path / "other.db"
    for path in (one, other):
        with make.database(path) as saver:
            make.put(saver, "t", {}, id="c", ts="now", metadata={"a": 1e22, "b": [0.5, -0.0], "c": "é"})
    make.execute(
        other, """UPDATE checkpoints SET metadata = '{"c":"\\u00e9","b":[5e-1,0.0],"a":1e+22,"c":"é"}'"""
    )
    assert transfer.verify(one, other).equal
    make.execute(other, """UPDATE checkpoints SET metadata = '{"c":"é","b":[0.5,0],"a":1e22}'""")
    assert "the metadata differs in" in str(transfer.verify(one, other).differences[0])


def test_a_state_changed_in_place_reads_the_same_from_both_of_our_savers(
    tmp_path: Path, postgres_dsn: str
) -> None:
    """Our Postgres saver keeps both values of one version; a source must see them as SQLite's does."""
    sides = [f"sqlite:///{tmp_path / 'chat.db'}", postgres_dsn]
    first: Checkpoint = {
        **empty_checkpoint(),
        "id": "1",
        "channel_values": {"items": [1]},
        "channel_versions": {"items": "1"},
    }
    second: Checkpoint = {**first, "id": "2", "channel_values": {"items": [1, 2]}}
    without: Checkpoint = {**first, "id": "3", "channel_values": {}}
    for side in sides:
        with persistence.open(side) as db:
            assert db.checkpointer is not None
            config: RunnableConfig = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
            for checkpoint in (first, second, without):
                config = db.checkpointer.put(config, checkpoint, {}, {"items": "1"})
    verdict = transfer.verify(*sides)
    assert verdict.equal, verdict

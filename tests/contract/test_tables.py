"""Clause F6 on our own backends: tables that are missing."""

from __future__ import annotations

import re

import pytest

from persistence.errors import SchemaError
from persistence.testing.fixtures import Opener
from persistence.testing.interface import METHODS, arguments
from persistence.testing.marks import clause
from persistence.testing.subject import Subject
from tests.contract.conftest import DURABLE, Ours


@clause("F6")
@pytest.mark.parametrize("backend", DURABLE)
def test_missing_table_is_an_error_that_names_the_command(target: Ours, opened: Opener) -> None:
    saver = opened()
    saver.put("t", "1", {})
    _without_tables(target)
    try:
        for name in METHODS:
            args, kwargs = arguments(name)
            with pytest.raises(SchemaError, match="persistence setup"):
                saver.call(name, *args, **kwargs)
    finally:
        saver.handle.setup() if not saver.is_async else saver.loop.run(saver.handle.setup())
    assert saver.get("t") is None


@clause("F1")
@pytest.mark.parametrize("backend", ["postgres"])
def test_blobs_that_nothing_names_are_collected(target: Ours, saver: Subject) -> None:
    """A value goes with the last checkpoint that names it; one that is named stays."""
    for thread in ("pruned", "rolled back", "deleted"):
        parent = None
        for i in range(4):
            versions = {"x": i, "same": 0}
            values = {"x": [f"{thread} {i}"], "same": [f"{thread} same"]}
            new = versions if i == 0 else {"x": i}
            saver.put(
                thread, str(i), values, parent=parent, versions=versions, new=new, metadata={"run_id": str(i)}
            )
            parent = str(i)
    saver.call("prune", ["pruned"])
    saver.call("copy_thread", "rolled back", "copy")
    saver.call("delete_for_runs", ["1", "2"])
    saver.call("delete_thread", "deleted")
    assert target.raw is not None
    stored = target.raw().decode()
    left = set(re.findall(r"(?:pruned|rolled back|deleted) (?:\d|same)", stored))
    assert left == {"pruned 3", "pruned same", "rolled back 0", "rolled back 3", "rolled back same"}


def _without_tables(target: Ours) -> None:
    """Take LangGraph's tables away, with the official saver's own connection."""
    assert target.official is not None
    with target.official() as official:
        conn = official.conn
        for table in (
            "checkpoints",
            "writes",
            "checkpoint_blobs",
            "checkpoint_writes",
            "checkpoint_migrations",
        ):
            conn.execute(f"DROP TABLE IF EXISTS {table}")
        conn.commit()

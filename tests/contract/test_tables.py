"""Clause F6 on our own backends: tables that are missing."""

from __future__ import annotations

import pytest

from persistence.errors import SchemaError
from persistence.testing.fixtures import Opener
from persistence.testing.interface import METHODS, arguments
from persistence.testing.marks import clause
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

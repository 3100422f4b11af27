"""One target of each database, filled and read the same way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Command

import persistence
from persistence.dsn import Dsn
from tests.transfer import graphs, make
from tests.transfer.conftest import file_rows, rows


@dataclass(frozen=True)
class Target:
    """A database to move into."""

    dsn: str

    def rows(self) -> dict[str, list[Any]]:
        """Every row of LangGraph's tables."""
        if (path := Dsn.parse(self.dsn).path) is not None:
            return file_rows(Path(path))
        return rows(self.dsn)

    def keys(self) -> dict[str, set[tuple[Any, ...]]]:
        """What identifies each row."""
        length = {"checkpoints": 3, "checkpoint_blobs": 4, "checkpoint_writes": 5, "writes": 5}
        return {name: {row[: length[name]] for row in found} for name, found in self.rows().items()}

    @contextmanager
    def official(self) -> Iterator[BaseCheckpointSaver[Any]]:
        """LangGraph's own saver on it."""
        path = Dsn.parse(self.dsn).path
        saver_class: Any = PostgresSaver if path is None else SqliteSaver
        with saver_class.from_conn_string(self.dsn if path is None else path) as saver:
            saver.serde = graphs.serde()
            saver.setup()
            yield saver

    def execute(self, statement: str) -> None:
        """Change it behind everybody's back."""
        if (path := Dsn.parse(self.dsn).path) is not None:
            make.execute(Path(path), statement)
            return
        with psycopg.connect(self.dsn) as conn:
            conn.execute(statement.encode())

    def chat(self, thread: str, said: str | Command[Any] = "later") -> None:
        """A turn of the application, by our own saver."""
        with persistence.open(self.dsn) as db:
            assert db.checkpointer is not None
            graph = graphs.chat(db.checkpointer)
            graph.invoke({"messages": [said]} if isinstance(said, str) else said, graphs.config(thread))

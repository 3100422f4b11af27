"""The administrator's view of one SQLite database: what is there, what must be, and how it is made.

SQLite's DDL is transactional, so LangGraph's setup runs in one transaction that holds the write lock: ten
processes take turns, and a crash leaves nothing half made.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast

from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.store.sqlite import SqliteStore

from persistence.contract import TableShape
from persistence.errors import SchemaError

if TYPE_CHECKING:
    from persistence.backends.sqlite.provider import SqliteProvider

# What checkpoint-sqlite 3.1.2 makes, checkpoints and store; tests/schema compares it with what the
# installed version makes on an empty database.
REQUIRED: Mapping[str, TableShape] = {
    "checkpoints": TableShape(
        frozenset(
            {
                "thread_id",
                "checkpoint_ns",
                "checkpoint_id",
                "parent_checkpoint_id",
                "type",
                "checkpoint",
                "metadata",
            }
        ),
        ("thread_id", "checkpoint_ns", "checkpoint_id"),
    ),
    "writes": TableShape(
        frozenset(
            {
                "thread_id",
                "checkpoint_ns",
                "checkpoint_id",
                "task_id",
                "task_path",
                "idx",
                "channel",
                "type",
                "value",
            }
        ),
        ("thread_id", "checkpoint_ns", "checkpoint_id", "task_id", "idx"),
    ),
    "store_migrations": TableShape(frozenset({"v"}), ("v",)),
    "store": TableShape(
        frozenset({"prefix", "key", "value", "created_at", "updated_at", "expires_at", "ttl_minutes"}),
        ("prefix", "key"),
        frozenset({"store_prefix_idx", "idx_store_expires_at"}),
    ),
}

_COLUMNS = r"""
SELECT m.name, c.name, c.pk FROM sqlite_master m, pragma_table_info(m.name) c
WHERE m.type = 'table' AND (m.name IN ({}) OR m.name LIKE 'persistence\_%' ESCAPE '\')
""".format(", ".join(f"'{name}'" for name in REQUIRED))
_INDEXES = "SELECT tbl_name, name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"


class SqliteTables:
    """The tables of one SQLite database; a context manager that opens it when first needed."""

    dialect: Literal["sqlite", "postgresql"] = "sqlite"
    schema: str | None = None
    required: Mapping[str, TableShape] = REQUIRED

    def __init__(self, provider: SqliteProvider) -> None:
        self._database = provider.database
        self._reader: sqlite3.Connection | None = None

    def __enter__(self) -> SqliteTables:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None
            if not self._had_log:  # a log that was there is not ours to empty
                self._database.tidy()

    def observed(self) -> Mapping[str, TableShape]:
        """Two small queries. A file that is not there has no tables, and is not made for the asking."""
        columns: dict[str, list[tuple[str, int]]] = {}
        for table, column, position in self._rows(_COLUMNS):
            columns.setdefault(table, []).append((column, position))
        indexes: dict[str, set[str]] = {}
        for table, index in self._rows(_INDEXES):
            indexes.setdefault(table, set()).add(index)
        return {
            table: TableShape(
                frozenset(name for name, _ in found),
                tuple(name for position, name in sorted((p, n) for n, p in found if p)),
                frozenset(indexes.get(table, ())),
            )
            for table, found in columns.items()
        }

    def own_revision(self) -> str | None:
        """The revision in Alembic's version table."""
        return cast("str | None", self._newest("version_num", "persistence_alembic_version"))

    def langgraph_pending(self) -> Mapping[str, str]:
        """The store counts its migrations; the saver keeps no record, its tables show what it did."""
        newest = self._newest("v", "store_migrations")
        done, known = 0 if newest is None else newest + 1, len(SqliteStore.MIGRATIONS)
        if done >= known:
            return {}
        return {"store_migrations": f"store_migrations records {done} of LangGraph's {known} migrations"}

    def setup_lock(self) -> AbstractContextManager[None]:
        """Nothing: each step of setup takes SQLite's own write lock, and looks again once it has it."""
        return nullcontext()

    def create_langgraph_tables(self) -> None:
        """Run the official ``setup()`` of saver and store, in one transaction."""
        with self._transaction() as connection:
            _official_setup(connection)

    def repair_langgraph_tables(self) -> None:
        """Forget which of the store's migrations ran, so that all of them run again."""
        with self._transaction() as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS store_migrations (v INTEGER PRIMARY KEY)")
            connection.execute("DELETE FROM store_migrations")
            _official_setup(connection)

    def langgraph_sql(self) -> str:
        """What the official setup leaves in an empty database. No connection to this one."""
        scratch = sqlite3.connect(":memory:", isolation_level=None)
        try:
            _official_setup(scratch)
            lines = [
                f"{sql};".replace("CREATE TABLE ", "CREATE TABLE IF NOT EXISTS ", 1).replace(
                    "CREATE INDEX ", "CREATE INDEX IF NOT EXISTS ", 1
                )
                for (sql,) in scratch.execute(
                    "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid"
                )
            ]
            recorded = scratch.execute("SELECT v FROM store_migrations ORDER BY v").fetchall()
        finally:
            scratch.close()
        lines += [f"INSERT OR IGNORE INTO store_migrations (v) VALUES ({v});" for (v,) in recorded]
        return "\n".join(lines)

    def connect(self) -> sqlite3.Connection:
        """A connection with the package's own settings."""
        return self._database.connect()

    def _rows(self, statement: str) -> list[tuple[Any, ...]]:
        if self._reader is None:
            path = self._database.path
            if path is not None and not path.exists() and path.absolute().parent.is_dir():
                return []
            self._had_log = self._database.has_log()
            self._reader = self._database.connect(readonly=True)
        try:
            return self._reader.execute(statement).fetchall()
        except sqlite3.Error as error:
            raise self._explain(error) from None

    def _newest(self, column: str, table: str) -> Any:
        if not self._rows(f"SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = '{table}'"):
            return None
        return self._rows(f"SELECT max({column}) FROM {table}")[0][0]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        connection = self._database.connect()
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._explain(error) from None
        finally:
            connection.close()  # an unfinished transaction goes with it

    def _explain(self, error: sqlite3.Error) -> SchemaError:
        """Our error for one that SQLite gave to a statement of setup or of the drift check."""
        where, reason = self._database.name, str(error)
        if "readonly" in reason:
            return SchemaError(
                f"{where} may only be read, and its tables are not complete",
                hint="run `persistence setup` as a user who may write the file",
            )
        if "locked" in reason:
            return SchemaError(
                f"another process is writing to {where} and does not finish",
                hint="stop it, or give it more time: sqlite_busy_timeout",
            )
        return SchemaError(f"the tables in {where} could not be set up: {reason}")


def _official_setup(connection: sqlite3.Connection) -> None:
    steps = cast("sqlite3.Connection", _Steps(connection))
    SqliteSaver(steps).setup()
    SqliteStore(steps).setup()


class _Steps:
    """A connection for upstream's ``setup()`` that stays inside the transaction it was given.

    ``executescript`` of the real one commits first. Read in checkpoint-sqlite 3.1.2: the saver's
    script begins with a change of journal mode, which is no statement for a transaction (the connection was
    opened with it already); the store's repeat ``ALTER TABLE ... ADD COLUMN`` after a crash that
    lost only the record of it.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def executescript(self, script: str) -> None:
        for statement in _statements(script):
            if statement.upper().startswith("PRAGMA JOURNAL_MODE"):
                continue
            try:
                self._connection.execute(statement)
            except sqlite3.OperationalError as error:
                if not str(error).startswith("duplicate column name"):
                    raise


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, in order."""
    statement = ""
    for part in script.split(";"):
        statement += part + ";"
        if sqlite3.complete_statement(statement):
            yield statement.strip()
            statement = ""

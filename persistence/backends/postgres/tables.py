"""The administrator's view of one Postgres database: what is there, what must be, and how it is made.

The connections are opened for the purpose; the pool has no part in it. No session state is used
(PgBouncer in transaction mode keeps none): no ``search_path``, no ``SET``, no session locks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Literal, cast

import psycopg
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.store.postgres import PostgresStore
from psycopg import ClientCursor, Connection, Cursor, errors
from psycopg.rows import DictRow, tuple_row

from persistence.backends.postgres.connection import connect, qualify, quote_identifier
from persistence.contract import Provider, TableShape
from persistence.dsn import mask_secrets
from persistence.errors import ConnectError, SchemaError

# What checkpoint-postgres 3.2.0 makes, checkpoints and store; tests/schema compares it with what the
# installed version makes on an empty database.
REQUIRED: Mapping[str, TableShape] = {
    "checkpoint_migrations": TableShape(frozenset({"v"}), ("v",)),
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
        frozenset({"checkpoints_thread_id_idx"}),
    ),
    "checkpoint_blobs": TableShape(
        frozenset({"thread_id", "checkpoint_ns", "channel", "version", "type", "blob"}),
        ("thread_id", "checkpoint_ns", "channel", "version"),
        frozenset({"checkpoint_blobs_thread_id_idx"}),
    ),
    "checkpoint_writes": TableShape(
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
                "blob",
            }
        ),
        ("thread_id", "checkpoint_ns", "checkpoint_id", "task_id", "idx"),
        frozenset({"checkpoint_writes_thread_id_idx"}),
    ),
    "store_migrations": TableShape(frozenset({"v"}), ("v",)),
    "store": TableShape(
        frozenset({"prefix", "key", "value", "created_at", "updated_at", "expires_at", "ttl_minutes"}),
        ("prefix", "key"),
        frozenset({"store_prefix_idx", "idx_store_expires_at"}),
    ),
}

# LangGraph's version tables, in the order in which setup fills them, and the migrations they count.
# The installed package's own lists, so that a newer one brings its migrations along.
_MIGRATIONS: Mapping[str, Sequence[str]] = {
    "checkpoint_migrations": PostgresSaver.MIGRATIONS,
    "store_migrations": PostgresStore.MIGRATIONS,
}

_HERE = """
  AND CASE WHEN %(schema)s::text IS NULL THEN pg_catalog.pg_table_is_visible(c.oid)
           ELSE n.nspname = %(schema)s END
"""

# An index counts only for the table it is on, so one of the same name in another schema does not;
# and only when it is valid: a CREATE INDEX CONCURRENTLY that failed leaves one behind that is not.
_OBSERVE = (
    r"""
SELECT c.relname::text AS name,
       ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute a
             WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns,
       ARRAY(SELECT a.attname::text
             FROM pg_catalog.pg_index i
             CROSS JOIN LATERAL pg_catalog.unnest(i.indkey) WITH ORDINALITY AS k (attnum, position)
             JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum
             WHERE i.indrelid = c.oid AND i.indisprimary AND k.position <= i.indnkeyatts
             ORDER BY k.position) AS primary_key,
       ARRAY(SELECT ic.relname::text FROM pg_catalog.pg_index i
             JOIN pg_catalog.pg_class ic ON ic.oid = i.indexrelid
             WHERE i.indrelid = c.oid AND i.indisvalid AND NOT i.indisprimary) AS indexes
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p')
  AND (c.relname = ANY (%(names)s) OR c.relname LIKE 'persistence\_%%')
"""
    + _HERE
)

_INVALID_INDEXES = (
    """
SELECT pg_catalog.format('%%I.%%I', n.nspname, ic.relname) AS name
FROM pg_catalog.pg_index i
JOIN pg_catalog.pg_class ic ON ic.oid = i.indexrelid
JOIN pg_catalog.pg_class c ON c.oid = i.indrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE NOT i.indisvalid AND c.relname = ANY (%(names)s) AND ic.relname = ANY (%(indexes)s)
"""
    + _HERE
)

_PARTITIONED = (
    """
SELECT c.relname::text AS name
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'p' AND c.relname = ANY (%(names)s)
"""
    + _HERE
    + "ORDER BY name"
)

# Two schemas do not wait for each other; no schema and the schema that this resolves to do.
# The holder is idle in a transaction for as long as setup takes: the server must not end it for that.
TRY_LOCK = """
SELECT pg_catalog.pg_try_advisory_xact_lock(pg_catalog.hashtextextended(
           'langgraph-persistence setup ' || coalesce(%(schema)s::text, current_schema()::text, ''), 0)
       ) AS got,
       (SELECT count(pg_catalog.set_config(name, '0', true)) FROM pg_catalog.pg_settings
        WHERE name IN ('idle_in_transaction_session_timeout', 'transaction_timeout')) AS timeouts
"""


# A server built without lz4 does not name it. What is stored already stays as it is.
HAS_LZ4 = """
SELECT 1 FROM pg_catalog.pg_settings WHERE name = 'default_toast_compression' AND 'lz4' = ANY (enumvals)
"""
SET_COMPRESSION = (
    "ALTER TABLE checkpoint_blobs ALTER COLUMN blob SET COMPRESSION {0}",
    "ALTER TABLE checkpoint_writes ALTER COLUMN blob SET COMPRESSION {0}",
)


class PostgresTables:
    """The tables of one Postgres database; a context manager that connects when first needed."""

    dialect: Literal["sqlite", "postgresql"] = "postgresql"
    required: Mapping[str, TableShape] = REQUIRED
    lock_timeout: float = 120.0
    """Seconds to wait for another process's setup, which may be building an index on a large table."""

    def __init__(self, provider: Provider) -> None:
        self._dsn = provider.dsn
        self._settings = provider.settings
        self.schema: str | None = provider.settings.db_schema
        self._main: Connection[DictRow] | None = None

    def __enter__(self) -> PostgresTables:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._main is not None:
            self._main.close()
            self._main = None

    def observed(self) -> Mapping[str, TableShape]:
        """One catalogue query; it needs no rights on the tables."""
        return {
            row["name"]: TableShape(
                frozenset(row["columns"]), tuple(row["primary_key"]), frozenset(row["indexes"])
            )
            for row in self._rows(_OBSERVE, names=list(REQUIRED))
        }

    def own_revision(self) -> str | None:
        """The revision in Alembic's version table."""
        return cast("str | None", self._newest("version_num", "persistence_alembic_version"))

    def langgraph_pending(self) -> Mapping[str, str]:
        """What the version tables have no record of, counted against the installed packages."""
        pending = {}
        for table, migrations in _MIGRATIONS.items():
            newest = self._newest("v", table)
            done = 0 if newest is None else newest + 1
            if done < len(migrations):
                pending[table] = f"{table} records {done} of LangGraph's {len(migrations)} migrations"
        return pending

    @contextmanager
    def setup_lock(self) -> Iterator[None]:
        """Poll for a transaction-level advisory lock, on a connection of its own.

        Waiting *inside* ``pg_advisory_xact_lock`` would hold a snapshot, and the ``CREATE INDEX
        CONCURRENTLY`` of the process that has the lock waits for all older snapshots: a deadlock. A poll
        holds one for an instant; the holder, idle in a READ COMMITTED transaction, holds none, provided that
        its statement went by the simple query protocol: the other one leaves the statement's portal
        open, with its snapshot, until the next statement. So the parameters are bound by the client.
        """
        connection = self._connect()
        try:
            with self._explained():
                connection.autocommit = False
                connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
                connection.cursor_factory = ClientCursor
                self._wait_for_lock(connection)
            yield
        finally:
            with suppress(psycopg.Error):
                connection.rollback()
            connection.close()

    def create_langgraph_tables(self) -> None:
        """Run the official ``setup()`` of saver and store."""
        with self._explained():
            self._create_schema()
            pending = self.langgraph_pending()
            self._refuse_partitioned(pending)
            connection = self._connection()
            PostgresSaver(connection).setup()
            PostgresStore(connection).setup()
            if pending:
                if "checkpoint_migrations" in pending and self._rows(HAS_LZ4):
                    self.set_compression("lz4")
                # A setup that was killed leaves an index half built, and IF NOT EXISTS takes it for made.
                self._rebuild_invalid_indexes()

    def _refuse_partitioned(self, migrations: Iterable[str]) -> None:
        """LangGraph's migrations make indexes concurrently, which fails on these in the middle of them."""
        kinds = tuple(name.removesuffix("_migrations") for name in migrations)
        names = [name for name in REQUIRED if name.startswith(kinds)]
        if found := [row["name"] for row in self._rows(_PARTITIONED, names=names)]:
            raise SchemaError(
                f"LangGraph's setup cannot be run on partitioned tables: {', '.join(found)} in {self._dsn}",
                hint="run the output of `persistence schema sql` there by hand, without CONCURRENTLY",
            )

    def set_compression(self, method: str) -> None:
        """How large values are compressed from now on; lz4 takes a fraction of the time of ``pglz``."""
        for statement in SET_COMPRESSION:
            self._connection().execute(statement.format(method).encode())

    def repair_langgraph_tables(self) -> None:
        """Run every migration of LangGraph's again, recorded or not. All of them may be repeated."""
        with self._explained():
            self._create_schema()
            self._refuse_partitioned(_MIGRATIONS)
            connection = self._connection()
            for statement in _repeatable_steps():
                connection.execute(statement.encode())
            self._rebuild_invalid_indexes()

    def langgraph_sql(self) -> str:
        """LangGraph's statements for a person to run, in order; each may be repeated. No connection."""
        statements = list(_repeatable_steps())
        if self.schema is not None:
            make = f"CREATE SCHEMA IF NOT EXISTS {quote_identifier(self.schema)};"
            statements = [make, *(qualify(statement, self.schema) for statement in statements)]
        return "\n".join(statements)

    def connect(self) -> Connection[Any]:
        """A connection as the driver makes it: SQLAlchemy names the schema itself and reads tuples."""
        connection: Connection[Any] = self._connect()
        connection.cursor_factory = Cursor
        connection.row_factory = tuple_row
        connection.autocommit = False
        return connection

    def _connection(self) -> Connection[DictRow]:
        if self._main is None:
            self._main = self._connect()
        return self._main

    def _connect(self) -> Connection[DictRow]:
        """One attempt; whoever opens the database does the retrying."""
        connection = connect(self._dsn, self._settings)
        # Nothing here runs often enough to prepare, and PgBouncer need not be announced for setup.
        connection.prepare_threshold = None
        return connection

    def _rows(self, statement: str, **parameters: Any) -> list[DictRow]:
        with self._explained():
            return self._connection().execute(statement, {"schema": self.schema, **parameters}).fetchall()

    def _newest(self, column: str, table: str) -> Any:
        try:
            row = self._connection().execute(f"SELECT max({column}) AS newest FROM {table}").fetchone()
        except errors.UndefinedTable:
            return None
        except psycopg.Error as error:
            raise self._explain(error) from None
        return row["newest"] if row else None

    def _wait_for_lock(self, connection: Connection[DictRow]) -> None:
        deadline = time.monotonic() + self.lock_timeout
        while True:
            row = connection.execute(TRY_LOCK, {"schema": self.schema}).fetchone()
            if row and row["got"]:
                return
            connection.rollback()
            if time.monotonic() >= deadline:
                raise SchemaError(
                    f"another process has been setting up {self._dsn} for more than {self.lock_timeout:g} s",
                    hint="wait until it has finished, or see in pg_stat_activity what holds it up",
                )
            time.sleep(random.uniform(0.05, 0.25))  # noqa: S311 - jitter, no secret

    def _create_schema(self) -> None:
        """Make the configured schema. Asked for first, because IF NOT EXISTS needs the right all the same."""
        if self.schema is None:
            return
        if not self._rows("SELECT 1 FROM pg_catalog.pg_namespace WHERE nspname = %(schema)s"):
            self._connection().execute(
                f"CREATE SCHEMA IF NOT EXISTS {quote_identifier(self.schema)}".encode()
            )

    def _rebuild_invalid_indexes(self) -> None:
        """REINDEX and not DROP: where another process is only just building the index, this waits for it."""
        wanted = [index for shape in REQUIRED.values() for index in shape.indexes]
        for row in self._rows(_INVALID_INDEXES, names=list(REQUIRED), indexes=wanted):
            self._connection().execute(f"REINDEX INDEX CONCURRENTLY {row['name']}".encode())

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except psycopg.Error as error:
            raise self._explain(error) from None

    def _explain(self, error: psycopg.Error) -> SchemaError | ConnectError:
        """Our error for one that the server gave to a statement of setup or of the drift check."""
        reason = mask_secrets((str(error).splitlines() or [type(error).__name__])[0], self._dsn)
        if isinstance(error, errors.InsufficientPrivilege):
            return SchemaError(
                f"the role has not the rights that this needs in {self._dsn}: {reason}",
                hint="run `persistence setup` as a role that may create tables there, or give the output of "
                "`persistence schema sql` to somebody who may; a role that only uses the tables needs "
                "SELECT, INSERT, UPDATE and DELETE on all of them",
            )
        if isinstance(error, psycopg.OperationalError) and error.sqlstate is None:
            return ConnectError(f"lost the connection to {self._dsn}: {reason}")
        return SchemaError(
            f"the tables in {self._dsn} could not be set up: {reason}",
            hint="put that right, then run `persistence setup`",
        )


def _repeatable_steps() -> Iterator[str]:
    """The official setup of an empty database, statement by statement; each may be repeated."""
    for table, migrations in _MIGRATIONS.items():
        # The saver's first migration makes its version table; the store's setup() makes its own itself.
        if table not in migrations[0]:
            yield f"CREATE TABLE IF NOT EXISTS {table} (v INTEGER PRIMARY KEY);"
        for v, statement in enumerate(migrations):
            yield statement.strip().removesuffix(";") + ";"
            yield f"INSERT INTO {table} (v) VALUES ({v}) ON CONFLICT DO NOTHING;"

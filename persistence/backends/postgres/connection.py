"""How connections to Postgres are made, kept, checked and given up; what their errors become."""

from __future__ import annotations

import asyncio
import re
import select
import weakref
from collections.abc import Mapping
from contextlib import suppress
from time import monotonic
from typing import Any

import psycopg
from psycopg import AsyncConnection, Connection, Cursor, IsolationLevel, errors, waiting
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import DictRow, dict_row, tuple_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from persistence.backends.moved import MOVED, sealed
from persistence.backends.postgres.deadline import DEADLINE
from persistence.backends.postgres.qualify import (
    AsyncSchemaCursor,
    SchemaCursor,
    async_schema_cursor,
    qualify,
    quote_identifier,
    schema_cursor,
)
from persistence.backends.postgres.wire import LARGE, Wire, size_of
from persistence.contract import ServerInfo
from persistence.dsn import Dsn, mask_secrets
from persistence.errors import ClosedError, ConnectError, DsnError, PersistenceError, SchemaError
from persistence.settings import Settings

__all__ = [
    "AsyncPool",
    "AsyncSchemaCursor",
    "Pool",
    "SchemaCursor",
    "aconnect",
    "connect",
    "connect_error",
    "connect_options",
    "lift_time_limits",
    "make_async_pool",
    "make_pool",
    "qualify",
    "quote_identifier",
    "server_info",
    "stay_connected",
    "translate",
    "translated",
]

IDLE_BEFORE_ROUND_TRIP = 30.0
"""Seconds a connection may sit in the pool before it is asked whether it still works."""
RECONNECT_WINDOW = 10.0
"""Seconds after which the pool's back-off between attempts starts afresh."""
_ISOLATION = IsolationLevel.READ_COMMITTED
"""Of transactions, whatever a role or a database says: who has waited for a lock sees what is there then."""

# What a Postgres server or libpq says when another attempt would fail the same way. libpq gives
# no SQLSTATE for a failed connection; a message in another language is retried, which costs only time.
_FINAL = re.compile(
    r"authentication failed|no password supplied|does not exist|no pg_hba\.conf entry|not permitted to log in"
    r"|permission denied for database|not currently accepting connections|invalid connection option"
    r"|certificate|does not support SSL|SSL is not enabled|invalid value for|invalid port|invalid sslmode"
    r"|definition of service|service file|unsupported frontend protocol|unsupported startup parameter",
    re.IGNORECASE,
)


class PoolConnection(Connection[DictRow]):
    """A pooled connection that knows when it was last handed out."""

    checked_out: float = 0.0
    wire: Wire
    home: weakref.ref[ConnectionPool[Any]] | None = None

    def __del__(self, *_: object) -> None:
        """Have the pool make another one if Ctrl-C lost this on its way: what the pool drops, it closes."""
        pool = self.home() if self.home is not None else None
        if pool is None or pool.closed or self.closed:
            super().__del__()
        else:
            self.close()
            self._pool = pool
            pool.putconn(self)


class AsyncPoolConnection(AsyncConnection[DictRow]):
    """As :class:`PoolConnection`."""

    checked_out: float = 0.0
    wire: Wire

    async def exchange(self, statement: str, params: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Run a statement; one with large values in a thread, so that the event loop goes on."""
        run = self.wire.run(statement, params)
        if size_of(params) < LARGE:
            return await self.wait(run)
        work = asyncio.ensure_future(asyncio.to_thread(waiting.wait, run, self.pgconn.socket))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            # The connection is the thread's until that has ended.
            end = asyncio.gather(self.cancel_safe(timeout=5), work, return_exceptions=True)
            while not end.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.shield(end)
            raise


Pool = ConnectionPool[PoolConnection]


class AsyncPool(AsyncConnectionPool[AsyncPoolConnection]):
    """A pool whose workers end with their event loop.

    psycopg's swallow a cancellation that comes while they connect, and ``asyncio.run`` waited for ever.
    """

    @classmethod
    async def worker(cls, q: Any) -> None:
        """As psycopg's."""
        await super().worker(_TasksOfWorker(q))  # type: ignore[arg-type]  # all that is asked of it

    def abandon(self) -> None:
        """Close without the event loop, which has ended, and the workers with it."""
        self._closed = True
        while self._pool:
            self._pool.popleft().pgconn.finish()


class _TasksOfWorker:
    """What a worker is to do, until it is cancelled."""

    def __init__(self, queue: asyncio.Queue[Any]) -> None:
        self._queue = queue

    async def get(self) -> Any:
        worker = asyncio.current_task()
        if worker is not None and worker.cancelling():
            raise asyncio.CancelledError
        return await self._queue.get()


def connect_options(dsn: Dsn, settings: Settings) -> dict[str, Any]:
    """Keyword arguments for every connection of ours, pooled or not, in both colours.

    What the DSN says itself stays: defaults are given only for parameters it does not name.
    """
    defaults: dict[str, Any] = {
        "fallback_application_name": "langgraph-persistence",
        "connect_timeout": max(2, round(settings.connect_timeout)),
        "keepalives": 1,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,
    }
    given = _parameters(dsn)
    return {
        **{key: value for key, value in defaults.items() if key not in given},
        # Whatever a role, a database or PGCLIENTENCODING says: rows travel as bytes that are UTF-8.
        "client_encoding": "UTF8",
        "autocommit": True,
        "row_factory": dict_row,
        # A prepared statement belongs to a server connection, which PgBouncer hands to others.
        "prepare_threshold": None if settings.pgbouncer else 5,
    }


def connect(dsn: Dsn, settings: Settings) -> Connection[DictRow]:
    """One connection outside any pool, with the schema-naming cursor; the caller closes it."""
    options = connect_options(dsn, settings)
    try:
        return Connection.connect(dsn.conninfo, **options, cursor_factory=schema_cursor(settings.db_schema))
    except psycopg.Error as error:
        raise connect_error(error, dsn) from None


async def aconnect(dsn: Dsn, settings: Settings) -> AsyncConnection[DictRow]:
    """As :func:`connect`, for the running event loop."""
    options = connect_options(dsn, settings)
    cursor_factory = async_schema_cursor(settings.db_schema)
    try:
        return await AsyncConnection.connect(dsn.conninfo, **options, cursor_factory=cursor_factory)
    except psycopg.Error as error:
        raise connect_error(error, dsn) from None


def lift_time_limits(cursor: Cursor[Any]) -> None:
    """Let the open transaction take its time, whatever a role or a database allows; as ``pg_dump`` does."""
    # Commands, where they can be: a distributed database hands them on to its machines.
    cursor.execute("SET LOCAL statement_timeout = 0")
    cursor.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
    cursor.execute(
        "SELECT set_config(name, '0', true) FROM pg_settings"
        " WHERE name = 'transaction_timeout' AND setting <> '0'"  # since Postgres 17
    )


def stay_connected(conn: Connection[Any]) -> None:
    """Let a connection wait while another side is read, for hours perhaps.

    Behind PgBouncer this is none of the client's business, and does no harm to others.
    """
    conn.execute(
        "SELECT set_config(name, '0', false) FROM pg_settings"
        " WHERE name = 'idle_session_timeout' AND setting <> '0'"
    )


def server_info(conn: Connection[Any] | AsyncConnection[Any]) -> ServerInfo:
    """Who answers, from what the server said when the connection began: no round trip."""
    return ServerInfo("PostgreSQL", conn.info.parameter_status("server_version") or "unknown")


def make_pool(dsn: Dsn, settings: Settings) -> Pool:
    """A pool, not opened yet, whose connections are checked when they are handed out.

    The check costs no round trip: a connection that the server has closed is readable, so the
    socket is asked, not the server. One that was idle for ``IDLE_BEFORE_ROUND_TRIP`` is asked for
    an answer, because a network that went away says nothing. The first broken connection makes
    the pool replace all the others: after a restart of the server none of them works.
    """

    def check(conn: PoolConnection) -> None:
        if not _needs_answer(conn):
            return
        try:
            pool.check_connection(conn)
        except psycopg.Error:
            conn.close()
            pool.drain()
            raise

    def configure(conn: PoolConnection) -> None:
        conn.isolation_level = _ISOLATION
        conn.home = weakref.ref(pool)
        _configure(conn, settings)

    pool = ConnectionPool(
        dsn.conninfo,
        connection_class=PoolConnection,
        kwargs={**connect_options(dsn, settings), "cursor_factory": schema_cursor(settings.db_schema)},
        configure=configure,
        check=check,
        # The background attempts of psycopg's pool wait twice as long each time, for minutes in the
        # end, and a server that is back would not be noticed. So they give up early and start afresh.
        reconnect_timeout=RECONNECT_WINDOW,
        reconnect_failed=lambda pool: pool.check(),
        **_pool_options(dsn, settings),
    )
    return pool


def make_async_pool(dsn: Dsn, settings: Settings) -> AsyncPool:
    """As :func:`make_pool`, for the running event loop."""

    async def check(conn: AsyncPoolConnection) -> None:
        if not _needs_answer(conn):
            return
        try:
            await pool.check_connection(conn)
        except psycopg.Error:
            await conn.close()
            await pool.drain()
            raise

    async def configure(conn: AsyncPoolConnection) -> None:
        await conn.set_isolation_level(_ISOLATION)
        _configure(conn, settings)

    async def start_afresh(pool: AsyncConnectionPool[Any]) -> None:
        await pool.check()

    pool = AsyncPool(
        dsn.conninfo,
        connection_class=AsyncPoolConnection,
        kwargs={**connect_options(dsn, settings), "cursor_factory": async_schema_cursor(settings.db_schema)},
        configure=configure,
        check=check,
        reconnect_timeout=RECONNECT_WINDOW,
        reconnect_failed=start_afresh,
        **_pool_options(dsn, settings),
    )
    return pool


def _pool_options(dsn: Dsn, settings: Settings) -> dict[str, Any]:
    return {
        "open": False,
        "name": dsn.masked,
        "min_size": settings.pool_min,
        "max_size": settings.pool_max,
        "timeout": settings.pool_timeout,
        "max_idle": settings.pool_max_idle,
        "max_lifetime": settings.pool_max_lifetime,
    }


def _configure(conn: PoolConnection | AsyncPoolConnection, settings: Settings) -> None:
    conn.checked_out = monotonic()
    conn.wire = Wire(conn.pgconn, settings.db_schema, conn.info.encoding, conn.prepare_threshold)


def _needs_answer(conn: PoolConnection | AsyncPoolConnection) -> bool:
    """Whether only a round trip can tell if the connection works; notes that it is handed out."""
    if (deadline := DEADLINE.get()) is not None:
        deadline.watch(conn)
    now = monotonic()
    idle, conn.checked_out = now - conn.checked_out, now
    # An idle connection has nothing to read, unless the server closed it or left a notice.
    return idle > IDLE_BEFORE_ROUND_TRIP or conn.closed or _readable(conn.fileno())


def _readable(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN | select.POLLPRI)
    return bool(poller.poll(0))


class translated:  # noqa: N801 - reads as a clause: with translated(where)
    """A block in which the driver's errors become ours, for both colours.

    A missing table becomes a :class:`SchemaError` that names the command, a lost connection and
    an exhausted pool a :class:`ConnectError`, a closed pool a :class:`ClosedError`. Other errors,
    such as a violated constraint, pass unchanged.
    """

    __slots__ = ("_where",)

    def __init__(self, where: str) -> None:
        """``where`` is the masked DSN, which is also the name of a pool."""
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and (ours := translate(error, self._where)) is not None:
            raise ours from error


def translate(error: BaseException, where: str) -> PersistenceError | None:
    """Our error for one of the driver's, or ``None`` where it says enough itself."""
    match error:
        case errors.UndefinedTable() | errors.UndefinedColumn() | errors.InvalidSchemaName():
            detail = _first_line(error)
            return SchemaError(f"{detail}: {where}", hint="make the tables with: persistence setup")
        case errors.IntegrityConstraintViolation() if (text := _first_line(error)).startswith(MOVED):
            return sealed(f"{text}: {where}")
        case PoolClosed():
            return ClosedError(f"the connection to {where} was closed")
        case PoolTimeout() | TooManyRequests():
            return ConnectError(
                f"{error}: {where}",
                hint="the server does not answer, or pool_max is too small for what runs at once",
            )
        case psycopg.OperationalError() if _is_lost(error):
            return ConnectError(f"lost the connection to {where}: {_first_line(error)}")
    return None


def _is_lost(error: psycopg.OperationalError) -> bool:
    # No SQLSTATE: libpq itself noticed. 08: connection exception. 57P: the server shuts down.
    state = error.sqlstate
    return state is None or state[:2] == "08" or state[:3] == "57P"


def connect_error(error: psycopg.Error, dsn: Dsn) -> ConnectError | DsnError:
    """What a failed attempt to connect means, with every password taken out."""
    reason = mask_secrets(" ".join(str(error).split()), dsn)
    if isinstance(error, psycopg.ProgrammingError):
        return DsnError(f"not a usable Postgres DSN: {dsn}: {reason}")
    final = _FINAL.search(str(error)) is not None
    return ConnectError(f"cannot connect to {dsn}: {reason}", transient=not final)


def _parameters(dsn: Dsn) -> dict[str, Any]:
    try:
        return conninfo_to_dict(dsn.conninfo)
    except psycopg.Error as error:
        raise connect_error(error, dsn) from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def database_identity(conn: Connection[Any]) -> str:
    """The server's own identifier and the database: a restored copy is another one."""
    cursor = conn.cursor(row_factory=tuple_row)
    allowed, oid, name = cursor.execute(
        "SELECT has_function_privilege('pg_control_system()', 'EXECUTE'), d.oid::text, d.datname"
        " FROM pg_database d WHERE d.datname = current_database()"
    ).fetchall()[0]
    system = "unknown"
    if allowed:
        system = cursor.execute("SELECT system_identifier::text FROM pg_control_system()").fetchall()[0][0]
    return f"postgresql:{system}/{oid}/{name}"

"""One look at an open Postgres database: a row is written and read, and sizes are taken."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import Any

import psycopg
from psycopg import errors
from psycopg_pool import PoolTimeout

from persistence.backends.moved import sealed
from persistence.backends.postgres.connection import (
    AsyncPool,
    AsyncPoolConnection,
    Pool,
    PoolConnection,
    quote_identifier,
    server_info,
    translate,
)
from persistence.backends.postgres.deadline import DEADLINE, Deadline
from persistence.backends.postgres.seal import SEALED, named
from persistence.contract import Probe
from persistence.errors import ConnectError, PersistenceError

_TABLES = ("checkpoints", "checkpoint_blobs", "checkpoint_writes", "store", "store_vectors")
_WRITE = (
    "INSERT INTO persistence_canary (id, beat) VALUES (1, %(beat)s) "
    "ON CONFLICT (id) DO UPDATE SET beat = EXCLUDED.beat"
)
_READ = "SELECT beat FROM persistence_canary WHERE id = 1"
_SIZES = (
    "SELECT t.name, pg_total_relation_size(to_regclass(t.qualified))::text "
    "FROM unnest(%(names)s::text[], %(qualified)s::text[]) AS t(name, qualified) "
    "WHERE to_regclass(t.qualified) IS NOT NULL"
)

# A row that is written again fits into the room that it has, also on a full disk. What is sorted or listed
# beyond work_mem goes to a new file, on the same disk by default, and needs no right and leaves nothing.
_ROOM = (
    "BEGIN READ ONLY",
    "SET LOCAL work_mem = '64kB'",
    "SELECT count(*)::text FROM generate_series(1, 10000)",
)

_Look = Generator[tuple[str, Mapping[str, Any]], list[tuple[Any, ...]], Probe]


def probe(pool: Pool, schema: str | None, timeout: float) -> Probe:
    """Look with a connection of the pool."""
    deadline = Deadline(timeout)
    timer = threading.Timer(timeout, deadline.expire)
    timer.daemon = True
    timer.start()
    token = DEADLINE.set(deadline)
    try:
        with pool.connection(timeout) as conn:
            deadline.watch(conn)
            try:
                return _run(_look(schema, conn, pool.name, deadline), conn)
            finally:
                deadline.watch(None)
    except psycopg.Error as error:
        return Probe(error=_ours(error, pool.name, deadline))
    finally:
        DEADLINE.reset(token)
        timer.cancel()


async def aprobe(pool: AsyncPool, schema: str | None, timeout: float) -> Probe:  # noqa: ASYNC109 - see Deadline
    """As :func:`probe`, for the running event loop."""
    deadline = Deadline(timeout)
    timer = asyncio.get_running_loop().call_later(timeout, deadline.expire)
    token = DEADLINE.set(deadline)
    try:
        async with pool.connection(timeout) as conn:
            deadline.watch(conn)
            try:
                return await _arun(_look(schema, conn, pool.name, deadline), conn)
            finally:
                deadline.watch(None)
    except psycopg.Error as error:
        return Probe(error=_ours(error, pool.name, deadline))
    finally:
        DEADLINE.reset(token)
        timer.cancel()


def _run(look: _Look, conn: PoolConnection) -> Probe:
    proceed: Callable[[], Any] = look.__next__
    try:
        while True:
            statement = proceed()
            try:
                proceed = partial(look.send, conn.wait(conn.wire.run(*statement, prepare=False)))
            except psycopg.Error as error:
                proceed = partial(look.throw, error)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


async def _arun(look: _Look, conn: AsyncPoolConnection) -> Probe:
    proceed: Callable[[], Any] = look.__next__
    try:
        while True:
            statement = proceed()
            try:
                proceed = partial(look.send, await conn.wait(conn.wire.run(*statement, prepare=False)))
            except psycopg.Error as error:
                proceed = partial(look.throw, error)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def _look(
    schema: str | None, conn: PoolConnection | AsyncPoolConnection, where: str, deadline: Deadline
) -> _Look:
    """The statements; each tells something by itself, so all are tried while the server answers."""
    failures: list[psycopg.Error] = []
    write_seconds = read_seconds = None
    is_sealed = False
    sizes: dict[str, int] = {}
    begin = time.perf_counter()
    try:
        yield _WRITE, {"beat": str(time.time())}
        write_seconds = time.perf_counter() - begin
    except psycopg.Error as error:
        failures.append(error)
    begin = time.perf_counter()
    try:
        rows = yield _READ, {}
        if rows:
            read_seconds = time.perf_counter() - begin
        # The canary has a table of its own, which no seal is on.
        tables = {table: named(table, schema) for table in ("checkpoints", "store")}
        is_sealed = bool((yield SEALED, tables))
        prefix = f"{quote_identifier(schema)}." if schema else ""
        names = list(_TABLES)
        try:
            for statement in _ROOM:
                yield statement, {}
        except psycopg.Error as error:
            failures.append(error)
        yield "ROLLBACK", {}  # in any case here: what the pool does later, nothing bounds
        found = yield _SIZES, {"names": names, "qualified": [prefix + name for name in names]}
        sizes = {name: int(size) for name, size in found}
    except psycopg.Error as error:
        failures.append(error)
    if is_sealed:
        write_seconds = None
    # An error with a SQLSTATE came from the server.
    answered = read_seconds is not None or any(error.sqlstate for error in failures)
    return Probe(
        server=server_info(conn) if answered else None,
        read_seconds=read_seconds,
        write_seconds=write_seconds,
        storage=sizes,
        error=_ours(failures[0], where, deadline) if failures else sealed() if is_sealed else None,
    )


def _ours(error: psycopg.Error, where: str, deadline: Deadline) -> Exception:
    if deadline.expired and not isinstance(error, PoolTimeout):
        return ConnectError(f"no answer within {round(deadline.seconds, 1):g} s: {where}")
    if isinstance(error, errors.ReadOnlySqlTransaction):
        return ConnectError(f"{where} can only be read", transient=False)
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return translate(error, where) or PersistenceError(f"{line}: {where}")

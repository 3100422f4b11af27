"""One statement and its rows, by libpq directly: what a cursor of psycopg does, in a third of its time.

A cursor looks for the right adapter of each value and each column, whatever they may be. Here they are few
and known: text, numbers, bytes, JSONB and arrays of them. Connecting, waiting, cancelling and the
classes of errors stay psycopg's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import count
from struct import pack, unpack_from
from typing import Any, NamedTuple

from psycopg import errors, generators, pq
from psycopg.abc import PQGen
from psycopg.waiting import Ready, Wait

from persistence.backends.postgres.qualify import qualify
from persistence.metadata import json_value

_TEXT, _BYTEA, _INT4 = 25, 17, 23
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)  # Postgres counts microseconds from here
LARGE = 1_000_000
"""Bytes from which a call is worth a thread of its own."""
_MOST_PREPARED = 100  # as psycopg's prepared_max
Take = Callable[[list[tuple[Any, ...]]], Any]
"""What is done with the rows of a statement."""
Params = Mapping[Any, Any] | Sequence[Any]
"""The values of named placeholders, or of nameless ones in their order."""
_PLACEHOLDER = re.compile(r"%\((\w+)\)[sb]|%([s%])")


class Query(NamedTuple):
    """A statement as libpq takes it, and the names of its parameters in order, or their numbers."""

    text: bytes
    names: tuple[Any, ...]


@lru_cache(maxsize=1024)
def query_of(statement: str, schema: str | None, encoding: str) -> Query:
    """Put numbers in place of placeholders and, if one is given, the schema before the tables."""
    if schema is not None:
        statement = qualify(statement, schema, placeholders=True)
    names: dict[str | int, int] = {}

    def number(match: re.Match[str]) -> str:
        if match[2] == "%":
            return "%"
        return f"${names.setdefault(match[1] or len(names), len(names) + 1)}"

    return Query(_PLACEHOLDER.sub(number, statement).encode(encoding), tuple(names))


def size_of(params: Mapping[str, Any]) -> int:
    """Bytes of values; :data:`LARGE` ones take so long to send that an event loop should not do it."""
    size = 0
    for value in params.values():
        if type(value) is list:
            size += sum(len(item) for item in value if type(item) is bytes)
        elif type(value) is bytes:
            size += len(value)
    return size


class Wire:
    """Runs statements on one connection; remembers which of them the server has prepared."""

    __slots__ = ("_encoding", "_numbers", "_pgconn", "_prepare_after", "_prepared", "_schema", "_used")

    def __init__(
        self, pgconn: pq.abc.PGconn, schema: str | None, encoding: str, prepare_after: int | None
    ) -> None:
        """A statement is prepared after so many uses; where that is ``None``, none ever is."""
        self._pgconn = pgconn
        self._schema = schema
        self._encoding = encoding
        self._prepare_after = prepare_after
        self._used: dict[Query, int] = {}
        self._prepared: dict[Query, bytes] = {}
        self._numbers = count()

    def run(self, statement: str, params: Params, *, prepare: bool = True) -> PQGen[list[tuple[Any, ...]]]:
        """Run a statement and return its rows; for the connection's ``wait``.

        Args:
            statement: One statement; all its placeholders have names, or none.
            params: Their values.
            prepare: Not within a transaction: an error there could not be put right.
        """
        query = query_of(statement, self._schema, self._encoding)
        formats, values = _encoded([params[name] for name in query.names], self._encoding)
        if prepare and (name := (yield from self._name(query))) is not None:
            with self._at_once(values):
                self._pgconn.send_query_prepared(name, values, formats, pq.Format.BINARY)
            try:
                result = yield from self._result()
            except errors.InvalidSqlStatementName:
                # Somebody said DEALLOCATE ALL, as psycopg itself does after a ROLLBACK. Nothing was done.
                self._prepared.clear()
            else:
                return _rows(result, self._encoding)
        with self._at_once(values):
            self._pgconn.send_query_params(query.text, values, None, formats, pq.Format.BINARY)
        del values  # may be large, and are sent
        return _rows((yield from self._result()), self._encoding)

    def run_all(
        self,
        statements: Sequence[tuple[str, Params]],
        take: Callable[[list[tuple[Any, ...]]], Any],
    ) -> PQGen[None]:
        """Run statements in one round trip and one transaction; for the connection's ``wait``.

        Args:
            statements: As :meth:`run` takes them, together not :data:`LARGE`.
            take: Called with the rows of each, in order. What they say is true only if all went well.
        """
        ready = []
        for statement, params in statements:
            query = query_of(statement, self._schema, self._encoding)
            ready.append((query, *_encoded([params[name] for name in query.names], self._encoding)))
        self._pgconn.enter_pipeline_mode()
        try:
            prepares = self._send_all(ready)
            del ready
            self._pgconn.pipeline_sync()
            while self._pgconn.flush():
                if (yield Wait.RW) & Ready.R:
                    self._pgconn.consume_input()
            yield from self._take_all(prepares, take)
        finally:
            try:
                self._pgconn.exit_pipeline_mode()
            except errors.OperationalError:  # it is lost, or answers are on their way: of no use
                self._pgconn.finish()

    def _send_all(
        self, ready: Sequence[tuple[Query, list[int], list[bytes | None]]]
    ) -> list[tuple[Query, bytes] | None]:
        """Send statements with formats and values; says which of them are prepared, and as what."""
        pgconn, names = self._pgconn, dict(self._prepared)
        prepares: list[tuple[Query, bytes] | None] = []
        for query, formats, values in ready:
            name, prepare = names.get(query), None
            if name is None and self._is_worth_a_name(query):
                name = names[query] = b"persistence_%d" % next(self._numbers)
                prepare = query, name
                pgconn.send_prepare(name, query.text)
            if name is None:
                pgconn.send_query_params(query.text, values, None, formats, pq.Format.BINARY)
            else:
                pgconn.send_query_prepared(name, values, formats, pq.Format.BINARY)
            prepares.append(prepare)
        return prepares

    def _take_all(self, prepares: Sequence[tuple[Query, bytes] | None], take: Take) -> PQGen[None]:
        error: errors.Error | None = None
        for prepare in prepares:
            if prepare is not None:
                result = yield from self._next_result()
                if result.status == pq.ExecStatus.COMMAND_OK:
                    self._prepared.update([prepare])
                elif error is None:
                    error = errors.error_from_result(result, encoding=self._encoding)
            result = yield from self._next_result()
            if error is None and result.status == pq.ExecStatus.TUPLES_OK:
                take(_rows(result, self._encoding))
            elif error is None and result.status == pq.ExecStatus.COMMAND_OK:
                take([])
            elif error is None:
                error = errors.error_from_result(result, encoding=self._encoding)
        while (result := (yield from self._next_result())).status != pq.ExecStatus.PIPELINE_SYNC:
            error = error or errors.error_from_result(result, encoding=self._encoding)  # of the commit
        if isinstance(error, errors.InvalidSqlStatementName):
            self._prepared.clear()
        if error is not None:
            raise error

    def _next_result(self) -> PQGen[pq.abc.PGresult]:
        """The next result of a pipeline; between those of two statements there is an empty one."""
        while True:
            while self._pgconn.is_busy():
                yield Wait.R
                self._pgconn.consume_input()
            if (result := self._pgconn.get_result()) is not None:
                return result

    def _name(self, query: Query) -> PQGen[bytes | None]:
        if (name := self._prepared.get(query)) is not None or not self._is_worth_a_name(query):
            return name
        name = b"persistence_%d" % next(self._numbers)
        self._pgconn.send_prepare(name, query.text)
        yield from self._result()
        self._prepared[query] = name
        return name

    def _is_worth_a_name(self, query: Query) -> bool:
        """Whether a statement, about to be used once more, shall be prepared."""
        if self._prepare_after is None:
            return False
        used = self._used[query] = self._used.get(query, 0) + 1
        return used > self._prepare_after and len(self._prepared) < _MOST_PREPARED

    @contextmanager
    def _at_once(self, values: Sequence[bytes | None]) -> Iterator[None]:
        """Wait until large values are sent: else libpq moves what is left each time that a piece is gone."""
        if sum(map(len, filter(None, values))) < LARGE:
            yield
            return
        self._pgconn.nonblocking = 0
        try:
            yield
        finally:
            self._pgconn.nonblocking = 1

    def _result(self) -> PQGen[pq.abc.PGresult]:
        # Where the commit fails there are two results, and the second one says so.
        result: pq.abc.PGresult = (yield from generators.execute(self._pgconn))[-1]
        if result.status in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK):
            return result
        raise errors.error_from_result(result, encoding=self._encoding)


def _encoded(values: Sequence[Any], encoding: str) -> tuple[list[int], list[bytes | None]]:
    """Formats and values as libpq takes them: text, but bytes and arrays in binary, so none in hex."""
    formats: list[int] = []
    encoded: list[bytes | None] = []
    for value in values:
        kind = type(value)
        if kind is list and any(item is not None for item in value):
            value, kind = _array(value, encoding), bytes
        formats.append(pq.Format.BINARY if kind is bytes else pq.Format.TEXT)
        encoded.append(value if kind is bytes or value is None else _SCALARS[kind](value, encoding))
    return formats, encoded


def _text(value: str, encoding: str) -> bytes:
    if "\0" in value:  # where libpq would take it to end
        raise errors.DataError("PostgreSQL text fields cannot contain NUL (0x00) bytes")
    return value.encode(encoding)


_SCALARS: dict[type, Callable[[Any, str], bytes]] = {
    str: _text,
    int: lambda value, encoding: b"%d" % value,
    bool: lambda value, encoding: b"true" if value else b"false",
    list: lambda value, encoding: b"{%s}" % b",".join([b"NULL"] * len(value)),  # says nothing of its type
}


def _array(items: Sequence[Any], encoding: str) -> bytes:
    first = next(item for item in items if item is not None)
    oid = {str: _TEXT, int: _INT4}.get(type(first), _BYTEA)
    parts = [pack(">5i", 1, int(None in items), oid, len(items), 1)]
    for item in items:
        if item is None:
            parts.append(b"\xff\xff\xff\xff")
            continue
        data = item.encode(encoding) if oid == _TEXT else pack(">i", item) if oid == _INT4 else item
        parts += (pack(">i", len(data)), data)
    return b"".join(parts)


def _rows(result: pq.abc.PGresult, encoding: str) -> list[tuple[Any, ...]]:
    loaders = [(column, _LOADERS[result.ftype(column)]) for column in range(result.nfields)]
    value = result.get_value
    return [
        tuple(
            [  # a list at once, which takes less than one after the other
                None if (data := value(row, column)) is None else load(data, encoding)
                for column, load in loaders
            ]
        )
        for row in range(result.ntuples)
    ]


def _str(data: bytes, encoding: str) -> str:
    return data.decode(encoding)


def _int(data: bytes, encoding: str) -> int:
    return int.from_bytes(data, "big", signed=True)


def _json(data: bytes, encoding: str) -> Any:
    return json_value(data if encoding == "utf-8" else data.decode(encoding))


def _jsonb(data: bytes, encoding: str) -> Any:
    return _json(data[1:], encoding)  # the first byte is the version of the format


def _items(data: bytes, load: Callable[[bytes, str], Any], encoding: str) -> list[Any]:
    if unpack_from(">i", data)[0] == 0:
        return []
    items: list[Any] = []
    at = 20
    for _ in range(unpack_from(">i", data, 12)[0]):
        (size,) = unpack_from(">i", data, at)
        at += 4
        if size < 0:
            items.append(None)
        else:
            items.append(load(data[at : at + size], encoding))
            at += size
    return items


def _moment(data: bytes, encoding: str) -> datetime:
    return _EPOCH + timedelta(microseconds=_int(data, encoding))


_LOADERS: dict[int, Callable[[bytes, str], Any]] = {
    16: lambda data, encoding: data == b"\1",
    _BYTEA: lambda data, encoding: data,
    _INT4: _int,
    _TEXT: _str,
    114: _json,
    1184: _moment,
    3802: _jsonb,
    1001: lambda data, encoding: _items(data, _LOADERS[_BYTEA], encoding),
    1007: lambda data, encoding: _items(data, _int, encoding),
    1009: lambda data, encoding: _items(data, _str, encoding),
}

"""Cursors of the server: rows come some at a time, so that memory stays bounded whatever their size.

Rows can be asked for before anybody wants them: the server computes them while this process is at work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, count, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
from psycopg import ClientCursor, errors, generators, pq
from psycopg.adapt import Transformer

from persistence.backends.postgres.qualify import SchemaCursor, qualify

if TYPE_CHECKING:
    from psycopg import Connection

Row = tuple[Any, ...]

_FETCH = 5_000
_FETCH_BYTES = 4_000_000
_CANCEL_SECONDS = 5.0
_NUMBERS = count()


class Query(NamedTuple):
    """A table in order: COLLATE "C" is that of UTF-8 bytes, whatever the database's own collation."""

    name: str
    columns: str
    """With a place for the column that is only wanted with the data."""
    data: str
    size: str
    """About how many bytes a row sends."""
    rest: str


class Where(NamedTuple):
    """A condition beside those that a query has, and its parameters."""

    text: str = ""
    args: tuple[object, ...] = ()


class Cut(NamedTuple):
    """What is wanted of a query."""

    query: Query
    columns: str
    where: Where
    sized: bool
    """Whether its rows may be large."""

    @property
    def rest(self) -> str:
        """All but what is selected."""
        return self.query.rest.format(where=self.where.text)


class Portal:
    """A cursor of the server."""

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.asked = 0
        """How many rows were asked for that nobody has taken."""
        self.page: list[Row] = []
        """Those, once they have come."""


class Cursors:
    """The cursors of one transaction.

    What opens and closes them goes along with the next request, which is one round trip. It has no
    parameters, so that it can be several statements, without the pipelines that not every PgBouncer knows.
    """

    def __init__(self, conn: Connection[Any]) -> None:
        factory = conn.cursor_factory
        self._schema = factory.schema if issubclass(factory, SchemaCursor) else None
        self.conn = conn
        self._before: list[bytes] = []
        self._asked: list[Portal] = []
        self._rows = Transformer.from_context(conn)

    def _declare(self, name: str, statement: str, args: Sequence[object] = ()) -> Portal:
        """A cursor for a statement; its name only tells a person what it is for."""
        portal = Portal(b"transfer_%s_%d" % (name.encode(), next(_NUMBERS)))
        if self._schema is not None:
            statement = qualify(statement, self._schema, placeholders=bool(args))
        if args:
            statement = ClientCursor(self.conn).mogrify(statement.encode(), args)
        encoded = statement.encode(self.conn.info.encoding)
        self._before.append(b"DECLARE %s BINARY NO SCROLL CURSOR FOR %s" % (portal.name, encoded))
        return portal

    def _ask(self, *wanted: tuple[Portal, int]) -> None:
        """Have the server compute the next rows of cursors, so many of each, and do not wait."""
        self.settle()
        for portal, number in wanted:
            portal.asked = number
        # One row of each ahead of the others, for which the server hashes and sorts all of them. Then it goes
        # on with the next cursor, while many rows would wait until they are read.
        each = [(portal, 1) for portal, _ in wanted]
        each += [(portal, number - 1) for portal, number in wanted if number > 1]
        statements, self._before = self._before, []
        statements += [b"FETCH %d FROM %s" % (number, portal.name) for portal, number in each]
        self.conn.pgconn.send_query(b";".join(statements))
        self._asked = [portal for portal, _ in each]
        self.conn.pgconn.flush()

    def settle(self) -> None:
        """Take in what is under way, so that the connection can be used for something else."""
        if not self._asked:
            return
        asked, self._asked = self._asked, []
        results = self.conn.wait(generators.execute(self.conn.pgconn))
        if results[-1].status not in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK):
            raise errors.error_from_result(results[-1], encoding=self.conn.info.encoding)
        rows = (result for result in results if result.status == pq.ExecStatus.TUPLES_OK)
        for portal, result in zip(asked, rows, strict=True):
            self._rows.set_pgresult(result)
            portal.page += self._rows.load_rows(0, result.ntuples, tuple)
        self._rows.set_pgresult(None)

    def _pages(self, portal: Portal, counts: Iterable[int]) -> Iterator[list[Row]]:
        """What was asked for of a cursor, then as many rows each time as ``counts`` say, to the end."""
        left = iter(counts)
        try:
            while portal.asked or (number := next(left, 0)):
                if not portal.asked:
                    self._ask((portal, number))
                if portal in self._asked:
                    self.settle()
                asked, portal.asked = portal.asked, 0
                page, portal.page = portal.page, []
                if page:
                    yield page
                if len(page) < asked:
                    break
        finally:
            self._before.append(b"CLOSE %s" % portal.name)

    def each(self, name: str, statement: str) -> Iterator[Row]:
        """The rows of a statement, all of which are small; the first ones are under way."""
        portal = self._declare(name, statement)
        self._ask((portal, _FETCH))
        return chain.from_iterable(self._pages(portal, repeat(_FETCH)))

    def asked(self, *cuts: Cut) -> list[Iterator[Row]]:
        """The rows of each; the first ones are under way."""
        begun = []
        for cut in cuts:
            portal = self._declare(cut.query.name, f"SELECT {cut.columns} {cut.rest}", cut.where.args)
            counts = self._sized(cut) if cut.sized else repeat(_FETCH)
            begun.append((portal, counts, next(counts, 0)))
        if wanted := [(portal, number) for portal, _, number in begun if number]:
            self._ask(*wanted)
        return [chain.from_iterable(self._pages(portal, counts)) for portal, counts, _ in begun]

    def _sized(self, cut: Cut) -> Iterator[int]:
        """How many rows to fetch, each time, so that they have a bounded number of bytes: or one."""
        sizes = f"SELECT {cut.query.size} {cut.rest}"
        portal = self._declare(f"{cut.query.name}_sizes", sizes, cut.where.args)
        number = total = 0
        for (size,) in chain.from_iterable(self._pages(portal, repeat(_FETCH))):
            if number and (number == _FETCH or total + (size or 0) > _FETCH_BYTES):
                yield number
                number = total = 0
            number += 1
            total += size or 0
        if number:
            yield number

    def close(self) -> None:
        """Close them all, as a table may be changed that they were reading."""
        self.settle()
        self._before.clear()
        self.conn.execute("CLOSE ALL")

    def abandon(self) -> None:
        """Have the server stop what nobody waits for any more."""
        if self.conn.pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
            with suppress(psycopg.Error):
                self.conn.cancel_safe(timeout=_CANCEL_SECONDS)

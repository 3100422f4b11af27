"""Statements written without a schema, sent with one.

LangGraph's statements and ours name their tables bare and leave the rest to the connection's
``search_path``. PgBouncer in transaction mode refuses or silently drops a ``search_path`` given at
connect time, so a configured schema is written into each statement instead, at the one place
that every statement passes: the cursor.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import lru_cache
from typing import Any, ClassVar, Self

from psycopg import AsyncCopy, AsyncCursor, Copy, Cursor
from psycopg.abc import AdaptContext, Params, Query
from psycopg.rows import DictRow
from psycopg.sql import Composable

# LangGraph's tables: checkpoint-postgres 3.2.0, checkpoints and store.
LANGGRAPH_TABLES = frozenset(
    {
        "checkpoints",
        "checkpoint_blobs",
        "checkpoint_writes",
        "checkpoint_migrations",
        "store",
        "store_migrations",
        "store_vectors",
        "vector_migrations",
    }
)
OWN_PREFIX = "persistence_"
"""Every table of ours begins with this."""

_TOKEN = re.compile(
    r"""
      (?P<skip> \s+ | --[^\n]* | /\*.*?\*/ )
    | (?P<text> [eE]'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*' | \$(?P<tag>\w*)\$.*?\$(?P=tag)\$ )
    | (?P<name> (?:[^\W\d][\w$]*|"(?:[^"]|"")*") (?:\s*\.\s*(?:[^\W\d][\w$]*|"(?:[^"]|"")*"|\*))* )
    | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL,
)
# Words after which one table is named, after which a list of them is, that may stand between the
# two, and that end a list.
_ONE_TABLE = frozenset({"join", "into", "update", "references", "copy", "on"})
_TABLE_LIST = frozenset({"from", "using", "table", "truncate", "lock", "analyze", "vacuum"})
_BETWEEN = frozenset({"if", "not", "exists", "only", "table", "concurrently"})
_LIST_ENDS = frozenset(
    {"where", "group", "order", "having", "limit", "set", "returning", "select", "union", "values", "for"}
)

_MAX_CACHED = 16_384


def quote_identifier(name: str) -> str:
    """A name as Postgres reads it back, whatever characters it holds."""
    return '"' + name.replace('"', '""') + '"'


def qualify(statement: str, schema: str, *, placeholders: bool = False) -> str:
    """Put ``schema`` before every table of LangGraph's or ours that stands where a table is named.

    Column qualifiers (``checkpoints.thread_id``) stay as they are, because a table's bare name is
    its alias; text in quotes, comments and names that have a schema already are left alone.
    A common table expression must not carry the name of such a table.

    Args:
        statement: Any SQL, several statements too.
        schema: The schema's name as the catalogue has it, unquoted.
        placeholders: The statement goes to psycopg with parameters, so a percent sign of the
            schema's name must be doubled.
    """
    prefix = quote_identifier(schema) + "."
    if placeholders:
        prefix = prefix.replace("%", "%%")
    if len(statement) > _MAX_CACHED:
        return _rewrite(statement, prefix)
    return _rewrite_cached(statement, prefix)


def _rewrite(statement: str, prefix: str) -> str:
    out: list[str] = []
    table_next = False
    in_list = [False]  # by depth of parentheses
    for token in _TOKEN.finditer(statement):
        text = token.group()
        if token.lastgroup == "skip":
            pass
        elif token.lastgroup == "name":
            word = text.lower()
            if table_next and word in _BETWEEN:
                pass
            elif table_next and _is_known(text):
                out.append(prefix)
                table_next = False
            else:
                table_next = word in _ONE_TABLE or word in _TABLE_LIST
                if word in _TABLE_LIST:
                    in_list[-1] = True
                elif word in _LIST_ENDS or word == "update":
                    in_list[-1] = False
        elif text == "(":
            in_list.append(False)  # table_next stays: FROM (checkpoints JOIN ...)
        elif text == ")":
            table_next = False
            if len(in_list) > 1:
                in_list.pop()
        else:
            table_next = text == "," and in_list[-1]
        out.append(text)
    return "".join(out)


_rewrite_cached = lru_cache(maxsize=1024)(_rewrite)


def _is_known(name: str) -> bool:
    bare = name[1:-1] if name.startswith('"') else name.lower()
    return bare in LANGGRAPH_TABLES or (bare.startswith(OWN_PREFIX) and bare.isidentifier())


def _qualified(query: Query, schema: str, context: AdaptContext, *, placeholders: bool) -> str | bytes:
    if isinstance(query, Composable):
        query = query.as_string(context)
    if isinstance(query, bytes):
        return qualify(query.decode(), schema, placeholders=placeholders).encode()
    if isinstance(query, str):
        return qualify(query, schema, placeholders=placeholders)
    raise TypeError(f"a statement must be str, bytes or psycopg.sql, not {type(query).__name__}")


class SchemaCursor(Cursor[DictRow]):
    """A cursor that names a schema in every statement; see :func:`schema_cursor`."""

    schema: ClassVar[str]

    def execute(self, query: Query, params: Params | None = None, **kwargs: Any) -> Self:
        """As the base class does, with the schema named."""
        query = _qualified(query, self.schema, self, placeholders=params is not None)
        return super().execute(query, params, **kwargs)

    def executemany(self, query: Query, params_seq: Iterable[Params], **kwargs: Any) -> None:
        """As the base class does, with the schema named."""
        query = _qualified(query, self.schema, self, placeholders=True)
        super().executemany(query, params_seq, **kwargs)

    def stream(self, query: Query, params: Params | None = None, **kwargs: Any) -> Iterator[DictRow]:
        """As the base class does, with the schema named."""
        query = _qualified(query, self.schema, self, placeholders=params is not None)
        return super().stream(query, params, **kwargs)

    @contextmanager
    def copy(self, statement: Query, params: Params | None = None, **kwargs: Any) -> Iterator[Copy]:
        """As the base class does, with the schema named."""
        statement = _qualified(statement, self.schema, self, placeholders=params is not None)
        with super().copy(statement, params, **kwargs) as copy:
            yield copy


class AsyncSchemaCursor(AsyncCursor[DictRow]):
    """As :class:`SchemaCursor`, for asynchronous connections."""

    schema: ClassVar[str]

    async def execute(self, query: Query, params: Params | None = None, **kwargs: Any) -> Self:
        """As the base class does, with the schema named."""
        query = _qualified(query, self.schema, self, placeholders=params is not None)
        return await super().execute(query, params, **kwargs)

    async def executemany(self, query: Query, params_seq: Iterable[Params], **kwargs: Any) -> None:
        """As the base class does, with the schema named."""
        query = _qualified(query, self.schema, self, placeholders=True)
        await super().executemany(query, params_seq, **kwargs)

    def stream(self, query: Query, params: Params | None = None, **kwargs: Any) -> AsyncIterator[DictRow]:
        """As the base class does, with the schema named."""
        query = _qualified(query, self.schema, self, placeholders=params is not None)
        return super().stream(query, params, **kwargs)

    @asynccontextmanager
    async def copy(
        self, statement: Query, params: Params | None = None, **kwargs: Any
    ) -> AsyncIterator[AsyncCopy]:
        """As the base class does, with the schema named."""
        statement = _qualified(statement, self.schema, self, placeholders=params is not None)
        async with super().copy(statement, params, **kwargs) as copy:
            yield copy


@lru_cache(maxsize=64)
def schema_cursor(schema: str | None) -> type[Cursor[DictRow]]:
    """The cursor class for connections whose tables live in ``schema``."""
    if schema is None:
        return Cursor
    return type("SchemaCursor", (SchemaCursor,), {"schema": schema})


@lru_cache(maxsize=64)
def async_schema_cursor(schema: str | None) -> type[AsyncCursor[DictRow]]:
    """As :func:`schema_cursor`, for asynchronous connections."""
    if schema is None:
        return AsyncCursor
    return type("AsyncSchemaCursor", (AsyncSchemaCursor,), {"schema": schema})

"""LangGraph's Postgres stores on the pool of a handle."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from langgraph.store.base import Op, Result
from langgraph.store.postgres.aio import AsyncPostgresStore as UpstreamAsyncStore
from langgraph.store.postgres.base import PostgresStore as UpstreamStore

from persistence.backends.postgres.connection import AsyncPool, Pool, translated


class PostgresStore(UpstreamStore):
    """LangGraph's store; a missing table or a closed pool is one of our errors.

    ``batch`` is what every other method of a LangGraph store goes through.
    """

    __slots__ = ()

    def __init__(self, pool: Pool) -> None:
        super().__init__(cast(Any, pool))

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """As LangGraph's."""
        with translated(cast(Pool, self.conn).name):
            return super().batch(ops)


class AsyncPostgresStore(UpstreamAsyncStore):
    """As :class:`PostgresStore`, for the running event loop."""

    __slots__ = ()

    def __init__(self, pool: AsyncPool) -> None:
        super().__init__(cast(Any, pool))

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """As LangGraph's."""
        with translated(cast(AsyncPool, self.conn).name):
            return await super().abatch(ops)

"""LangGraph's own saver and store, on our pool, in a schema that no search path names.

Every statement of theirs, those built at run time too, must find its tables through the cursor alone.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any, cast

import psycopg
import pytest
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.store.base import GetOp, ListNamespacesOp, MatchCondition, Op, PutOp, SearchOp
from langgraph.store.postgres.aio import AsyncPostgresStore
from langgraph.store.postgres.base import PostgresStore
from psycopg import sql

from persistence.backends.postgres.connection import make_async_pool, make_pool
from persistence.dsn import Dsn
from persistence.settings import Settings
from tests.ops.conftest import counter, thread

SCHEMA = 'My "odd" schema %s'


@pytest.fixture
def place(postgres_dsn: str) -> Iterator[tuple[Dsn, Settings]]:
    """A schema of ours, and a role whose search path is another, empty one."""
    role = f"r_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres_dsn, autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(SCHEMA)))
        conn.execute("CREATE SCHEMA empty")
        conn.execute(sql.SQL("CREATE ROLE {} LOGIN SUPERUSER").format(sql.Identifier(role)))
        conn.execute(sql.SQL("ALTER ROLE {} SET search_path = empty").format(sql.Identifier(role)))
    yield Dsn.parse(f"{postgres_dsn}&user={role}"), Settings(db_schema=SCHEMA, pool_max=4)
    with psycopg.connect(postgres_dsn, autocommit=True) as conn:
        rows = conn.execute(
            "SELECT schemaname FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        ).fetchall()
        assert {row[0] for row in rows} == {SCHEMA}
        conn.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
        conn.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


OPS: list[Op] = [
    PutOp(("a", "b"), "k", {"x": 1}, ttl=5),
    PutOp(("a", "c"), "k", {"x": 2}),
    PutOp(("a", "c"), "gone", None),
    GetOp(("a", "b"), "k", refresh_ttl=True),
    SearchOp(("a",), filter={"x": {"$gt": 0}}, refresh_ttl=True),
    SearchOp(("a",), filter={"x": 2}, refresh_ttl=False),
    ListNamespacesOp((MatchCondition("prefix", ("a",)), MatchCondition("suffix", ("b",))), max_depth=1),
]


def test_the_official_saver_and_store(place: tuple[Dsn, Settings]) -> None:
    with make_pool(*place) as pool:
        saver = PostgresSaver(cast(Any, pool))
        saver.setup()
        saver.setup()
        graph = counter().compile(checkpointer=saver)
        assert graph.invoke({"n": 1}, thread()) == {"n": 2}
        assert graph.invoke({"n": 1}, thread("other")) == {"n": 2}
        assert len(list(graph.get_state_history(thread()))) == 3
        assert len(list(saver.list(thread(), filter={"step": 0}, limit=1))) == 1
        before = saver.get_tuple(thread())
        assert before is not None
        assert list(saver.list(thread(), before=before.config))
        saver.put_writes(before.config, [("n", 5), ("__error__", "x")], "task")
        config = {"configurable": {"thread_id": "old", "checkpoint_ns": ""}}
        old = {**empty_checkpoint(), "v": 3}
        saver.put(cast(Any, config), cast(Any, old), {}, {})
        assert saver.get_tuple(cast(Any, config)) is not None
        saver.get_delta_channel_history(config=before.config, channels=["n"])
        saver.prune(["t"], strategy="keep_latest")
        assert len(list(saver.list(thread()))) == 1
        saver.prune(["t"], strategy="delete")
        saver.delete_thread("other")
        assert list(saver.list(thread("other"))) == []

        store = PostgresStore(cast(Any, pool))
        store.setup()
        store.setup()
        store.batch(OPS[:3])
        got, found, filtered, namespaces = store.batch(OPS[3:])
        assert got is not None
        assert len(cast(Any, found)) == 2
        assert len(cast(Any, filtered)) == 1
        assert namespaces == [("a",)]
        assert store.sweep_ttl() == 0


async def test_the_official_saver_and_store_async(place: tuple[Dsn, Settings]) -> None:
    async with make_async_pool(*place) as pool:
        saver = AsyncPostgresSaver(cast(Any, pool))
        await saver.setup()
        graph = counter().compile(checkpointer=saver)
        assert await graph.ainvoke({"n": 1}, thread()) == {"n": 2}
        assert len([state async for state in graph.aget_state_history(thread())]) == 3
        latest = await saver.aget_tuple(thread())
        assert latest is not None
        await saver.aget_delta_channel_history(config=latest.config, channels=["n"])
        await saver.aprune(["t"], strategy="keep_latest")
        await saver.adelete_thread("t")

        store = AsyncPostgresStore(cast(Any, pool))
        await store.setup()
        await store.abatch(OPS[:3])
        got, *_ = await store.abatch(OPS[3:])
        assert got is not None
        assert await store.sweep_ttl() == 0


def test_every_way_into_a_cursor_names_the_schema(place: tuple[Dsn, Settings]) -> None:
    with make_pool(*place) as pool, pool.connection() as conn, conn.cursor() as cur:
        cur.execute("CREATE TABLE store (key text)")
        cur.executemany("INSERT INTO store VALUES (%s)", [("a",), ("b",)])
        cur.execute(b"INSERT INTO store VALUES ('c')")
        with cur.copy("COPY store FROM STDIN") as copy:
            copy.write_row(["d"])
        composed = sql.SQL("SELECT {} FROM store ORDER BY 1").format(sql.Identifier("key"))
        assert [row["key"] for row in cur.execute(composed)] == ["a", "b", "c", "d"]
        assert [
            row["key"] for row in cur.stream("SELECT key FROM store WHERE key > %s ORDER BY 1", ["b"])
        ] == [
            "c",
            "d",
        ]
        with pytest.raises(TypeError, match="str, bytes or psycopg"):
            cur.execute(cast(Any, 5))


async def test_every_way_into_an_async_cursor_names_the_schema(place: tuple[Dsn, Settings]) -> None:
    async with make_async_pool(*place) as pool, pool.connection() as conn, conn.cursor() as cur:
        await cur.execute("CREATE TABLE store (key text)")
        await cur.executemany("INSERT INTO store VALUES (%s)", [("a",), ("b",)])
        async with cur.copy("COPY store FROM STDIN") as copy:
            await copy.write_row(["c"])
        rows = [row["key"] async for row in cur.stream("SELECT key FROM store ORDER BY 1")]
        assert rows == ["a", "b", "c"]

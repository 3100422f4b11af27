"""The factories for the agent server share one open database on each event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import persistence
from persistence import langgraph_server
from persistence.errors import ClosedError, ConfigurationError, ConnectError
from persistence.settings import get_settings
from tests.ops.conftest import counter, thread


@pytest.fixture(autouse=True)
def dsn_of_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PERSISTENCE_DSN", f"sqlite:///{tmp_path}/x.db")
    get_settings.cache_clear()


async def test_saver_and_store_share_one_until_the_last_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    async def aopen() -> persistence.AsyncPersistence:
        opened.append(await persistence.aopen())
        return opened[-1]

    monkeypatch.setattr(langgraph_server, "aopen", aopen)
    outer, inner = langgraph_server.checkpointer(), langgraph_server.store()
    saver, store = await asyncio.gather(outer.__aenter__(), inner.__aenter__())
    assert len(opened) == 1
    assert (saver, store) == (opened[0].checkpointer, opened[0].store)
    await outer.__aexit__(None, None, None)
    await store.aput(("a",), "key", {"v": 1})
    assert not opened[0].closed
    await inner.__aexit__(None, None, None)
    assert opened[0].closed
    with pytest.raises(ClosedError):
        await saver.aget_tuple(thread())
    async with langgraph_server.checkpointer() as again:
        assert len(opened) == 2
        assert await counter().compile(checkpointer=again).ainvoke({"n": 1}, thread()) == {"n": 2}


def test_each_event_loop_has_its_own() -> None:
    async def run(number: int) -> object:
        async with langgraph_server.checkpointer() as saver:
            await counter().compile(checkpointer=saver).ainvoke({"n": 1}, thread(str(number)))
            return saver

    with ThreadPoolExecutor(3) as pool:
        savers = list(pool.map(lambda number: asyncio.run(run(number)), range(3)))
    assert len({id(saver) for saver in savers}) == 3


async def test_a_failed_opening_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "later"
    monkeypatch.setenv("PERSISTENCE_DSN", f"sqlite:///{folder}/x.db")
    get_settings.cache_clear()
    with pytest.raises(ConnectError, match="folder does not exist"):
        await langgraph_server.store().__aenter__()
    folder.mkdir()
    async with langgraph_server.store() as store:
        assert await store.aget(("a",), "key") is None


@pytest.mark.parametrize("factory", [langgraph_server.checkpointer, langgraph_server.store])
async def test_the_server_needs_checkpointing(factory: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSISTENCE_ENABLE_CHECKPOINTING", "false")
    get_settings.cache_clear()
    with pytest.raises(ConfigurationError, match="checkpointing is off"):
        await factory().__aenter__()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["checkpointer", "store"])
async def test_the_path_with_a_colon_is_found_where_the_server_looks(name: str) -> None:
    package, rest = f"persistence.langgraph_server:{name}".rsplit(".", 1)
    assert package == "persistence"
    async with vars(persistence)[rest]() as found, getattr(langgraph_server, name)() as same:
        assert found is same

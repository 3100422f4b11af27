"""The process-wide checkpointer: lazy, shared, closed safely, opened again, and apart in a forked child."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import persistence
from persistence import process
from persistence.errors import ClosedError, ConnectError
from persistence.settings import get_settings
from tests.ops.conftest import counter, thread


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(process, "_process", process._Process())
    yield
    persistence.close_checkpointer()


@pytest.fixture
def dsn_of_settings(dsn: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PERSISTENCE_DSN", dsn)
    get_settings.cache_clear()
    return dsn


def test_it_opens_at_the_first_call_and_again_after_a_close(dsn_of_settings: str) -> None:
    saver = persistence.get_checkpointer()
    assert saver is persistence.get_checkpointer()
    assert counter().compile(checkpointer=saver).invoke({"n": 1}, thread()) == {"n": 2}
    persistence.close_checkpointer()
    persistence.close_checkpointer()
    assert saver is not None
    with pytest.raises(ClosedError):
        saver.get_tuple(thread())
    again = persistence.get_checkpointer()
    assert again is not saver
    assert counter().compile(checkpointer=again).invoke({"n": 1}, thread()) == {"n": 2}


async def test_it_opens_at_the_first_call_and_again_after_a_close_async(dsn_of_settings: str) -> None:
    saver = await persistence.aget_checkpointer()
    assert saver is await persistence.aget_checkpointer()
    assert await counter().compile(checkpointer=saver).ainvoke({"n": 1}, thread()) == {"n": 2}
    await persistence.aclose_checkpointer()
    await persistence.aclose_checkpointer()
    again = await persistence.aget_checkpointer()
    assert again is not saver
    await persistence.aclose_checkpointer()


async def test_closing_what_was_never_opened_does_nothing() -> None:
    persistence.close_checkpointer()
    await persistence.aclose_checkpointer()


async def test_setup_makes_the_tables_where_opening_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PERSISTENCE_DSN", f"sqlite:///{tmp_path}/x.db")
    monkeypatch.setenv("PERSISTENCE_SETUP_ON_OPEN", "false")
    get_settings.cache_clear()
    persistence.setup_checkpointer()
    persistence.setup_checkpointer()
    saver = persistence.get_checkpointer()
    assert saver is not None
    assert saver.get_tuple(thread()) is None
    await persistence.asetup_checkpointer()
    await persistence.aclose_checkpointer()


def test_concurrent_first_calls_share_one(dsn_of_settings: str) -> None:
    barrier = threading.Barrier(16)

    def first() -> int:
        barrier.wait()
        return id(persistence.get_checkpointer())

    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(lambda _: first(), range(16)))) == 1


async def test_concurrent_first_calls_share_one_async(dsn_of_settings: str) -> None:
    savers = await asyncio.gather(*(persistence.aget_checkpointer() for _ in range(16)))
    assert len({id(saver) for saver in savers}) == 1
    await persistence.aclose_checkpointer()


def test_each_event_loop_has_its_own(postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSISTENCE_DSN", postgres_dsn)
    get_settings.cache_clear()
    seen: list[object] = []  # kept, so that no id is used twice

    async def run() -> None:
        saver = await persistence.aget_checkpointer()
        seen.append(saver)
        await counter().compile(checkpointer=saver).ainvoke({"n": 1}, thread(str(len(seen))))
        await persistence.aclose_checkpointer()

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(asyncio.run, run()) for _ in range(3)]:
            done.result(60)
    asyncio.run(run())
    assert len({id(saver) for saver in seen}) == 4


def test_a_failed_first_call_is_tried_again_by_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "later"
    monkeypatch.setenv("PERSISTENCE_DSN", f"sqlite:///{folder}/x.db")
    get_settings.cache_clear()
    with pytest.raises(ConnectError, match="folder does not exist"):
        persistence.get_checkpointer()
    folder.mkdir()
    assert persistence.get_checkpointer() is not None


def test_getting_and_closing_at_once_never_deadlocks(dsn_of_settings: str) -> None:
    end = threading.Event()
    failures: list[Exception] = []

    def churn(close: bool) -> None:
        while not end.is_set():
            try:
                if close:
                    persistence.close_checkpointer()
                else:
                    saver = persistence.get_checkpointer()
                    assert saver is not None
                    saver.get_tuple(thread())
            except ClosedError:
                pass  # closed between the two calls
            except Exception as error:  # noqa: BLE001 - all are looked at
                failures.append(error)
                return

    workers = [threading.Thread(target=churn, args=(number == 0,)) for number in range(4)]
    for worker in workers:
        worker.start()
    end.wait(1.0)
    end.set()
    for worker in workers:
        worker.join(60)
    assert not any(worker.is_alive() for worker in workers)
    assert failures == []


def child(pipe: Any, parents: int) -> None:
    """In a forked child: its own saver, its own connection."""
    saver = persistence.get_checkpointer()
    assert id(saver) != parents
    graph = counter().compile(checkpointer=saver)
    pipe.send(graph.invoke({"n": graph.get_state(thread()).values["n"]}, thread()))
    persistence.close_checkpointer()
    pipe.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("dsn", ["sqlite", "postgres"], indirect=True)
def test_a_forked_child_has_its_own_and_leaves_the_parents_alone(dsn_of_settings: str) -> None:
    saver = persistence.get_checkpointer()
    graph = counter().compile(checkpointer=saver)
    graph.invoke({"n": 1}, thread())
    fork = multiprocessing.get_context("fork")
    for expected in (3, 4):
        here, there = fork.Pipe()
        worker = fork.Process(target=child, args=(there, id(saver)))
        worker.start()
        assert here.poll(60)
        assert here.recv() == {"n": expected}
        worker.join(60)
        assert worker.exitcode == 0
        here.close()
        there.close()
        assert graph.get_state(thread()).values == {"n": expected}  # the parent's still works
    assert persistence.get_checkpointer() is saver


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_forked_while_another_thread_opens_does_not_deadlock(dsn_of_settings: str) -> None:
    with process._process.sync.lock:  # as held by another thread at the moment of the fork
        pid = os.fork()
        if pid == 0:
            try:
                persistence.get_checkpointer()
                persistence.close_checkpointer()
                os._exit(0)
            except BaseException:  # noqa: BLE001 - the exit code tells
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

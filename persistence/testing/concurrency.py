"""Many callers at once, and callers that go away: clauses R6, R7, W3, F2, F3, F4, F5."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any

from persistence.errors import ClosedError
from persistence.testing.fixtures import Opener
from persistence.testing.marks import clause
from persistence.testing.subject import Subject, at, bare

THREADS = 32
TASKS = 100
STEPS = 5
TURNS = (*range(24), *(2**n for n in range(5, 14)))
"""Of an event loop: every one at first, where most awaits are."""


def values_of(worker: int, step: int) -> dict[str, Any]:
    return {"list": [worker, step], "number": worker * 1000 + step, "text": "x" * (step * 700)}


def check_conversations(saver: Subject, workers: int) -> None:
    """What each worker stored is there as a whole, and nothing else is."""
    assert len(saver.ids()) == workers * STEPS
    for worker in range(workers):
        found = saver.list(at(f"t{worker}"))
        assert [f.config["configurable"]["checkpoint_id"] for f in found] == [
            f"{step}" for step in reversed(range(STEPS))
        ]
        for step, stored in zip(reversed(range(STEPS)), found, strict=True):
            assert stored.checkpoint["channel_values"] == values_of(worker, step)
            assert stored.pending_writes == [("task", "list", [step]), ("task", "number", worker)]


@clause("R7", "W3", "F2")
def test_many_threads_share_a_saver(saver: Subject) -> None:
    """Synchronous methods, of either colour's saver, from 32 threads."""
    errors: list[BaseException] = []

    def converse(worker: int) -> None:
        try:
            for step in range(STEPS):
                values = values_of(worker, step)
                versions: Any = dict.fromkeys(values, f"{step}")
                parent = f"{step - 1}" if step else None
                config = saver.saver.put(
                    at(f"t{worker}", parent), bare(f"{step}", values, versions), {}, versions
                )
                saver.saver.put_writes(config, [("list", [step]), ("number", worker)], "task")
                found = saver.saver.get_tuple(at(f"t{worker}"))
                assert found is not None
                assert found.checkpoint["channel_values"] == values
                assert len(list(saver.saver.list(at(f"t{worker}")))) == step + 1
                saver.saver.delete_thread(f"nobody{worker}")
        except BaseException as error:  # noqa: BLE001 - to be shown in the main thread
            errors.append(error)

    threads = [threading.Thread(target=converse, args=(worker,)) for worker in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert not any(thread.is_alive() for thread in threads)
    check_conversations(saver, THREADS)


@clause("R7", "W3", "F2")
def test_many_tasks_share_a_saver(saver: Subject) -> None:
    """Asynchronous methods, of either colour's saver, from 100 tasks."""

    async def converse(worker: int) -> None:
        for step in range(STEPS):
            values = values_of(worker, step)
            versions: Any = dict.fromkeys(values, f"{step}")
            parent = f"{step - 1}" if step else None
            config = await saver.saver.aput(
                at(f"t{worker}", parent), bare(f"{step}", values, versions), {}, versions
            )
            await saver.saver.aput_writes(config, [("list", [step]), ("number", worker)], "task")
            found = await saver.saver.aget_tuple(at(f"t{worker}"))
            assert found is not None
            assert found.checkpoint["channel_values"] == values
            assert len([f async for f in saver.saver.alist(at(f"t{worker}"), limit=2)]) == min(step + 1, 2)

    async def all_at_once() -> None:
        await asyncio.wait_for(asyncio.gather(*(converse(worker) for worker in range(TASKS))), 60)

    saver.loop.run(all_at_once())
    check_conversations(saver, TASKS)


@clause("R6", "F2")
def test_listing_that_is_left_early_holds_nothing(opened: Opener) -> None:
    saver = opened(pool_max=1, pool_timeout=60)
    for step in range(40):
        saver.put("t", f"{step:02}", {"x": [step]})
    left_open: list[Any] = []
    for _ in range(5):
        if saver.is_async:

            async def first() -> Any:
                listing = saver.saver.alist(at("t"))
                left_open.append(listing)
                return await anext(aiter(listing))

            found = saver.loop.run(first())
        else:
            listing = saver.saver.list(at("t"))
            left_open.append(listing)
            found = next(iter(listing))
        assert found.config["configurable"]["checkpoint_id"] == "39"
        assert saver.get("t") is not None
        saver.put_writes(at("t", "39"), [("x", 1)])
    left_open.clear()
    gc.collect()
    assert len(saver.ids(at("t"))) == 40


async def _stop_after(work: Coroutine[Any, Any, Any], turns: int) -> bool:
    """Cancel ``work`` when the loop has gone round so many times; whether it had ended before."""
    task = asyncio.ensure_future(work)
    for _ in range(turns):
        await asyncio.sleep(0)
        if task.done():
            break
    ended = task.done()
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
    return ended


@clause("W3", "F5")
def test_call_may_be_cancelled_at_any_await(opened: Opener) -> None:
    """Each method is cancelled after 0, 1, 2, ... turns of the loop, until it ends before that."""
    saver = opened(pool_max=2, pool_timeout=60)
    target = saver.saver

    def fill(thread: str) -> None:
        for id_ in ("1", "2"):
            saver.put(thread, id_, {"a": [id_], "b": id_}, metadata={"run_id": thread})
            saver.put_writes(at(thread, id_), [("a", 1), ("b", 2)])

    async def listed(thread: str) -> list[Any]:
        return [found async for found in target.alist(at(thread))]

    both: Any = {"a": "3", "b": "3"}
    calls: dict[str, Callable[[str], Coroutine[Any, Any, Any]]] = {
        "put": lambda t: target.aput(at(t, "2"), bare("3", {"a": ["3"], "b": "3"}, both), {}, both),
        "put_writes": lambda t: target.aput_writes(at(t, "2"), [("a", 3), ("b", 4)], "other"),
        "get_tuple": lambda t: target.aget_tuple(at(t)),
        "list": listed,
        "history": lambda t: target.aget_delta_channel_history(config=at(t), channels=["a"]),
        "delete_thread": target.adelete_thread,
        "delete_for_runs": lambda t: target.adelete_for_runs([t]),
        "prune": lambda t: target.aprune([t]),
        "copy_thread": lambda t: target.acopy_thread(t, f"{t}-copy"),
    }
    allowed = {
        "put": [(3, 4), (2, 4)],
        "put_writes": [(2, 6), (2, 4)],
        "delete_thread": [(0, 0), (2, 4)],
        "delete_for_runs": [(0, 0), (2, 4)],
        "prune": [(1, 2), (2, 4)],
    }
    for name, begin in calls.items():
        for turns in TURNS:
            thread = f"{name}-{turns}"
            fill(thread)
            ended = saver.loop.run(_stop_after(begin(thread), turns))
            saver.put("after", f"{name}-{turns:03}", {"x": [1]})  # the saver works, and nothing is held
            found = saver.list(at(thread))
            counts = (len(found), sum(len(f.pending_writes or ()) for f in found))
            assert counts in allowed.get(name, [(2, 4)]), (name, turns)
            assert all(f.checkpoint["channel_values"].keys() == {"a", "b"} for f in found)
            copies = saver.list(at(f"{thread}-copy"))
            assert len(copies) in ((0, 2) if name == "copy_thread" else (0,))
            assert sum(len(f.pending_writes or ()) for f in copies) == 2 * len(copies)
            for used in (thread, f"{thread}-copy"):
                saver.call("delete_thread", used)
            if ended:
                break


@clause("F3")
def test_two_loops_share_a_saver(saver: Subject) -> None:
    """One is the saver's own, the other runs in this thread; no call hangs, and none is lost."""

    async def converse(worker: int) -> None:
        for step in range(STEPS):
            config = await saver.saver.aput(at(f"t{worker}"), bare(f"{step}", {"x": [step]}), {}, {"x": 1})
            await saver.saver.aput_writes(config, [("x", step)], "task")
            assert await saver.saver.aget_tuple(config) is not None

    async def several(first: int) -> None:
        await asyncio.wait_for(asyncio.gather(*(converse(first + i) for i in range(10))), 60)

    other = saver.loop.start(several(0))
    asyncio.run(several(10))
    other.result(60)
    assert len(saver.ids()) == 20 * STEPS


@clause("F4", "W3")
def test_close_while_tasks_use_it(opened: Opener) -> None:
    """Each call is done, or says that the saver was closed."""
    saver = opened()
    started = threading.Event()
    done: list[str] = []

    async def converse(worker: int) -> None:
        for step in count():
            id_ = f"{worker}-{step:05}"
            try:
                await saver.saver.aput(at("t"), bare(id_, {"x": [step], "y": id_}), {}, {"x": 1, "y": 1})
            except ClosedError:
                return
            done.append(id_)
            if len(done) > 50:
                started.set()
            await asyncio.sleep(0)

    async def several() -> None:
        await asyncio.wait_for(asyncio.gather(*(converse(worker) for worker in range(8))), 60)

    running = saver.loop.start(several())
    assert started.wait(60)
    saver.close()
    running.result(60)
    if saver.target.is_durable:
        stored = {found.checkpoint["id"]: found for found in opened().list(at("t"))}
        assert set(done) <= stored.keys()
        assert all(found.checkpoint["channel_values"]["y"] == id_ for id_, found in stored.items())

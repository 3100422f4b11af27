"""LangGraph's own agent server, driven by its SDK, keeps its state in our database, killed or not."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from langgraph.checkpoint.base import CheckpointTuple
from langgraph_sdk import get_client
from langgraph_sdk.client import LangGraphClient

import persistence
from tests.server.conftest import AgentServer, block_of_page

pytestmark = pytest.mark.timeout(240)


def human(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def contents(values: Any) -> list[str]:
    return [message["content"] for message in values["messages"]]


async def new_thread(client: LangGraphClient) -> str:
    return str((await client.threads.create())["thread_id"])


async def stored(db: persistence.AsyncPersistence, thread: str) -> list[CheckpointTuple]:
    """The thread's checkpoints in the database, newest first."""
    assert db.checkpointer is not None
    return [each async for each in db.checkpointer.alist({"configurable": {"thread_id": thread}})]


async def stored_ids(db: persistence.AsyncPersistence, thread: str) -> list[str]:
    return [each.checkpoint["id"] for each in await stored(db, thread)]


async def at_work(db: persistence.AsyncPersistence, thread: str, checkpoints: int) -> None:
    """Wait until the thread's run is in the node that takes its time."""
    while len(await stored(db, thread)) < checkpoints:  # noqa: ASYNC110 - another process writes them
        await asyncio.sleep(0.05)


async def test_runs_leave_their_state_in_our_database(
    client: LangGraphClient, db: persistence.AsyncPersistence
) -> None:
    """The first is waited for, the second streamed."""
    thread = await new_thread(client)
    values: Any = await client.runs.wait(thread, "agent", input=human("hello"))
    assert contents(values) == ["hello", "You said: hello"]
    modes: Any = ["values", "updates", "messages-tuple", "checkpoints"]
    stream = client.runs.stream(thread, "agent", input=human("again"), stream_mode=modes)
    parts: dict[str, list[Any]] = {}
    async for part in stream:
        parts.setdefault(part.event, []).append(part.data)
    assert "error" not in parts
    assert [list(each) for each in parts["updates"]] == [["listen"], ["work"], ["ask"]]
    assert [each[0]["content"] for each in parts["messages"]] == ["You said: again"]
    assert contents(parts["values"][-1]) == ["hello", "You said: hello", "again", "You said: again"]
    values = (await client.threads.get_state(thread))["values"]
    assert contents(values) == contents(parts["values"][-1])
    assert values["log"] == ["heard hello", "worked", "heard again", "worked"]
    history = await client.threads.get_history(thread, limit=100)
    assert [each["checkpoint"]["checkpoint_id"] for each in history] == await stored_ids(db, thread)
    assert len(history) == 10
    assert len(parts["checkpoints"]) == 5


async def test_an_interrupted_thread_is_copied_and_both_are_resumed(
    server: AgentServer, client: LangGraphClient, db: persistence.AsyncPersistence
) -> None:
    thread = await new_thread(client)
    values: Any = await client.runs.wait(thread, "agent", input=human("book a room"))
    assert [each["value"] for each in values["__interrupt__"]] == ["Really?"]
    assert (await client.threads.get(thread))["status"] == "interrupted"
    newest = (await stored(db, thread))[0]
    assert [write[1] for write in newest.pending_writes or []] == ["__interrupt__"]

    copy: str = (await client.http.post(f"/threads/{thread}/copy", json=None))["thread_id"]
    assert copy != thread
    assert server.rows(copy) == server.rows(thread) > 0
    assert await stored_ids(db, copy) == await stored_ids(db, thread)
    for each in (thread, copy):
        state = await client.threads.get_state(each)
        assert state["next"] == ["ask"]
        assert [interrupt["value"] for interrupt in state["tasks"][0]["interrupts"]] == ["Really?"]

    async def resume(thread: str, answer: str) -> None:
        values = await client.runs.wait(thread, "agent", command={"resume": answer})
        assert contents(values)[-1] == f"Booked: {answer}"
        assert (await client.threads.get_state(thread))["next"] == []

    await asyncio.gather(resume(thread, "yes"), resume(copy, "the copy"))


async def test_history_is_read_changed_and_forked(client: LangGraphClient) -> None:
    thread = await new_thread(client)
    await client.runs.wait(thread, "agent", input=human("hello"))
    history = await client.threads.get_history(thread)
    assert [each["next"] for each in history] == [[], ["ask"], ["work"], ["listen"], ["__start__"]]
    old: Any = history[2]["checkpoint"]
    before: Any = {"configurable": {"checkpoint_id": old["checkpoint_id"]}}
    older = await client.threads.get_history(thread, before=before, limit=1)
    assert [each["next"] for each in older] == [["listen"]]
    seen = await client.threads.get_state(thread, checkpoint_id=old["checkpoint_id"])
    assert contents(seen["values"]) == ["hello"]
    await client.threads.update_state(thread, human("rather: bye"), checkpoint=old, as_node="listen")
    state = await client.threads.get_state(thread)
    assert (state["next"], contents(state["values"])) == (["work"], ["hello", "rather: bye"])
    assert state["parent_checkpoint"] == old
    values = await client.runs.wait(thread, "agent", input=None)
    assert contents(values) == ["hello", "rather: bye", "You said: rather: bye"]


async def test_runs_that_are_rolled_back_leave_nothing(
    client: LangGraphClient, db: persistence.AsyncPersistence
) -> None:
    async def by_strategy(thread: str, run: str) -> None:
        values = await client.runs.wait(thread, "agent", input=human("quick"), multitask_strategy="rollback")
        assert contents(values) == ["hello", "You said: hello", "quick", "You said: quick"]

    async def by_cancelling(thread: str, run: str) -> None:
        await client.runs.cancel(thread, run, wait=True, action="rollback")
        assert contents((await client.threads.get_state(thread))["values"]) == ["hello", "You said: hello"]

    async def by_deleting(thread: str, run: str) -> None:
        await client.runs.cancel(thread, run, wait=True)
        assert len(await stored(db, thread)) == 8
        await client.runs.delete(thread, run)
        assert contents((await client.threads.get_state(thread))["values"]) == ["hello", "You said: hello"]

    async def roll_back(how: Callable[[str, str], Awaitable[None]], left: int) -> None:
        thread = await new_thread(client)
        await client.runs.wait(thread, "agent", input=human("hello"))
        before = await stored_ids(db, thread)
        run = (await client.runs.create(thread, "agent", input=human("slowly")))["run_id"]
        await at_work(db, thread, 8)
        assert [each.metadata["run_id"] for each in await stored(db, thread)].count(run) == 3
        await how(thread, run)
        after = await stored(db, thread)
        assert run not in {each.metadata["run_id"] for each in after}
        assert [each.checkpoint["id"] for each in after][left:] == before

    await asyncio.gather(roll_back(by_strategy, 5), roll_back(by_cancelling, 0), roll_back(by_deleting, 0))


async def test_deleted_threads_are_gone_from_the_database(
    server: AgentServer, client: LangGraphClient
) -> None:
    deleted, pruned, kept = threads = [await new_thread(client) for _ in range(3)]
    text = human("book a room")
    await asyncio.gather(*(client.runs.wait(thread, "agent", input=text) for thread in threads))
    before = [server.rows(thread) for thread in threads]
    assert 0 not in before
    await client.threads.delete(deleted)
    assert await client.threads.prune([pruned]) == {"pruned_count": 1}
    assert [server.rows(thread) for thread in threads] == [0, 0, before[2]]
    assert [each["thread_id"] for each in await client.threads.search(ids=threads)] == [kept]
    assert (await client.threads.get_state(kept))["next"] == ["ask"]


async def test_store_items_are_in_our_database(
    client: LangGraphClient, db: persistence.AsyncPersistence
) -> None:
    store = client.store
    await store.put_item(["users", "ann"], key="likes", value={"food": "figs"})
    await store.put_item(["users", "bob"], key="likes", value={"food": "plums"})
    item = await store.get_item(["users", "ann"], key="likes")
    assert item["value"] == {"food": "figs"}
    found = await store.search_items(["users"], filter={"food": "plums"})
    assert [each["namespace"] for each in found["items"]] == [["users", "bob"]]
    names = await store.list_namespaces(prefix=["users"])
    assert names["namespaces"] == [["users", "ann"], ["users", "bob"]]
    await store.delete_item(["users", "ann"], key="likes")
    await client.runs.wait(await new_thread(client), "agent", input=human("from the graph"))
    assert db.store is not None
    assert await db.store.aget(("users", "ann"), "likes") is None
    assert [each.value for each in await db.store.asearch(("users",))] == [{"food": "plums"}]
    said = await db.store.aget(("said",), "last")
    assert said is not None
    assert said.value == {"text": "from the graph"}


async def test_a_kill_loses_nothing(
    server: AgentServer, client: LangGraphClient, db: persistence.AsyncPersistence
) -> None:
    """The server has lived until here without one complaint, and the next one continues."""
    done, asked, running = [await new_thread(client) for _ in range(3)]
    await asyncio.gather(
        client.runs.wait(done, "agent", input=human("hello")),
        client.runs.wait(asked, "agent", input=human("book a room")),
        client.runs.create(running, "agent", input=human("slowly")),
    )
    await at_work(db, running, 3)
    await client.store.put_item(["kept"], key="it", value={"is": "there"})
    server.kill()
    assert server.complaints() == []
    ids = {thread: await stored_ids(db, thread) for thread in (done, asked, running)}
    newest = {thread: (await stored(db, thread))[0] for thread in ids}
    assert [len(each) for each in ids.values()] == [5, 4, 3]
    assert [write[1] for write in newest[asked].pending_writes or []] == ["__interrupt__"]

    shutil.rmtree(server.folder / ".langgraph_api")  # what the server itself has noted, its list of threads
    server.start()
    async with get_client(url=server.url) as client:
        assert await client.threads.search() == []
        page: dict[str, Any] = {}
        exec(block_of_page("python"), page)  # noqa: S102 - what docs/agent-server.md says
        states = {thread: await page["reopen"](server.url, thread) for thread in ids}
        assert [state["next"] for state in states.values()] == [[], ["ask"], ["work"]]
        assert contents(states[done]["values"]) == ["hello", "You said: hello"]
        values = await client.runs.wait(asked, "agent", command={"resume": "yes"})
        assert contents(values)[-1] == "Booked: yes"
        history = await client.threads.get_history(running)
        assert [each["checkpoint"]["checkpoint_id"] for each in history] == ids[running]
        assert (await client.store.get_item(["kept"], key="it"))["value"] == {"is": "there"}
    server.stop()
    assert server.complaints() == []
    assert "persistence closed" in server.text()

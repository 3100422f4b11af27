"""Two works above the saver's own interface: a graph that chats, and the store."""

from __future__ import annotations

import asyncio
import gc
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.graph.state import CompiledStateGraph
from langgraph.store.base import BaseStore

from tools.benchmarks.clients import AsyncSaverClient, WrongStateError
from tools.benchmarks.contenders import Contender, StoreOpener
from tools.benchmarks.material import prose
from tools.benchmarks.measure import Load, Sample, describe, percentiles


class State(TypedDict):
    """The state of a conversation."""

    messages: Annotated[list[AnyMessage], add_messages]
    sources: list[str]
    turns: int


def _retrieve(state: State) -> dict[str, Any]:
    return {"sources": [prose(500, state.get("turns", 0) * 499 + n * 613) for n in range(3)]}


def _answer(state: State) -> dict[str, Any]:
    turns = state.get("turns", 0) + 1
    return {"messages": [AIMessage(prose(300, turns * 331))], "turns": turns}


def _build(client: AsyncSaverClient) -> CompiledStateGraph[State, None, State, State]:
    builder = StateGraph(State)
    builder.add_node("retrieve", _retrieve)
    builder.add_node("answer", _answer)
    builder.add_edge(START, "retrieve")
    builder.add_edge("retrieve", "answer")
    builder.add_edge("answer", END)
    return builder.compile(checkpointer=client.saver)


def graph(contender: Contender, place: str, load: Load) -> Sample:
    """Conversations side by side, each question an ``ainvoke``. Gives turns/s and the time of a turn."""
    return asyncio.run(_graph(contender, place, load))


async def _graph(contender: Contender, place: str, load: Load) -> Sample:
    manager = contender.open(place)
    assert isinstance(manager, AbstractAsyncContextManager)  # noqa: S101 - this work has asynchronous savers only
    async with manager as client:
        assert isinstance(client, AsyncSaverClient)  # noqa: S101
        compiled = _build(client)
        await asyncio.gather(*(_chat(compiled, 0.0, []) for _ in range(load.workflows)))
        times: list[float] = []
        gc.collect()
        started = time.perf_counter()
        until = started + load.seconds
        chats = (_chat(compiled, until, times) for _ in range(load.workflows))
        ended = await asyncio.gather(*chats, return_exceptions=True)
        elapsed = time.perf_counter() - started
        kept = [outcome for outcome in ended if not isinstance(outcome, BaseException)]
        checks = await asyncio.gather(*(_remembers(compiled, *chat) for chat in kept), return_exceptions=True)
    values = {"turns/s": sum(turns for _, turns in kept) / elapsed, **percentiles("turn", times)}
    return Sample(values, [describe(o) for o in [*ended, *checks] if isinstance(o, BaseException)])


async def _chat(
    compiled: CompiledStateGraph[State, None, State, State], until: float, times: list[float]
) -> tuple[str, int]:
    thread, turns = uuid.uuid4().hex, 0
    config: Any = {"configurable": {"thread_id": thread}}
    while not turns or time.perf_counter() < until:
        begun = time.perf_counter()
        question: Any = {"messages": [HumanMessage(prose(120, turns * 127))]}
        await compiled.ainvoke(question, config)
        times.append((time.perf_counter() - begun) * 1000)
        turns += 1
    return thread, turns


async def _remembers(
    compiled: CompiledStateGraph[State, None, State, State], thread: str, turns: int
) -> None:
    values = (await compiled.aget_state({"configurable": {"thread_id": thread}})).values
    questions = [m.content for m in values["messages"] if isinstance(m, HumanMessage)]
    if questions != [prose(120, n * 127) for n in range(turns)] or values["turns"] != turns:
        raise WrongStateError(f"the conversation after {turns} turns differs")


def store(opener: StoreOpener, place: str, load: Load) -> Sample:
    """Put, get and search, one after the other, by clients side by side. Gives the calls/s of each."""
    return asyncio.run(_store(opener, place, load))


async def _store(opener: StoreOpener, place: str, load: Load) -> Sample:
    async with opener(place) as store:
        users = [_User(store) for _ in range(load.workflows)]
        for user in users[:20]:  # connections and statements
            await user.put(0)
            await user.get(0)
            await user.search(0)
        sample = Sample()
        for name in ("put", "get", "search"):
            rate, errors = await _phase([getattr(user, name) for user in users], load.seconds / 3)
            sample.values[f"{name}/s"] = rate
            sample.errors += errors
    return sample


async def _phase(calls: list[Callable[[int], Awaitable[None]]], seconds: float) -> tuple[float, list[str]]:
    """Calls per second, and what failed."""

    async def repeat(call: Callable[[int], Awaitable[None]]) -> int:
        number = 0
        while not number or time.perf_counter() < until:
            await call(number)
            number += 1
        return number

    gc.collect()
    started = time.perf_counter()
    until = started + seconds
    ended = await asyncio.gather(*(repeat(call) for call in calls), return_exceptions=True)
    elapsed = time.perf_counter() - started
    done = sum(outcome for outcome in ended if isinstance(outcome, int))
    return done / elapsed, [describe(o) for o in ended if isinstance(o, BaseException)]


class _User:
    """One who keeps 20 notes."""

    NOTES = 20

    def __init__(self, store: BaseStore) -> None:
        self._store = store
        self._namespace = ("notes", uuid.uuid4().hex)
        self._kept: dict[str, dict[str, Any]] = {}

    async def put(self, number: int) -> None:
        key = f"note {number % self.NOTES}"
        value = {"text": prose(500, number * 509), "number": number}
        await self._store.aput(self._namespace, key, value)
        self._kept[key] = value

    async def get(self, number: int) -> None:
        key = f"note {number % len(self._kept)}"
        found = await self._store.aget(self._namespace, key)
        if found is None or found.value != self._kept[key]:
            raise WrongStateError(f"{key} differs")

    async def search(self, number: int) -> None:
        found = await self._store.asearch(self._namespace, limit=10)
        if len(found) != min(10, len(self._kept)) or any(i.value != self._kept[i.key] for i in found):
            raise WrongStateError("the notes found differ")

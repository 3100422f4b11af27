"""The graph that the agent server of these tests runs: it answers, may be slow, may ask, and keeps a note."""

from __future__ import annotations

import asyncio
from typing import Annotated, TypedDict

from langchain_core.messages import AIMessage, AnyMessage
from langgraph.channels.delta import DeltaChannel
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.store.base import BaseStore
from langgraph.types import interrupt


def _append(before: list[str], new: list[list[str]]) -> list[str]:
    return before + [text for part in new for text in part]


class State(TypedDict, total=False):
    messages: Annotated[list[AnyMessage], add_messages]
    log: Annotated[list[str], DeltaChannel(_append, list, snapshot_frequency=3)]


class Step(TypedDict):
    note: str


def _said(state: State) -> str:
    return str(next(message.content for message in reversed(state["messages"]) if message.type == "human"))


async def listen(state: State, *, store: BaseStore) -> State:
    await store.aput(("said",), "last", {"text": _said(state)})
    return {"log": [f"heard {_said(state)}"]}


async def work(state: State) -> State:
    if "slowly" in _said(state):
        await asyncio.sleep(60)
    return {"messages": [AIMessage(f"You said: {_said(state)}")], "log": ["worked"]}


def ask(state: State) -> State:
    if "book" not in _said(state):
        return {}
    return {"messages": [AIMessage(f"Booked: {interrupt('Really?')}")], "log": ["asked"]}


graph = (
    StateGraph(State)
    .add_node("listen", listen)
    .add_node("work", work)
    .add_node("ask", ask)
    .add_edge(START, "listen")
    .add_edge("listen", "work")
    .add_edge("work", "ask")
    .compile()
)

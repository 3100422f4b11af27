"""Real LangGraph graphs whose checkpoints hold what applications put into them."""

from __future__ import annotations

import enum
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Command, Send, interrupt
from pydantic import BaseModel


class Colour(enum.Enum):
    RED = "red"


class Profile(BaseModel):
    name: str
    born: datetime


@dataclass
class Money:
    amount: Decimal
    currency: str


class Chat(TypedDict, total=False):
    messages: Annotated[list[AnyMessage], add_messages]
    profile: Profile
    price: Money
    colour: Colour
    turn: int
    ratio: float
    note: str | None
    raw: bytes
    found: Annotated[list[str], operator.add]
    done: bool


class Item(TypedDict):
    name: str


def serde() -> JsonPlusSerializer:
    """A serializer that knows these types, so that reading them warns nobody."""
    return JsonPlusSerializer(allowed_msgpack_modules=[Colour, Profile, Money, bytearray])


def _answer(state: Chat) -> Chat:
    turn = state.get("turn", 0) + 1
    return {
        "messages": [AIMessage(f"answer {turn} " + "x" * 400)],
        "profile": Profile(name="Zoë \U0001f600", born=datetime(1990, 1, turn, tzinfo=UTC)),
        "price": Money(Decimal("9.90"), "CHF"),
        "colour": Colour.RED,
        "turn": turn,
        "ratio": turn / 3,
        "note": None,
        "raw": b"\0\xff" * turn,
        "done": turn > 1,
    }


def _fan_out(state: Chat) -> list[Send]:
    return [Send("look", {"name": f"item {n}"}) for n in range(3)]


def _look(item: Item) -> Chat:
    return {"found": [item["name"]]}


def _ask(state: Chat) -> Chat:
    return {"found": [interrupt({"question": "go on?", "turn": state["turn"]})]}


def _inner() -> Any:
    class Inner(TypedDict, total=False):
        turn: int
        found: Annotated[list[str], operator.add]

    graph = StateGraph(Inner)
    graph.add_node("deep", lambda state: {"found": [f"deep {state.get('turn')}"]})
    graph.add_edge(START, "deep")
    return graph.compile(checkpointer=True)


def chat(saver: BaseCheckpointSaver[Any]) -> Any:
    """Messages, pydantic, dataclass, enum, ``Send``, parallel nodes, a subgraph and an interrupt."""
    graph = StateGraph(Chat)
    graph.add_node("answer", _answer)
    graph.add_node("look", _look)  # type: ignore[arg-type]  # a Send brings its own state
    graph.add_node("inner", _inner())
    graph.add_node("ask", _ask)
    graph.add_edge(START, "answer")
    graph.add_conditional_edges("answer", _fan_out, ["look"])
    graph.add_edge("answer", "inner")
    graph.add_edge("inner", "ask")
    return graph.compile(checkpointer=saver)


def _append(state: list[str], writes: Sequence[list[str]]) -> list[str]:
    return [*state, *(text for write in writes for text in write)]


class Log(TypedDict, total=False):
    lines: Annotated[list[str], DeltaChannel(_append, snapshot_frequency=3)]
    other: int


def log(saver: BaseCheckpointSaver[Any]) -> Any:
    """A DeltaChannel that takes a snapshot now and then, beside steps that do not touch it."""
    graph = StateGraph(Log)
    graph.add_node("write", lambda state: {"lines": ["written " + "y" * 300]})
    graph.add_node("rest", lambda state: {"other": state.get("other", 0) + 1})
    graph.add_edge(START, "write")
    graph.add_edge("write", "rest")
    return graph.compile(checkpointer=saver)


def config(thread: str) -> Any:
    """The config of a thread."""
    return {"configurable": {"thread_id": thread}}


def fill(path: Path, *, threads: int = 3, turns: int = 2) -> None:
    """Make a database with the official saver: finished, interrupted, edited and delta threads."""
    with SqliteSaver.from_conn_string(str(path)) as saver:
        saver.serde = serde()
        graph = chat(saver)
        for number in range(threads):
            place = config(f"chat {number} é")
            for turn in range(turns):
                graph.invoke({"messages": [HumanMessage(f"question {turn}")]}, place)
                if number % 2 == 0:  # every other thread stays interrupted
                    graph.invoke(Command(resume="yes"), place)
        graph.update_state(config("chat 0 é"), {"note": "edited", "found": ["by hand"]})
        history = list(graph.get_state_history(config("chat 0 é")))
        graph.update_state(history[len(history) // 2].config, {"turn": 7})  # a fork
        delta = log(saver)
        for _ in range(5):
            delta.invoke({"lines": ["asked"]}, config("log"))

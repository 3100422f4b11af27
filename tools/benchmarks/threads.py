"""Databases to move: the threads of a real graph, written by LangGraph's own SQLite saver.

A conversation of each length is held once. Further threads are its rows under other ids, so that a database
of 10 GB is made in a minute. A transfer does the same work for them, as nothing is shared between threads.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages

from tools.benchmarks.material import prose

_KEPT = {
    "checkpoints": "checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata",
    "writes": "checkpoint_ns, checkpoint_id, task_id, idx, channel, type, value",
}


@dataclass(frozen=True)
class Shape:
    """What the threads of a database are like."""

    turns: int
    """Of a conversation; each is four checkpoints."""
    threads: int
    sources: int
    """Bytes of each of the three texts that a turn looks up; they replace those of the turn before."""


SHAPES = {
    "5 turns": Shape(5, 600, 500),
    "30 turns": Shape(30, 50, 500),
    "300 turns": Shape(300, 2, 500),
    "30 turns, large states": Shape(30, 10, 20_000),
    "few short threads": Shape(5, 20, 500),
}

_AT_ONCE = 8_000_000
"""A thread is added for each of these bytes that are missing, in one transaction: it is smaller."""


class _State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]
    sources: list[str]
    turns: int


def conversation(path: Path, thread: str, *, turns: int, sources: int) -> None:
    """Hold one conversation: a question, three sources, an answer, again and again."""

    def retrieve(state: _State) -> dict[str, Any]:
        turn = state.get("turns", 0)
        return {"sources": [prose(sources, turn * 499 + n * 613) for n in range(3)]}

    def answer(state: _State) -> dict[str, Any]:
        turn = state.get("turns", 0) + 1
        return {"messages": [AIMessage(prose(150, turn * 331))], "turns": turn}

    builder = StateGraph(_State)
    builder.add_node("retrieve", retrieve)
    builder.add_node("answer", answer)
    builder.add_edge(START, "retrieve")
    builder.add_edge("retrieve", "answer")
    builder.add_edge("answer", END)
    with SqliteSaver.from_conn_string(str(path)) as saver:
        saver.setup()
        saver.conn.execute("PRAGMA synchronous = OFF")
        graph = builder.compile(checkpointer=saver)
        config: Any = {"configurable": {"thread_id": thread}}
        for turn in range(turns):
            question: Any = {"messages": [HumanMessage(prose(60, turn * 127))]}
            graph.invoke(question, config)


def fill(path: Path, shape: Shape, size: int = 0) -> None:
    """Make a database of this shape; further threads make it as large as asked."""
    name = f"{shape.turns} turns"
    conversation(path, f"{name}, 0", turns=shape.turns, sources=shape.sources)
    made = shape.threads
    _repeat(path, name, range(1, made))
    while (missing := size - path.stat().st_size) > 0:
        more = 1 + missing // _AT_ONCE
        _repeat(path, name, range(made, made + more))
        made += more


def _repeat(path: Path, name: str, numbers: range) -> None:
    with closing(sqlite3.connect(path)) as conn, conn:
        conn.execute("PRAGMA synchronous = OFF")
        for number in numbers:
            for table, columns in _KEPT.items():
                conn.execute(
                    f"INSERT INTO {table} (thread_id, {columns}) SELECT ?, {columns} FROM {table}"
                    " WHERE thread_id = ?",
                    (f"{name}, {number}", f"{name}, 0"),
                )

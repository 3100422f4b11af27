"""Writes a database as one version of LangGraph's SQLite saver makes it, and what that saver lists.

It runs in an environment of that version, from the root of a checkout::

    python -m venv old && old/bin/pip install langgraph-checkpoint-sqlite==1.0.4 'langgraph<0.3'
    PYTHONPATH=. old/bin/python tests/transfer/make_fixtures.py tests/transfer/fixtures/1.0.4

makes ``1.0.4.db`` and ``1.0.4.json``. 1.0.0, which still wrote JSON, was made with ``langgraph==0.2.14``,
``langgraph-checkpoint==1.0.9`` and ``langchain-core<0.3``; 2.0.11 with ``langgraph>=0.5,<0.7``; 3.0.0 with
``langgraph>=1.0,<1.1``; 3.1.2 with that of the tests. So it uses only what all of these have.
"""

from __future__ import annotations

import json
import operator
import sqlite3
import sys
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, TypedDict
from uuid import UUID

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.errors import NodeInterrupt
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages

try:
    from langgraph.types import Send
except ImportError:
    from langgraph.constants import Send  # type: ignore[no-redef]

from tests.transfer.fixture_state import Colour, Money, Profile, listed


class State(TypedDict, total=False):
    messages: Annotated[list[AnyMessage], add_messages]
    profile: Profile
    price: Money
    colour: Colour
    when: datetime
    key: UUID
    raw: bytes
    tags: set[int]
    note: str | None
    turn: int
    found: Annotated[list[str], operator.add]


class Item(TypedDict):
    name: str


def answer(state: State) -> State:
    turn = (state.get("turn") or 0) + 1
    call = {"name": "search", "args": {"q": "é"}, "id": f"call {turn}", "type": "tool_call"}
    return {
        "messages": [AIMessage(f"answer {turn}", id=f"a{turn}", tool_calls=[call])],
        "profile": Profile(name="Zoë", born=datetime(1990, 1, turn, tzinfo=UTC)),
        "price": Money(Decimal("9.90"), "CHF"),
        "colour": Colour.RED,
        "when": datetime(2024, 9, turn, 12, tzinfo=UTC),
        "key": UUID(int=turn),
        "raw": b"\0\xff",
        "tags": {1, turn},
        "note": None,
        "turn": turn,
    }


def inner() -> Any:
    class Inner(TypedDict, total=False):
        turn: int
        found: Annotated[list[str], operator.add]

    graph = StateGraph(Inner)
    graph.add_node("deep", lambda state: {"found": [f"deep {state['turn']}"]})
    graph.add_edge(START, "deep")
    return graph.compile()


def ask(state: State) -> State:
    raise NodeInterrupt({"question": "go on?", "turn": state["turn"]})


def graph_on(saver: BaseCheckpointSaver[Any], **options: Any) -> Any:
    graph = StateGraph(State)
    graph.add_node("answer", answer)
    graph.add_node("look", lambda item: {"found": [item["name"]]})
    graph.add_node("inner", inner())
    graph.add_node("ask", ask)
    graph.add_edge(START, "answer")
    graph.add_conditional_edges(
        "answer", lambda state: [Send("look", {"name": f"item {n}"}) for n in range(2)], ["look"]
    )
    graph.add_edge("answer", "inner")
    graph.add_edge("inner", "ask")
    return graph.compile(checkpointer=saver, **options)


def config(thread: str) -> Any:
    return {"configurable": {"thread_id": thread}}


def main(target: Path) -> None:
    database = target.with_name(target.name + ".db")
    database.unlink(missing_ok=True)
    with SqliteSaver.from_conn_string(str(database)) as saver:
        graph = graph_on(saver)
        for turn in range(2):
            graph.invoke({"messages": [HumanMessage(f"question {turn}", id=f"h{turn}")]}, config("asked"))
        graph.update_state(config("asked"), {"note": "edited"})
        waiting = graph_on(saver, interrupt_before=["look"])
        waiting.invoke({"messages": [HumanMessage("question", id="h")]}, config("packets wait"))
        # The first versions list no pending writes.
        expected = listed(saver.get_tuple(item.config) for item in list(saver.list(None)))
    saver.conn.close()  # the first versions left it open
    with closing(sqlite3.connect(database)) as conn:
        conn.execute("PRAGMA journal_mode = DELETE")
        conn.execute("VACUUM")
    text = json.dumps(expected, ensure_ascii=False, separators=(",", ":"))
    target.with_name(target.name + ".json").write_text(text.replace('{"place"', '\n{"place"') + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

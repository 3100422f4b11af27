"""A conversation that books a trip: messages, a pydantic model, a subgraph, and a question to a person.

The database is whatever ``PERSISTENCE_DSN`` names; nothing in here knows which. Each call is a
process of its own, so everything between two calls comes out of the database::

    python -m examples.trip_planner say alice "3 nights in Lisbon, please"
    python -m examples.trip_planner answer alice yes
    python -m examples.trip_planner show alice
"""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Command, interrupt
from pydantic import BaseModel

import persistence


class Trip(BaseModel):
    """What the conversation is about; kept in the state as this type, not as a dict."""

    city: str
    nights: int
    price: float | None = None
    booked: bool = False


class State(TypedDict):
    """The state of one conversation."""

    messages: Annotated[list[AnyMessage], add_messages]
    trip: Trip | None


def settings() -> persistence.Settings:
    """The environment's settings; from the database only known types are restored, and our own is one."""
    return persistence.Settings(strict_msgpack=True, allowed_msgpack=(f"{Trip.__module__}:Trip",))


def understand(state: State) -> dict[str, Any]:
    """Stand in for a language model: deterministic, and without a network."""
    text = str(state["messages"][-1].content)
    found = re.search(r"(\d+) nights? in (\w+)", text)
    if found is None:
        trip = state.get("trip")
        about = (
            f"Your {trip.nights} nights in {trip.city} are booked." if trip and trip.booked else "Where to?"
        )
        return {"messages": [AIMessage(about)]}
    trip = Trip(city=found[2], nights=int(found[1]))
    return {"trip": trip, "messages": [AIMessage(f"Looking for {trip.nights} nights in {trip.city}.")]}


def find_offer(state: State) -> dict[str, Any]:
    """Set the price of the trip."""
    trip = state["trip"]
    if trip is None:
        raise ValueError("there is no trip to look for")
    return {"trip": trip.model_copy(update={"price": 80.5 * trip.nights})}


def confirm(state: State) -> dict[str, Any]:
    """Ask the person; the graph stops here until the answer comes, in whichever process that is."""
    trip = state["trip"]
    if trip is None:
        raise ValueError("there is no trip to confirm")
    answer = interrupt(f"{trip.nights} nights in {trip.city} cost {trip.price}. Book?")
    if answer != "yes":
        return {"trip": None, "messages": [AIMessage("Not booked.")]}
    return {
        "trip": trip.model_copy(update={"booked": True}),
        "messages": [AIMessage(f"Booked: {trip.nights} nights in {trip.city}.")],
    }


def _next(state: State) -> str:
    trip = state.get("trip")
    return "booking" if trip is not None and trip.price is None else END


def build(checkpointer: Any) -> CompiledStateGraph[Any]:
    """The graph; the booking is a subgraph and keeps checkpoints in a namespace of its own."""
    booking = StateGraph(State)
    booking.add_node("find_offer", find_offer)
    booking.add_node("confirm", confirm)
    booking.add_edge(START, "find_offer")
    booking.add_edge("find_offer", "confirm")
    graph = StateGraph(State)
    graph.add_node("understand", understand)
    graph.add_node("booking", booking.compile())
    graph.add_edge(START, "understand")
    graph.add_conditional_edges("understand", _next, ["booking", END])
    return graph.compile(checkpointer=checkpointer)


def main(argv: list[str]) -> int:
    """Say something, answer a question, or show the conversation."""
    if len(argv) < 2 or argv[0] not in ("say", "answer", "show"):
        print(__doc__)
        return 2
    verb, thread, text = argv[0], argv[1], " ".join(argv[2:])
    config: Any = {"configurable": {"thread_id": thread}}
    with persistence.open(settings=settings()) as db:
        graph = build(db.checkpointer)
        before = len(graph.get_state(config).values.get("messages", []))
        if verb == "say":
            graph.invoke({"messages": [HumanMessage(text)]}, config)
        elif verb == "answer":
            graph.invoke(Command(resume=text), config)
        else:
            before = 0
        state = graph.get_state(config)
        for message in state.values.get("messages", [])[before:]:
            print(f"{message.type}: {message.content}")
        for question in state.interrupts:
            print(f"waiting for an answer: {question.value}")
    return 0


if __name__ == "__main__":
    # The types' home is this module's importable name, not __main__: that is what checkpoints record.
    from examples.trip_planner import main as run

    sys.exit(run(sys.argv[1:]))

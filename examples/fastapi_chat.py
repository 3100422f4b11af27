r"""A chat service on FastAPI; the database is what ``PERSISTENCE_DSN`` names.

Run it with ``uvicorn examples.fastapi_chat:app`` and talk to it::

    curl -X POST localhost:8000/threads/alice -H 'content-type: application/json' \
         -d '{"text": "3 nights in Lisbon"}'

``POST /threads/{thread}/stream`` answers with server-sent events, a message at a time. If the service is
killed while it answers, the next request to that thread finishes the turn first; so a client waits for
its answer before it asks again. Health and metrics are below ``/persistence``.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from langchain_core.messages import AnyMessage, HumanMessage
from langgraph.types import Command, StateSnapshot
from pydantic import BaseModel

from examples.trip_planner import build, settings
from persistence import asgi


class Text(BaseModel):
    """What a person says."""

    text: str


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the database with the application and close it with it; compile the graph once."""
    async with asgi.make_lifespan(settings=settings())(app):
        app.state.graph = build(app.state.persistence.checkpointer)
        yield


app = FastAPI(title="Trip planner", lifespan=lifespan)
app.mount("/persistence", asgi.Endpoints())


@app.post("/threads/{thread}")
async def say(thread: str, body: Text, request: Request) -> dict[str, Any]:
    """Say something; where the conversation waits for an answer, this is the answer."""
    graph, config = request.app.state.graph, _config(thread)
    state = await _settled(graph, config)
    await graph.ainvoke(_turn(state, body.text), config)
    return view(await graph.aget_state(config))


@app.post("/threads/{thread}/stream")
async def stream(thread: str, body: Text, request: Request) -> StreamingResponse:
    """As :func:`say`, but each message is sent as soon as it is there; the last event is the conversation."""
    graph, config = request.app.state.graph, _config(thread)

    async def events() -> AsyncIterator[str]:
        state = await _settled(graph, config)
        sent = len(view(state)["messages"])
        async for values in graph.astream(_turn(state, body.text), config, stream_mode="values"):
            for message in values["messages"][sent:]:
                yield _event("message", _message(message))
            sent = len(values["messages"])
        yield _event("conversation", view(await graph.aget_state(config)))

    return StreamingResponse(events(), media_type="text/event-stream")


@app.get("/threads/{thread}")
async def show(thread: str, request: Request) -> dict[str, Any]:
    """The conversation so far, and the question it waits at."""
    return view(await request.app.state.graph.aget_state(_config(thread)))


def view(state: StateSnapshot) -> dict[str, Any]:
    """What a client is shown of a conversation."""
    return {
        "messages": [_message(message) for message in state.values.get("messages", [])],
        "waiting_for_answer": [question.value for question in state.interrupts],
    }


def _config(thread: str) -> Any:
    return {"configurable": {"thread_id": thread}}


async def _settled(graph: Any, config: Any) -> StateSnapshot:
    """The state of the conversation, after finishing a turn that a crash cut off."""
    state: StateSnapshot = await graph.aget_state(config)
    if state.tasks and not state.interrupts:  # not state.next: it leaves out a node that had just finished
        await graph.ainvoke(None, config)
        state = await graph.aget_state(config)
    return state


def _turn(state: StateSnapshot, text: str) -> Any:
    return Command(resume=text) if state.interrupts else {"messages": [HumanMessage(text)]}


def _message(message: AnyMessage) -> dict[str, Any]:
    return {"from": message.type, "text": message.content}


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"

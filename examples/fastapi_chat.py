r"""A chat service on FastAPI; the database is what ``PERSISTENCE_DSN`` names.

Run it with ``uvicorn examples.fastapi_chat:app`` and talk to it::

    curl -X POST localhost:8000/threads/alice -H 'content-type: application/json' \
         -d '{"text": "3 nights in Lisbon"}'
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from langchain_core.messages import HumanMessage
from langgraph.types import Command
from pydantic import BaseModel

from examples.trip_planner import build, settings
from persistence import asgi
from persistence.errors import ConnectError


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


@app.post("/threads/{thread}")
async def say(thread: str, body: Text, request: Request) -> dict[str, Any]:
    """Say something; where the conversation waits for an answer, this is the answer."""
    graph, config = request.app.state.graph, _config(thread)
    waiting = (await graph.aget_state(config)).interrupts
    message: Any = Command(resume=body.text) if waiting else {"messages": [HumanMessage(body.text)]}
    await graph.ainvoke(message, config)
    return await _show(graph, config)


@app.get("/threads/{thread}")
async def show(thread: str, request: Request) -> dict[str, Any]:
    """The conversation so far, and the question it waits at."""
    return await _show(request.app.state.graph, _config(thread))


@app.get("/health")
async def health(request: Request) -> dict[str, str]:
    """Whether the database answers, from the live connection."""
    try:
        server = await request.app.state.persistence.ping()
    except ConnectError as error:
        raise HTTPException(503, str(error)) from error
    return {"status": "ok", "server": f"{server.product} {server.version}"}


def _config(thread: str) -> Any:
    return {"configurable": {"thread_id": thread}}


async def _show(graph: Any, config: Any) -> dict[str, Any]:
    state = await graph.aget_state(config)
    return {
        "messages": [{"from": m.type, "text": m.content} for m in state.values.get("messages", [])],
        "waiting_for_answer": [question.value for question in state.interrupts],
    }

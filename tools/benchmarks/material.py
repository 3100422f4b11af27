"""What a workflow hands to its saver, step by step: the same for every contender."""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from langgraph.checkpoint.base import Checkpoint, CheckpointMetadata, empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

CHANGING = ("messages", "step")
"""Channels that every step changes; the others change in the first only."""

Versions = dict[str, str | int | float]
Blob = tuple[str, bytes]


@lru_cache(maxsize=1)
def _prose() -> str:
    """A megabyte of words: it compresses about as well as real text, not like one repeated letter."""
    chosen = random.Random(7)  # noqa: S311 - the same text in every run
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    weights = range(len(letters), 0, -1)
    words = ["".join(chosen.choices(letters, weights, k=chosen.randint(2, 9))) for _ in range(4_000)]
    text: list[str] = []
    size = 0
    while size < 1_000_000:
        word = chosen.choice(words)
        text.append(word)
        size += len(word) + 1
    return " ".join(text)


def prose(size: int, start: int = 0) -> str:
    """Text of ``size`` bytes, other text for another ``start``."""
    words = _prose()
    start %= len(words) // 2
    piece = words[start : start + size]
    while len(piece) < size:
        piece += words[: size - len(piece)]
    return piece


@dataclass(frozen=True)
class _Content:
    """The bulk of a state, shared by all workflows of one size."""

    history: list[dict[str, str]]
    documents: list[dict[str, str]]
    profile: dict[str, str]


@lru_cache(maxsize=8)
def _content(size: int) -> _Content:
    """Half of the state is messages; the other half never changes."""
    piece = max(100, min(100_000, size // 40))
    parts = max(4, size // piece)

    def texts(count: int, start: int) -> list[dict[str, str]]:
        return [
            {"role": ("user", "assistant")[n % 2], "content": prose(piece, start + n * 977)}
            for n in range(count)
        ]

    return _Content(
        history=texts(parts // 2, 0),
        documents=texts(parts // 4, 300_000),
        profile={f"note {n}": prose(piece, 600_000 + n * 977) for n in range(parts // 4)},
    )


class Workflow:
    """One conversation and its steps."""

    def __init__(self, state: int) -> None:
        self.thread = uuid.uuid4().hex
        self.parent: str | None = None
        self.id = ""
        self.size = state
        self._content = _content(state)

    @property
    def latest(self) -> Any:
        """The config by which LangGraph asks for the latest checkpoint."""
        return {"configurable": {"thread_id": self.thread, "checkpoint_ns": ""}}

    @property
    def before(self) -> Any:
        """The config that ``put`` is called with: it names the parent."""
        config = self.latest
        if self.parent is not None:
            config["configurable"]["checkpoint_id"] = self.parent
        return config

    @property
    def current(self) -> Any:
        """The config that ``put_writes`` is called with."""
        config = self.latest
        config["configurable"]["checkpoint_id"] = self.id
        return config

    def advance(self, step: int) -> None:
        """Choose the next checkpoint's id."""
        self.parent = self.id or None
        self.id = str(uuid6(clock_seq=step))

    def values(self, step: int) -> dict[str, Any]:
        """The state after ``step``; its last message tells threads and steps apart."""
        return {
            "messages": [*self._content.history, {"role": "user", "content": f"{self.thread} {step}"}],
            "documents": self._content.documents,
            "profile": self._content.profile,
            "title": "A conversation",
            "step": step,
        }

    def versions(self, step: int) -> Versions:
        """The version of every channel."""
        first, now = f"{1:032}.0", f"{step + 1:032}.0"
        return {name: now if name in CHANGING else first for name in self.values(step)}

    def new_versions(self, step: int) -> Versions:
        """The versions of the channels that ``step`` changed."""
        return {k: v for k, v in self.versions(step).items() if step == 0 or k in CHANGING}

    def checkpoint(self, step: int) -> Checkpoint:
        """The checkpoint that ``put`` is given."""
        checkpoint = empty_checkpoint()
        checkpoint["v"] = 4  # as LangGraph writes them; this function's own number is an old format's
        checkpoint["id"] = self.id
        checkpoint["channel_values"] = self.values(step)
        checkpoint["channel_versions"] = self.versions(step)
        checkpoint["versions_seen"] = {"model": {"messages": f"{step:032}.0"}}
        return checkpoint

    def metadata(self, step: int) -> CheckpointMetadata:
        """The metadata that ``put`` is given."""
        return {"source": "loop", "step": step, "parents": {}}

    def writes(self, step: int) -> list[tuple[str, Any]]:
        """What a node returns."""
        return [("messages", [{"role": "assistant", "content": prose(300, step * 31)}]), ("step", step + 1)]


_serializer = JsonPlusSerializer()


@dataclass(frozen=True)
class Rows:
    """A workflow's rows, serialised beforehand: what the bare driver writes again and again."""

    document: Blob
    """The whole checkpoint, as SQLite keeps it."""
    body: dict[str, Any]
    """The checkpoint without its blobs, as Postgres keeps it."""
    blobs: dict[str, Blob]
    writes: list[tuple[int, str, str, bytes]]
    metadata: str


def rows(workflow: Workflow) -> Rows:
    """Serialise the first step of ``workflow``."""
    values = workflow.values(0)
    blobs = {k: _serializer.dumps_typed(v) for k, v in values.items() if not isinstance(v, str | int)}
    body: dict[str, Any] = {**workflow.checkpoint(0), "id": "", "ts": ""}  # the same bytes in every process
    document = _serializer.dumps_typed(body)
    body["channel_values"] = {k: v for k, v in values.items() if k not in blobs}
    writes = [(n, name, *_serializer.dumps_typed(v)) for n, (name, v) in enumerate(workflow.writes(0))]
    return Rows(document, body, blobs, writes, '{"source": "loop", "step": 0, "parents": {}}')

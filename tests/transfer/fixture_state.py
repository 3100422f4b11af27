"""What the fixtures of old savers hold, and a form in which old and new savers' tuples compare.

It is imported in environments with the oldest LangGraph packages, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from datetime import datetime
from enum import Enum
from typing import Any

from pydantic import BaseModel

SENDS = "__pregel_tasks"


class Colour(Enum):
    RED = "red"


class Profile(BaseModel):
    name: str
    born: datetime


@dataclass
class Money:
    amount: Any
    currency: str


def neutral(value: Any) -> Any:
    """A value as JSON that says what it is."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): neutral(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [neutral(item) for item in value]
    if isinstance(value, set | frozenset):
        return {"set": sorted(map(str, value))}
    kind = type(value).__name__
    if isinstance(value, bytes):
        return {kind: value.hex()}
    if isinstance(value, Enum):
        return {kind: value.value}
    if kind == "Send":
        return {kind: [value.node, neutral(value.arg)]}
    if kind == "Interrupt":  # its other fields are other ones in each version
        return {kind: neutral(value.value)}
    if hasattr(value, "content"):
        calls = [call["name"] for call in getattr(value, "tool_calls", ())]
        return {kind: [value.id, neutral(value.content), calls]}
    if isinstance(value, BaseModel):
        return {kind: neutral(value.model_dump())}
    if is_dataclass(value):
        return {kind: neutral(asdict(value))}  # type: ignore[arg-type]  # no class gets here
    return {kind: str(value)}


def listed(tuples: Iterable[Any]) -> list[dict[str, Any]]:
    """What a saver listed, sorted.

    Packets that wait stand in the checkpoint, or since its version 4 in a channel: here, always there.
    """
    found = []
    for item in tuples:
        checkpoint = dict(item.checkpoint)
        values = dict(checkpoint["channel_values"])
        if sends := checkpoint.pop("pending_sends", None):
            values[SENDS] = sends
        versions = {name: str(v) for name, v in checkpoint["channel_versions"].items() if name != SENDS}
        found.append(
            {
                "place": [item.config["configurable"][name] for name in _PLACE],
                "parent": item.parent_config["configurable"]["checkpoint_id"] if item.parent_config else None,
                "v": checkpoint["v"],
                "ts": checkpoint["ts"],
                "values": neutral(values),
                "versions": versions,
                "seen": neutral(checkpoint["versions_seen"]),
                "metadata": neutral({k: v for k, v in item.metadata.items() if k != "writes"}),
                "writes": sorted(neutral(list(item.pending_writes or ())), key=str),
            }
        )
    return sorted(found, key=lambda entry: str(entry["place"]))


_PLACE = ("thread_id", "checkpoint_ns", "checkpoint_id")

"""The history of delta channels: writes back to the nearest stored value."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from langgraph.checkpoint.base import DeltaChannelHistory, PendingWrite


@dataclass(frozen=True, slots=True)
class Ancestor:
    """One checkpoint on the way to the root."""

    stored: Collection[str]
    """The channels that it holds a value of."""
    load: Callable[[str], Any]
    """The value of one of them."""
    writes: Callable[[], list[PendingWrite]]
    """Its writes, in order; those of channels nobody asked for may be left out."""


def delta_history(channels: Iterable[str], ancestors: Iterable[Ancestor]) -> dict[str, DeltaChannelHistory]:
    """What ``get_delta_channel_history`` returns, from the ancestors of its target, nearest first.

    Stops asking for ancestors once every channel has its value.
    """
    history: dict[str, DeltaChannelHistory] = {channel: {"writes": []} for channel in channels}
    open_ = set(history)
    if not open_:
        return history
    for ancestor in ancestors:
        for write in reversed(ancestor.writes()):
            if write[1] in open_:
                history[write[1]]["writes"].append(write)
        for channel in open_.intersection(ancestor.stored):
            history[channel]["seed"] = ancestor.load(channel)
            open_.discard(channel)
        if not open_:
            break
    for entry in history.values():
        entry["writes"].reverse()
    return history

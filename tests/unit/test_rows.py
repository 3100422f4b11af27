"""Short cuts of the savers give what the long way gives."""

from __future__ import annotations

from typing import Any

import pytest
from langgraph.checkpoint.base import writes_sort_key
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from persistence import rules
from persistence.backends.sqlite.codec import codec_for, items


@pytest.mark.parametrize("fields", [4, 14, 15, 16, 300])
@pytest.mark.parametrize("kept", [1, 13, 14, 15, 300])
def test_a_row_of_carried_values_is_the_row_that_is_put_together(fields: int, kept: int) -> None:
    """With headers of one byte and with longer ones."""
    codec = codec_for(JsonPlusSerializer())
    config: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
    versions = {f"c{i}": "1" for i in range(kept)} | {"new": "2"}
    checkpoint: Any = {"id": "1", "channel_values": {}, "channel_versions": versions}
    checkpoint |= {f"field {i}": i for i in range(fields - 2)}
    put = rules.put_of(config, checkpoint, {}, {"new": "2"})
    values = {f"c{i}": codec.given([i]) for i in range(kept)}
    together = codec.together({"new": "x"})
    assert together is not None
    whole = codec.seal(put, values, together)
    carried = codec.carry(put, together, items(values), kept)
    assert (carried.type, *carried.parts, carried.size) == (whole.type, b"".join(whole.parts), whole.size)
    assert len(codec.open((carried.type, carried.parts[0]))[1]) == kept + 1


def test_writes_are_in_the_order_of_langgraph() -> None:
    serde = JsonPlusSerializer()
    keys = [("~b", "1", 0), ("~a", "2", 1), ("~a", "2", 0), ("~a", "1", -1), ("", "9", 3)]
    rows = [(path, task, idx, str(idx), *serde.dumps_typed(path)) for path, task, idx in keys]
    in_order = sorted(keys, key=lambda key: writes_sort_key(*key))
    assert rules.pending_writes(rows, serde) == [(task, str(idx), path) for path, task, idx in in_order]

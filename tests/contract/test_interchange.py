"""Clause F7: ours and the official saver of the same backend read what the other wrote."""

from __future__ import annotations

from typing import Any

import pytest
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.checkpoint.serde.types import _DeltaSnapshot

from persistence.testing.kinds import VALUES
from persistence.testing.marks import clause
from persistence.testing.subject import Subject, at, bare, same
from tests.contract.conftest import DURABLE, Ours

# What a version of an official saver changes or refuses itself, in one place or the other.
UPSTREAM_CANNOT = {
    "bytearray",
    "minus zero",
    "large float",
    "tiny float",
    "nan",
    "infinity",
    "largest int",
    "text with NUL",
    "text with a surrogate",
    "str enum",
    "int enum",
    "marker of our own",
    "empty marker of our own",
}
COMMON = {name: value for name, value in VALUES.items() if name not in UPSTREAM_CANNOT} | {"last": 1}


def fill(put: Any, put_writes: Any) -> None:
    """A history with all that a thread can have."""
    for thread in ("t", "u"):
        for ns in ("", "sub:1"):
            parent = None
            versions: dict[str, Any] = {}
            for i, (name, value) in enumerate(COMMON.items()):
                new = {name: f"{i:032}.5", "counter": f"{i:032}.7"}
                versions |= new
                values = {n: v for n, v in COMMON.items() if n in versions} | {"counter": i}
                checkpoint = bare(f"{i:04}", values, versions)
                config = put(
                    at(thread, parent, ns), checkpoint, {"source": "loop", "step": i, "run_id": name}, new
                )
                put_writes(config, [(name, value), ("__error__", "e"), ("x", i)], f"task{i}", f"~{i}")
                parent = f"{i:04}"


def equal(left: CheckpointTuple, right: CheckpointTuple) -> bool:
    """The same tuple; a delta snapshot's version gives it to the later checkpoints too."""
    return all(same(a, b) for a, b in zip(left, right, strict=True))


@clause("F7")
@pytest.mark.parametrize("backend", DURABLE)
def test_official_saver_reads_what_ours_wrote(target: Ours, saver: Subject) -> None:
    fill(
        lambda *args: saver.call("put", *args),
        lambda *args: saver.call("put_writes", *args),
    )
    ours = saver.list()
    assert len(ours) == 4 * len(COMMON)
    saver.close()
    assert target.official is not None
    with target.official() as official:
        assert len(list(official.list(None))) == len(ours)
        for found in ours:
            read = official.get_tuple(found.config)
            assert equal(read, found), (read, found)
        assert equal(
            official.get_tuple(at("t")),
            next(f for f in ours if f.config == at("t", ours[0].checkpoint["id"])),
        )
        history = official.get_delta_channel_history(config=at("t"), channels=["x", "delta snapshot"])
    assert history["delta snapshot"]["seed"] == _DeltaSnapshot([1, 2])


@clause("F7")
@pytest.mark.parametrize("backend", DURABLE)
def test_ours_reads_what_the_official_saver_wrote(target: Ours, saver: Subject) -> None:
    assert target.official is not None
    with target.official() as official:
        fill(official.put, official.put_writes)
        theirs = list(official.list(None))
        history = official.get_delta_channel_history(config=at("t"), channels=["x", "delta snapshot"])
    assert len(theirs) == 4 * len(COMMON)
    for found in theirs:
        read = saver.call("get_tuple", found.config)
        assert equal(read, found), (read, found)
    assert saver.history(at("t"), ["x", "delta snapshot"]) == history
    latest = saver.get("t")
    assert latest is not None
    assert latest.checkpoint["id"] == max(found.checkpoint["id"] for found in theirs)


@clause("F7")
@pytest.mark.parametrize("backend", DURABLE)
def test_both_may_write_one_thread(target: Ours, saver: Subject) -> None:
    assert target.official is not None
    saver.put("t", "1", {"x": [1], "y": 1})
    with target.official() as official:
        versions = {"x": "1.x", "y": "1.y", "z": 2}
        official.put(at("t", "1"), bare("2", {"x": [1], "y": 1, "z": [2]}, versions), {}, {"z": 2})
        saver.put("t", "3", {"w": [3]}, parent="2", versions=versions | {"w": 3}, new={"w": 3})
        read = official.get_tuple(at("t"))
        assert read.checkpoint["channel_values"] == {"x": [1], "y": 1, "z": [2], "w": [3]}
        assert saver.get("t") == read
        saver.call("prune", ["t"])
        assert official.get_tuple(at("t")) == read._replace(parent_config=None)

"""Records are looked at some at a time, and nobody sees a difference to one after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from persistence.backends.postgres.transfer_preflight import PostgresPreflight
from persistence.backends.postgres.transfer_rows import Rows
from persistence.backends.postgres.transfer_versions import Versions
from persistence.settings import Settings
from persistence.transfer.canonical import content_hash
from persistence.transfer.chunks import Chunk, chunked
from persistence.transfer.digest import Digester, describe, digests
from persistence.transfer.formats import Formats
from persistence.transfer.records import Checkpoint, Record, Reject, Value, ValueRef, Write
from persistence.transfer.report import content_bytes

HASH = content_hash(b"\x91\x01")


def value(channel: str = "c", version: str = "1", thread: str = "t", data: bytes = b"\x91\x01") -> Value:
    return Value(thread, "", channel, version, "msgpack", HASH, data)


def checkpoint(number: int, body: bytes = b'{"v":4}', thread: str = "t", channel: str = "n") -> Checkpoint:
    refs = (
        ValueRef("c", "1", "msgpack", HASH, None, 2, False),
        ValueRef(channel, "2", "msgpack", content_hash(b"\x05"), b"\x05", 1, False),
    )
    versions = {"c": "1", channel: "2"}
    return Checkpoint(thread, "", f"{number:04}", f"{number - 1:04}", body, b"{}", versions, refs)


def write(number: int, idx: int = 0, task: str = "task", thread: str = "t", channel: str = "c") -> Write:
    return Write(thread, "", f"{number:04}", task, idx, "path", channel, "msgpack", HASH, b"\x91\x01")


def usual(thread: str = "t") -> list[Record]:
    found: list[Record] = [value(thread=thread)]
    found += [checkpoint(number, thread=thread) for number in range(100)]
    found += [write(number, idx, thread=thread) for number in range(100) for idx in (-3, 0, 1)]
    return found


ODD: dict[str, Callable[[list[Record]], object]] = {
    "nothing": lambda records: None,
    "reject": lambda records: records.insert(50, Reject("t", "", "0049", "it cannot be read", b"raw")),
    "nul in a channel": lambda records: records.insert(1, value("a\0b")),
    "nul in a value's name within": lambda records: records.insert(101, checkpoint(100, channel="a\0b")),
    "nul in the checkpoint": lambda records: records.insert(101, checkpoint(100, rb'{"a":"\u0000","v":4}')),
    "an escaped escape": lambda records: records.insert(101, checkpoint(100, rb'{"a":"\\u0000","v":4}')),
    "no version": lambda records: records.insert(101, checkpoint(100, b'{"a":{"b":1,"v":4}}')),
    "backslash": lambda records: records.append(write(101, task="a\\b")),
    "long id": lambda records: records.append(write(101, channel="x" * 900, task="y" * 1_800)),
    "index": lambda records: records.append(write(101, idx=2**31)),
    "checkpoint twice": lambda records: records.insert(101, checkpoint(99)),
    "write twice": lambda records: records.append(write(99, 1)),
    "write of another checkpoint": lambda records: records.append(write(101, 1)),
    "twice where a chunk ends": lambda records: records.insert(52, records[51]),
}


@pytest.fixture(params=ODD)
def records(request: pytest.FixtureRequest) -> list[Record]:
    found = usual()
    ODD[request.param](found)
    return [*usual("before"), *found, *usual("u")]


def preflight() -> PostgresPreflight:
    versions = Versions(all_blobs=False)
    return PostgresPreflight(versions, Rows(versions, Formats(Settings())))


def test_they_are_the_records(records: list[Record]) -> None:
    chunks = list(chunked(iter(records)))
    assert [record for chunk in chunks for record in chunk.records] == records
    for chunk in chunks:
        assert {record.thread_id for record in chunk.records} == {chunk.thread_id}
        moved = [record for record in chunk.records if not isinstance(record, Reject)]
        assert chunk.sizes == [content_bytes(record) for record in moved]
        assert len(chunk.checkpoints) <= 64
        assert len(chunk.records) <= 256


def test_large_records_are_not_held_together() -> None:
    large = [value("c", str(number), data=bytes(400_000)) for number in range(9)]
    assert [len(chunk.records) for chunk in chunked(large)] == [2, 2, 2, 2, 1]
    assert [len(chunk.records) for chunk in chunked([value(), checkpoint(1), write(1)])] == [3]


def test_the_same_is_found(records: list[Record]) -> None:
    """Problems in their order, and who is told of them."""
    outcomes = []
    for look in (_one_by_one, _some_at_a_time):
        found, told = preflight(), list[tuple[str, str]]()
        found.told = lambda record, reason, told=told: told.append((describe(record), reason))
        look(found, records)
        outcomes.append((found.problems(), told))
    assert outcomes[0] == outcomes[1]


def _one_by_one(found: PostgresPreflight, records: list[Record]) -> None:
    for record in records:
        found.see(record)


def _some_at_a_time(found: PostgresPreflight, records: list[Record]) -> None:
    for chunk in chunked(records):
        found.take(chunk)


def test_the_same_rows_and_digests(records: list[Record]) -> None:
    moved = [record for record in records if not isinstance(record, Reject)]
    digester, ended = Digester(), []
    for record in moved:
        ended.append(digester.see(record))
    assert [*filter(None, ended), digester.end()] == list(digests(moved))
    chunks = [chunk for chunk in chunked(moved) if _fits(chunk)]
    one, other = (Rows(Versions(all_blobs=False), Formats(Settings())) for _ in range(2))
    rows = [one.row(record) for chunk in chunks for record in chunk.states + chunk.writes]
    assert [row for chunk in chunks for row in other.rows(chunk)] == rows


def _fits(chunk: Chunk) -> bool:
    return all(write.idx < 2**31 for write in chunk.writes)


def test_the_newest_checkpoint_that_has_a_value() -> None:
    """Also where later ones have not even the channel."""
    scalar = ValueRef("c", "1", "msgpack", content_hash(b"\x05"), b"\x05", 1, False)
    large = ValueRef("c", "1", "msgpack", HASH, None, 2, False)
    versions, named = Versions(all_blobs=False), {"c": "1"}
    record = checkpoint(0)
    for number, ref in enumerate((scalar, large, scalar, scalar, None, None)):
        record = checkpoint(number)._replace(
            versions=named if ref else {}, values=(ref,) if ref is not None else ()
        )
        versions.see(record)
    assert versions.end(record[:2]) == [("c", "1")]
    held = versions.of(record)["c", "1"]
    assert held is not None
    assert held.carrier == "0003"

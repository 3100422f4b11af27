"""What identifies a row, and a mark of its content: how a ledger knows later what a batch inserted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import msgspec
import zstandard

from persistence.transfer.chunks import Chunk
from persistence.transfer.digest import line
from persistence.transfer.items import BadItem, Item, item_line
from persistence.transfer.items import Key as ItemKey
from persistence.transfer.records import Checkpoint, Value, Write

_MARK_BYTES = 8
"""Enough to tell a row that was changed from one that was not: nobody chooses the content to collide."""


class Key(NamedTuple):
    """A row of a thread: a checkpoint, a pending write, or a channel value that has a row of its own."""

    kind: Literal["c", "w", "v"]
    checkpoint_ns: str
    name: str
    """The checkpoint's id, or the value's channel."""
    part: str = ""
    """The write's task, or the value's version."""
    idx: int = 0


def kind_of(record: Value | Checkpoint | Write) -> Literal["c", "w", "v"]:
    """The kind that a record's key names."""
    return _KINDS[type(record)]


def key_of(record: Value | Checkpoint | Write) -> Key:
    """What identifies a record within its thread."""
    match record:
        case Checkpoint():
            return Key("c", record.checkpoint_ns, record.checkpoint_id)
        case Write():
            return Key("w", record.checkpoint_ns, record.checkpoint_id, record.task_id, record.idx)
        case Value():
            return Key("v", record.checkpoint_ns, record.channel, record.version)


_KINDS: Mapping[type, Literal["c", "w", "v"]] = {Checkpoint: "c", Write: "w", Value: "v"}


def marks_of(lines: Iterable[bytes]) -> list[bytes]:
    """A mark of the content of each record, from its :func:`~persistence.transfer.digest.line`."""
    sha256 = hashlib.sha256
    return [sha256(text).digest()[:_MARK_BYTES] for text in lines]


def marked(record: Value | Checkpoint | Write) -> tuple[Key, bytes]:
    """A record's key and mark."""
    return key_of(record), marks_of([line(record)])[0]


def values_of(checkpoint: Checkpoint) -> Iterator[Value]:
    """The values that a checkpoint refers to, without their data."""
    for ref in checkpoint.values:
        if ref.data is None and ref.version is not None:
            yield Value(*checkpoint[:2], ref.channel, ref.version, ref.type, ref.sha256, b"")


_Packed = list[tuple[str, list[tuple[Key, bytes]]]]
_decoder = msgspec.msgpack.Decoder(_Packed)
_encode = msgspec.msgpack.Encoder().encode


def plain_key(record: Value | Checkpoint | Write) -> tuple[Any, ...]:
    """What :func:`key_of` gives, without making a :class:`Key` of it."""
    if isinstance(record, Write):
        return ("w", *record[1:5])
    if isinstance(record, Checkpoint):
        return ("c", *record[1:3], "", 0)
    return ("v", *record[1:4], 0)


def plain_keys(chunk: Chunk) -> list[tuple[Any, ...]]:
    """What :func:`plain_key` gives for each record."""
    return [*map(plain_key, chunk.states), *[("w", *write[1:5]) for write in chunk.writes]]


def pack(threads: Sequence[tuple[str, Sequence[tuple[Any, bytes]]]]) -> bytes:
    """Plain keys, encoded or not, and marks of sorted threads, compressed."""
    return zstandard.compress(_encode(threads))


_part_decoder = msgspec.msgpack.Decoder(list[tuple[Key, bytes]])


def pack_part(keys: Sequence[tuple[Key, bytes]]) -> bytes:
    """Keys and marks of one thread, compressed."""
    return zstandard.compress(msgspec.msgpack.encode(keys))


def unpack_part(data: bytes) -> dict[Key, bytes]:
    """What :func:`pack_part` has packed."""
    return dict(_part_decoder.decode(zstandard.decompress(data)))


_ItemKeys = list[tuple[str, str, bytes]]
_item_decoder = msgspec.msgpack.Decoder(_ItemKeys)


def item_mark(item: Item) -> bytes:
    """A mark of an item's content. Reading an item may put off when it expires, so that is none of it."""
    return marks_of([item_line(item._replace(expires_at=None))])[0]


def unchanged(held: Mapping[ItemKey, Item | BadItem], marks: Mapping[ItemKey, bytes]) -> list[ItemKey]:
    """Which items still have their marks."""
    return [key for key, item in held.items() if isinstance(item, Item) and item_mark(item) == marks[key]]


def pack_items(items: Iterable[Item]) -> bytes:
    """The keys and marks of items of a store, compressed."""
    packed: _ItemKeys = [(*item[:2], item_mark(item)) for item in items]
    return zstandard.compress(msgspec.msgpack.encode(packed))


def unpack_items(data: bytes) -> dict[ItemKey, bytes]:
    """The keys and marks of the items of a batch."""
    return {(prefix, key): mark for prefix, key, mark in _item_decoder.decode(zstandard.decompress(data))}


def unpack(batches: Iterable[bytes]) -> Iterator[tuple[str, Mapping[Key, bytes]]]:
    """The keys and marks of each thread, whose records may be spread over following batches."""
    threads = (entry for data in batches for entry in _decoder.decode(zstandard.decompress(data)))
    for thread, entries in groupby(threads, key=lambda entry: entry[0]):
        yield thread, {key: mark for _, rows in entries for key, mark in rows}

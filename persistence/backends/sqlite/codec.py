"""A checkpoint as one row of bytes, in the official saver's format.

The format is one msgpack map with the channel values inside. Values are serialised one by one,
when a call arrives, and put together here: so a value that did not change is taken over from its
parent's row as bytes, and what the format changes at the top of a channel can be told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import msgspec
import ormsgpack
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import EXT_CONSTRUCTOR_SINGLE_ARG, JsonPlusSerializer

from persistence.metadata import json_value
from persistence.rules import Put, Typed, dumps, writes_plain_msgpack

_NIL = b"\xc0"
_RAW = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_PLAIN = msgspec.msgpack.Decoder()
EMPTY_MAP = b"\x80"
"""No values, in msgpack."""
_BYTES = [bytes((byte,)) for byte in range(256)]
_READ = ("v", "channel_versions")
_CHANNEL_VALUES = ormsgpack.packb("channel_values")

LARGE_ROW = 4 << 20
"""Bytes of a checkpoint; what is larger is neither put together in memory nor remembered."""


@dataclass(slots=True)
class Sealed:
    """A checkpoint as a row holds it: its type, and its bytes one part after the other."""

    type: str
    parts: Sequence[bytes]
    """One, unless there are more than :data:`LARGE_ROW` bytes."""
    size: int


class Codec(Protocol):
    """How one serializer's checkpoints are put together and taken apart."""

    in_bytes: bool
    """Whether a value in the form that goes into a row is bytes, which nobody can change."""

    def seal(self, put: Put, values: Mapping[str, Any], together: bytes = EMPTY_MAP) -> Sealed:
        """A row from the checkpoint, and the values in the form that goes into a row.

        Args:
            put: The checkpoint.
            values: Of some of the channels.
            together: Of the others, as :meth:`together` gave them.
        """

    def together(self, values: dict[str, Any]) -> bytes | None:
        """Values as one map of that form, by one call; ``None`` where they have to go one by one."""

    def carry(self, put: Put, together: bytes, carried: bytes, count: int) -> Sealed:
        """As :meth:`seal`, of the ``count`` values in ``carried`` and those in ``together``."""

    def given(self, value: Any) -> Any:
        """A value in the form that goes into a row; it is detached from the caller's object."""

    def open(self, row: Typed) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The keys ``v`` and ``channel_versions`` of a row, and its values in the form that goes into one."""


class _Spliced:
    """msgpack, and msgpack under a cipher: values are slices of bytes."""

    in_bytes = True

    def __init__(self, serde: SerializerProtocol, plain: JsonPlusSerializer, cipher: Any = None) -> None:
        self._serde = serde
        self._plain = plain
        self._cipher = cipher

    def seal(self, put: Put, values: Mapping[str, bytes], together: bytes = EMPTY_MAP) -> Sealed:
        has_values = put.has_values or values or together != EMPTY_MAP
        parts = _parts(put.packed, values if has_values else None, together)
        size = sum(map(len, parts))
        if self._cipher is None and size > LARGE_ROW:
            return Sealed("msgpack", parts, size)
        return self._sealed(parts)

    def carry(self, put: Put, together: bytes, carried: bytes, count: int) -> Sealed:
        packed = put.packed
        fields, all_ = packed[0] + 1, together[0] + count
        if fields < 0x90 and all_ < 0x90:  # each header is one byte
            parts = (_BYTES[fields], packed[1:], _CHANNEL_VALUES, _BYTES[all_], together[1:], carried)
        else:
            size, rest = _map_parts(packed)
            more, others = _map_parts(together)
            parts = (_map_header(size + 1), rest, _CHANNEL_VALUES, _map_header(count + more), others, carried)
        return self._sealed(parts)

    def _sealed(self, parts: Sequence[bytes]) -> Sealed:
        type_, blob = "msgpack", b"".join(parts)
        if self._cipher is not None:
            name, blob = self._cipher.encrypt(blob)
            type_ = f"msgpack+{name}"
        return Sealed(type_, (blob,), len(blob))

    def given(self, value: Any) -> bytes:
        return inside_map(*self._plain.dumps_typed(value))

    def together(self, values: dict[str, Any]) -> bytes | None:
        for value in values.values():
            if isinstance(value, (bytes, bytearray)):  # not stored at the top of a channel as inside a map
                return None
        try:
            return self._plain.dumps_typed(values)[1]
        except Exception:  # noqa: BLE001 - one by one it is found out whose it is
            return None

    def open(self, row: Typed) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        type_, blob = row
        if "+" in type_ and self._cipher is not None:
            type_, name = type_.split("+", 1)
            blob = self._cipher.decrypt(name, blob)
        if type_ != "msgpack":  # "json", from the first versions
            loaded = self._serde.loads_typed(row)
            type_, blob = JsonPlusSerializer().dumps_typed(loaded)
        parts = _RAW.decode(blob)
        values = split(parts.pop("channel_values", EMPTY_MAP))
        return {key: _PLAIN.decode(parts[key]) for key in _READ if key in parts}, values


class _Whole:
    """Any other serializer: a checkpoint is one object, and so are its values."""

    in_bytes = False

    def __init__(self, serde: SerializerProtocol) -> None:
        self._serde = serde

    def seal(self, put: Put, values: Mapping[str, Any], together: bytes = EMPTY_MAP) -> Sealed:
        checkpoint = put.body
        if put.has_values or values:
            checkpoint["channel_values"] = dict(values)
        type_, blob = dumps(self._serde, checkpoint)
        return Sealed(type_, (blob,), len(blob))

    def carry(self, put: Put, together: bytes, carried: bytes, count: int) -> Sealed:
        raise NotImplementedError  # it gives nothing that could be carried

    def given(self, value: Any) -> Any:
        return self._serde.loads_typed(dumps(self._serde, value))

    def together(self, values: dict[str, Any]) -> None:
        return None

    def open(self, row: Typed) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        body = dict(self._serde.loads_typed(row))
        return body, body.pop("channel_values", {})


def codec_for(serde: SerializerProtocol) -> Codec:
    """The fastest way to handle a serializer's rows."""
    cipher = serde.cipher if isinstance(serde, EncryptedSerializer) else None
    plain = serde.serde if isinstance(serde, EncryptedSerializer) else serde
    # Only what is known to be msgpack can be taken apart; a pickle fallback is not.
    if writes_plain_msgpack(plain) and not plain.pickle_fallback:
        return _Spliced(serde, plain, cipher)
    return _Whole(serde)


def joined(body: bytes, values: Mapping[str, bytes] | None) -> bytes:
    """A row: the packed checkpoint with its values, in the form of :func:`inside_map`, put into it."""
    return b"".join(_parts(body, values))


def split(values: bytes | msgspec.Raw) -> dict[str, bytes]:
    """A map of values, taken apart."""
    return {channel: bytes(raw) for channel, raw in _RAW.decode(values).items()}


def items(values: Mapping[str, bytes]) -> bytes:
    """Values in the form of :func:`inside_map` with their names, as they lie in a row."""
    return b"".join(_items(values))


def _items(values: Mapping[str, bytes]) -> list[bytes]:
    parts: list[bytes] = []
    for channel, blob in values.items():
        parts += (_packed_name(channel), blob)
    return parts


def _parts(body: bytes, values: Mapping[str, bytes] | None, together: bytes = EMPTY_MAP) -> list[bytes]:
    """What :func:`joined` joins."""
    size, rest = _map_parts(body)
    if values is None:
        return [_map_header(size), rest]
    count, others = _map_parts(together)
    header = (_map_header(size + 1), rest, _CHANNEL_VALUES, _map_header(count + len(values)), others)
    return [*header, *_items(values)]


def inside_map(type_: str, blob: bytes) -> bytes:
    """A value that the serializer gave as this type and these bytes, as it stands inside a msgpack map."""
    if type_ == "msgpack":
        return blob
    if type_ == "null":
        return _NIL
    if type_ == "bytes":
        return _pack(blob)
    # The map would give a bytearray back as bytes; a constructor keeps the type.
    return _pack(ormsgpack.Ext(EXT_CONSTRUCTOR_SINGLE_ARG, _pack(("builtins", "bytearray", bytes(blob)))))


def load_metadata(text: bytes | str | None) -> dict[str, Any]:
    """Metadata as stored."""
    loaded = json_value(text) if text else {}
    return loaded if isinstance(loaded, dict) else {}


def _pack(value: Any) -> bytes:
    return ormsgpack.packb(value)


@lru_cache(4096)
def _packed_name(channel: str) -> bytes:
    return _pack(channel)


def _map_parts(packed: bytes) -> tuple[int, bytes]:
    """The number of a map's items, and the items."""
    if packed[0] < 0x90:
        return packed[0] & 0x0F, packed[1:]
    width = 2 if packed[0] == 0xDE else 4
    return int.from_bytes(packed[1 : 1 + width], "big"), packed[1 + width :]


def _map_header(size: int) -> bytes:
    if size < 16:
        return _BYTES[0x80 | size]
    return b"\xde" + size.to_bytes(2, "big") if size < 1 << 16 else b"\xdf" + size.to_bytes(4, "big")

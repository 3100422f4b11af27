"""COPY's binary form, as far as a transfer writes it: rows are bytes, without a driver's conversions."""

from __future__ import annotations

import struct
from functools import lru_cache

HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"
NULL = b"\xff\xff\xff\xff"
JSONB_VERSION = b"\x01"
length = struct.Struct("!i").pack
fields = struct.Struct("!h").pack
_int8 = struct.Struct("!iq").pack
_POSTGRES_EPOCH = 946_684_800_000_000
"""2000-01-01 in microseconds since 1970."""
MOMENTS = range(-210_866_803_200_000_000, 2**63)
"""What a timestamp can be, in microseconds since 1970: from the year 4713 BC."""


def text(value: str) -> tuple[bytes, bytes]:
    """A field of text."""
    data = value.encode()
    return length(len(data)), data


@lru_cache(4096)
def name(value: str) -> bytes:
    """A field of text of which there are few, such as the name of a channel."""
    return b"".join(text(value))


def binary(data: bytes) -> tuple[bytes, bytes]:
    """A field in the binary form of its type."""
    return length(len(data)), data


def jsonb(data: bytes) -> tuple[bytes, bytes, bytes]:
    """A field of JSONB."""
    return length(len(data) + 1), JSONB_VERSION, data


def timestamp(value: int | None) -> bytes:
    """A field of TIMESTAMPTZ, from microseconds since 1970."""
    return NULL if value is None else _int8(8, value - _POSTGRES_EPOCH)

"""Which channel values a checkpoint row holds itself, and which the blob table.

The official saver keeps ``None``, text, numbers and booleans inside the row's JSONB and all else
in ``checkpoint_blobs``, by channel and version. Here JSONB holds only what it gives back unchanged.
What has no place in this layout goes into the row as a marker
(``persistence.backends.postgres.markers``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer

from persistence.backends.postgres.markers import is_marker, unmark
from persistence.backends.postgres.wire import LARGE
from persistence.rules import writes_plain_msgpack

_MAX_INLINE_TEXT = 1000
_MIN_INT, _MAX_INT = -(2**63), 2**64  # what msgpack can hold: the same is refused everywhere
EMPTY = "empty"  # the official savers' type of a blob that holds nothing


def is_inline(value: Any) -> bool:
    """Whether JSONB gives this value back equal and of the same type.

    ``True`` is not kept inline: beside a blob it stands for the blob.
    """
    kind = type(value)
    if value is None or value is False:
        return True
    if kind is int:
        return bool(_MIN_INT <= value < _MAX_INT)
    if kind is float:
        text = repr(value)
        return math.isfinite(value) and "e" not in text and text != "-0.0"
    if kind is str:
        return len(value) <= _MAX_INLINE_TEXT and "\0" not in value and _is_encodable(value)
    return False


def unpack(
    rows: Iterable[Sequence[Any]] | None, packed: bytes | None, serde: SerializerProtocol
) -> Iterator[Any]:
    """Rows of which the last column was the size of a blob get the blob: all of them come in one piece.

    LangGraph's own serializer reads large msgpack from there, without a copy.
    """
    whole: Any = packed or b""
    views = len(whole) >= LARGE and writes_plain_msgpack(serde)
    at = 0
    for *columns, size in rows or ():
        piece = None
        if size is not None:
            in_place = views and columns[-1] == "msgpack"
            piece = memoryview(whole)[at : at + size] if in_place else whole[at : at + size]
        yield *columns, piece
        at += size or 0


def load_values(
    row: Mapping[str, Any], blobs: Iterable[tuple[str, str, bytes | None]], serde: SerializerProtocol
) -> dict[str, Any]:
    """Channel values from what the row holds itself and the blobs of its versions (channel, type, blob).

    A marker wins, because it is there in spite of a blob. ``true`` beside a blob stands for the
    blob: the official saver writes it for a delta snapshot.
    """
    stored: dict[str, Any] = {
        channel: (True, (type_, blob or b"")) for channel, type_, blob in blobs if type_ != EMPTY
    }
    for channel, value in row.items():
        if is_marker(value):
            if (marked := unmark(value)) is None:
                stored.pop(channel, None)
            else:
                stored[channel] = (True, marked)
        elif value is not True or channel not in stored:
            stored[channel] = (False, value)
    # An encrypting serializer decides whether plaintext is accepted.
    checks = any(not typed for typed, _ in stored.values()) and isinstance(serde, EncryptedSerializer)
    return {
        channel: serde.loads_typed(value) if is_typed else _checked(value, serde) if checks else value
        for channel, (is_typed, value) in stored.items()
    }


def _checked(value: Any, serde: SerializerProtocol) -> Any:
    return serde.loads_typed(("json", json.dumps(value).encode()))


def _is_encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

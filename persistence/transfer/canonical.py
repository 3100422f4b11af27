"""One spelling for each value, so that the same content has the same bytes on every side.

Postgres' JSONB reorders keys, drops duplicate ones and rewrites numbers; SQLite holds msgpack and
JSON text as they were written. The canonical JSON here survives JSONB unchanged: keys sorted by
code point, no white space, integers in full, floats in positional notation with the fewest digits
that read back equal and always a digit after the point, and no negative zero.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Annotated, Any, Generic, TypeVar

import msgspec
import ormsgpack

# What msgspec spells otherwise than canonical JSON: exponents, and the zero that JSONB does not keep
# negative. Matches inside strings only cost time.
_RESPELL = re.compile(rb"(?:^|[:,\[])(?:-?[0-9]+(?:\.[0-9]+)?e|-0\.0)")
_ESCAPED_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")

INLINE_BYTES = 512
"""Strings up to this long travel inside their checkpoint; longer ones are stored once per version."""
DELTA_SNAPSHOT_EXT = 7
"""The msgpack extension of a DeltaChannel snapshot: ``EXT_DELTA_SNAPSHOT``, checkpoint 4.3.2."""

_map = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_NoItems = Annotated[list[str], msgspec.Meta(max_length=0)]
# The fields of a checkpoint as LangGraph writes them. What has these types, msgspec spells canonically.
_usual: dict[str, msgspec.msgpack.Decoder[Any]] = {
    "v": msgspec.msgpack.Decoder(int),
    "id": msgspec.msgpack.Decoder(str),
    "ts": msgspec.msgpack.Decoder(str),
    "channel_versions": msgspec.msgpack.Decoder(dict[str, str | int]),
    "versions_seen": msgspec.msgpack.Decoder(dict[str, dict[str, str | int]]),
    "updated_channels": msgspec.msgpack.Decoder(list[str] | None),
    "pending_sends": msgspec.msgpack.Decoder(_NoItems),
}


class NotCanonicalError(ValueError):
    """A value has no canonical form."""


def json_bytes(value: Any) -> bytes:
    """Canonical JSON of plain values.

    Raises:
        NotCanonicalError: A value is not JSON: bytes, an extension type, NaN, a key that is no string.
    """
    try:
        return "".join(_spell(value)).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise NotCanonicalError(_reason(error)) from None


def _no_float(text: str) -> Any:
    raise ValueError(text)


# Only floats are spelled in more than one way, and nearly no metadata have one.
_without_floats = msgspec.json.Decoder(float_hook=_no_float)
_encoder = msgspec.json.Encoder(order="deterministic")


def canonical_json(text: bytes | str) -> bytes:
    """Canonical JSON of JSON text.

    Raises:
        NotCanonicalError: It is not JSON, or holds what JSON readers do not agree on.
    """
    try:
        return _encoder.encode(_without_floats.decode(text))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return canonical_value(decode_json(text))


def decode_json(text: bytes | str) -> Any:
    """The plain values of JSON text.

    Raises:
        NotCanonicalError: As :func:`canonical_json`.
    """
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise NotCanonicalError(_reason(error)) from None


def canonical_value(value: Any) -> bytes:
    """Canonical JSON of what :func:`decode_json` gave."""
    try:
        plain = msgspec.json.encode(value, order="deterministic")
    except RecursionError as error:
        raise NotCanonicalError(_reason(error)) from None
    return json_bytes(value) if _RESPELL.search(plain) else plain


def has_nul(canonical: bytes) -> bool:
    """Whether a string in canonical JSON holds the character that Postgres cannot store."""
    return b"\\" in canonical and b"\\u0000" in canonical and _ESCAPED_NUL.search(canonical) is not None


def float_text(value: float) -> str:
    """A float in positional notation, as JSONB gives it back.

    Raises:
        NotCanonicalError: It is not finite.
    """
    if not math.isfinite(value):
        raise NotCanonicalError(f"{value} is not a JSON number")
    text = format(Decimal(repr(value or 0.0)), "f")
    return text if "." in text else text + ".0"


def version_text(value: object) -> str:
    """A channel version as the text that identifies its value.

    Raises:
        NotCanonicalError: It is neither text nor a number.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return float_text(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise NotCanonicalError(f"a channel version is {type(value).__name__}, not text or a number")


def split_map(data: bytes) -> dict[str, msgspec.Raw]:
    """A msgpack map with its values left as the bytes they are.

    Raises:
        NotCanonicalError: It is not a map with string keys, or is damaged.
    """
    try:
        return _map.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise NotCanonicalError(_reason(error)) from None


def body_fields(fields: Mapping[str, msgspec.Raw]) -> tuple[dict[str, Any], bytes]:
    """A checkpoint's fields, other than ``channel_values``, as plain values and as canonical JSON.

    Raises:
        NotCanonicalError: A field is damaged, or not JSON.
    """
    body: dict[str, Any] = {}
    usual = True
    for key, raw in fields.items():
        try:
            if (decoder := _usual.get(key)) is not None:
                body[key] = decoder.decode(raw)
                continue
        except msgspec.ValidationError:
            pass  # such as versions that are floats
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise NotCanonicalError(_reason(error)) from None
        usual = False
        try:
            body[key] = msgspec.msgpack.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise NotCanonicalError(_reason(error)) from None
    return body, msgspec.json.encode(body, order="deterministic") if usual else json_bytes(body)


_ChannelValue = TypeVar("_ChannelValue")
_Encoded = TypeVar("_Encoded", bytes, str)


class _Usual(msgspec.Struct, Generic[_ChannelValue], forbid_unknown_fields=True):
    """A checkpoint as today's LangGraph writes it, in the order of canonical JSON; it has no floats."""

    channel_values: dict[str, _ChannelValue] | msgspec.UnsetType = msgspec.UNSET
    channel_versions: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    id: str | msgspec.UnsetType = msgspec.UNSET
    pending_sends: _NoItems | msgspec.UnsetType = msgspec.UNSET
    ts: str | msgspec.UnsetType = msgspec.UNSET
    updated_channels: list[str] | msgspec.UnsetType | None = msgspec.UNSET
    v: int | msgspec.UnsetType = msgspec.UNSET
    versions_seen: dict[str, dict[str, str | int]] | msgspec.UnsetType = msgspec.UNSET


_usual_msgpack = msgspec.msgpack.Decoder(_Usual[msgspec.Raw])
_usual_json = msgspec.json.Decoder(_Usual[Any])


def split_usual(data: object) -> tuple[dict[str, msgspec.Raw], Mapping[str, str], bytes] | None:
    """A checkpoint's channel values, its channel versions as text, and the rest as canonical JSON.

    ``None`` for one that is not as LangGraph writes it today: of an older version, with more fields, damaged.
    """
    return _split(_usual_msgpack.decode, data) if isinstance(data, bytes) else None


def split_usual_json(text: str) -> tuple[dict[str, Any], Mapping[str, str], bytes] | None:
    """As :func:`split_usual`, for a checkpoint in JSON."""
    return _split(_usual_json.decode, text)


def _split(
    decode: Callable[[_Encoded], _Usual[_ChannelValue]], data: _Encoded
) -> tuple[dict[str, _ChannelValue], Mapping[str, str], bytes] | None:
    try:
        usual = decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    channels, usual.channel_values = usual.channel_values or {}, msgspec.UNSET
    return channels, usual.channel_versions or {}, _encoder.encode(usual)


_SMALL_BYTES = 64


def content_hash(data: bytes) -> bytes:
    """SHA-256 of a value; small ones, of which there are few, are remembered."""
    return _small_hash(data) if len(data) <= _SMALL_BYTES else hashlib.sha256(data).digest()


@lru_cache(4096)
def _small_hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def msgpack_value(raw: bytes) -> tuple[str, bytes]:
    """The serializer's type and bytes of a value that stood inside a msgpack map.

    Inside the map ``None`` is nil, ``bytes`` is bin and our own savers write a ``bytearray`` as a call of its
    constructor, while on its own the serializer of checkpoint 4.3.2 gives each a type of its own.
    """
    first = raw[0]
    if first == 0xC0:
        return "null", b""
    if header := _BIN_HEADER.get(first):
        return "bytes", raw[header:]
    at = _EXT_CODE_AT.get(first)
    if at is not None and raw.startswith(_BYTEARRAY, at):
        start = at + len(_BYTEARRAY)
        header = _BIN_HEADER.get(raw[start] if len(raw) > start else 0, 0)
        data = raw[start + header :]
        if header and int.from_bytes(raw[start + 1 : start + header]) == len(data):
            return "bytearray", data
    return "msgpack", raw


_BIN_HEADER = {0xC4: 2, 0xC5: 3, 0xC6: 5}
# The extension "constructor with one argument" of checkpoint 4.3.2, up to the argument, which is a bin.
_BYTEARRAY = b"\x00\x93\xa8builtins\xa9bytearray"
_EXT_CODE_AT = {0xD4: 1, 0xD5: 1, 0xD6: 1, 0xD7: 1, 0xD8: 1, 0xC7: 2, 0xC8: 3, 0xC9: 5}


def is_delta(start: bytes) -> bool:
    """Whether a msgpack value, given its first six bytes or more, is a DeltaChannel snapshot."""
    at = _EXT_CODE_AT.get(start[0]) if start else None
    return at is not None and len(start) > at and start[at] == DELTA_SNAPSHOT_EXT


Facts = tuple[str, bytes, bytes, bool, bool]
"""A value's type and bytes, their hash, and whether it is a DeltaChannel snapshot, or a scalar as in JSON."""
_COLLECTIONS = frozenset({*range(0x80, 0xA0), *range(0xDC, 0xE0)})


def facts(raw: bytes) -> Facts:
    """What a checkpoint says of a value that stood inside a msgpack map."""
    if raw[0] in _COLLECTIONS:  # most often
        return "msgpack", raw, content_hash(raw), False, False
    return _small_facts(raw) if len(raw) <= _SMALL_BYTES else typed_facts(*msgpack_value(raw))


@lru_cache(4096)
def _small_facts(raw: bytes) -> Facts:
    return typed_facts(*msgpack_value(raw))


def typed_facts(type_: str, data: bytes) -> Facts:
    """As :func:`facts`, for a value as the serializer gives it."""
    delta = type_ == "msgpack" and is_delta(data)
    return type_, data, content_hash(data), delta, inline_json(type_, data) is not None


_SHORT_SCALAR_BYTES = INLINE_BYTES + 5


def inline_json(type_: str, data: bytes) -> bytes | None:
    """The JSON of a scalar that JSONB gives back unchanged, or ``None`` for everything else.

    Unchanged means that the value read back packs to the very bytes given.
    """
    if type_ == "null":
        return b"null"
    if type_ != "msgpack" or len(data) > _SHORT_SCALAR_BYTES or not _is_scalar(data[0]):
        return None
    return _scalar_json(data)


@lru_cache(4096)
def _scalar_json(data: bytes) -> bytes | None:
    try:
        value = ormsgpack.unpackb(data)
    except ormsgpack.MsgpackDecodeError:
        return None
    if isinstance(value, float):
        spelled = repr(value)
        if not math.isfinite(value) or "e" in spelled or spelled == "-0.0":
            return None
    elif isinstance(value, str) and "\0" in value:
        return None
    return msgspec.json.encode(value) if ormsgpack.packb(value) == data else None


def _is_scalar(first: int) -> bool:
    """Whether a msgpack value that begins with this byte is a boolean, number or string."""
    return (
        first <= 0x7F
        or 0xA0 <= first <= 0xBF
        or first in (0xC2, 0xC3, 0xCA, 0xCB)
        or 0xCC <= first <= 0xD3
        or 0xD9 <= first <= 0xDB
        or first >= 0xE0
    )


def json_value(value: Any) -> tuple[str, bytes]:
    """The serializer's type and bytes of a value that stood in a JSON document.

    Raises:
        NotCanonicalError: It has no msgpack form, such as an integer of more than 64 bits.
    """
    if value is None:
        return "null", b""
    try:
        return "msgpack", ormsgpack.packb(value)
    except (ormsgpack.MsgpackEncodeError, TypeError) as error:
        raise NotCanonicalError(_reason(error)) from None


def _spell(value: Any) -> list[str]:
    out: list[str] = []
    _spell_into(value, out)
    return out


def _spell_into(value: Any, out: list[str]) -> None:
    if value is None or isinstance(value, bool):
        out.append({None: "null", True: "true", False: "false"}[value])
    elif isinstance(value, str | int):
        out.append(msgspec.json.encode(value).decode())
    elif isinstance(value, float):
        out.append(float_text(value))
    elif isinstance(value, list | tuple):
        out.append("[")
        for number, item in enumerate(value):
            out.append("," if number else "")
            _spell_into(item, out)
        out.append("]")
    elif isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise NotCanonicalError("a key is not text")
        out.append("{")
        for number, key in enumerate(sorted(value)):
            out.append("," if number else "")
            out.append(msgspec.json.encode(key).decode() + ":")
            _spell_into(value[key], out)
        out.append("}")
    else:
        raise NotCanonicalError(f"{type(value).__name__} is not JSON")


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

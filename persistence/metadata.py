"""The metadata and filter rules that every backend shares.

Metadata is JSON, and what JSON, JSONB and Python disagree about is settled here, once: what is
cleaned, what is refused, and when two values are the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any, cast

import msgspec
import ormsgpack

from persistence.errors import InvalidInputError

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import CheckpointMetadata

_LEGACY = "writes"
_NOT_METADATA = frozenset(("thread_id", "checkpoint_ns", "checkpoint_id"))
_MAX_DEPTH = 200
# Python converts integers to text up to this many digits, unless the process allows more.
_INT_BOUND = 10**4300
_FEW = 2**53
_JSON = msgspec.json.Encoder()
_ANY_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)

# Bytes of msgpack that stand for small whole numbers, text, true, false, null, {} and [], or are
# part of these; then those that begin a dict or a list. What is left may be a NUL, bytes, a float, ...
_PLAIN = bytes(
    [*range(0x01, 0x81), 0x90, *range(0xA0, 0xC1), 0xC2, 0xC3, 0xCC, 0xCD, 0xD9, *range(0xE0, 0x100)]
)
_BRANCHES = bytes([*range(0x81, 0x90), *range(0x91, 0xA0)])
_MAX_BRANCHES = 200
_AS_IS = (
    ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_SUBCLASS
    | ormsgpack.OPT_PASSTHROUGH_UUID
)


def merged_metadata(config: RunnableConfig, metadata: CheckpointMetadata | None) -> dict[str, Any]:
    """The metadata to store: the caller's, with the config's."""
    if not config.get("metadata") and config["configurable"].keys() <= _NOT_METADATA:
        merged: dict[str, Any] = {**metadata} if metadata else {}
    else:
        from langgraph.checkpoint.base import get_checkpoint_metadata  # half a second, for some to wait

        merged = cast(dict[str, Any], get_checkpoint_metadata(config, metadata or {}))
    merged.pop(_LEGACY, None)
    return merged


def metadata_text(merged: dict[str, Any]) -> str:
    """Metadata as :func:`json_text`, cleaned.

    Raises:
        InvalidInputError: A value is not JSON; the message names its key.
    """
    return json_text(_clean_object(merged, "metadata", 0))


def packed_with_json(first: dict[str, Any], second: dict[str, Any]) -> tuple[bytes | None, str | None]:
    """The first as msgpack, the second as JSON, each if :func:`clean_json` would plainly leave it as it is.

    One look is for both.
    """
    try:
        packed, other = ormsgpack.packb(first, option=_AS_IS), ormsgpack.packb(second, option=_AS_IS)
    except TypeError:
        pass
    else:
        if _is_plain(packed + other):  # nearly always
            return packed, _JSON.encode(second).decode()
    return pack_clean(first), None if pack_clean(second) is None else _JSON.encode(second).decode()


def json_value(data: bytes | str) -> Any:
    """What JSON text says; a fifth of the time that Python's own reader takes."""
    try:
        return msgspec.json.decode(data)
    except (
        ValueError
    ):  # what only Python's own reader takes: NaN, unpaired surrogates, numbers beyond a float
        return json.loads(data)


def clean_filter(wanted: Mapping[str, Any] | None) -> dict[str, Any]:
    """A metadata filter, cleaned like the metadata it is compared with.

    Raises:
        InvalidInputError: A value is not JSON; the message names its key.
    """
    return _clean_object(wanted or {}, "filter", 0)


def clean_json(value: Any, where: str) -> Any:
    """``value`` as JSON keeps it: tuples as lists, keys as text, no NUL, no unpaired surrogates."""
    return _clean(value, where, 0)


def pack_clean(value: dict[str, Any]) -> bytes | None:
    """``value`` as msgpack, if it is plainly what :func:`clean_json` would leave as it is.

    Nearly always it is, and seeing that in the bytes takes a third of the time.
    """
    try:
        packed = ormsgpack.packb(value, option=_AS_IS)
    except TypeError:
        return None
    return packed if _is_plain(packed) else None


def _is_plain(packed: bytes) -> bool:
    rest = packed.translate(None, _PLAIN)
    return len(rest) < _MAX_BRANCHES and not rest.strip(_BRANCHES)


def json_text(value: Any) -> str:
    """JSON text that JSONB gives back unchanged: no exponents, which it would turn into integers."""
    if type(value) is dict and pack_clean(value) is not None:
        return _JSON.encode(value).decode()
    text = _ANY_JSON.encode(value)
    return _without_exponents(value) if "e+" in text or "e-" in text else text


def number_text(value: int | float) -> str:
    """A number as JSONB shows it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    text = repr(value + 0.0)  # -0.0 becomes 0.0, as in a Postgres numeric
    if "e" not in text:
        return text
    text = format(Decimal(text), "f")
    return text if "." in text else text + ".0"


def run_text(metadata: Mapping[str, Any]) -> str | None:
    """The run that a checkpoint belongs to, as ``delete_for_runs`` names it; no list or dict is a name."""
    run = metadata.get("run_id")
    if isinstance(run, (int, float)):
        return number_text(run)
    return run if isinstance(run, str) else None


def comparable(value: Any) -> Any:
    """A form in which two JSON values are equal if, and only if, they are the same JSON.

    ``true`` is not 1, 1 equals 1.0, the order of keys is irrelevant, the order of items is not.
    """
    if value is None or isinstance(value, (bool, str)):
        return (type(value).__name__, value)
    if isinstance(value, int):
        return Decimal(value)
    if isinstance(value, float):
        return Decimal(repr(value))
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    return [comparable(item) for item in value]


def matches(metadata: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether ``metadata`` has what is wanted; ``wanted`` holds :func:`comparable` values."""
    return all(comparable(metadata.get(key)) == value for key, value in wanted.items())


def clean_text(text: str) -> str:
    """``text`` without NUL and unpaired surrogates, which not every database can hold."""
    if text.isascii():
        return text.replace("\0", "") if "\0" in text else str.__str__(text)
    # Through UTF-16 a pair of surrogates becomes the character it means, and a single one is dropped.
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")
    return whole.replace("\0", "")


def _clean(value: Any, where: str, depth: int) -> Any:
    if isinstance(value, str):
        return clean_text(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if -_INT_BOUND < value < _INT_BOUND:
            return int(value)
        raise InvalidInputError(f"{where} holds an integer of more than 4300 digits")
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value) + 0.0
        raise InvalidInputError(f"{where} holds {value!r}, which JSON has no form for")
    if depth >= _MAX_DEPTH:
        raise InvalidInputError(f"{where[:80]}... is nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, dict):
        return _clean_object(value, where, depth)
    if isinstance(value, (list, tuple)):
        return [item if _is_clean(item) else _clean(item, where, depth + 1) for item in value]
    raise InvalidInputError(
        f"{where} holds a value of type {type(value).__name__}, which is not JSON",
        hint="use text, numbers, true, false, null, lists and dicts of these",
    )


def _clean_object(value: Mapping[Any, Any], where: str, depth: int) -> dict[str, Any]:
    clean: dict[str, Any] = {}
    for key, item in value.items():
        name = key if type(key) is str and key.isascii() and "\0" not in key else _key(key, where)
        clean[name] = item if _is_clean(item) else _clean(item, f"{where}[{name!r}]", depth + 1)
    return clean


def _is_clean(value: Any) -> bool:
    """Whether :func:`_clean` would return it as it is; most values are, and this is a tenth of the work."""
    kind = type(value)
    if kind is str:
        return value.isascii() and "\0" not in value
    return value is None or kind is bool or (kind is int and -_FEW <= value <= _FEW)


def _key(key: Any, where: str) -> str:
    if isinstance(key, str):
        return clean_text(key)
    if key is None or isinstance(key, (bool, int, float)):
        return json.dumps(_clean(key, f"a key of {where}", 0))
    raise InvalidInputError(f"{where} has a key of type {type(key).__name__}, which is not JSON")


def _without_exponents(value: Any) -> str:
    if isinstance(value, float):
        return number_text(value)
    if isinstance(value, dict):
        items = (f"{json.dumps(k, ensure_ascii=False)}:{_without_exponents(v)}" for k, v in value.items())
        return "{" + ",".join(items) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_without_exponents(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)

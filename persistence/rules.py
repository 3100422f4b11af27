"""The rules that every saver shares: ids, versions, writes, limits, and the shape of what is returned.

Nothing here knows a database. A saver hands its arguments in and gets plain values back, checked
and detached from the caller's objects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple, TypeGuard, cast

import ormsgpack
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    PendingWrite,
)
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import TASKS

from persistence.errors import InvalidInputError, WrongLoopError
from persistence.metadata import (
    clean_json,
    clean_text,
    merged_metadata,
    metadata_text,
    number_text,
    packed_with_json,
)

MAX_KEY_BYTES = 2600
"""A Postgres index entry holds 2704 bytes; the texts of one primary key must fit in it together."""
PRUNE_STRATEGIES = ("keep_latest", "delete")
_SENDS_IN_PARENT_BEFORE = 4
_ORDER = itemgetter(0, 1, 2)  # task path, task id, idx: LangGraph's writes_sort_key
_FIRST_VERSION = f"{1:032}.{0:016}"

Typed = tuple[str, bytes]
"""A serialised value: the serializer's name for the format, and the bytes."""


class Key(NamedTuple):
    """One checkpoint; without ``checkpoint`` the latest of its namespace."""

    thread: str
    ns: str
    checkpoint: str | None


class Scope(NamedTuple):
    """What a listing covers; ``None`` covers all."""

    thread: str | None
    ns: str | None
    checkpoint: str | None
    before: str | None


@dataclass(slots=True)
class Put:
    """A checkpoint to store.

    A version names a value. ``own`` are the channels whose value comes with this call: they have
    a new version, or none at all. Every other channel with a version keeps the value that is
    stored for it, and takes the one in ``given`` only where none is.
    """

    thread: str
    ns: str
    id: str
    parent: str | None
    packed: bytes
    """The checkpoint without its channel values, as msgpack; it is JSON."""
    metadata: str
    """JSON."""
    given: dict[str, Any]
    """Channel values, still the caller's objects: to be serialised before anything else happens."""
    has_values: bool
    versions: dict[str, str]
    """Version of each channel that has one, as text; see :func:`version_text`."""
    own: AbstractSet[str]
    kept: dict[str, str]
    """The channels that keep what is stored for their version, and these."""

    @property
    def body(self) -> dict[str, Any]:
        """The checkpoint without its channel values."""
        return cast(dict[str, Any], ormsgpack.unpackb(self.packed))

    @property
    def config(self) -> RunnableConfig:
        """What ``put`` returns."""
        return config_of(self.thread, self.ns, self.id)


@dataclass(slots=True)
class Write:
    """One pending write to store; a negative ``idx`` replaces what is there, others do not."""

    idx: int
    channel: str
    type: str
    blob: bytes


def config_of(thread: str, ns: str, checkpoint: str) -> RunnableConfig:
    """A fresh config that names one checkpoint."""
    return {"configurable": {"thread_id": thread, "checkpoint_ns": ns, "checkpoint_id": checkpoint}}


def text_id(value: Any, name: str) -> str:
    """An identifier as text.

    Raises:
        InvalidInputError: It is missing, or some backend could not store it.
    """
    if type(value) is str and value.isascii() and "\0" not in value and len(value) <= MAX_KEY_BYTES:
        return value  # nearly always
    if value is None:
        raise InvalidInputError(f"{name} is missing")
    text = str.__str__(value) if isinstance(value, str) else str(value)
    if "\0" in text or (not text.isascii() and _has_surrogates(text)):
        raise InvalidInputError(f"{name} holds a NUL or an unpaired surrogate: {text[:80]!r}")
    _check_size(name, text)
    return text


def text_ids(values: Iterable[Any], name: str) -> list[str]:
    """Identifiers as text, each once.

    Raises:
        InvalidInputError: As :func:`text_id`.
        TypeError: It is one text, not several.
    """
    if isinstance(values, (str, bytes)):
        raise TypeError(f"{name}s must be an iterable of ids, not one {type(values).__name__}")
    return list(dict.fromkeys(text_id(value, name) for value in values))


def key_of(config: RunnableConfig, *, exact: bool = False) -> Key:
    """The checkpoint that a config names.

    Raises:
        InvalidInputError: An id is missing or not storable; with ``exact`` also the checkpoint's.
    """
    thread, ns, given = _names(config)
    if _fit(thread, ns, given) and (given or not exact):
        return tuple.__new__(Key, (thread, ns, given or None))  # nearly always
    thread, ns = text_id(thread, "thread_id"), text_id(ns, "checkpoint_ns")
    if given == "":
        if exact:
            raise InvalidInputError("checkpoint_id is missing")
        _check_size("thread_id and checkpoint_ns", thread, ns)
        return Key(thread, ns, None)
    checkpoint = text_id(given, "checkpoint_id")
    _check_size("thread_id, checkpoint_ns and checkpoint_id", thread, ns, checkpoint)
    return Key(thread, ns, checkpoint)


def scope_of(config: RunnableConfig | None, before: RunnableConfig | None) -> Scope:
    """What ``list(config, before=before)`` covers."""
    thread = ns = checkpoint = None
    if config:
        configurable = _configurable(config)
        thread = text_id(configurable.get("thread_id"), "thread_id")
        if (given_ns := configurable.get("checkpoint_ns")) is not None:
            ns = text_id(given_ns, "checkpoint_ns")
        if (given := configurable.get("checkpoint_id")) not in (None, ""):
            checkpoint = text_id(given, "checkpoint_id")
    bound = None
    if before and (given := _configurable(before).get("checkpoint_id")) not in (None, ""):
        bound = text_id(given, "checkpoint_id")
    return Scope(thread, ns, checkpoint, bound)


def check_limit(limit: Any) -> int | None:
    """A limit as asked.

    Raises:
        InvalidInputError: It is negative or not an integer.
    """
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise InvalidInputError(f"limit must be a whole number, 0 or more, or None: {limit!r}")
    return limit


def check_strategy(strategy: str) -> None:
    """Refuse an unknown prune strategy."""
    if strategy not in PRUNE_STRATEGIES:
        raise InvalidInputError(f"unknown prune strategy {strategy!r}, known: {', '.join(PRUNE_STRATEGIES)}")


def version_text(version: Any, channel: str) -> str:
    """A channel version as text, the same on every backend: what ``jsonb_each_text`` yields.

    Raises:
        InvalidInputError: It is not text, an integer or a finite float.
    """
    if type(version) is str and version.isascii() and "\0" not in version and len(version) <= MAX_KEY_BYTES:
        return version  # nearly always
    if isinstance(version, str):
        return text_id(version, f"the version of channel {channel!r}")
    if isinstance(version, (int, float)):
        return number_text(clean_json(version, f"the version of channel {channel!r}"))
    raise InvalidInputError(f"the version of channel {channel!r} is a {type(version).__name__}")


def put_of(
    config: RunnableConfig,
    checkpoint: Checkpoint,
    metadata: CheckpointMetadata,
    new_versions: ChannelVersions | None,
) -> Put:
    """The arguments of ``put``, checked."""
    id_ = checkpoint.get("id")
    thread, ns, given_parent = _names(config)
    if _fit(thread, ns, given_parent, id_):
        parent = given_parent or None  # nearly always
    else:
        thread, ns, parent = key_of(config)
        id_ = text_id(id_, "the checkpoint's id")
        _check_size("thread_id, checkpoint_ns and the checkpoint's id", thread, ns, id_)
    body: dict[str, Any] = {**checkpoint, "id": id_}
    values = body.pop("channel_values", None) or {}
    named: Any = checkpoint.get("channel_versions", {})
    new: Mapping[str, Any] = new_versions or {}
    if type(named) is not dict and not isinstance(named, Mapping):
        raise InvalidInputError(f"the checkpoint's channel_versions is a {type(named).__name__}, not a dict")
    merged = merged_metadata(config, metadata)
    packed, text = packed_with_json(body, merged)
    # So many characters certainly fit into a primary key beside these; UTF-8 has at most four bytes each.
    room = MAX_KEY_BYTES // 4 - len(thread) - len(ns)
    if packed is not None and new.items() <= named.items() and _all_short_text(named, room, packed):
        versions, own = dict(named), set(new)  # nearly always
    else:
        versions, own = _versions(named, new, Key(thread, ns, parent), room)
    if packed is None:
        packed = _pack(clean_json(body, "checkpoint"))
    kept = versions.copy()
    for channel in own:
        del kept[channel]
    if values.keys() <= versions.keys():
        given = dict(values)
    else:
        given = {_channel(name, thread, ns, room): value for name, value in values.items()}
        own.update(given.keys() - versions.keys())
    # By position: naming them takes as long as half of the checks.
    return Put(
        thread,
        ns,
        id_,
        parent,
        packed,
        metadata_text(merged) if text is None else text,
        given,
        "channel_values" in checkpoint,
        versions,
        own,
        kept,
    )


def _versions(
    named: Mapping[Any, Any], new: Mapping[Any, Any], parent: Key, room: int
) -> tuple[dict[str, str], set[str]]:
    """The version of each channel as text, and the channels of which it is new."""
    new = {str(channel): version for channel, version in new.items()}
    versions, own = {}, set()
    for name, version in named.items():
        channel = _channel(name, parent.thread, parent.ns, room)
        text = versions[channel] = version_text(version, channel)
        _check_size("a channel's key", parent.thread, parent.ns, channel, text)
        if channel in new and version_text(new[channel], channel) == text:
            own.add(channel)
    return versions, own


def writes_of(
    key: Key,
    writes: Iterable[tuple[str, Any]],
    task_id: Any,
    task_path: Any,
    serde: SerializerProtocol,
) -> tuple[str, str, list[Write]]:
    """Task id, task path and writes of one ``put_writes``, serialised; at most one for each index."""
    if _fit(f"{key.thread}{key.ns}{key.checkpoint}", task_id, task_path):
        task, path = task_id, task_path  # nearly always
    else:
        task, path = text_id(task_id, "task_id"), text_id(task_path, "task_path")
        _check_size("the key of a write", key.thread, key.ns, key.checkpoint or "", task)
    room = _room(key.thread, key.ns)
    rows: dict[int, Write] = {}
    for position, (name, value) in enumerate(writes):
        if type(name) is str and name.isascii() and len(name) <= room and "\0" not in name:
            channel = name  # nearly always
        else:
            channel = _channel(name, key.thread, key.ns, room)
        idx = WRITES_IDX_MAP.get(channel, position)
        rows[idx] = Write(idx, channel, *dumps(serde, value))
    return task, path, list(rows.values())


def dumps(serde: SerializerProtocol, value: Any) -> Typed:
    """Serialise one value; the bytes are detached from it."""
    typed = serde.dumps_typed(value)
    return typed if type(typed[1]) is bytes else (typed[0], bytes(typed[1]))


def writes_plain_msgpack(serde: SerializerProtocol) -> TypeGuard[JsonPlusSerializer]:
    """Whether it stores values as LangGraph's own serializer does, neither transformed nor encrypted."""
    return _is_plain(type(serde))


@lru_cache  # to ask a protocol's class, as these are, takes as long as to serialise a small value
def _is_plain(kind: type) -> bool:
    return issubclass(kind, JsonPlusSerializer) and kind.dumps_typed is JsonPlusSerializer.dumps_typed


def pending_writes(
    rows: Iterable[tuple[str, str, int, str, str, bytes]], serde: SerializerProtocol
) -> list[PendingWrite]:
    """Stored writes (task path, task id, idx, channel, type, blob) as a tuple gives them."""
    loads = serde.loads_typed
    return [
        (task, channel, loads((type_, blob))) for _, task, _, channel, type_, blob in sorted(rows, key=_ORDER)
    ]


def has_sends_in_parent(checkpoint: Mapping[str, Any]) -> bool:
    """Whether this checkpoint is of a format that keeps its pending sends in its parent's writes."""
    version = checkpoint.get("v")
    return not isinstance(version, (int, float)) or version < _SENDS_IN_PARENT_BEFORE


def add_sends(checkpoint: dict[str, Any], sends: list[Any]) -> None:
    """Put the sends of an old format where new ones keep them, as LangGraph's Postgres saver does."""
    if not sends:
        return
    checkpoint["channel_values"] = {**(checkpoint.get("channel_values") or {}), TASKS: sends}
    versions = checkpoint.get("channel_versions") or {}
    checkpoint["channel_versions"] = {**versions, TASKS: _highest(versions)}


def checkpoint_tuple(
    key: tuple[str, str, str],
    parent: str | None,
    checkpoint: dict[str, Any],
    metadata: dict[str, Any],
    writes: list[PendingWrite],
) -> CheckpointTuple:
    """What a reader returns; every part a fresh object."""
    thread, ns, _ = key
    return CheckpointTuple(
        config_of(*key),
        cast(Checkpoint, checkpoint),
        cast(CheckpointMetadata, metadata),
        config_of(thread, ns, parent) if parent else None,
        writes,
    )


def _highest(versions: Mapping[str, Any]) -> Any:
    if not versions:
        return _FIRST_VERSION
    try:
        # Of equal ones, as 2 and 2.0 are, the int: the order of the channels is not the same everywhere.
        return max(versions.values(), key=lambda version: (version, type(version).__name__))
    except TypeError:  # text beside numbers: "2.0" comes after 2.0
        return max(versions.values(), key=lambda version: (str(version), type(version).__name__))


def check_loop(own: asyncio.AbstractEventLoop, saver: str) -> None:
    """Raise ``WrongLoopError`` on the loop that an asynchronous saver belongs to: it must not wait there."""
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        return
    if running is own:
        raise WrongLoopError(
            f"a synchronous method of {saver} would block its own event loop",
            hint="await the method of the same name with an a in front, or call it from another thread",
        )


def _configurable(config: RunnableConfig) -> Mapping[str, Any]:
    configurable = config.get("configurable")
    if configurable is None:
        raise InvalidInputError(
            "the config has no 'configurable'", hint='give {"configurable": {"thread_id": ...}}'
        )
    return configurable


def _names(config: RunnableConfig) -> tuple[Any, Any, Any]:
    """Thread, namespace and checkpoint as a config gives them; the last two are empty where it does not."""
    configurable = _configurable(config)
    ns, checkpoint = configurable.get("checkpoint_ns"), configurable.get("checkpoint_id")
    return (
        configurable.get("thread_id"),
        "" if ns is None else ns,
        "" if checkpoint is None else checkpoint,
    )


def _all_short_text(versions: Mapping[str, Any], room: int, packed: bytes) -> bool:
    """Whether these versions are text, and no longer than fits; in C, whatever their number.

    They were packed: so the names are text, and no text is of a class of its own.
    """
    try:
        size = len("".join(versions.values()))
    except TypeError:
        return False
    if len(packed) <= room:  # all of the checkpoint is short
        return True
    size += len("".join(versions))
    # All of them together, even; else the longest name beside the longest version.
    return size <= room or max(map(len, versions)) + max(map(len, versions.values())) <= room


def _fit(thread: Any, ns: Any, one: Any, other: Any = "") -> bool:
    """Whether these are plain text, and fit into a primary key together; nearly always they do."""
    if type(thread) is str and type(ns) is str and type(one) is str and type(other) is str:
        text = f"{thread}{ns}{one}{other}"
        return text.isascii() and "\0" not in text and len(text) <= MAX_KEY_BYTES
    return False


def _room(thread: str, ns: str) -> int:
    """So many characters certainly fit into a primary key beside these; UTF-8 has at most four bytes each."""
    return MAX_KEY_BYTES // 4 - len(thread) - len(ns)


def _channel(name: Any, thread: str, ns: str, room: int) -> str:
    channel = text_id(name, "the name of a channel")
    if len(channel) > room:
        _check_size("thread_id, checkpoint_ns and the channel", thread, ns, channel)
    return channel


def _pack(body: dict[str, Any]) -> bytes:
    try:
        return ormsgpack.packb(body)
    except TypeError as error:
        raise InvalidInputError(f"the checkpoint cannot be stored: {error}") from error


def _check_size(what: str, *texts: str) -> None:
    if len("".join(texts)) * 4 <= MAX_KEY_BYTES:  # UTF-8 has at most four bytes a character
        return
    size = sum(len(text.encode()) for text in texts)
    if size > MAX_KEY_BYTES:
        raise InvalidInputError(f"{what} too long: {size} bytes of UTF-8, the limit is {MAX_KEY_BYTES}")


def _has_surrogates(text: str) -> bool:
    return clean_text(text) != text

"""Compares what LangGraph's own savers return from two sides: tuples, by value and type.

Unlike everything else in this package this deserialises, so classes of the application are imported, as
LangGraph does when a graph reads its state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import TASKS, _DeltaSnapshot

from persistence.errors import EncryptionError, PersistenceError
from persistence.transfer.difference import Difference

if TYPE_CHECKING:
    from langgraph.checkpoint.base import CheckpointTuple

T = TypeVar("T")
_MIGRATED_BELOW = 4
"""The format version up to which the Postgres saver moves pending sends into a channel as it reads."""


class Official(Protocol):
    """LangGraph's own saver of one side, on the snapshot that is compared. It writes nothing."""

    carries_snapshots: bool
    """It shows a DeltaChannel snapshot also in later checkpoints that are still at its version."""
    migrates_sends: bool
    """It shows the sends of a checkpoint of an old format in the next one."""

    def keys(self, thread: str) -> Iterator[tuple[str, str]]:
        """Namespace and id of each checkpoint of a thread, sorted."""

    def tuple(self, thread: str, ns: str, checkpoint_id: str) -> CheckpointTuple | None:
        """What the saver lists for a checkpoint."""

    def beside(self, thread: str, ns: str, checkpoint_id: str) -> Mapping[str, Sequence[Any]]:
        """The channels whose content this package keeps beside the saver's layout, which has no place for it.

        Each with its value, or with none where the checkpoint has none.
        """


@dataclass(slots=True)
class _Side:
    label: str
    official: Official
    snapshots: dict[tuple[str, Any], bytes]
    """Hashes of the DeltaChannel snapshots of the namespace at hand, by channel and version."""


class Tuples:
    """Compares two sides, thread by thread."""

    def __init__(self, left: str, right: str, one: Official, other: Official) -> None:
        self._sides = (_Side(left, one, {}), _Side(right, other, {}))
        self.checkpoints = self.writes = self.beside = 0

    def differences(self, thread: str) -> Iterator[Difference]:
        """Every place where the savers of both sides return something else; it ends early if not read on."""
        one, other = self._sides
        ns: str | None = None
        for key, in_one, in_other in _merge(one.official.keys(thread), other.official.keys(thread)):
            if key[0] != ns:
                ns = key[0]
                one.snapshots.clear()
                other.snapshots.clear()
            self.checkpoints += in_one
            if not in_one or not in_other:
                missing = one.label if not in_one else other.label
                yield Difference(thread, f"the checkpoint is missing in {missing}", *key)
                continue
            mine = _read(one, one.official.tuple, thread, key)
            theirs = _read(other, other.official.tuple, thread, key)
            if isinstance(mine, str) or isinstance(theirs, str):
                for said in (mine, theirs):
                    if isinstance(said, str):
                        yield Difference(thread, said, *key)
                continue
            self.writes += len(mine.pending_writes or ())
            try:
                yield from self._compared(thread, key, mine, theirs)
            except PersistenceError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a class of the application raises, or a depth
                yield Difference(thread, f"it cannot be compared: {type(error).__name__}: {error}", *key)

    def _compared(
        self, thread: str, key: tuple[str, str], mine: CheckpointTuple, theirs: CheckpointTuple
    ) -> Iterator[Difference]:
        one, other = self._sides
        mine, theirs = self._without_habits(_with_own_sends(mine), _with_own_sends(theirs))
        for channel, detail in _tuple_differences(mine, theirs):
            yield Difference(thread, detail, *key, channel)
        values = _value_differences(_values(mine), _values(theirs), one.label, other.label)
        if known := dict(values):
            yield from self._not_beside(thread, key, known, _values(mine), _values(theirs))

    def _not_beside(
        self,
        thread: str,
        key: tuple[str, str],
        known: Mapping[str, str],
        mine: Mapping[str, Any],
        theirs: Mapping[str, Any],
    ) -> Iterator[Difference]:
        """The differences of values that are none only in what a saver shows; those others are counted."""
        one, other = self._sides
        kept = []
        for side, values in ((one, mine), (other, theirs)):
            beside = _read(side, side.official.beside, thread, key)
            if isinstance(beside, str):
                yield Difference(thread, beside, *key)
                return
            rest = {channel: value for channel, value in values.items() if channel not in beside}
            kept.append(rest | {channel: held[0] for channel, held in beside.items() if held})
        left = dict(_value_differences(kept[0], kept[1], one.label, other.label))
        for channel in known:
            if channel in left:
                yield Difference(thread, left[channel], *key, channel)
            else:
                self.beside += 1

    def _without_habits(
        self, mine: CheckpointTuple, theirs: CheckpointTuple
    ) -> tuple[CheckpointTuple, CheckpointTuple]:
        """Take out what one saver shows and the other does not, where it is what the other's rows say."""
        one, other = self._sides
        if one.official.migrates_sends or other.official.migrates_sends:
            mine, theirs = _with_sends(mine, one.official), _with_sends(theirs, other.official)
        if one.official.carries_snapshots != other.official.carries_snapshots:
            if one.official.carries_snapshots:
                _remember(other, theirs)
                mine = _not_carried(mine, theirs, other)
            else:
                _remember(one, mine)
                theirs = _not_carried(theirs, mine, one)
        return mine, theirs


def _read(side: _Side, ask: Callable[..., T | None], thread: str, key: tuple[str, str]) -> T | str:
    """What the saver returns, or why it cannot."""
    try:
        found = ask(thread, *key)
    except EncryptionError as error:
        where = Difference(thread, error.message, *key)
        raise EncryptionError(f"{side.label}, {where}", hint=error.hint) from None
    except PersistenceError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a class of the application raises
        said = (str(error).splitlines() or [""])[0]
        return f"LangGraph's saver cannot read it from {side.label}: {type(error).__name__}: {said}"
    if found is None:
        return f"LangGraph's saver does not find it in {side.label}"
    return found


def _merge(
    lefts: Iterator[tuple[str, str]], rights: Iterator[tuple[str, str]]
) -> Iterator[tuple[tuple[str, str], bool, bool]]:
    """The keys of both sides in order, and which side has each."""
    one, other = next(lefts, None), next(rights, None)
    while one is not None or other is not None:
        key = min(side for side in (one, other) if side is not None)
        yield key, one == key, other == key
        one, other = (
            next(lefts, None) if one == key else one,
            next(rights, None) if other == key else other,
        )


def _remember(side: _Side, item: CheckpointTuple) -> None:
    """Note the snapshots of a checkpoint, on the side that shows each only where it was taken."""
    versions = _versions(item)
    for channel, value in _values(item).items():
        if isinstance(value, _DeltaSnapshot) and channel in versions:
            side.snapshots[channel, versions[channel]] = _hash(value)


def _not_carried(item: CheckpointTuple, plain: CheckpointTuple, side: _Side) -> CheckpointTuple:
    """The tuple without snapshots that an earlier checkpoint of the other side has, at the same version."""
    versions, shown = _versions(item), _values(plain)
    values = {
        channel: value
        for channel, value in _values(item).items()
        if channel in shown
        or not isinstance(value, _DeltaSnapshot)
        or side.snapshots.get((channel, versions.get(channel))) != _hash(value)
    }
    return item._replace(checkpoint={**item.checkpoint, "channel_values": values})


def _with_sends(item: CheckpointTuple, official: Official) -> CheckpointTuple:
    """The tuple as the Postgres saver would show it: with the sends that its parent has as pending writes.

    That saver has the database sort them by task, in the order of its collation. So what it shows is put into
    the order of the pending writes, which all savers sort by bytes, provided that it is the same sends.
    """
    checkpoint, config = item.checkpoint, item.config["configurable"]
    if checkpoint.get("v", _MIGRATED_BELOW) >= _MIGRATED_BELOW or item.parent_config is None:
        return item
    if official.migrates_sends and TASKS not in _values(item):
        return item
    parent_id = item.parent_config["configurable"]["checkpoint_id"]
    parent = official.tuple(config["thread_id"], config["checkpoint_ns"], parent_id)
    sends = [value for _, channel, value in (parent and parent.pending_writes) or () if channel == TASKS]
    if official.migrates_sends and not _same_sends(sends, _values(item)[TASKS]):
        return item
    return _in_channel(item, sends) if sends else item


def _same_sends(sends: Sequence[Any], shown: Any) -> bool:
    """Whether they are the same in whatever order."""
    return isinstance(shown, list) and sorted(map(_hash, sends)) == sorted(map(_hash, shown))


def _with_own_sends(item: CheckpointTuple) -> CheckpointTuple:
    """The tuple as a graph loads it: packets that a checkpoint of an old format held itself are in a channel.

    A transfer has moved them there.
    """
    checkpoint: dict[str, Any] = {**item.checkpoint}
    sends = checkpoint.get("pending_sends")
    if not sends or checkpoint.get("v", _MIGRATED_BELOW) >= _MIGRATED_BELOW:
        return item
    checkpoint["pending_sends"] = []
    return _in_channel(item._replace(checkpoint=cast(Any, checkpoint)), sends)


def _in_channel(item: CheckpointTuple, sends: Sequence[Any]) -> CheckpointTuple:
    versions: dict[str, Any] = dict(_versions(item))
    if versions:
        versions[TASKS] = max(versions.values())
    values = {**_values(item), TASKS: sends}
    return item._replace(
        checkpoint={**item.checkpoint, "channel_versions": versions, "channel_values": values}
    )


def _tuple_differences(mine: CheckpointTuple, theirs: CheckpointTuple) -> Iterator[tuple[str | None, str]]:
    """Channel and description of each place where two tuples differ, but for the values."""
    if not same(mine.config, theirs.config):
        yield None, f"the config is {mine.config!r} and {theirs.config!r}"
    if not same(mine.parent_config, theirs.parent_config):
        yield None, f"the parent is {_parent(mine)!r} and {_parent(theirs)!r}"
    for name, one, other in (
        ("checkpoint", _fields(mine), _fields(theirs)),
        ("metadata", _named(mine.metadata), _named(theirs.metadata)),
    ):
        keys = sorted({*one, *other})
        if differing := [key for key in keys if not same(one.get(key, ...), other.get(key, ...), json=True)]:
            yield None, f"the {name} differs in {', '.join(differing)}"
    writes, their_writes = mine.pending_writes or [], theirs.pending_writes or []
    if len(writes) != len(their_writes):
        yield None, f"there are {len(writes)} and {len(their_writes)} pending writes"
    for number, (write, their_write) in enumerate(zip(writes, their_writes, strict=False)):
        if not same(tuple(write), tuple(their_write)):
            yield write[1], f"pending write {number}, of task {write[0]!r}, differs"


def _value_differences(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], left: str, right: str
) -> Iterator[tuple[str, str]]:
    """Each channel in which two checkpoints hold different values, and how."""
    for channel in sorted({*mine, *theirs}):
        if channel not in mine or channel not in theirs:
            yield channel, f"the value is missing in {left if channel not in mine else right}"
        elif not same(mine[channel], theirs[channel]):
            yield channel, "the value differs"


def _values(item: CheckpointTuple) -> Mapping[str, Any]:
    return item.checkpoint.get("channel_values") or {}


def _versions(item: CheckpointTuple) -> Mapping[str, Any]:
    return item.checkpoint.get("channel_versions") or {}


def _named(metadata: Any) -> Mapping[str, Any]:
    return metadata if isinstance(metadata, Mapping) else {"": metadata}


def _fields(item: CheckpointTuple) -> dict[str, Any]:
    return {name: value for name, value in item.checkpoint.items() if name != "channel_values"}


def _parent(item: CheckpointTuple) -> str | None:
    return item.parent_config["configurable"]["checkpoint_id"] if item.parent_config else None


def same(one: Any, other: Any, *, json: bool = False) -> bool:
    """Whether two deserialised values are equal in type and content, all the way down.

    An object without a content of its own that could be looked at is compared by its serialized form.

    Args:
        one: A value.
        other: Another.
        json: They come from JSON, where negative zero is zero: JSONB cannot keep it.
    """
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return (one == other or (math.isnan(one) and math.isnan(other))) and (
            json or math.copysign(1, one) == math.copysign(1, other)
        )
    if one is None or isinstance(one, str | bytes | bytearray | int):
        return bool(one == other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(
            same(key, their_key, json=json) and same(one[key], other[their_key], json=json)
            for key, their_key in zip(_sorted(one), _sorted(other), strict=True)
        )
    if isinstance(one, Sequence):
        return len(one) == len(other) and all(same(a, b, json=json) for a, b in zip(one, other, strict=True))
    if isinstance(one, AbstractSet):
        return len(one) == len(other) and all(map(same, _sorted(one), _sorted(other)))
    return _same_objects(one, other)


def _same_objects(one: Any, other: Any) -> bool:
    try:
        if _serialized(one) == _serialized(other):
            return True
    except Exception:  # noqa: BLE001 - whatever a class of the application raises
        return bool(one == other)
    # The same content may be serialized in another order, as that of a set.
    if dataclasses.is_dataclass(one) or hasattr(one, "model_dump"):
        return same(_state(one), _state(other))
    return False


def _state(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    return dict(vars(value))


def _sorted(values: Any) -> list[Any]:
    """Keys, or members of a set, in an order that is the same on both sides."""
    return sorted(values, key=lambda value: (type(value).__qualname__, repr(value)))


def _serialized(value: Any) -> tuple[str, bytes]:
    return JsonPlusSerializer().dumps_typed(value)


def _hash(value: Any) -> bytes:
    return hashlib.sha256(_serialized(value)[1]).digest()

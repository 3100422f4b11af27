"""What differs between two sides' records of one thread, by a merge of both: neither is held in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from persistence.errors import SourceError
from persistence.transfer.canonical import decode_json
from persistence.transfer.difference import Difference
from persistence.transfer.digest import describe
from persistence.transfer.records import Checkpoint, Reject, Source, Write

_Key = tuple[str, str, str, str, int]
_Keyed = tuple[_Key, Checkpoint | Write]


def thread_differences(thread: str, left: Source, right: Source) -> Iterator[Difference]:
    """Every place where two sides differ in a thread, in order."""
    lefts, rights = _keyed(thread, left), _keyed(thread, right)
    one, other = next(lefts, None), next(rights, None)
    while one is not None or other is not None:
        key = min(side[0] for side in (one, other) if side is not None)
        mine = one[1] if one is not None and one[0] == key else None
        theirs = other[1] if other is not None and other[0] == key else None
        if mine != theirs:
            yield from _record_differences(mine, theirs, left.label, right.label)
        one = next(lefts, None) if mine is not None else one
        other = next(rights, None) if theirs is not None else other


def _keyed(thread: str, source: Source) -> Iterator[_Keyed]:
    """A thread's records with what identifies them, as hashes and JSON: no channel values.

    Sources send checkpoints before writes, and both in the order of these keys.
    """
    for record in source.records([thread], data=False):
        match record:
            case Checkpoint():
                # Where a value is kept is not content.
                values = tuple(ref._replace(data=None, size=0, delta=False) for ref in record.values)
                yield (
                    ("", record.checkpoint_ns, record.checkpoint_id, "", 0),
                    record._replace(values=values, versions={}),
                )
            case Write():
                key = ("w", record.checkpoint_ns, record.checkpoint_id, record.task_id, record.idx)
                yield key, record._replace(data=None)
            case Reject():
                raise SourceError(f"{describe(record)} cannot be read: {record.reason}")
            case _:
                pass


def _record_differences(
    one: Checkpoint | Write | None, other: Checkpoint | Write | None, left: str, right: str
) -> Iterator[Difference]:
    record = one or other
    if record is None:
        return
    channel = record.channel if isinstance(record, Write) else None

    def differ(detail: str, channel: str | None = channel) -> Difference:
        return Difference(record.thread_id, detail, record.checkpoint_ns, record.checkpoint_id, channel)

    if one is None or other is None:
        what = "the checkpoint"
        if isinstance(record, Write):
            what = f"write {record.idx} of task {record.task_id!r}"
        yield differ(f"{what} is missing in {left if one is None else right}")
    elif isinstance(one, Write) and isinstance(other, Write):
        names = [n for n in ("task_path", "channel", "type") if getattr(one, n) != getattr(other, n)]
        yield differ(f"write {one.idx} of task {one.task_id!r} differs in {', '.join(names) or 'its value'}")
    elif isinstance(one, Checkpoint) and isinstance(other, Checkpoint):
        if one.parent_id != other.parent_id:
            yield differ(f"the parent is {one.parent_id!r} and {other.parent_id!r}")
        for name, a, b in (("checkpoint", one.body, other.body), ("metadata", one.metadata, other.metadata)):
            if a != b:
                yield differ(f"the {name} differs in {_json_difference(decode_json(a), decode_json(b))}")
        mine, theirs = ({ref.channel: ref for ref in side.values} for side in (one, other))
        for name in sorted(mine.keys() | theirs.keys()):
            if name not in mine or name not in theirs:
                yield differ(f"the value is missing in {left if name not in mine else right}", name)
            elif mine[name][2:4] != theirs[name][2:4]:
                yield differ("the value differs", name)


def _json_difference(one: Any, other: Any) -> str:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return "its content"
    return ", ".join(
        sorted(k for k in one.keys() | other.keys() if one.get(k, ...) != other.get(k, ...))
    ) or ("the type of a number")

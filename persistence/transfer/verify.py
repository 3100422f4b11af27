"""Compares two sides by content: a digest per thread from each, then what differs, in detail.

Each side computes its digests from its own rows. Only a thread whose digests differ is read again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from persistence.errors import SourceError, VerificationError
from persistence.transfer.canonical import decode_json
from persistence.transfer.digest import ThreadDigest, describe
from persistence.transfer.records import Checkpoint, Reject, Source, Write

_SHOWN_THREADS = 20
_SHOWN_PER_THREAD = 20


@dataclass(frozen=True, slots=True)
class Difference:
    """One place where two sides differ."""

    thread_id: str
    detail: str
    checkpoint_ns: str | None = None
    checkpoint_id: str | None = None
    channel: str | None = None

    def __str__(self) -> str:
        where = f"thread {self.thread_id!r}"
        if self.checkpoint_ns:
            where += f", namespace {self.checkpoint_ns!r}"
        if self.checkpoint_id is not None:
            where += f", checkpoint {self.checkpoint_id!r}"
        if self.channel is not None:
            where += f", channel {self.channel!r}"
        return f"{where}: {self.detail}"


@dataclass(slots=True)
class Verdict:
    """Whether two sides hold the same.

    Attributes:
        left: The one side; holds no secret.
        right: The other side.
        threads: How many threads were compared.
        checkpoints: How many checkpoints the left side has in them.
        writes: How many pending writes the left side has in them.
        differing_threads: How many threads differ, or are on one side only.
        differences: What differs, for the first of these threads.
    """

    left: str
    right: str
    threads: int = 0
    checkpoints: int = 0
    writes: int = 0
    differing_threads: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Nothing differs."""
        return self.differing_threads == 0

    def require(self) -> None:
        """Raise where the sides differ.

        Raises:
            VerificationError: It names the first differences.
        """
        if self.equal:
            return
        shown = "; ".join(map(str, self.differences[:3]))
        raise VerificationError(
            f"{self.left} and {self.right} differ in {self.differing_threads} of {self.threads}"
            f" threads: {shown}"
        )

    def to_json(self) -> str:
        """The verdict as one JSON object."""
        return json.dumps(asdict(self) | {"equal": self.equal}, sort_keys=True)


def compare(
    left: Source,
    right: Source,
    left_digests: Iterable[ThreadDigest],
    right_digests: Iterable[ThreadDigest],
    verdict: Verdict,
) -> None:
    """Walk both sides' digests, sorted by thread, and add what differs to the verdict."""
    lefts, rights = iter(left_digests), iter(right_digests)
    one, other = next(lefts, None), next(rights, None)
    differing: list[str] = []
    while one is not None or other is not None:
        verdict.threads += 1
        thread = min(side.thread_id for side in (one, other) if side is not None)
        mine = one if one is not None and one.thread_id == thread else None
        theirs = other if other is not None and other.thread_id == thread else None
        if mine is not None:
            verdict.checkpoints += mine.checkpoints
            verdict.writes += mine.writes
            one = next(lefts, None)
        if theirs is not None:
            other = next(rights, None)
        if mine is None or theirs is None or mine.sha256 != theirs.sha256:
            verdict.differing_threads += 1
            if verdict.differing_threads > _SHOWN_THREADS:
                continue
            if mine is None or theirs is None:
                side = verdict.left if mine is None else verdict.right
                verdict.differences.append(Difference(thread, f"missing in {side}"))
            else:
                # Later: the sides' cursors are still in use for the digests.
                differing.append(thread)
    for thread in differing:
        verdict.differences += _thread_differences(thread, left, right, verdict)


def _thread_differences(thread: str, left: Source, right: Source, verdict: Verdict) -> list[Difference]:
    mine, theirs = _by_key(thread, left), _by_key(thread, right)
    found: list[Difference] = []
    for key in sorted(mine.keys() | theirs.keys()):
        one, other = mine.get(key), theirs.get(key)
        if one != other:
            found += _record_differences(one, other, verdict)
        if len(found) >= _SHOWN_PER_THREAD:
            break
    return found


Key = tuple[str, str, str, str, int]


def _by_key(thread: str, source: Source) -> Mapping[Key, Checkpoint | Write]:
    """A thread's records by what identifies them, as hashes and JSON: no channel values."""
    records: dict[Key, Checkpoint | Write] = {}
    for record in source.records([thread], data=False):
        match record:
            case Checkpoint():
                # Where a value is kept is not content.
                values = tuple(ref._replace(data=None, size=0, delta=False) for ref in record.values)
                records["", record.checkpoint_ns, record.checkpoint_id, "", 0] = record._replace(
                    values=values, versions={}
                )
            case Write():
                key = ("w", record.checkpoint_ns, record.checkpoint_id, record.task_id, record.idx)
                records[key] = record._replace(data=None)
            case Reject():
                raise SourceError(f"{describe(record)} cannot be read: {record.reason}")
            case _:
                pass
    return records


def _record_differences(
    one: Checkpoint | Write | None, other: Checkpoint | Write | None, verdict: Verdict
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
        yield differ(f"{what} is missing in {verdict.left if one is None else verdict.right}")
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
                side = verdict.left if name not in mine else verdict.right
                yield differ(f"the value is missing in {side}", name)
            elif mine[name][2:4] != theirs[name][2:4]:
                yield differ("the value differs", name)


def _json_difference(one: Any, other: Any) -> str:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return "its content"
    return ", ".join(
        sorted(k for k in one.keys() | other.keys() if one.get(k, ...) != other.get(k, ...))
    ) or ("the type of a number")

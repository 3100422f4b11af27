"""What one reading of a source tells: how large its parts are, and what is worth knowing before a move.

It looks at records only, deserialises nothing, and keeps a few bytes for each checkpoint of one thread
and for each channel version of one namespace.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from persistence.transfer.canonical import INLINE_BYTES, inline_json
from persistence.transfer.chunks import Chunk
from persistence.transfer.digest import describe
from persistence.transfer.records import Checkpoint, Problem, Record, ValueRef, Write

Severity = Literal["refused", "conflict", "note"]
"""The move would stop; it would stop unless told what to do; it goes on, but this is worth knowing."""

EXAMPLES = 3
LARGEST_THREADS = 10
_FORMAT_VERSION = 4  # what LangGraph writes since checkpoint 2.1
_PLAIN_TYPES = frozenset({"msgpack", "bytes", "bytearray", "null"})


@dataclass(slots=True)
class Finding:
    """One kind of thing that needs a decision, or is worth knowing.

    Attributes:
        kind: A stable name for programs.
        severity: What it means for the move.
        what: One line for a person.
        advice: What to do about it.
        count: How many rows, or threads, it is about.
        examples: Where the first ones stand.
    """

    kind: str
    severity: Severity
    what: str
    advice: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        """One more."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)


@dataclass(frozen=True, slots=True)
class Bucket:
    """How many checkpoints have fewer than ``below`` bytes, and at least half of that."""

    below: int
    checkpoints: int


@dataclass(frozen=True, slots=True)
class CheckpointSize:
    """One checkpoint, and the bytes of all that it holds."""

    thread_id: str
    checkpoint_ns: str
    checkpoint_id: str
    bytes: int


@dataclass(frozen=True, slots=True)
class ThreadSize:
    """One thread, and the bytes of its content, each value once."""

    thread_id: str
    checkpoints: int
    writes: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the parts of a source are.

    Attributes:
        histogram: Checkpoints by size, each with all that it holds.
        largest_checkpoint: The largest one; it sets how much memory a move takes.
        largest_threads: The largest threads, the largest first.
    """

    histogram: list[Bucket]
    largest_checkpoint: CheckpointSize | None
    largest_threads: list[ThreadSize]


class Survey:
    """Looks at every record of a scan, in its order."""

    def __init__(self) -> None:
        self._found: dict[str, Finding] = {}
        self._thread: str | None = None
        self._ns: str | None = None
        # Of one thread: its checkpoints by namespace and id, each with its parent.
        self._parents: dict[int, int | None] = {}
        # Of one namespace: checkpoints whose parent does not come before them, and the values by version.
        self._early: list[Checkpoint] = []
        self._versions: dict[tuple[str, str], bytes] = {}
        # By channel the last value that there was nothing to note about: most channels do not change.
        self._harmless: dict[str, ValueRef] = {}
        self._checkpoints = self._writes = self._bytes = 0
        self._buckets: Counter[int] = Counter()
        self._largest: CheckpointSize | None = None
        self._threads: list[tuple[int, int, ThreadSize]] = []
        self._ended = 0

    def take(self, chunk: Chunk) -> None:
        """Take the next records."""
        if chunk.thread_id != self._thread:
            self.end()
            self._thread = chunk.thread_id
        if chunk.reject is not None:  # it cannot be read, but it is there
            self._parents.setdefault(hash(chunk.reject[1:3]), None)
            return
        self._checkpoints += len(chunk.checkpoints)
        self._writes += len(chunk.writes)
        self._bytes += sum(chunk.sizes)
        versions = iter(chunk.format_versions)
        for state in chunk.states:
            if isinstance(state, Checkpoint):
                self._checkpoint(state, next(versions))
            elif state.type not in _PLAIN_TYPES:
                self._type(state.type, state)
        if chunk.wholes:
            self._size(chunk)
        if chunk.writes:
            self._look_at_writes(chunk.writes)

    def end(self) -> None:
        """All records of the thread were seen."""
        self._end_namespace()
        if self._thread is not None:
            size = ThreadSize(self._thread, self._checkpoints, self._writes, self._bytes)
            self._ended += 1
            heapq.heappush(self._threads, (size.bytes, -self._ended, size))
            if len(self._threads) > LARGEST_THREADS:
                heapq.heappop(self._threads)
        self._thread = None
        self._parents.clear()
        self._checkpoints = self._writes = self._bytes = 0

    def merge(self, other: Survey) -> None:
        """Take what another one has seen in the threads that follow, after its :meth:`end`."""
        for kind, finding in other._found.items():
            mine = self._found.setdefault(kind, replace(finding, count=0, examples=[]))
            mine.count += finding.count
            mine.examples += finding.examples[: EXAMPLES - len(mine.examples)]
        self._buckets.update(other._buckets)
        if self._largest is None or (other._largest and other._largest.bytes > self._largest.bytes):
            self._largest = other._largest
        for size, ended, thread in other._threads:
            heapq.heappush(self._threads, (size, ended - self._ended, thread))
        while len(self._threads) > LARGEST_THREADS:
            heapq.heappop(self._threads)
        self._ended += other._ended

    def sizes(self) -> Sizes:
        """How large everything was; after :meth:`end`."""
        return Sizes(
            [Bucket(1 << bits, count) for bits, count in sorted(self._buckets.items())],
            self._largest,
            [size for _, _, size in sorted(self._threads, reverse=True)],
        )

    def findings(self) -> list[Finding]:
        """What was noticed; none of it stops a move by itself."""
        return list(self._found.values())

    def note_converted(self, count: int) -> None:
        """So many values were JSON. A record does not show that any more, so the source tells it."""
        if count:
            self._finding("json").count += count

    def _checkpoint(self, record: Checkpoint, version: object) -> None:
        if record.checkpoint_ns != self._ns:
            self._end_namespace()
            self._ns = record.checkpoint_ns
        harmless = self._harmless
        if others := [ref for ref in record.values if harmless.get(ref[0]) is not ref]:
            self._look_at_values(record, others)
        self._lineage(record)
        if isinstance(version, int | float) and version < _FORMAT_VERSION:
            self._note("old-format", f"{describe(record)}, format version {version}")

    def _look_at_values(self, record: Checkpoint, refs: Sequence[ValueRef]) -> None:
        changed: str | None = None
        for ref in refs:
            channel, version, type_, digest, data, _, _ = ref
            if data is not None and type_ not in _PLAIN_TYPES:
                self._type(type_, record)
            elif version is not None and (data is None or len(data) <= INLINE_BYTES):
                self._harmless[channel] = ref
            if version is None:
                if inline_json(type_, data or b"") is None:
                    self._note("no-version", f"{describe(record)}, channel {channel!r}")
            elif self._versions.setdefault((channel, version), digest) != digest:
                changed = channel
                self._harmless.pop(channel, None)
        if changed is not None:
            self._note("changed-in-place", f"{describe(record)}, channel {changed!r}")

    def _size(self, chunk: Chunk) -> None:
        """Note how large checkpoints are, with all that they hold."""
        self._buckets.update(map(int.bit_length, chunk.wholes))
        largest = max(chunk.wholes)
        if self._largest is None or largest > self._largest.bytes:
            record = chunk.checkpoints[chunk.wholes.index(largest)]
            self._largest = CheckpointSize(*record[:3], largest)

    def _lineage(self, record: Checkpoint) -> None:
        key = hash((record.checkpoint_ns, record.checkpoint_id))
        parent = None
        if record.parent_id is not None:
            parent = hash((record.checkpoint_ns, record.parent_id))
            if parent == key:
                self._note("own-parent", describe(record))
                parent = None
            elif parent not in self._parents:
                self._early.append(record._replace(body=b"", metadata=b"", versions={}, values=()))
        self._parents[key] = parent

    def _end_namespace(self) -> None:
        """Which parents came later, and lead back to their own child; which are not there at all."""
        seen: set[int] = set()
        for record in self._early:
            parent = hash((record.checkpoint_ns, record.parent_id))
            if parent not in self._parents:
                self._note("parent-missing", f"{describe(record)}, parent {record.parent_id!r}")
            # Every cycle has a checkpoint whose parent comes after it.
            elif _leads_into_new_cycle(
                hash((record.checkpoint_ns, record.checkpoint_id)), self._parents, seen
            ):
                self._note("parent-cycle", describe(record))
        self._ns = None
        self._early.clear()
        self._versions.clear()
        self._harmless.clear()

    def _look_at_writes(self, writes: Sequence[Write]) -> None:
        checkpoints = map(hash, {write[1:3] for write in writes})
        if self._parents.keys() >= set(checkpoints) and _PLAIN_TYPES.issuperset([w.type for w in writes]):
            return
        for write in writes:
            if write.type not in _PLAIN_TYPES:
                self._type(write.type, write)
            if hash(write[1:3]) not in self._parents:
                self._note("orphaned-write", describe(write))

    def _type(self, type_: str, record: Record) -> None:
        self._note("pickle", f"{describe(record)}, type {type_!r}")

    def _note(self, kind: str, example: str) -> None:
        self._finding(kind).add(example)

    def _finding(self, kind: str) -> Finding:
        if (finding := self._found.get(kind)) is None:
            finding = self._found[kind] = Finding(kind, "note", *_NOTES[kind])
        return finding


def _leads_into_new_cycle(start: int, parents: Mapping[int, int | None], seen: set[int]) -> bool:
    """Follow parents from ``start``; ``seen`` has what was followed before."""
    path: set[int] = set()
    at: int | None = start
    while at is not None and at not in seen:
        seen.add(at)
        path.add(at)
        at = parents.get(at)
    return at is not None and at in path


_NOTES = {
    "changed-in-place": (
        "checkpoints have different values under one version: a node changed the state in place",
        "let the node return a new value; what each checkpoint saw moves as it is, but LangGraph's own"
        " Postgres saver shows the newest value in all checkpoints of the version",
    ),
    "json": (
        "values are stored as JSON, by an early LangGraph or by LangGraph.js",
        "they become msgpack, which LangGraph for Python reads and LangGraph.js does not",
    ),
    "no-version": (
        "values are in channels without a version",
        "they move as they are, but LangGraph's own Postgres saver has no place for such a value",
    ),
    "old-format": (
        "checkpoints are in a format older than LangGraph's present one, 4",
        "LangGraph reads them, and writes new ones in its present format",
    ),
    "orphaned-write": (
        "pending writes belong to checkpoints that are not there",
        "they move too; a saver shows them only once there is such a checkpoint",
    ),
    "own-parent": (
        "checkpoints name themselves as their parent",
        "a walk through the history never ends there",
    ),
    "parent-cycle": ("parents of checkpoints form a circle", "a walk through the history never ends there"),
    "parent-missing": (
        "checkpoints have a parent that is not there",
        "usual after pruning: the history begins there",
    ),
    "pickle": (
        "values are pickled, which runs code when they are read",
        "LangGraph reads them only where its serializer is told to (pickle_fallback)",
    ),
}

# What the refusals of sources and targets say, what sort that is, and what to do about it.
_REFUSALS: Sequence[tuple[str, str, str]] = (
    ("not encrypted although", "plaintext", "?allow_plaintext=true on the source lets it be read"),
    (
        "encrypted",
        "encrypted",
        "set PERSISTENCE_ENCRYPTION_KEY to the key of the application that wrote them",
    ),
    ("decrypted", "encrypted", "set PERSISTENCE_ENCRYPTION_OLD_KEYS to the keys that were used before"),
    ("type 'pickle'", "pickle", "--allow-pickle, if nobody else can write to the source: it runs code"),
    ("the JSON", "damaged", "something other than LangGraph wrote them: delete or mend them"),
    ("serializer type", "unknown-type", "the rows need the serializer of the application that wrote them"),
    ("not UTF-8", "damaged", "something other than LangGraph wrote them: delete or mend them"),
    ("is stored as", "damaged", "something other than LangGraph wrote them: delete or mend them"),
    ("NUL character", "nul", "delete these threads, or change the text: Postgres cannot hold U+0000"),
    ("is not JSON", "not-json", "keep only JSON in metadata: no NaN, infinity or bytes"),
    ("do not fit a Postgres index", "long-id", "use shorter ids"),
    ("backslash", "backslash", "rename the channel or task: LangGraph's Postgres saver misreads it"),
    (
        "no format version",
        "no-format-version",
        "the official Postgres saver could not read them: delete them",
    ),
    ("larger than", "too-large", "keep large content outside the state"),
    ("too large", "too-large", "keep large content outside the state"),
    ("out of range", "damaged", "something other than LangGraph wrote them: delete or mend them"),
)
_OTHERWISE = (
    "not-readable",
    "look at these rows: they are damaged, or something other than LangGraph wrote them",
)


def refusals(problems: Iterable[Problem]) -> list[Finding]:
    """What stops a move, by kind: reasons that differ only in a name are one."""
    found: dict[str, Finding] = {}
    for problem in problems:
        kind, advice = next(((k, a) for phrase, k, a in _REFUSALS if phrase in problem.reason), _OTHERWISE)
        finding = found.setdefault(kind, Finding(kind, "refused", problem.reason, advice))
        finding.count += problem.count
        finding.examples += problem.examples[: EXAMPLES - len(finding.examples)]
    return list(found.values())

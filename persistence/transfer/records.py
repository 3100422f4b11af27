"""The neutral form of checkpoint data that every transfer speaks, and what a side of one must offer.

A source yields records in one fixed order: threads by id; in a thread the checkpoints by namespace
and id, each after the values it uses; then the thread's pending writes by their key. Text compares
by code point, which is the order of its UTF-8 bytes. A sink takes the same records in batches.
Nobody here deserialises a channel value.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from persistence.transfer.items import StoreSink, StoreSource
from persistence.transfer.ledger import Ledger, LedgerEntry

if TYPE_CHECKING:
    from persistence.transfer.chunks import Chunk
    from persistence.transfer.keys import Key
    from persistence.transfer.live import Follower
    from persistence.transfer.live_store import StoreFollower
    from persistence.transfer.semantic import Official


make = tuple.__new__
"""A record of a class and all its fields, in half the time that its constructor takes: there are millions."""


class ValueRef(NamedTuple):
    """What a checkpoint holds in one channel."""

    channel: str
    version: str | None
    """The channel's version as text, ``None`` for a channel that ``channel_versions`` does not name."""
    type: str
    """The serializer's type: ``msgpack``, ``bytes``, ``bytearray`` or ``null``."""
    sha256: bytes
    data: bytes | None
    """The bytes where they travel inside the checkpoint; ``None`` where a :class:`Value` has them."""
    size: int
    """How many bytes the value has."""
    delta: bool
    """A ``DeltaChannel`` snapshot."""


class Value(NamedTuple):
    """A channel value, sent once per thread, namespace, channel, version and content."""

    thread_id: str
    checkpoint_ns: str
    channel: str
    version: str
    type: str
    sha256: bytes
    data: bytes


class Checkpoint(NamedTuple):
    """One checkpoint without the values that :class:`Value` records carry."""

    thread_id: str
    checkpoint_ns: str
    checkpoint_id: str
    parent_id: str | None
    body: bytes
    """Canonical JSON of the checkpoint without its ``channel_values``."""
    metadata: bytes
    """Canonical JSON."""
    versions: Mapping[str, str]
    """``channel_versions`` with the versions as text; the same as in ``body``."""
    values: tuple[ValueRef, ...]
    """Sorted by channel."""


class Write(NamedTuple):
    """One pending write."""

    thread_id: str
    checkpoint_ns: str
    checkpoint_id: str
    task_id: str
    idx: int
    task_path: str
    channel: str
    type: str
    sha256: bytes
    data: bytes | None
    """``None`` where only the content's hash was asked for."""


class Reject(NamedTuple):
    """A row that the source cannot express as a record."""

    thread_id: str
    checkpoint_ns: str
    checkpoint_id: str
    reason: str
    raw: bytes = b""
    """The row as the source stores it, msgpack; for those who set it aside."""


Record = Value | Checkpoint | Write | Reject


@dataclass(frozen=True, slots=True)
class Batch:
    """Records that are written together, in one transaction."""

    number: int
    rows: Sequence[tuple[str, Any]]
    """What :meth:`Sink.row` made of each, with its kind; see :class:`persistence.transfer.keys.Key`."""
    entry: LedgerEntry
    keys: bytes
    """What it inserts, for the ledger; see :mod:`persistence.transfer.keys`."""
    threads: Sequence[str]
    """Those that it has records of."""
    replaces: Sequence[str] = ()
    """Threads to delete first."""


@dataclass(slots=True)
class Problem:
    """A kind of row that cannot be moved: how many there are, and where the first ones stand."""

    reason: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


class Source(Protocol):
    """One consistent snapshot of a database or archive."""

    label: str
    """What messages call it; holds no secret."""

    @property
    def divisible(self) -> bool:
        """Whether reading some threads takes their share of the time: an archive is read by whole parts."""

    @property
    def encrypted(self) -> bool:
        """Whether there is a key, so that what it reads is not to be stored elsewhere as it is."""

    @property
    def database(self) -> str | None:
        """The database whose setup would wait for this snapshot, as the identity of a sink in it begins."""

    @property
    def size(self) -> int | None:
        """Bytes of its storage, about; ``None`` where that is not quickly known."""

    @property
    def converted(self) -> int:
        """How many values and checkpoints it has read that were JSON, and became msgpack."""

    def drift(self) -> list[str]:
        """How its tables differ from what the installed savers make, a line for each."""

    @property
    def identity(self) -> str:
        """Which database or archive this is, beyond the name it is reached by."""

    @property
    def place(self) -> str:
        """As :attr:`identity`, also by its disk. A sink that would write into this has the same."""

    def threads(self) -> Iterator[str]:
        """The ids of all threads, sorted."""

    def marks(self, after: str | None, upto: str) -> list[int]:
        """Numbers about the rows of the threads after one and up to another, which change with the rows.

        They are quickly had, and add up: those of two ranges together are those of both.
        """

    def official(self) -> Official | None:
        """LangGraph's own saver on this snapshot; ``None`` where it has none."""

    def count(self, threads: Sequence[str] | None = None) -> int:
        """How many checkpoints there are, or those threads have, for the progress bar."""

    def records(self, threads: Sequence[str] | None = None, *, data: bool = True) -> Iterator[Record]:
        """All records in order, or those of some threads.

        Args:
            threads: Ids, sorted; ``None`` means all.
            data: Without it no :class:`Value` is sent and writes carry only their hash.

        Raises:
            SourceError: The source cannot be read.
        """

    def store(self) -> StoreSource:
        """The store in the same snapshot."""


class Preflight(Protocol):
    """Looks at every record before the first is written."""

    told: Callable[[Record, str], None] | None
    """Told each row that cannot be moved, and why."""

    def see(self, record: Record) -> None:
        """Note what the target cannot hold."""

    def take(self, chunk: Chunk) -> None:
        """As :meth:`see`, for some records."""

    def end_thread(self) -> None:
        """All records of a thread were seen."""

    def merge(self, other: Any) -> None:
        """Take what another one has found in the threads that follow, whose ends it has seen."""

    def problems(self) -> list[Problem]:
        """What was found; to be asked when every record was seen."""


class Sink(Protocol):
    """A database that a transfer writes to."""

    label: str
    fresh: str
    """What an empty target would be, for messages: ``an empty database``."""
    repeats_values: bool
    """Whether a checkpoint's row holds all its values, so that a batch grows with what it refers to."""

    @property
    def identity(self) -> str:
        """Which database this is, beyond the name it is reached by; the ledger is bound to it."""

    @property
    def place(self) -> str:
        """See :attr:`Source.place`."""

    def preflight(self) -> Preflight:
        """A fresh check for one transfer."""

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep every other transfer out of this database.

        Raises:
            ConflictError: One is under way.
        """

    def rehearsal(self) -> AbstractContextManager[None]:
        """A block whose writes, the ledger's too, are one transaction that is rolled back at its end."""

    def ledger(self) -> Ledger:
        """The record of transfers that this database keeps."""

    def store(self) -> StoreSink:
        """The store of this database."""

    def existing(self, threads: Sequence[str]) -> set[str]:
        """Which of these threads have any row here."""

    def write(self, batch: Batch) -> None:
        """Commit the batch and its ledger entry together.

        Raises:
            ConflictError: A row is there already.
        """

    def placed(self, records: Iterable[Record]) -> Generator[Record]:
        """The records of a run as its rows hold them; to be read after the :meth:`preflight` saw them all.

        Close it: it may keep values in a file.

        A value that a row of its own holds is a :class:`Value`, and one in a checkpoint's row is with it.
        """

    def row(self, record: Value | Checkpoint | Write) -> Any:
        """What is written of a record that :meth:`placed` gave."""

    def skip(self, batch: Batch) -> None:
        """See a batch that an interrupted run has committed: later ones may refer to its values."""

    def follower(self, run_id: str) -> Follower:
        """What keeps the threads of a run equal to a source that goes on changing."""

    def store_follower(self, run_id: str) -> StoreFollower:
        """What keeps the items of a run equal to those of a source that goes on changing."""

    def source(self) -> AbstractContextManager[Source]:
        """What it holds now."""

    def values(self, thread: str) -> Iterator[Value]:
        """The thread's values that have rows of their own, without their data."""

    def removing(self) -> AbstractContextManager[Removal]:
        """One transaction, in which nobody else writes."""


class Removal(Protocol):
    """Takes rows of a transfer out again."""

    @property
    def source(self) -> Source:
        """What the transaction sees."""

    def remove(self, thread: str, keys: Iterable[Key]) -> None:
        """Delete rows of a thread; keys without a row are no error."""

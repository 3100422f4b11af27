"""What a source that goes on changing must offer, and what a target that follows it.

A *stamp* says of a thread which rows it has, by marks that are cheap to read: what a row is called, when it
was inserted, how long it is. The target keeps the stamp of each thread beside its rows, so a difference
between the two stamps is a thread to look at. A stamp is not content: see ``persistence.transfer.follow``
for what is compared by content, and when.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeVar

from persistence.errors import ConflictError
from persistence.transfer.ledger import Tables
from persistence.transfer.records import Checkpoint, Record, Source, Write

if TYPE_CHECKING:
    from persistence.transfer.live_store import LiveStore
    from persistence.transfer.options import Part

ClaimT = TypeVar("ClaimT")
KeyT = TypeVar("KeyT")
CLAIMS_AT_ONCE = 5_000


class Stamp(NamedTuple):
    """What tells that a thread has changed."""

    thread_id: str
    text: str
    """Empty for a thread of which it is not known how much of it has arrived."""
    checkpoints: int
    writes: int

    @property
    def keys(self) -> str:
        """The part of the text that says which rows there are, and nothing about what they hold."""
        return self.text.partition("/")[0]


Kind = Literal["add", "replace", "drop", "keep"]
Place = tuple[str, str, str]
"""Thread, namespace and checkpoint."""


class Change(NamedTuple):
    """What becomes of one thread in the target."""

    thread_id: str
    kind: Kind
    """Rows are added; all rows are replaced, or written for the first time; all are deleted; all stay."""
    before: Stamp | None
    """``None`` where the target does not have the thread."""
    after: Stamp | None
    """``None`` where the source does not have it any more."""
    records: Callable[[], Iterator[Record]]
    """What is to be written; may be asked more than once."""
    rewrite: bool = False
    """With ``add``: the thread's pending writes are replaced by those that the records hold."""

    @property
    def inserts(self) -> bool:
        """Whether rows are written: the ledger notes their keys."""
        return self.kind in ("add", "replace")

    @property
    def forgets(self) -> str:
        """The kinds of keys of which nothing counts that was noted before."""
        if self.kind == "add":
            return "w" if self.rewrite else ""
        return "" if self.kind == "keep" else "cvw"

    def require(self, stamp: str | None, checkpoints: int, writes: int, label: str) -> None:
        """Raise where the target is not as the run left the thread; it is told what is there now.

        Raises:
            ConflictError: Somebody else has written to it.
        """
        known = self.before
        there = (checkpoints, writes)
        is_new = known is None and stamp is None and there == (0, 0)
        is_known = known is not None and stamp == known.text and (not stamp or there == known[2:])
        if not (is_new or is_known):
            raise ConflictError(
                f"thread {self.thread_id!r} in {label} is not as this transfer left it, or was there before",
                hint="nothing else may write to these threads until the cut-over; delete them from the target"
                " or move into another database, schema or file",
            )


class Snapshot(Source, Protocol):
    """One state of a source that goes on changing."""

    def stamps(self) -> Iterator[Stamp]:
        """Every thread, in order."""

    def keys(self) -> Iterator[Stamp]:
        """As :meth:`stamps`, but quicker, and only with the part that :attr:`Stamp.keys` gives."""

    def stamp(self, thread: str) -> Stamp:
        """One thread's, which must be there."""

    def kept(self, before: Stamp) -> tuple[bool, bool]:
        """Whether the rows that a stamp speaks of are all still there: checkpoints, and writes."""

    def since(self, before: Stamp, *, all_writes: bool) -> Iterator[Record]:
        """The records of a thread that came after a stamp; or all of its writes."""

    def noted(self, after: int) -> tuple[set[str], int]:
        """Threads with a row that was changed in place or deleted under a watch, and how far that goes."""

    def shape(self) -> int:
        """Changes when the file was rebuilt, which makes stamps worthless."""

    def live_store(self) -> LiveStore:
        """The store in it."""


class Locked(Snapshot, Protocol):
    """The last state of a source: nobody can write to it."""

    began: float
    """When writers had to wait first, by ``time.monotonic()``."""

    def seal(self, target: str) -> None:
        """Refuse writes from the end of this transaction on, and say where the data has moved."""

    def unwatch(self) -> None:
        """As :meth:`LiveSource.unwatch`, in this transaction."""


class LiveSource(Protocol):
    """A source that goes on changing. Opening it changes nothing in it."""

    label: str
    name: str
    """What it is called wherever it is opened from; the ledger is bound to it."""

    def version(self) -> int:
        """Another number whenever somebody has written."""

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """The state that it has now."""

    def require(self, parts: Collection[Part], *, sealing: bool) -> None:
        """Raise where a cut-over of these parts cannot be, before it begins.

        Raises:
            TransferError: A right is lacking that :meth:`locked` or, if it is wanted, the seal needs.
            ConnectError: It can only be read, or not be locked.
        """

    def watch(self) -> None:
        """A cut-over of the threads begins: note what stamps may not show; see :meth:`Snapshot.noted`."""

    def watch_store(self) -> None:
        """As :meth:`watch`, for the items of the store; ``unwatch`` ends both."""

    def unwatch(self) -> None:
        """End the watch, and forget its notes."""

    def locked(self) -> AbstractContextManager[Locked]:
        """Keep everybody else from writing to what is watched; what the block does is committed at its end.

        Raises:
            ConnectError: Somebody is writing and does not finish.
        """

    def sealed(self) -> bool:
        """Whether it refuses writes."""

    def unseal(self) -> bool:
        """Allow writes again; whether they were refused."""


class Follower(Protocol):
    """A target and the threads in it that one run has brought."""

    def claims(self, after: str | None, limit: int) -> list[Stamp]:
        """The next threads of this run, in order, with the stamps they were last brought up to."""

    def claim(self, stamps: Sequence[Stamp]) -> None:
        """Note threads of this run: with an empty stamp before they are brought, with theirs afterwards."""

    def apply(self, changes: Sequence[Change]) -> None:
        """Carry out changes, and note the stamps, in one transaction.

        Raises:
            ConflictError: A thread is not as this run left it.
        """

    def held(self, checkpoints: Collection[Place], writes: Collection[Place]) -> Iterator[Checkpoint | Write]:
        """Some checkpoints, and all writes of some: as the target holds them now, without data."""

    def miscounted(self) -> list[str]:
        """Threads of this run, the first few, that do not have as many rows as their stamp says."""


def claim_pages(
    claims: Callable[[KeyT | None, int], list[ClaimT]],
    key: Callable[[ClaimT], KeyT],
    limit: int = CLAIMS_AT_ONCE,
) -> Iterator[list[ClaimT]]:
    """All that a run has claimed, some at a time, in order.

    Args:
        claims: Gives the next ones after a key, such as :meth:`Follower.claims`.
        key: What a claim is sorted by.
        limit: How many at a time.
    """
    last: KeyT | None = None
    while page := claims(last, limit):
        yield page
        last = key(page[-1])


def claimed(tables: Tables, run_id: str, after: str | None, limit: int) -> list[Stamp]:
    """See :meth:`Follower.claims`; the same query on every database."""
    rows = tables.query(
        "SELECT thread_id, stamp, checkpoints, writes FROM persistence_followed WHERE run_id = ?"
        f" {'' if after is None else 'AND thread_id > ?'} ORDER BY thread_id LIMIT {limit}",
        [run_id] if after is None else [run_id, after],
    )
    return [Stamp(*row) for row in rows]

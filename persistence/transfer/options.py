"""What a transfer is asked to do beyond moving everything."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from persistence.transfer.selection import Selection

OnConflict = Literal["error", "skip", "replace", "merge"]
OnReject = Literal["stop", "set-aside"]
Part = Literal["checkpoints", "store"]
THREADS: tuple[Part, ...] = ("checkpoints",)


@dataclass(frozen=True, slots=True)
class Options:
    """The choices of one transfer; the defaults move everything and change nothing that is there.

    Attributes:
        select: Which threads; all by default.
        on_conflict: What to do about threads that the target has already. ``error``: refuse before
            anything is written. ``skip``: leave them as they are. ``replace``: delete them, each with the
            first of its batches. ``merge``: add the rows that they lack; refuse where a row has another
            content.
            Items of the store: ``skip`` keeps the target's, ``replace`` takes the source's, ``merge`` the one
            that was updated last.
        on_reject: What to do about rows that cannot be moved. ``stop``: refuse before anything is written.
            ``set-aside``: move the others, and keep these in the target's ledger.
        allow_pickle: Move rows that are pickled. To read them from SQLite runs the code that they name.
        decrypt: Write values that were encrypted as plaintext, into the target or an archive.
        max_mbps: Write at most so many megabytes of content in a second; ``None`` is no limit.
        workers: Processes that read, write into Postgres and compare; ``None`` leaves it to the settings.
        include: ``checkpoints``, which is the threads, and ``store``, all of it.
        vectors: Whether the store's items bring the embeddings of their fields.
    """

    select: Selection = field(default_factory=Selection)
    on_conflict: OnConflict = "error"
    on_reject: OnReject = "stop"
    allow_pickle: bool = False
    decrypt: bool = False
    max_mbps: float | None = None
    workers: int | None = None
    include: Collection[Part] = THREADS
    vectors: bool = True

"""What a transfer is asked to do beyond moving everything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from persistence.transfer.selection import Selection

OnConflict = Literal["error", "skip", "replace", "merge"]


@dataclass(frozen=True, slots=True)
class Options:
    """The choices of one transfer; the defaults move everything and change nothing that is there.

    Attributes:
        select: Which threads; all by default.
        on_conflict: What to do about threads that the target has already. ``error``: refuse before
            anything is written. ``skip``: leave them as they are. ``replace``: delete them, each with the
            first of its batches. ``merge``: add the rows that they lack; refuse where a row has another
            content.
        allow_pickle: Move rows that are pickled. To read them from SQLite runs the code that they name.
        decrypt: Write values that were encrypted as plaintext, into the target or an archive.
        max_mbps: Write at most so many megabytes of content in a second; ``None`` is no limit.
        workers: Processes that write into Postgres at once; ``None`` leaves it to the settings.
    """

    select: Selection = field(default_factory=Selection)
    on_conflict: OnConflict = "error"
    allow_pickle: bool = False
    decrypt: bool = False
    max_mbps: float | None = None
    workers: int | None = None

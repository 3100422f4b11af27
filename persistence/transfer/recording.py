"""What the first reading of a source made of it, kept for the second pass: finished rows, and their ledger.

It is a file without a name, which the system removes with the processes that have it open, however they end.
Whatever is not in it is read from the source again: threads that were not to be moved as they came, what did
not fit, and all of a source or target that is encrypted, since the file holds plaintext.
"""

from __future__ import annotations

import fcntl
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import msgspec

from persistence.errors import TransferError
from persistence.transfer.chunks import Chunk
from persistence.transfer.digest import ThreadDigest
from persistence.transfer.keys import plain_keys
from persistence.transfer.records import Preflight, Source

LIMIT = 2_000_000_000
"""Bytes that a recording takes at most; and never more than it leaves free."""
PART_BYTES = 1_000_000
"""Content of a part: so much of it is in memory at once."""
_LARGE = 4_000_000
"""A thread with a larger record is read twice: it would be in memory several times."""

Place = tuple[int, int]
"""Where a part stands in the file, and its bytes."""


class Part(msgspec.Struct, array_like=True):
    """Some records of one thread, following each other, as they are written."""

    kinds: str = ""
    """A letter for each, as in :class:`persistence.transfer.keys.Key`."""
    sizes: list[int] = []
    """Bytes of content."""
    weights: list[int] = []
    """How much each counts for the size of a batch."""
    lines: list[bytes] = []
    """For digests."""
    keys: list[msgspec.Raw] = []
    """For the ledger; ``None`` where it gets none. Read back, they are not decoded."""
    rows: list[Any] = []
    """What the sink made of the record; ``None`` where nothing is written."""

    def add(self, kind: str, key: Any, size: int, weight: int, text: bytes, row: Any) -> None:
        """One more; its key comes as ``None`` where the ledger gets none."""
        self.kinds += kind
        self.sizes.append(size)
        self.weights.append(weight)
        self.lines.append(text)
        self.keys.append(key)
        self.rows.append(row)

    def extend(
        self, keys: Sequence[Any], sizes: Sequence[int], lines: Sequence[bytes], rows: Sequence[Any]
    ) -> None:
        """Some more, of which the ledger gets all keys."""
        self.kinds += "".join([key[0] for key in keys])
        self.sizes += sizes
        self.weights += sizes
        self.lines += lines
        self.keys += keys
        self.rows += rows


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Part).decode


@dataclass(frozen=True, slots=True)
class Recording:
    """The file, which all processes of a transfer append to and read from."""

    fd: int

    def append(self, part: Part) -> Place | None:
        """Keep a part; gives where, or nothing where there is no room."""
        data = _encode(part)
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX)
            try:
                start, disk = os.lseek(self.fd, 0, os.SEEK_END), os.fstatvfs(self.fd)
                if start + len(data) > min(LIMIT, disk.f_bavail * disk.f_frsize):
                    return None
                return (start, len(data)) if os.pwrite(self.fd, data, start) == len(data) else None
            finally:
                fcntl.lockf(self.fd, fcntl.LOCK_UN)
        except OSError:
            return None

    def parts(self, places: Sequence[Place]) -> Iterator[Part]:
        """What was kept there.

        Raises:
            TransferError: It cannot be read.
        """
        try:
            for start, size in places:
                yield _decode(os.pread(self.fd, size, start))
        except (OSError, msgspec.MsgspecError) as error:
            raise TransferError(
                f"the temporary file of the transfer cannot be read: {error}",
                hint="run the command again: it goes on where it stopped",
            ) from None


@runtime_checkable
class Finishing(Preflight, Protocol):
    """A preflight that knows how the rows will look."""

    finishes: bool
    """Whether it does."""

    @property
    def as_it_came(self) -> bool:
        """Whether that was so for the thread of the last :meth:`end_thread`."""

    def rows(self, chunk: Chunk) -> Sequence[Any]:
        """What a sink makes of the records of a thread that is as it came."""


class Ahead(Protocol):
    """Writes parts at once; see :class:`persistence.transfer.ahead.Ahead`."""

    def take(self, thread: str, part: Part) -> bool:
        """The next part of a thread; gives whether it is taken."""

    def spoil(self) -> None:
        """The thread is not written as it was given."""


class Recorder:
    """Records threads while they are read; see :class:`persistence.transfer.reading.Copyist`.

    Args:
        preflight: What makes the rows.
        recording: Where they are kept.
        ahead: What writes them at once, as long as it can.
    """

    def __init__(self, preflight: Finishing, recording: Recording | None, ahead: Ahead | None = None) -> None:
        self._preflight = preflight
        self._recording = recording
        self._ahead = ahead
        self._full = False
        self._thread = ""
        self._part, self._bytes, self._given_up = Part(), 0, False
        self._places: list[Place] = []
        self._is_written = False

    def add(self, chunk: Chunk, lines: Sequence[bytes]) -> None:
        """The next records."""
        if self._given_up:
            return
        if chunk.reject is not None or max(chunk.sizes) > _LARGE:
            self._given_up = True
            return
        try:
            rows = self._preflight.rows(chunk)
        except (ValueError, struct.error):  # no target could hold it, as the preflight says
            self._given_up = True
            return
        self._thread = chunk.thread_id
        self._part.extend(plain_keys(chunk), chunk.sizes, lines, rows)
        self._bytes += sum(chunk.sizes)
        if self._bytes >= PART_BYTES:
            self._keep()

    def end_thread(self, digest: ThreadDigest) -> list[Place] | None:
        """The thread is complete; gives where it is kept."""
        is_good = not self._given_up and self._preflight.as_it_came
        if is_good and self._part.kinds:
            self._keep()
        if self._ahead is not None and not is_good:
            self._ahead.spoil()
        kept = None if not is_good or self._given_up or self._is_written else self._places
        self._part, self._bytes, self._given_up, self._places = Part(), 0, self._full, []
        self._is_written = False
        return kept

    def _keep(self) -> None:
        part, self._part, self._bytes = self._part, Part(), 0
        if self._ahead is not None and self._ahead.take(self._thread, part):
            self._is_written = True
        elif self._is_written:  # what came before was not kept here
            self._given_up = True
        elif self._recording is not None and (place := self._recording.append(part)) is not None:
            self._places.append(place)
        else:
            self._full = self._given_up = True


def recorder(
    recording: Recording | None, preflight: Preflight, ahead: Ahead | None = None
) -> Recorder | None:
    """What records threads that this preflight sees, if it can."""
    if not isinstance(preflight, Finishing) or not preflight.finishes:
        return None
    return Recorder(preflight, recording, ahead) if recording is not None or ahead is not None else None


@contextmanager
def recorded(source: Source, lend: Callable[[int], None]) -> Iterator[Recording | None]:
    """A file to record a source into; none where that is better not done.

    Args:
        source: What will be read.
        lend: Told the file, for other processes to have it too.
    """
    file = None
    if source.divisible and not source.encrypted:
        with suppress(OSError):
            file = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    if file is None:
        yield None
        return
    with file:
        lend(file.fileno())
        yield Recording(file.fileno())

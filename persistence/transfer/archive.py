"""Reads an archive, which may come from anybody.

Nothing is decompressed before its checksum matched, no name in the archive is followed, no record is
believed: sizes are limited, hashes are computed, what a checkpoint refers to must be there.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeVar

import msgspec
import zstandard
from msgspec.msgpack import Decoder

from persistence.errors import ArchiveError
from persistence.transfer import archive_format as fmt
from persistence.transfer.archive_reader import Reader, damaged
from persistence.transfer.archive_store import ArchiveStore
from persistence.transfer.formats import is_known, unknown
from persistence.transfer.records import Checkpoint, Record, Reject, Value, Write
from persistence.transfer.workers import Open

_CHUNK = 1 << 20
Frame = TypeVar("Frame")


class ArchiveSource:
    """An archive as the source of a transfer. A context manager."""

    database = None
    divisible = False
    encrypted = False

    def __init__(
        self, folder: Path, manifest: fmt.Manifest | None = None, *, allow_pickle: bool = True
    ) -> None:
        self.label = f"archive {folder}"
        self._folder = folder
        self._allow_pickle = allow_pickle
        self._given = manifest

    def __enter__(self) -> ArchiveSource:
        self.manifest = self._given or fmt.read_manifest(self._folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @property
    def size(self) -> int:
        """See :class:`persistence.transfer.records.Source`; its content, not compressed."""
        return self.manifest.totals.bytes

    @property
    def converted(self) -> int:
        """See :class:`persistence.transfer.records.Source`; an archive holds no JSON."""
        return 0

    def drift(self) -> list[str]:
        """See :class:`persistence.transfer.records.Source`; it has no tables."""
        return []

    def share(self) -> Open:
        """See :mod:`persistence.transfer.workers`; the manifest's checksums are what holds it together."""
        return partial(ArchiveSource, self._folder, self.manifest, allow_pickle=self._allow_pickle)

    @property
    def identity(self) -> str:
        """See :class:`persistence.transfer.records.Source`; another content is another archive."""
        return f"archive:{self.manifest.checksum}"

    @property
    def place(self) -> str:
        """See :class:`persistence.transfer.records.Source`."""
        return self.identity

    def marks(self, after: str | None, upto: str) -> list[int]:
        """See :class:`persistence.transfer.records.Source`; the identity says all."""
        return []

    def official(self) -> None:
        """See :class:`persistence.transfer.records.Source`."""

    def threads(self) -> Iterator[str]:
        """See :class:`persistence.transfer.records.Source`."""
        last: str | None = None
        count = 0
        for part in self.manifest.parts:
            for frame in self.frames(part, fmt.decoder):
                if isinstance(frame, fmt.ThreadFrame) and not frame.continued:
                    if last is not None and frame.thread_id <= last:
                        raise damaged(self.label, part, f"thread {frame.thread_id!r} is out of order")
                    last = frame.thread_id
                    count += 1
                    yield last
        if count != self.manifest.totals.threads:
            raise ArchiveError(f"{self.label} does not hold what its manifest says")

    def count(self, threads: Sequence[str] | None = None) -> int:
        """See :class:`persistence.transfer.records.Source`; for all, what the manifest says."""
        if threads is None:
            return self.manifest.totals.checkpoints
        return sum(isinstance(record, Checkpoint) for record in self.records(threads, data=False))

    def records(self, threads: Sequence[str] | None = None, *, data: bool = True) -> Iterator[Record]:
        """See :class:`persistence.transfer.records.Source`.

        Raises:
            ArchiveError: The archive is damaged.
        """
        numbers: Sequence[int] = range(len(self.manifest.parts))
        if threads is not None:
            ordered, parts = sorted(threads), self.manifest.parts
            numbers = [
                n for n in numbers if _has_between(ordered, parts[n].first_thread, parts[n].last_thread)
            ]
        reader = Reader(self.label, None if threads is None else set(threads))
        for number in numbers:
            for record in self._read(reader, number):
                if data:
                    yield record
                elif isinstance(record, Write):
                    yield record._replace(data=None)
                elif not isinstance(record, Value):
                    yield record
        reader.end(self.manifest)

    def begun_in(self, number: int) -> Iterator[Record]:
        """The records of the threads that begin in a part, given by its index; the last may end later.

        Raises:
            ArchiveError: The archive is damaged.
        """
        reader = Reader(self.label, None, whole=False)
        for each in range(number, len(self.manifest.parts)):
            yield from self._read(reader, each)
            if not reader.within_thread:
                break
            reader.wanted = {self.manifest.parts[each].last_thread}
        reader.end(self.manifest)

    def _read(self, reader: Reader, number: int) -> Iterator[Record]:
        """The records of one part."""
        part = self.manifest.parts[number]
        before = self.manifest.parts[number - 1] if number else None
        for record in reader.records(part, self.frames(part, fmt.decoder), before):
            known = all(is_known(type_, allow_pickle=self._allow_pickle) for type_ in _types(record))
            yield record if known else _reject(record)

    def check_part(self, part: fmt.StorePart) -> None:
        """Compare a part's size and checksum with the manifest; nothing is decompressed.

        Raises:
            ArchiveError: They do not match.
        """
        with fmt.open_regular(self._folder, part.file) as file:
            self._check(part, file)

    def store(self) -> ArchiveStore:
        """See :class:`persistence.transfer.records.Source`."""
        return ArchiveStore(self)

    def frames(self, part: fmt.StorePart, decoder: Decoder[Frame]) -> Iterator[Frame]:
        """What is in one part.

        Raises:
            ArchiveError: The part is damaged.
        """
        with fmt.open_regular(self._folder, part.file) as file:
            self._check(part, file)
            try:
                yield from self._decoded(part, file, decoder)
            except zstandard.ZstdError as error:
                raise ArchiveError(f"{part.file} of {self.label} cannot be decompressed: {error}") from None
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise ArchiveError(f"{part.file} of {self.label} holds no valid record: {error}") from None

    def _check(self, part: fmt.StorePart, file: BinaryIO) -> None:
        digest, size = hashlib.sha256(), 0
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            if size > part.bytes:
                break
            digest.update(chunk)
        if size != part.bytes:
            raise ArchiveError(
                f"{part.file} of {self.label} does not have the {part.bytes} bytes it should have"
            )
        if digest.hexdigest() != part.sha256:
            raise ArchiveError(f"{part.file} of {self.label} is damaged: its checksum does not match")
        file.seek(0)

    def _decoded(self, part: fmt.StorePart, file: BinaryIO, decoder: Decoder[Frame]) -> Iterator[Frame]:
        decompressor = zstandard.ZstdDecompressor(max_window_size=fmt.MAX_WINDOW_BYTES)
        with decompressor.stream_reader(file, read_across_frames=True, closefd=False) as raw:
            left, count = part.raw_bytes, 0
            while head := _read(raw, 5):
                length = int.from_bytes(head[1:])
                if len(head) < 5 or head[0] != fmt.FRAME_MARK:
                    raise ArchiveError(f"{part.file} of {self.label} holds something that is no record")
                left -= 5 + length
                if length > fmt.MAX_RECORD_BYTES or left < 0:
                    raise ArchiveError(f"{part.file} of {self.label} holds more than its manifest says")
                data = _read(raw, length)
                if len(data) < length:
                    raise ArchiveError(f"{part.file} of {self.label} ends within a record")
                count += 1
                yield decoder.decode(data)
        if left or count != part.records:
            raise ArchiveError(f"{part.file} of {self.label} holds less than its manifest says")


def _types(record: Value | Checkpoint | Write) -> Iterator[str]:
    """The serializer's types of the data in a record."""
    if isinstance(record, Checkpoint):
        yield from (ref.type for ref in record.values if ref.data is not None)
    else:
        yield record.type


def _reject(record: Value | Checkpoint | Write) -> Reject:
    where = "" if isinstance(record, Value) else record.checkpoint_id
    return Reject(*record[:2], where, unknown("record", ", ".join(_types(record))))


def _read(raw: zstandard.ZstdDecompressionReader, size: int) -> bytes | bytearray:
    """Exactly ``size`` bytes, or what there is; memory grows with what there is, not with ``size``."""
    first = raw.read(min(size, _CHUNK))
    if len(first) == size or not first:
        return first
    data = bytearray(first)
    while len(data) < size and (chunk := raw.read(min(size - len(data), _CHUNK))):
        data += chunk
    return data


def _has_between(ordered: Sequence[str], first: str, last: str) -> bool:
    at = bisect_left(ordered, first)
    return at < len(ordered) and ordered[at] <= last

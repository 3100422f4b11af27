"""Reads an archive, which may come from anybody.

Nothing is decompressed before its checksum matched, no name in the archive is followed, no record is
believed: sizes are limited, hashes are computed, what a checkpoint refers to must be there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import msgspec
import zstandard

from persistence.errors import ArchiveError
from persistence.transfer import archive_format as fmt
from persistence.transfer.canonical import NotCanonicalError, canonical_value, decode_json, version_text
from persistence.transfer.digest import Digester, Fingerprint
from persistence.transfer.records import Checkpoint, Record, Value, ValueRef, Write
from persistence.transfer.report import Totals
from persistence.transfer.workers import Open

_CHUNK = 1 << 20


class ArchiveSource:
    """An archive as the source of a transfer. A context manager."""

    database = None

    def __init__(self, folder: Path, manifest: fmt.Manifest | None = None) -> None:
        self.label = f"archive {folder}"
        self._folder = folder
        self._given = manifest

    def __enter__(self) -> ArchiveSource:
        self.manifest = self._given or fmt.read_manifest(self._folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def drift(self) -> list[str]:
        """See :class:`persistence.transfer.records.Source`; it has no tables."""
        return []

    def share(self) -> Open:
        """See :mod:`persistence.transfer.workers`; the manifest's checksums are what holds it together."""
        return partial(ArchiveSource, self._folder, self.manifest)

    def threads(self) -> Iterator[str]:
        """See :class:`persistence.transfer.records.Source`."""
        for thread, _ in groupby(self.records(data=False), key=attrgetter("thread_id")):
            yield thread

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
        if threads is None:
            parts = self.manifest.parts
            reader = _Reader(self.label, Fingerprint())
        else:
            wanted = set(threads)
            parts = [
                part
                for part in self.manifest.parts
                if any(part.first_thread <= thread <= part.last_thread for thread in wanted)
            ]
            reader = _Reader(self.label, None)
        for part in parts:
            for record in reader.records(part, self._frames(part)):
                if threads is not None and record.thread_id not in wanted:
                    continue
                if data:
                    yield record
                elif isinstance(record, Write):
                    yield record._replace(data=None)
                elif not isinstance(record, Value):
                    yield record
        if threads is None:
            reader.end(self.manifest)

    def _frames(self, part: fmt.Part) -> Iterator[fmt.Frame]:
        with fmt.open_regular(self._folder, part.file) as file:
            self._check(part, file)
            try:
                yield from self._decoded(part, file)
            except zstandard.ZstdError as error:
                raise ArchiveError(f"{part.file} of {self.label} cannot be decompressed: {error}") from None
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise ArchiveError(f"{part.file} of {self.label} holds no valid record: {error}") from None

    def _check(self, part: fmt.Part, file: BinaryIO) -> None:
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

    def _decoded(self, part: fmt.Part, file: BinaryIO) -> Iterator[fmt.Frame]:
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
                yield fmt.decoder.decode(data)
        if left or count != part.records:
            raise ArchiveError(f"{part.file} of {self.label} holds less than its manifest says")


def _read(raw: zstandard.ZstdDecompressionReader, size: int) -> bytes:
    """Exactly ``size`` bytes, or what there is; memory grows with what there is, not with ``size``."""
    first = raw.read(min(size, _CHUNK))
    if len(first) == size or not first:
        return first
    data = bytearray(first)
    while len(data) < size and (chunk := raw.read(min(size - len(data), _CHUNK))):
        data += chunk
    return bytes(data)


class _Reader:
    """Turns frames into records, and checks all that the archive claims about them."""

    def __init__(self, label: str, fingerprint: Fingerprint | None) -> None:
        self._label = label
        self._fingerprint = fingerprint
        self._thread: str | None = None
        self._last_ended: str | None = None
        self._digester = Digester()
        self._ns: str | None = None
        self._sent: set[tuple[str, str, str, bytes]] = set()
        self._totals = Totals()

    def records(self, part: fmt.Part, frames: Iterator[fmt.Frame]) -> Iterator[Record]:
        """The records of one part."""
        first = True
        for frame in frames:
            match frame:
                case fmt.ThreadFrame():
                    self._begin(frame, part, first=first)
                case fmt.EndFrame():
                    self._end(frame, part)
                case _:
                    if self._thread is None:
                        raise self._damaged(part, "a record belongs to no thread")
                    record = self._record(self._thread, frame, part)
                    if self._fingerprint is not None:
                        self._digester.see(record)
                    yield record
            first = False

    def end(self, manifest: fmt.Manifest) -> None:
        """All parts were read: what was in them must be what the manifest says."""
        if self._thread is not None:
            raise ArchiveError(f"{self._label} ends within thread {self._thread!r}")
        mine, claimed = self._totals, manifest.totals
        if (mine.threads, mine.checkpoints, mine.writes, mine.values) != (
            claimed.threads,
            claimed.checkpoints,
            claimed.writes,
            claimed.values,
        ) or (self._fingerprint is not None and self._fingerprint.hexdigest() != manifest.fingerprint):
            raise ArchiveError(f"{self._label} does not hold what its manifest says")

    def _begin(self, frame: fmt.ThreadFrame, part: fmt.Part, *, first: bool) -> None:
        if frame.continued:
            # Reading some threads may begin in the middle of one that is not wanted.
            if not first or (self._fingerprint is not None and frame.thread_id != self._thread):
                raise self._damaged(part, f"thread {frame.thread_id!r} continues nothing")
            if self._thread is None or self._thread != frame.thread_id:
                self._thread, self._ns = frame.thread_id, None
            return
        if self._fingerprint is not None and self._thread is not None:
            raise self._damaged(part, f"thread {self._thread!r} does not end")
        if self._last_ended is not None and frame.thread_id <= self._last_ended:
            raise self._damaged(part, f"thread {frame.thread_id!r} is out of order")
        self._thread, self._ns = frame.thread_id, None
        self._sent.clear()
        self._digester = Digester()

    def _end(self, frame: fmt.EndFrame, part: fmt.Part) -> None:
        if self._thread is None:
            raise self._damaged(part, "an end belongs to no thread")
        if self._fingerprint is not None:
            digest = self._digester.end()
            if digest is None or tuple(digest[1:]) != (frame.sha256, frame.checkpoints, frame.writes):
                raise self._damaged(part, f"thread {self._thread!r} does not have the digest it should have")
            self._fingerprint.see(digest)
            self._totals.threads += 1
        self._last_ended, self._thread = self._thread, None

    def _record(self, thread: str, frame: fmt.Frame, part: fmt.Part) -> Value | Checkpoint | Write:
        match frame:
            case fmt.ValueFrame():
                self._enter(frame.checkpoint_ns)
                digest = hashlib.sha256(frame.data).digest()
                self._sent.add((frame.channel, frame.version, frame.type, digest))
                self._totals.values += 1
                return Value(
                    thread, frame.checkpoint_ns, frame.channel, frame.version, frame.type, digest, frame.data
                )
            case fmt.WriteFrame():
                digest = hashlib.sha256(frame.data).digest()
                self._totals.writes += 1
                return Write(
                    thread,
                    frame.checkpoint_ns,
                    frame.checkpoint_id,
                    frame.task_id,
                    frame.idx,
                    frame.task_path,
                    frame.channel,
                    frame.type,
                    digest,
                    frame.data,
                )
            case fmt.CheckpointFrame():
                self._enter(frame.checkpoint_ns)
                self._totals.checkpoints += 1
                try:
                    return self._checkpoint(thread, frame, part)
                except NotCanonicalError as error:
                    raise self._damaged(part, f"checkpoint {frame.checkpoint_id!r}: {error}") from None
        raise self._damaged(part, "a record of no known kind")

    def _checkpoint(self, thread: str, frame: fmt.CheckpointFrame, part: fmt.Part) -> Checkpoint:
        body, metadata = decode_json(frame.body), decode_json(frame.metadata)
        if canonical_value(body) != frame.body or canonical_value(metadata) != frame.metadata:
            raise NotCanonicalError("its JSON is not canonical")
        if not isinstance(body, dict) or "channel_values" in body:
            raise NotCanonicalError("its body is not a checkpoint's")
        named = body.get("channel_versions", {})
        if not isinstance(named, dict):
            raise NotCanonicalError("channel_versions is not a map")
        versions = {channel: version_text(version) for channel, version in named.items()}
        refs = tuple(self._ref(ref, versions) for ref in frame.values)
        if [ref.channel for ref in refs] != sorted({ref.channel for ref in refs}):
            raise NotCanonicalError("its channels are not sorted")
        return Checkpoint(
            thread,
            frame.checkpoint_ns,
            frame.checkpoint_id,
            frame.parent_id,
            frame.body,
            frame.metadata,
            versions,
            refs,
        )

    def _ref(self, ref: ValueRef, versions: Mapping[str, str]) -> ValueRef:
        if ref.version != versions.get(ref.channel):
            raise NotCanonicalError(f"channel {ref.channel!r} is not at the version it should have")
        if ref.data is not None:
            if hashlib.sha256(ref.data).digest() != ref.sha256:
                raise NotCanonicalError(f"the value of channel {ref.channel!r} does not have its hash")
        elif (
            ref.version is None or (ref.channel, ref.version, ref.type, ref.sha256) not in self._sent
        ) and self._fingerprint is not None:
            raise NotCanonicalError(f"the value of channel {ref.channel!r} is missing")
        return ref

    def _enter(self, ns: str) -> None:
        if ns != self._ns:
            self._ns = ns
            self._sent.clear()

    def _damaged(self, part: fmt.Part, what: str) -> ArchiveError:
        return ArchiveError(f"{part.file} of {self._label} is damaged: {what}")

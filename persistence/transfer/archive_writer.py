"""Writes an archive: bounded parts, each on disk before the next begins, and the manifest last."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import msgspec
import zstandard
from msgspec import UNSET

from persistence.errors import ArchiveError
from persistence.transfer import archive_format as fmt
from persistence.transfer.archive_store import StoreWriter
from persistence.transfer.chunks import Chunk
from persistence.transfer.digest import ThreadDigest
from persistence.transfer.records import Checkpoint, Record, Value, Write
from persistence.transfer.report import StoreTotals, Totals

_LEVEL = 3
_FLUSH_BYTES = 1_000_000


class ArchiveWriter:
    """A new archive. A context manager: leaving it by an error removes what was written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: list[fmt.Part] = []
        self._open: PartWriter | None = None
        self._thread: str | None = None
        self._store: StoreWriter | None = None
        self._is_one = False

    def __enter__(self) -> ArchiveWriter:
        require_room(self._folder)
        self._created = _make(self._folder)
        self._lock = _lock(self._folder)
        try:
            require_room(self._folder)  # once more: another export may just have ended
            _clear(self._folder)
        except OSError as error:
            os.close(self._lock)
            raise ArchiveError(f"cannot make archive {self._folder}: {error.strerror}") from None
        except ArchiveError:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None:
            self._open.abort()
        if self._store is not None:
            self._store.abort()
        if error is not None and not self._is_one:
            _clear(self._folder)
            if self._created:
                self._folder.rmdir()
        os.close(self._lock)
        if isinstance(error, OSError):
            raise ArchiveError(f"cannot write archive {self._folder}: {error.strerror}") from None

    def add(self, chunk: Chunk, lines: Sequence[bytes]) -> None:
        """Append records; they come in the order of ``persistence.transfer.records``."""
        for record in chunk.records:
            self._append(record)

    def _append(self, record: Record) -> None:
        frame: fmt.Frame
        match record:
            case Value():
                frame = fmt.ValueFrame(
                    record.checkpoint_ns, record.channel, record.version, record.type, record.data
                )
            case Checkpoint():
                frame = fmt.CheckpointFrame(
                    record.checkpoint_ns,
                    record.checkpoint_id,
                    record.parent_id,
                    record.body,
                    record.metadata,
                    list(record.values),
                )
            case Write():
                frame = fmt.WriteFrame(*record[1:7], record.type, record.data or b"")
            case _:
                return
        self._part_for(record.thread_id).frame(frame)

    def end_thread(self, digest: ThreadDigest) -> None:
        """Close a thread with its digest."""
        self._part_for(digest.thread_id).frame(fmt.EndFrame(digest.sha256, digest.checkpoints, digest.writes))

    def store(self) -> StoreWriter:
        """Begin the store; an archive has one if this was called."""
        self._store = StoreWriter(lambda name: PartWriter(self._folder, name))
        return self._store

    def finish(
        self, source: str, fingerprint: str, totals: Totals, items: StoreTotals, store_fingerprint: str
    ) -> None:
        """Write the manifest; only now the archive is one."""
        self._close_part()
        store = UNSET if self._store is None else self._store.finish(items, store_fingerprint)
        manifest = fmt.Manifest(
            format=fmt.FORMAT,
            version=fmt.VERSION if store is UNSET else fmt.STORE_VERSION,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            creator=f"langgraph-persistence {version('langgraph-persistence')}",
            source=source,
            fingerprint=fingerprint,
            totals=fmt.ManifestTotals(
                totals.threads, totals.checkpoints, totals.writes, totals.values, totals.bytes
            ),
            parts=self._parts,
            store=store,
        )
        temporary = self._folder / f"{fmt.MANIFEST}.tmp"
        data = fmt.manifest_bytes(manifest)
        if len(data) > fmt.MAX_MANIFEST_BYTES:
            raise ArchiveError(f"{len(self._parts)} parts are more than an archive can have")
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self._folder / fmt.MANIFEST)
        self._is_one = True  # what is interrupted now is not taken back: its parts belong to the manifest
        _sync_folder(self._folder)
        _sync_folder(self._folder.parent)

    def _part_for(self, thread: str) -> PartWriter:
        if self._open is not None and self._open.raw_bytes >= fmt.PART_BYTES:
            self._close_part()
        if self._open is None:
            self._open = PartWriter(self._folder, fmt.part_name(len(self._parts) + 1))
            self._open.begin(thread, continued=thread == self._thread)
        elif thread != self._thread:
            self._open.begin(thread, continued=False)
        self._thread = thread
        return self._open

    def _close_part(self) -> None:
        if self._open is not None:
            first, last = self._open.threads or ("", "")
            part = self._open.close()
            self._parts.append(fmt.Part(**msgspec.structs.asdict(part), first_thread=first, last_thread=last))
            self._open = None


class PartWriter:
    """One file of compressed frames."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name = name
        self._file: BinaryIO = (folder / name).open("xb")
        self._hash = hashlib.sha256()
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compressobj()
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._records = self._bytes = self.raw_bytes = 0
        self.threads: tuple[str, str] | None = None
        """The first and the last one."""

    def begin(self, thread: str, *, continued: bool) -> None:
        """What follows belongs to this thread."""
        self.threads = (self.threads[0] if self.threads else thread, thread)
        self.frame(fmt.ThreadFrame(thread, continued))

    def frame(self, frame: fmt.Frame | fmt.StoreFrame) -> None:
        """Append a record."""
        data = fmt.encoder.encode(frame)
        json = max(len(frame.body), len(frame.metadata)) if isinstance(frame, fmt.CheckpointFrame) else 0
        if len(data) > fmt.MAX_RECORD_BYTES or json > fmt.MAX_JSON_BYTES:
            raise ArchiveError(f"a record of {len(data)} bytes is larger than an archive can hold")
        self._pending += (bytes([fmt.FRAME_MARK]), len(data).to_bytes(4), data)
        self._pending_bytes += len(data) + 5
        self.raw_bytes += len(data) + 5
        self._records += 1
        if self._pending_bytes >= _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._write(self._compressor.compress(b"".join(self._pending)))
        self._pending.clear()
        self._pending_bytes = 0

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)

    def close(self) -> fmt.StorePart:
        """Have it on disk; what the manifest says of it."""
        self._flush()
        self._write(self._compressor.flush())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return fmt.StorePart(self._name, self._hash.hexdigest(), self._bytes, self.raw_bytes, self._records)

    def abort(self) -> None:
        """Give it up."""
        with suppress(OSError):  # a full disk: what was not written yet cannot be now either
            self._file.close()


def require_room(folder: Path) -> None:
    """Whether an archive can be made here; makes nothing.

    Raises:
        ArchiveError: There is one already, or something else.
    """
    try:
        if not folder.exists():
            return
        if not folder.is_dir():
            raise ArchiveError(f"{folder} exists and is not a folder")
        if (folder / fmt.MANIFEST).exists():
            raise ArchiveError(
                f"archive {folder} exists already", hint="name another folder, or delete this one"
            )
        if others := [path.name for path in folder.iterdir() if not _is_ours(path.name)]:
            raise ArchiveError(
                f"{folder} holds other files ({others[0]})", hint="name a folder that is empty or new"
            )
    except OSError as error:
        raise ArchiveError(f"cannot make archive {folder}: {error.strerror}") from None


def _make(folder: Path) -> bool:
    """Make the folder, if it is not there; whether it was made."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise ArchiveError(f"cannot make archive {folder}: {error.strerror}") from None
    return True


def _lock(folder: Path) -> int:
    """Keep other exports out of the folder. The kernel gives the lock up with the process that holds it.

    Raises:
        ArchiveError: One is under way.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ArchiveError(f"cannot make archive {folder}: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise ArchiveError(
            f"another export into archive {folder} is under way", hint="wait until it has ended"
        ) from None
    return fd


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if _is_ours(path.name):
            path.unlink()


def _is_ours(name: str) -> bool:
    return fmt.is_part_name(name) or name == f"{fmt.MANIFEST}.tmp"


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

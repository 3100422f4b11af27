"""The archive's format: the manifest, the frames in its parts, and what both may hold.

``docs/archive-format.md`` is the specification.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
from msgspec import UNSET, UnsetType

from persistence.errors import ArchiveError
from persistence.transfer.items import Vector, joint_fingerprint
from persistence.transfer.records import ValueRef

FORMAT = "langgraph-persistence archive"
VERSION = 1
STORE_VERSION = 2
"""The version of an archive with a store; without one it is still version 1."""
MANIFEST = "manifest.json"
PART_BYTES = 64_000_000
"""A part ends with the record that reaches this many bytes before compression."""
MAX_MANIFEST_BYTES = 16_000_000
"""Enough for some 40,000 parts."""
MAX_RECORD_BYTES = 1 << 30
"""More than any record has: a field of SQLite or Postgres ends at one gigabyte."""
MAX_PART_BYTES = 64_000_000 + MAX_RECORD_BYTES + 5
"""What a part may claim to hold before compression."""
MAX_JSON_BYTES = 16_000_000
"""Body and metadata of a checkpoint are decoded, which may take thirty times their size in memory."""
MAX_CHANNELS = 100_000
MAX_WINDOW_BYTES = 8 << 20
"""What decompression may keep of the past; the writer stays below."""
FRAME_MARK = 0xC6
"""A frame is one msgpack ``bin 32`` whose content is the record."""


class _Head(msgspec.Struct):
    """What says that a manifest is one, before the rest of it is made objects of."""

    format: str = ""
    version: int = 0
    store: msgspec.Raw | UnsetType = UNSET


class StorePart(msgspec.Struct, forbid_unknown_fields=True):
    """One file of items."""

    file: str
    sha256: str
    bytes: int
    raw_bytes: int
    records: int


class Part(StorePart, forbid_unknown_fields=True):
    """One file of the records of threads."""

    first_thread: str
    last_thread: str


class ManifestTotals(msgspec.Struct, forbid_unknown_fields=True):
    """How much the archive holds."""

    threads: int
    checkpoints: int
    writes: int
    values: int
    bytes: int


class Store(msgspec.Struct, forbid_unknown_fields=True):
    """The store in the archive."""

    fingerprint: str
    namespaces: int
    items: int
    vectors: int
    bytes: int
    parts: list[StorePart]


class Manifest(msgspec.Struct, forbid_unknown_fields=True):
    """The list of parts; written last, so an archive that has one is complete."""

    format: str
    version: int
    created: str
    creator: str
    source: str
    fingerprint: str
    totals: ManifestTotals
    parts: list[Part]
    store: Store | UnsetType = UNSET
    checksum: str = ""

    @property
    def content(self) -> str:
        """The fingerprint of threads and store together."""
        if self.store is UNSET:
            return self.fingerprint
        return joint_fingerprint(self.fingerprint, self.store.fingerprint, self.store.items)


class ThreadFrame(msgspec.Struct, array_like=True, tag_field="kind", tag="t", forbid_unknown_fields=True):
    """The records that follow belong to this thread; repeated at the start of a part."""

    thread_id: str
    continued: bool


class ValueFrame(msgspec.Struct, array_like=True, tag_field="kind", tag="v", forbid_unknown_fields=True):
    """A channel value."""

    checkpoint_ns: str
    channel: str
    version: str
    type: str
    data: bytes


class CheckpointFrame(msgspec.Struct, array_like=True, tag_field="kind", tag="c", forbid_unknown_fields=True):
    """A checkpoint; each value is (channel, version, type, sha256, data or nil, size, delta)."""

    checkpoint_ns: str
    checkpoint_id: str
    parent_id: str | None
    body: Annotated[bytes, msgspec.Meta(max_length=MAX_JSON_BYTES)]
    metadata: Annotated[bytes, msgspec.Meta(max_length=MAX_JSON_BYTES)]
    values: Annotated[list[ValueRef], msgspec.Meta(max_length=MAX_CHANNELS)]


class WriteFrame(msgspec.Struct, array_like=True, tag_field="kind", tag="w", forbid_unknown_fields=True):
    """A pending write."""

    checkpoint_ns: str
    checkpoint_id: str
    task_id: str
    idx: int
    task_path: str
    channel: str
    type: str
    data: bytes


class EndFrame(msgspec.Struct, array_like=True, tag_field="kind", tag="e", forbid_unknown_fields=True):
    """The thread is complete; its digest."""

    sha256: bytes
    checkpoints: int
    writes: int


class ItemFrame(msgspec.Struct, array_like=True, tag_field="kind", tag="i", forbid_unknown_fields=True):
    """An item of the store; each vector is (field, data, created_at, updated_at)."""

    prefix: str
    key: str
    value: bytes
    created_at: int | None
    updated_at: int | None
    expires_at: int | None
    ttl_minutes: float | None
    vectors: list[Vector]


class NamespaceFrame(msgspec.Struct, array_like=True, tag_field="kind", tag="n", forbid_unknown_fields=True):
    """The items of this namespace, which came before, are complete; their digest."""

    prefix: str
    sha256: bytes
    items: int


Frame = ThreadFrame | ValueFrame | CheckpointFrame | WriteFrame | EndFrame
encoder = msgspec.msgpack.Encoder()
decoder = msgspec.msgpack.Decoder(Frame)
StoreFrame = ItemFrame | NamespaceFrame
store_decoder = msgspec.msgpack.Decoder(StoreFrame)


def part_name(number: int) -> str:
    """The file name of a part, counted from 1."""
    return f"part-{number:06d}.msgpack.zst"


def store_part_name(number: int) -> str:
    """The file name of a part of the store, counted from 1."""
    return f"store-{number:06d}.msgpack.zst"


def is_part_name(name: str) -> bool:
    """Whether a file in an archive's folder is, or claims to be, a part."""
    return name.startswith(("part-", "store-")) and name.endswith(".msgpack.zst")


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as written, with its checksum."""
    manifest.checksum = manifest_checksum(manifest)
    return msgspec.json.format(msgspec.json.encode(manifest)) + b"\n"


def manifest_checksum(manifest: Manifest) -> str:
    """SHA-256 over the manifest as canonical JSON with an empty checksum."""
    bare = msgspec.structs.replace(manifest, checksum="")
    return hashlib.sha256(msgspec.json.encode(bare, order="deterministic")).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest, and that the folder has just the parts that it lists.

    Raises:
        ArchiveError: There is none, it is damaged, or of a version that is not known.
    """
    try:
        _require_folder(folder)
    except OSError as error:
        raise ArchiveError(f"archive {folder} cannot be read: {error.strerror}") from None
    with open_regular(folder, MANIFEST) as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise ArchiveError(f"the manifest of archive {folder} is too large")
    try:
        head = msgspec.json.decode(data, type=_Head)
        if head.format != FORMAT:
            raise ArchiveError(f"{folder} is not an archive of this package")
        if head.version != (VERSION if head.store is UNSET else STORE_VERSION):
            raise ArchiveError(
                f"archive {folder} has the format version {head.version}, which is not known",
                hint="read it with the version of this package that wrote it",
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ArchiveError(f"the manifest of archive {folder} is damaged: {error}") from None
    if manifest_checksum(manifest) != manifest.checksum:
        raise ArchiveError(f"the manifest of archive {folder} is damaged: its checksum does not match")
    _check_parts(folder, manifest)
    return manifest


def _require_folder(folder: Path) -> None:
    if not folder.exists():
        raise ArchiveError(f"archive {folder} does not exist")
    if not folder.is_dir():
        raise ArchiveError(f"{folder} is not an archive: an archive is a folder with a {MANIFEST}")
    if not (folder / MANIFEST).exists():
        hint = None
        if any(is_part_name(name) for name in os.listdir(folder)):  # noqa: PTH208 - names are enough
            hint = "the export did not end; run it again"
        raise ArchiveError(f"archive {folder} has no {MANIFEST}", hint=hint)


def _check_parts(folder: Path, manifest: Manifest) -> None:
    # Names are counted, not believed, so no name leads out of the folder.
    listed = [part.file for part in manifest.parts]
    expected = [part_name(number) for number in range(1, len(listed) + 1)]
    if manifest.store is not UNSET:
        items = [part.file for part in manifest.store.parts]
        listed += items
        expected += [store_part_name(number) for number in range(1, len(items) + 1)]
    if listed != expected:
        raise ArchiveError(f"the manifest of archive {folder} lists parts that are not numbered from 1")
    parts: list[StorePart] = [*manifest.parts, *(manifest.store.parts if manifest.store else ())]
    if any(part.raw_bytes > MAX_PART_BYTES for part in parts):
        raise ArchiveError(f"the manifest of archive {folder} lists a part that is larger than parts are")
    present = {name for name in os.listdir(folder) if is_part_name(name)}  # noqa: PTH208 - names are enough
    if missing := sorted(set(listed) - present):
        raise ArchiveError(f"archive {folder} lacks {missing[0]}")
    if extra := sorted(present - set(listed)):
        raise ArchiveError(f"archive {folder} has {extra[0]}, which its manifest does not list")


@contextmanager
def open_regular(folder: Path, name: str) -> Iterator[BinaryIO]:
    """Open a file of the archive for reading: a regular one, never through a symbolic link."""
    try:
        fd = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ArchiveError(f"cannot read {name} of archive {folder}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ArchiveError(f"{name} of archive {folder} is not a regular file")
    with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor, not a path
        yield file

"""Turns an archive's frames into records, and checks all that the archive claims about them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from persistence.errors import ArchiveError
from persistence.transfer import archive_format as fmt
from persistence.transfer.canonical import (
    NotCanonicalError,
    canonical_value,
    decode_json,
    is_delta,
    version_text,
)
from persistence.transfer.digest import Digester, Fingerprint
from persistence.transfer.records import Checkpoint, Value, ValueRef, Write
from persistence.transfer.report import Totals


class Reader:
    """Reads a whole archive, or some threads of some of its parts.

    Args:
        label: What messages call the archive.
        wanted: Only these threads; every other one is passed over.
        whole: All parts are read, from the first to the last.
    """

    def __init__(self, label: str, wanted: Collection[str] | None, *, whole: bool = True) -> None:
        self.wanted = wanted
        self._label = label
        self._whole = whole and wanted is None
        self._fingerprint = Fingerprint()
        self._thread: str | None = None
        self._skip = False
        self._last_begun: str | None = None
        self._digester = Digester()
        self._at: tuple[Any, ...] = ()
        self._ns: str | None = None
        self._sent: dict[tuple[str, str, str, bytes], tuple[int, bool]] = {}
        self._totals = Totals()

    @property
    def within_thread(self) -> bool:
        """A thread that is wanted has begun and not ended."""
        return self._thread is not None and not self._skip

    def records(
        self, part: fmt.Part, frames: Iterator[fmt.Frame], before: fmt.Part | None
    ) -> Iterator[Value | Checkpoint | Write]:
        """The records of one part; ``before`` is the part before it, read or not."""
        first, begun = True, ""
        for frame in frames:
            match frame:
                case fmt.ThreadFrame():
                    if first and frame.thread_id != part.first_thread:
                        raise self._damaged(part, f"it begins with thread {frame.thread_id!r}")
                    begun_before = before is not None and before.last_thread == frame.thread_id
                    if frame.continued and not (first and begun_before):
                        raise self._damaged(part, f"thread {frame.thread_id!r} continues nothing")
                    self._begin(frame, part, first=first)
                    begun = frame.thread_id
                case fmt.EndFrame():
                    self._end(frame, part)
                case _:
                    if self._thread is None:
                        raise self._damaged(part, "a record belongs to no thread")
                    if not self._skip:
                        record = self._record(self._thread, frame, part)
                        self._digester.see(record)
                        yield record
            first = False
        if first or begun != part.last_thread:
            raise self._damaged(part, f"it ends with thread {begun!r}")

    def end(self, manifest: fmt.Manifest) -> None:
        """All parts were read: what was in them must be what the manifest says."""
        if self.within_thread:
            raise ArchiveError(f"{self._label} ends within thread {self._thread!r}")
        mine, claimed = self._totals, manifest.totals
        if self._whole and (
            (mine.threads, mine.checkpoints, mine.writes, mine.values)
            != (claimed.threads, claimed.checkpoints, claimed.writes, claimed.values)
            or self._fingerprint.hexdigest() != manifest.fingerprint
        ):
            raise ArchiveError(f"{self._label} does not hold what its manifest says")

    def _begin(self, frame: fmt.ThreadFrame, part: fmt.Part, *, first: bool) -> None:
        thread = frame.thread_id
        if frame.continued:
            if first and thread == self._thread:
                return
            # A part that is not read holds the beginning, so this thread is not one that is wanted.
            if self._whole or self.within_thread:
                raise self._damaged(part, f"thread {thread!r} continues nothing")
            self._thread, self._skip = thread, True
            return
        if self._thread is not None and not (first and self._skip):
            raise self._damaged(part, f"thread {self._thread!r} does not end")
        if self._last_begun is not None and thread <= self._last_begun:
            raise self._damaged(part, f"thread {thread!r} is out of order")
        self._thread = self._last_begun = thread
        self._skip = self.wanted is not None and thread not in self.wanted
        self._at, self._ns = (), None
        self._sent.clear()
        self._digester = Digester()

    def _end(self, frame: fmt.EndFrame, part: fmt.Part) -> None:
        if self._thread is None:
            raise self._damaged(part, "an end belongs to no thread")
        if not self._skip:
            digest = self._digester.end()
            if digest is None or tuple(digest[1:]) != (frame.sha256, frame.checkpoints, frame.writes):
                raise self._damaged(part, f"thread {self._thread!r} does not have the digest it should have")
            self._fingerprint.see(digest)
            self._totals.threads += 1
        self._thread = None

    def _record(self, thread: str, frame: fmt.Frame, part: fmt.Part) -> Value | Checkpoint | Write:
        match frame:
            case fmt.ValueFrame():
                self._enter(frame.checkpoint_ns, part)
                digest = hashlib.sha256(frame.data).digest()
                delta = frame.type == "msgpack" and is_delta(frame.data[:6])
                self._sent[frame.channel, frame.version, frame.type, digest] = (len(frame.data), delta)
                self._totals.values += 1
                return Value(
                    thread, frame.checkpoint_ns, frame.channel, frame.version, frame.type, digest, frame.data
                )
            case fmt.WriteFrame():
                self._advance((1, frame.checkpoint_ns, frame.checkpoint_id, frame.task_id, frame.idx), part)
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
                self._enter(frame.checkpoint_ns, part)
                self._advance((0, frame.checkpoint_ns, frame.checkpoint_id), part)
                self._totals.checkpoints += 1
                try:
                    return self._checkpoint(thread, frame)
                except NotCanonicalError as error:
                    raise self._damaged(part, f"checkpoint {frame.checkpoint_id!r}: {error}") from None
        raise self._damaged(part, "a record of no known kind")

    def _checkpoint(self, thread: str, frame: fmt.CheckpointFrame) -> Checkpoint:
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
            if hashlib.sha256(ref.data).digest() != ref.sha256 or len(ref.data) != ref.size:
                raise NotCanonicalError(f"the value of channel {ref.channel!r} does not have its hash")
            return ref
        held = None
        if ref.version is not None:
            held = self._sent.get((ref.channel, ref.version, ref.type, ref.sha256))
        if held is None:
            raise NotCanonicalError(f"the value of channel {ref.channel!r} is missing")
        if held != (ref.size, ref.delta):
            raise NotCanonicalError(f"the value of channel {ref.channel!r} is not of the kind it should be")
        return ref

    def _enter(self, ns: str, part: fmt.Part) -> None:
        """A value or a checkpoint of a namespace: these come before all writes, namespace by namespace."""
        if (0, ns) < self._at[:2]:
            raise self._damaged(part, f"a record of namespace {ns!r} is out of order")
        if ns != self._ns:
            self._ns = ns
            self._at = (0, ns)
            self._sent.clear()

    def _advance(self, key: tuple[Any, ...], part: fmt.Part) -> None:
        if key <= self._at:
            raise self._damaged(part, f"checkpoint {key[2]!r} is there twice, or out of order")
        self._at = key

    def _damaged(self, part: fmt.Part, what: str) -> ArchiveError:
        return damaged(self._label, part, what)


def damaged(label: str, part: fmt.Part, what: str) -> ArchiveError:
    """The error for a part that does not hold what it should."""
    return ArchiveError(f"{part.file} of {label} is damaged: {what}")

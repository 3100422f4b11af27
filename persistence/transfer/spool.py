"""The thread digests of one side, kept outside memory while the other side is read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from types import TracebackType

import msgspec

from persistence.transfer.digest import ThreadDigest

_IN_MEMORY = 4_000_000
_decoder = msgspec.msgpack.Decoder(tuple[str, bytes, int, int])


class Spool:
    """Thread digests in order, written once and read any number of times. A context manager."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - closed by __exit__
        self.count = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, thread: ThreadDigest) -> None:
        """Append one."""
        data = msgspec.msgpack.encode(tuple(thread))
        self._file.write(len(data).to_bytes(4))
        self._file.write(data)
        self.count += 1

    def chunks(self, size: int) -> Iterator[list[ThreadDigest]]:
        """All of them, some at a time."""
        self._file.seek(0)
        chunk: list[ThreadDigest] = []
        while head := self._file.read(4):
            chunk.append(ThreadDigest(*_decoder.decode(self._file.read(int.from_bytes(head)))))
            if len(chunk) == size:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

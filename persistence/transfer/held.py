"""Values that later records refer to, kept outside memory."""

from __future__ import annotations

import tempfile

from persistence.transfer.records import Checkpoint, Value, ValueRef

_IN_MEMORY = 8_000_000


class HeldValues:
    """Values of one thread and namespace, whose checkpoints repeat them: a temporary file and an index."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - closed by close()
        self._at: dict[tuple[str, str, str, bytes], tuple[int, int]] = {}
        self._place: tuple[str, str] | None = None

    def add(self, value: Value) -> None:
        """Keep a value, and forget those of another namespace."""
        if (place := value[:2]) != self._place:
            self._place = place
            self._at.clear()
            self._file.seek(0)
            self._file.truncate()
        start = self._file.seek(0, 2)
        self._file.write(value.data)
        self._at[value.channel, value.version, value.type, value.sha256] = (start, len(value.data))

    def get(self, checkpoint: Checkpoint, ref: ValueRef) -> bytes | None:
        """What a checkpoint refers to."""
        if ref.data is not None:
            return ref.data
        if checkpoint[:2] != self._place or ref.version is None:
            return None
        held = self._at.get((ref.channel, ref.version, ref.type, ref.sha256))
        if held is None:
            return None
        self._file.seek(held[0])
        return self._file.read(held[1])

    def close(self) -> None:
        """Give up the file."""
        self._file.close()

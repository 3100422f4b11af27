"""A sample of threads that can be drawn again: the choice depends on a seed and the thread's id alone."""

from __future__ import annotations

import hashlib
import heapq
import math
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from persistence.errors import ConfigurationError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)%|(\d+)")
_HASHES = 1 << 64


@dataclass(frozen=True, slots=True)
class Sample:
    """How much to compare, and which choice of so much.

    Attributes:
        size: A share such as ``5%``, or a number of threads such as ``100``.
        seed: The same seed chooses the same threads again.
    """

    size: str
    seed: int

    @classmethod
    def drawn(cls, size: str, seed: int | None) -> Sample:
        """A sample with this seed, or with a new one.

        Raises:
            ConfigurationError: The size is none.
        """
        return cls(size, secrets.randbelow(1 << 32) if seed is None else seed)

    def __post_init__(self) -> None:
        found = _SIZE.fullmatch(self.size.strip())
        if found is None or not 0 < float(found[1] or found[2]) <= (100 if found[1] else math.inf):
            raise ConfigurationError(
                f"{self.size!r} is no sample", hint="a sample is a share such as 5%, or a number of threads"
            )

    def of(self, total: int) -> int:
        """How many of ``total`` are a sample of this size: at least one."""
        text = self.size.strip()
        wanted = math.ceil(total * float(text[:-1]) / 100) if text.endswith("%") else int(text)
        return min(total, max(1, wanted))

    def rank(self, name: str) -> int:
        """The place of a thread in the order in which this seed chooses."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}\0{name}".encode()).digest()[:8])

    def limit(self, threads: Iterable[str]) -> int:
        """The rank up to which threads are chosen; for a number of threads as many ranks are in memory."""
        text = self.size.strip()
        if text.endswith("%"):
            # A share is one of ranks. Of few threads it might be none: then the first of all is chosen.
            lowest = min(map(self.rank, threads), default=0)
            return max(lowest, int(_HASHES * float(text[:-1]) / 100))
        return max(heapq.nsmallest(int(text), map(self.rank, threads)), default=0)

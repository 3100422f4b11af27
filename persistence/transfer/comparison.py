"""A comparison of two sides, some threads at a time: in whole or by sample, at either depth, resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING

from persistence.errors import UnsupportedError
from persistence.transfer.difference import Depth, Verdict
from persistence.transfer.engine import Clock, Meter
from persistence.transfer.progress_file import ProgressFile
from persistence.transfer.reading import Pieces, digest_by
from persistence.transfer.records import Source
from persistence.transfer.sampling import Sample
from persistence.transfer.verify import compare
from persistence.transfer.workers import ALONE, Crew

if TYPE_CHECKING:
    from persistence.transfer.semantic import Official, Tuples

_SAVED_EVERY = 0.5
"""Seconds between two notes of how far it has come: to make one takes a look at the tables and a write."""


@dataclass(frozen=True, slots=True)
class Check:
    """How two sides, or an archive by itself, are compared.

    Attributes:
        depth: ``checksums``: an archive's parts have the checksums of its manifest; nothing is decompressed.
            ``digests``: each side's rows give the same digests. ``semantic``: the official savers of both
            sides return equal tuples; this deserialises, so classes of the application are imported.
        sample: Only a share such as ``5%`` of the threads, or a number of them such as ``100``.
        seed: The sample with this seed, to draw it again; a new one by default.
        resume: A file to keep the progress in: the same comparison goes on there after an interruption.
    """

    depth: Depth = "digests"
    sample: str | None = None
    seed: int | None = None
    resume: Path | None = None


class Comparison:
    """One comparison of two sides.

    Args:
        left: The one side.
        right: The other.
        check: How they are compared.
        clock: Told how far it has come.
        subset: Threads that only the right side has are no difference.
        about: What else says what is compared, for a comparison that is resumed.
        crew: Who reads, where digests are compared.
    """

    def __init__(
        self,
        left: Source,
        right: Source,
        check: Check,
        clock: Clock,
        *,
        subset: bool = False,
        about: str = "",
        crew: Crew = ALONE,
    ) -> None:
        self._sides = (left, right)
        self._check = check
        self._clock = clock
        self._subset = subset
        self._about = about
        self._crew = crew
        self._sample = Sample.drawn(check.sample, check.seed) if check.sample is not None else None
        self._verdict = Verdict(left.label, right.label, check.depth)
        self._after: str | None = None
        self._file = ProgressFile(check.resume) if check.resume is not None else None

    def run(self) -> Verdict:
        """Compare.

        Raises:
            SourceError: A side cannot be read, or is not what it was when the comparison began.
            UnsupportedError: A side has no official saver.
        """
        with self._clock.phase("verify"):
            compared = self._by_digests if self._check.depth == "digests" else self._by_tuples()
            self._continue()
            total = 0 if self._sample else self._sides[0].count()
            meter = Meter(self._clock, "verify", total)
            meter.totals.checkpoints = self._verdict.checkpoints
            saved = -math.inf
            for threads in compared(Pieces(self._chosen(), *self._sides), meter):
                if self._file is not None and time.monotonic() - saved >= _SAVED_EVERY:
                    self._file.save(self._asked(), self._sides, self._verdict, threads[-1])
                    saved = time.monotonic()
            meter.tell()
            if self._file is not None:
                self._file.done()
        return self._verdict

    def _continue(self) -> None:
        """Take up what an interrupted comparison left."""
        state = self._file.begun() if self._file is not None else None
        if self._file is not None and state is not None:
            if self._sample is not None and self._check.seed is None and state.verdict.seed is not None:
                self._sample = Sample(self._sample.size, state.verdict.seed)
            self._verdict = self._file.resume(state, self._asked(), self._sides)
            self._after = state.after
        if self._sample is not None:
            self._verdict.sampled = True
            self._verdict.sample, self._verdict.seed = self._sample.size, self._sample.seed

    def _asked(self) -> str:
        sample = f"{self._sample.size} seed {self._sample.seed}" if self._sample else "all"
        return f"{self._check.depth}, {sample}, {'subset' if self._subset else 'both'}, {self._about}"

    def _threads(self) -> Iterator[str]:
        """The ids that either side has, in order."""
        left, right = self._sides
        ids = left.threads() if self._subset else merge(left.threads(), right.threads())
        for thread, _ in groupby(ids):
            yield thread

    def _chosen(self) -> Iterator[str]:
        """The ids of those that are to be compared."""
        limit = self._sample.limit(self._threads()) if self._sample else None
        total = 0
        for thread in self._threads():
            total += 1
            if self._after is not None and thread <= self._after:
                continue
            if self._sample is not None and limit is not None and self._sample.rank(thread) > limit:
                continue
            yield thread
        self._verdict.total_threads = total

    def _by_digests(self, pieces: Pieces[str], meter: Meter) -> Iterator[list[str]]:
        left, right = self._sides
        for threads, (mine, theirs) in digest_by(self._crew, self._sides, pieces, meter.add):
            compare(left, right, mine, theirs, self._verdict)
            yield threads

    def _by_tuples(self) -> Callable[[Pieces[str], Meter], Iterator[list[str]]]:
        from persistence.transfer.semantic import Tuples

        one, other = map(_official, self._sides)
        tuples = Tuples(self._sides[0].label, self._sides[1].label, one, other)

        def compared(pieces: Pieces[str], meter: Meter) -> Iterator[list[str]]:
            for threads in pieces:
                began = time.monotonic()
                for thread in threads:
                    self._compare_tuples(tuples, thread)
                    meter.totals.checkpoints = self._verdict.checkpoints
                    meter.tell()
                pieces.took(threads, time.monotonic() - began)
                yield threads

        return compared

    def _compare_tuples(self, tuples: Tuples, thread: str) -> None:
        self._verdict.threads += 1
        tuples.checkpoints = tuples.writes = tuples.beside = 0
        found = tuples.differences(thread)
        if (first := next(found, None)) is not None:
            self._verdict.note(chain([first], found))
        self._verdict.checkpoints += tuples.checkpoints
        self._verdict.writes += tuples.writes
        self._verdict.beside += tuples.beside


def _official(side: Source) -> Official:
    if (official := side.official()) is None:
        raise UnsupportedError(
            f"{side.label} has no saver of LangGraph's that could read it",
            hint="compare by digests, or import the archive and compare the databases",
        )
    return official

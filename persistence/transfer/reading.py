"""Reading, alone or by several processes, each some threads at a time: to look at all, or for digests alone.

What was seen of some threads is added to what was seen of those before them, in their order. So the outcome
is the same, whoever read them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Generic, Protocol, TypeVar

from persistence.transfer.chunks import Chunk, chunked
from persistence.transfer.digest import Digester, ThreadDigest, digests
from persistence.transfer.recording import Place, Recording, recorder
from persistence.transfer.records import Preflight, Record, Source
from persistence.transfer.report import Counts, counted
from persistence.transfer.spool import Entry
from persistence.transfer.survey import Survey
from persistence.transfer.workers import Crew, Open, Tell, Telling, itself, shared

T = TypeVar("T", str, ThreadDigest)
"""A thread, as a comparison knows it."""

_FIRST = 1
_MOST = 1_000
_MOST_OF_AN_ARCHIVE = 5_000
_QUICK = 0.1
"""Seconds: after a piece that was quicker than this the next ones have twice as many threads."""
_SLOW = 3.0


class Copyist(Protocol):
    """Takes what a scan reads: an archive being written."""

    def add(self, chunk: Chunk, lines: Sequence[bytes]) -> None:
        """The next records, and the line of each as digests see it."""

    def end_thread(self, digest: ThreadDigest) -> list[Place] | None:
        """The thread of the records before is complete; gives where it can be read again."""


def read(
    source: Source,
    threads: Sequence[str] | None,
    counts: Counts,
    preflight: Preflight,
    survey: Survey,
    copyist: Copyist | None = None,
) -> Iterator[Entry]:
    """Show whole threads to everybody who looks at them; gives each when it has ended."""
    digester, before, converted = Digester(), replace(counts.totals), source.converted

    def end(thread: ThreadDigest | None) -> Iterator[Entry]:
        nonlocal before
        if thread is None:
            return
        preflight.end_thread()
        places = copyist.end_thread(thread) if copyist is not None else None
        now = replace(counts.totals)
        yield Entry(
            thread,
            now.records - before.records,
            now.values_referenced - before.values_referenced,
            now.bytes - before.bytes,
            now.bytes_referenced - before.bytes_referenced,
            places,
        )
        before = now

    for chunk in chunked(source.records(threads)):
        if (ended := digester.take(chunk)) is not None:
            yield from end(ended)
        counts.take(chunk)
        preflight.take(chunk)
        survey.take(chunk)
        if copyist is not None:
            copyist.add(chunk, digester.lines)
    yield from end(digester.end())
    survey.note_converted(source.converted - converted)
    survey.end()


class Pieces(Generic[T]):
    """Threads, some at a time: as many as take a worker a fraction of a second."""

    def __init__(self, threads: Iterator[T], *sources: Source) -> None:
        self._threads: Iterator[T] = threads
        divisible = all(source.divisible for source in sources)
        self._size, self._most = (_FIRST, _MOST) if divisible else (_MOST_OF_AN_ARCHIVE,) * 2

    def __iter__(self) -> Iterator[list[T]]:
        while piece := list(islice(self._threads, self._size)):
            yield piece

    def took(self, piece: Sequence[T], seconds: float) -> None:
        """Learn from a piece that was done how many the next ones should have."""
        if len(piece) == self._size and seconds < _QUICK:
            self._size = min(self._size * 2, self._most)
        elif len(piece) == self._size and seconds > _SLOW:
            self._size = max(self._size // 2, 1)


@dataclass(slots=True)
class Seen:
    """What was seen of some threads."""

    entries: list[Entry]
    preflight: Preflight
    survey: Survey


@dataclass(frozen=True, slots=True)
class Looking:
    """The job of the first reading."""

    source: Open
    preflight: Preflight
    """One that has seen nothing."""
    recording: Recording | None = None
    """Where to keep what it will be written as."""

    @contextmanager
    def begun(self) -> Iterator[Callable[[Sequence[str], Tell], Seen]]:
        """See :class:`persistence.transfer.workers.Job`."""
        with self.source() as source:
            yield partial(self._look, source)

    def _look(self, source: Source, threads: Sequence[str], tell: Tell) -> Seen:
        counts, preflight, survey = Telling(tell), deepcopy(self.preflight), Survey()
        copyist = recorder(self.recording, preflight)
        entries = list(read(source, threads, counts, preflight, survey, copyist))
        counts.tell()
        return Seen(entries, preflight, survey)


def divided(*sources: Source) -> list[Open] | None:
    """What opens the sources in workers, each for some threads at a time, if they all can be read so."""
    opens = [shared(source) for source in sources if source.divisible]
    found = [one for one in opens if one is not None]
    return found if len(found) == len(sources) else None


def read_by(
    crew: Crew,
    source: Source,
    opens: Sequence[Open],
    preflight: Preflight,
    survey: Survey,
    told: Tell,
    recording: Recording | None = None,
) -> Iterator[Entry]:
    """As :func:`read`, of a whole source by several processes."""
    pieces, blank = Pieces(source.threads(), source), deepcopy(preflight)
    here, elsewhere = (Looking(opened, blank, recording) for opened in (itself(source), opens[0]))
    for done in crew.each(here, elsewhere, pieces, told):
        pieces.took(done.piece, done.seconds)
        preflight.merge(done.result.preflight)
        survey.merge(done.result.survey)
        yield from done.result.entries


@dataclass(frozen=True, slots=True)
class Digesting:
    """The job of a comparison: the digests that each side has of the same threads."""

    sides: Sequence[Open]
    """What is read of the first one is told."""

    @contextmanager
    def begun(self) -> Iterator[Callable[[Sequence[str | ThreadDigest], Tell], list[list[ThreadDigest]]]]:
        """See :class:`persistence.transfer.workers.Job`."""
        with ExitStack() as stack:
            yield partial(_digest, [stack.enter_context(side()) for side in self.sides])


def _digest(
    sides: Sequence[Source], threads: Sequence[str | ThreadDigest], tell: Tell
) -> list[list[ThreadDigest]]:
    ids = _ids(threads)
    asked = [side.records(ids, data=False) for side in sides]  # a server begins with it at once
    counts = Telling(tell)
    found = [_digests(records, counts, number) for number, records in enumerate(asked)]
    counts.tell()
    return found


def _ids(threads: Sequence[str | ThreadDigest]) -> list[str]:
    return [one if isinstance(one, str) else one.thread_id for one in threads]


def _digests(records: Iterator[Record], counts: Telling, number: int) -> list[ThreadDigest]:
    """What is read of the first side is counted."""
    return list(digests(counted(records, counts) if number == 0 else records))


def digest_by(
    crew: Crew, sides: Sequence[Source], pieces: Pieces[T], told: Tell
) -> Iterator[tuple[list[T], list[list[ThreadDigest]]]]:
    """The digests that each side has of threads, some at a time; what is read of the first side is told."""
    opens = divided(*sides) if crew.count > 1 else None
    if opens is None:
        yield from _digest_alone(sides, pieces, told)
        return
    here = Digesting([itself(side) for side in sides])
    for done in crew.each(here, Digesting(opens), pieces, told):
        pieces.took(done.piece, done.seconds)
        yield done.piece, done.result


def _digest_alone(
    sides: Sequence[Source], pieces: Pieces[T], told: Tell
) -> Iterator[tuple[list[T], list[list[ThreadDigest]]]]:
    """As :func:`digest_by`. A side is asked for the next piece as soon as it has answered for one."""
    left, counts = iter(pieces), Telling(told)
    piece = next(left, None)
    asked = [side.records(_ids(piece), data=False) for side in sides] if piece else []
    while piece is not None:
        began, following = time.monotonic(), next(left, None)
        found, then = [], []
        for number, (side, records) in enumerate(zip(sides, asked, strict=True)):
            if following is not None:
                then.append(side.records(_ids(following), data=False))
            found.append(_digests(records, counts, number))
        counts.tell()
        pieces.took(piece, time.monotonic() - began)
        yield piece, found
        piece, asked = following, then

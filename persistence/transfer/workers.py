"""This process and others beside it, which do the pieces of a transfer's work side by side.

Much of the time is Python's, so workers are processes. They are programs of their own: a fork would
share open databases, and ``multiprocessing`` would run the script of the caller again. They are started
once, and then told what to do: to read, to write, to compare. This process does pieces too, from the first
moment, and hands out others in between.
A worker that has lost its parent ends at once, whatever it is doing; what it had not committed is gone.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

from persistence.errors import TransferError
from persistence.transfer.collecting import rarely_collected
from persistence.transfer.records import Sink, Source
from persistence.transfer.report import Counts, Totals

MOST = 4
"""Processes that work unasked; more of them take more memory, and wait for the server."""
_PATIENCE = 0.3
"""Seconds of work before other processes are started unasked: about what it takes to start one. Who has
worked for so long has, as likely as not, as much to do again."""
_AHEAD = 64
"""Pieces that may be done before one that comes before them is: their results are held in memory."""
_PROGRAM = "import sys; sys.path[:] = {path!r}; from persistence.transfer.workers import main; main()"
_GONE = (EOFError, ConnectionResetError, BrokenPipeError)

Open = Callable[[], AbstractContextManager[Source]]
OpenSink = Callable[[], AbstractContextManager[Sink]]
Tell = Callable[[Totals], None]
"""Told what was done since it was told the last time."""
P = TypeVar("P")
R = TypeVar("R")
T = TypeVar("T")
P_contra = TypeVar("P_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


@runtime_checkable
class _SharedSource(Protocol):
    """A source that several processes may be able to read at once."""

    def share(self) -> Open | None:
        """What opens the very same snapshot elsewhere, and can be pickled; ``None`` if nothing can."""


@runtime_checkable
class _SharedSink(Protocol):
    """A sink that several processes can write to at once."""

    def share(self) -> OpenSink:
        """What opens the same database elsewhere, and can be pickled."""


def shared(source: Source) -> Open | None:
    """What opens the source's snapshot in a worker, if it can be shared."""
    return source.share() if isinstance(source, _SharedSource) else None


def shared_sink(sink: Sink) -> OpenSink | None:
    """What opens the sink in a worker, if it can be shared."""
    return sink.share() if isinstance(sink, _SharedSink) else None


def itself(opened: T) -> Callable[[], AbstractContextManager[T]]:
    """What is open already, as something to open."""
    return lambda: nullcontext(opened)


class Job(Protocol[P_contra, R_co]):
    """What is done with each piece of some work; it can be pickled, unless it is for this process."""

    def begun(self) -> AbstractContextManager[Callable[[P_contra, Tell], R_co]]:
        """Open what the work needs; what it gives does a piece. All is complete when it is closed."""


class Done(NamedTuple, Generic[P, R]):
    """A piece that was done."""

    piece: P
    result: R
    seconds: float


@dataclass(frozen=True, slots=True)
class _Ready:
    """A worker has begun the job."""


@dataclass(frozen=True, slots=True)
class _Result:
    """A worker has done a piece, and can have another one."""

    number: int
    result: Any
    seconds: float


@dataclass(frozen=True, slots=True)
class _Ended:
    """A worker has closed the job."""


class Telling(Counts):
    """Tells what was done since it told the last time."""

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self._tell = tell
        self._told = Totals()

    def tell(self) -> None:
        """Tell what has not been told."""
        now = replace(self.totals)
        self._tell(now.since(self._told))
        self._told = now


def sensible(asked: int | None) -> int:
    """How many processes work: as many as were asked for, or one for each two cores, up to four.

    The other cores are for the server, which is often on the same machine. And each process takes some 80 MB:
    on two cores a second one makes a transfer quicker, but it is for the user to spend that.
    """
    if not sys.executable:  # Python is inside another program, and nothing says how to start one
        return 1
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST, cores // 2))


class Crew:
    """So many processes, this one included. A context manager; the others live until its end.

    Args:
        asked: How many were asked for; they are started as soon as there is work for them. Unasked, it
            is for :func:`sensible` to say, and they are started once there has been enough to do.
    """

    def __init__(self, asked: int | None = None) -> None:
        self.asked = asked
        self.count = sensible(asked)
        self._patience = 0.0 if asked is not None else _PATIENCE
        self._lent: list[int] = []
        self._stack = ExitStack()
        self._others: list[Connection] = []
        self._round: _Round[Any, Any] | None = None
        self._rounds = 0

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self._others.clear()
        self._stack.close()

    def lend(self, fd: int) -> None:
        """Have the others get a file that is open here, under the same number."""
        self._lent.append(fd)

    def each(
        self, here: Job[P, R], elsewhere: Job[P, R] | None, pieces: Iterable[P], told: Tell
    ) -> Iterator[Done[P, R]]:
        """Do all pieces; gives each when those before it are done, too.

        Args:
            here: How this process does them.
            elsewhere: The same for other processes; ``None`` where they cannot.
            pieces: They are taken when somebody has time for one.
            told: Told what each process has done, many times in each piece.

        Raises:
            TransferError: A worker ended before its work was done. An error in a worker is raised as it is.
        """
        if elsewhere is None or self.count == 1:
            with here.begun() as do:
                for piece in pieces:
                    yield _done(do, piece, told)
            return
        self._rounds += 1
        self._round = work = _Round(self._rounds, elsewhere, iter(pieces), told)
        due = time.monotonic() + self._patience

        def tell(some: Totals) -> None:
            told(some)
            if not self._others and time.monotonic() >= due:
                others = (_worker(self._lent) for _ in range(self.count - 1))
                self._others += map(self._stack.enter_context, others)
                work.join(self._others)
            self.attend()

        try:
            work.join(self._others)
            with here.begun() as do:
                while not work.is_over():
                    tell(Totals())
                    yield from work.in_order()
                    if (given := work.take()) is not None:
                        work.results[given[0]] = _done(do, given[1], tell)
                    elif not work.is_over():
                        work.listen(None)  # others have all that are left, or one that all must wait for
                work.dismiss()
            while work.busy:
                work.listen(None)
        except BaseException:
            self.__exit__()
            raise
        finally:
            self._round = None

    def attend(self) -> None:
        """Hear what the others have to say, and give them something to do, in the middle of a piece."""
        if self._round is not None:
            self._round.listen(0)
            self._round.feed()


ALONE = Crew(1)


class _Round(Generic[P, R]):
    """The pieces of one work: which were taken, which are done, which is next to be given."""

    def __init__(self, number: int, job: Job[P, R], pieces: Iterator[P], told: Tell) -> None:
        self.results: dict[int, Done[P, R]] = {}
        self.busy: set[Connection] = set()
        """Those who have been given a piece, until all that they did is complete."""
        self._number = number
        self._job = job
        self._pieces = enumerate(pieces)
        self._told = told
        self._taken: dict[int, P] = {}
        self._next = 0
        self._over = False
        self._hands: list[Connection] = []
        self._idle: list[Connection] = []

    def join(self, others: Iterable[Connection]) -> None:
        """Tell workers what the work is."""
        for one in others:
            self._hands.append(one)
            self._send(one, (self._number, self._job))

    def take(self) -> tuple[int, P] | None:
        """The next piece; none at the end, or where too many wait for one before them."""
        if self._over or len(self._taken) >= _AHEAD:
            return None
        given = next(self._pieces, None)
        if given is None:
            self._over = True
            return None
        self._taken[given[0]] = given[1]
        return given

    def feed(self) -> None:
        """Give those something to do who have nothing."""
        while self._idle and (given := self.take()) is not None:
            one = self._idle.pop()
            self.busy.add(one)
            self._send(one, given)

    def listen(self, timeout: float | None) -> None:
        """Hear the workers, or wait for them where there is no timeout."""
        for one in wait(self._hands, timeout):
            assert isinstance(one, Connection)  # noqa: S101 - what was asked for
            with _living():
                self._hear(one)
                while one.poll():
                    self._hear(one)

    def in_order(self) -> Iterator[Done[P, R]]:
        """What is done, up to the first piece that is not."""
        while (done := self.results.pop(self._next, None)) is not None:
            del self._taken[self._next]
            self._next += 1
            yield done

    def is_over(self) -> bool:
        """Whether all pieces are done, and were given."""
        return self._over and not self._taken

    def dismiss(self) -> None:
        """Have all workers close the job. Nobody waits for those who did nothing of it."""
        for one in self._hands:
            self._send(one, None)

    def _hear(self, one: Connection) -> None:
        number, message = one.recv()
        if isinstance(message, BaseException):
            raise message
        if number != self._number:  # of a work that was done without this one
            return
        match message:
            case _Ready():
                self._idle.append(one)
            case Totals():
                self._told(message)
            case _Result():
                piece = self._taken[message.number]
                self.results[message.number] = Done(piece, message.result, message.seconds)
                self._idle.append(one)
            case _Ended():
                self.busy.discard(one)

    def _send(self, one: Connection, message: object) -> None:
        """Say something to a worker; one that has ended has perhaps said why."""
        with _living():
            try:
                one.send(message)
            except _GONE:
                while one.poll():
                    self._hear(one)
                raise


def _done(do: Callable[[P, Tell], R], piece: P, tell: Tell) -> Done[P, R]:
    began = time.monotonic()
    return Done(piece, do(piece, tell), time.monotonic() - began)


@contextmanager
def _living() -> Iterator[None]:
    """A block that says so where a worker does not live."""
    try:
        yield
    except _GONE:
        raise TransferError(
            "a worker of the transfer ended before its work was done",
            hint="was it killed, or short of memory? Run the command again: it goes on where it stopped",
        ) from None


@contextmanager
def _worker(lent: Sequence[int]) -> Iterator[Connection]:
    """A running worker; its input is the line that tells it whether this process lives."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(  # noqa: S603 - this package
            [sys.executable, "-c", _PROGRAM.format(path=sys.path), str(theirs.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), *lent],
        )
    with Connection(ours.detach()) as connection:
        try:
            yield connection
        finally:
            process.kill()  # it has committed what it had to
            process.communicate()


def main() -> None:
    """The program of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and says what to do
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with Connection(int(sys.argv[1])) as parent, suppress(*_GONE):
        try:
            while True:
                _work(parent)
        except _GONE:
            raise
        except Exception as error:  # noqa: BLE001 - raised by the parent
            parent.send((0, error))


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _work(parent: Connection) -> None:
    """One job, to its end."""
    number, job = parent.recv()

    def say(message: object) -> None:
        parent.send((number, message))

    with rarely_collected(), job.begun() as do:
        say(_Ready())
        while (given := parent.recv()) is not None:
            done = _done(do, given[1], say)
            say(_Result(given[0], done.result, done.seconds))
    say(_Ended())

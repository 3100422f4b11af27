"""``persistence migrate --follow``, ``cut-over`` and ``unseal``: a move while the application goes on."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from persistence.cli.arguments import Json, Source, Target, read_dsn
from persistence.cli.choices import Include, WithoutVectors, parts
from persistence.cli.console import OK, emit, invocation, left_out, note, rows
from persistence.cli.progress import progress

if TYPE_CHECKING:
    from persistence.dsn import Dsn
    from persistence.transfer import CutOver, Round
    from persistence.transfer.options import Part

Follow = Annotated[
    bool,
    typer.Option("--follow", help="Go on catching up with what is written to SOURCE, until stopped."),
]
FollowInterval = Annotated[
    float, typer.Option(min=0.1, max=3600, metavar="SECONDS", help="With --follow: how often to catch up.")
]


def keep_up(
    source: Dsn, target: Dsn, interval: float, include: Collection[Part] | None, *, vectors: bool
) -> int:
    """Copy everything, then catch up until Ctrl-C or SIGTERM; the round that is under way is finished."""
    from persistence import transfer

    with progress(plain=True) as show, _stopped_by_signals() as stop:
        done = transfer.follow(
            source,
            target,
            interval=interval,
            include=include,
            vectors=vectors,
            stop=stop,
            progress=show,
            told=_tell,
        )
    emit(
        asdict(done),
        [
            rows(
                [
                    ("source", done.source),
                    ("target", done.target),
                    *_totals(done.last),
                    ("time", f"{done.seconds:.1f} s"),
                    ("result", "stopped; the same command goes on, `persistence cut-over` switches over"),
                ]
            )
        ],
    )
    return OK


def cut_over(
    source: Source,
    target: Target,
    include: Include = None,
    without_vectors: WithoutVectors = False,
    no_seal: Annotated[
        bool,
        typer.Option("--no-seal", help="Leave SOURCE open: processes left behind go on writing there."),
    ] = False,
    as_json: Json = False,
) -> int:
    """Switch from SOURCE to TARGET while the application runs: writing stops for seconds.

    Everything that `persistence migrate --follow` has moved is compared by content. Then SOURCE is locked for
    the last changes, and sealed: processes that still use it get an error when they write, until
    `persistence unseal`. What was followed is known; --include is for a SOURCE that was not.
    """
    from persistence import transfer

    left, right = read_dsn(source), read_dsn(target)
    with progress(plain=True) as show:
        done = transfer.cut_over(
            left,
            right,
            include=parts(include, transfer.Selection()) if include else None,
            vectors=not without_vectors,
            seal=not no_seal,
            progress=show,
            told=_tell,
        )
    emit(asdict(done), [rows(list(_outcome(done)))])
    return OK


def unseal(source: Source, as_json: Json = False) -> int:
    """Let SOURCE be written again after a cut-over: for a rollback."""
    from persistence import transfer

    dsn = read_dsn(source)
    was_sealed = transfer.unseal(dsn)
    emit(
        {"source": dsn.masked, "was_sealed": was_sealed},
        ["unsealed" if was_sealed else "was not sealed"],
    )
    return OK


def _outcome(done: CutOver) -> Iterator[tuple[str, object]]:
    yield "source", done.source
    yield "target", done.target
    if done.last is not None:
        yield from _totals(done.last)
        yield "in the pause", _amounts(done.last)
        yield "write pause", f"{done.pause_seconds:.2f} s"
    if done.mended:
        yield "mended", f"{done.mended:,} threads or items that had changed without showing it"
    yield "time", f"{done.seconds:.1f} s"
    how = "was cut over before" if done.already_done else "cut over, verified by content"
    yield "result", f"{how}; the source {'is sealed' if done.sealed else 'is not sealed'}"


def _totals(last: Round) -> Iterator[tuple[str, object]]:
    yield "threads", f"{last.source_threads:,}"
    yield "checkpoints", f"{last.source_checkpoints:,}"
    yield "pending writes", f"{last.source_writes:,}"
    if last.items_left_out:
        yield "store", left_out(last.items_left_out, "do not move")
    elif last.source_items:
        yield "store", f"{last.source_items:,} items"


def _tell(done: Round) -> None:
    if invocation.json:
        sys.stderr.write(json.dumps({"event": "round", **asdict(done)}) + "\n")
        sys.stderr.flush()
    note(f"round {done.number}: {_amounts(done)}, {done.seconds:.2f} s behind")


def _amounts(done: Round) -> str:
    from persistence.transfer.report import amount

    items = f", {done.items:,} items" if done.items else ""
    return f"{done.rows:,} rows of {done.threads:,} threads{items}, {amount(done.bytes)}"


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; a second signal does not wait any more."""
    stop = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""The works of a run, and how the contenders take turns at each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import psycopg

from tools.benchmarks import applications, child, measure, transfers
from tools.benchmarks.contenders import BARE, OURS, SAVERS, SHARED, STORES
from tools.benchmarks.measure import Load, Sample
from tools.benchmarks.server import Server

SMALL, MEDIUM, LARGE, HUGE = 2_000, 200_000, 10_000_000, 100_000_000
MB = 1_000_000
MEMORY = "transfer memory"
Link = Literal["loopback", "1 ms", "file", "-"]
NEAR: Link = "loopback"
FAR: Link = "1 ms"


@dataclass(frozen=True)
class Work:
    """One row of the plan."""

    kind: str
    backend: str
    colour: str
    link: Link
    workflows: int
    state: int
    checkpoints: int = 0
    """How long the listed thread is."""
    shape: str = ""
    """What the threads are like that a transfer moves."""

    @property
    def name(self) -> str:
        """As people and ``--only`` say it."""
        if self.shape:
            of = f"{size(self.state)} of " if self.state else ""
            return f"{self.kind}, sqlite to {self.backend}, {self.link}, {of}{self.shape}"
        parts = [self.kind, self.backend, self.colour, self.link, f"{self.workflows} x {size(self.state)}"]
        if self.checkpoints:
            parts[-1] = f"{self.checkpoints:,} checkpoints of {size(self.state)}"
        return ", ".join(parts)


@dataclass
class Series:
    """The samples of one contender."""

    contender: str
    samples: list[dict[str, float]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def median(self, figure: str) -> float | None:
        """The middle of the rounds; ``None`` where nothing was measured."""
        values = [sample[figure] for sample in self.samples if figure in sample]
        return statistics.median(values) if values else None

    def summary(self) -> dict[str, dict[str, float]]:
        """Median, extremes and quartiles of each figure."""
        names = dict.fromkeys(name for sample in self.samples for name in sample)
        return {name: _spread([s[name] for s in self.samples if name in s]) for name in names}


@dataclass
class Outcome:
    """What a work showed."""

    work: Work
    series: list[Series]

    def of(self, contender: str) -> Series | None:
        """The series of one contender."""
        return next((one for one in self.series if one.contender == contender), None)

    def as_json(self) -> dict[str, Any]:
        """For the JSON file."""
        contenders = [
            {
                "name": one.contender,
                "summary": one.summary(),
                "samples": one.samples,
                "errors": len(one.errors),
                "first errors": one.errors[:3],
            }
            for one in self.series
        ]
        return {"name": self.work.name, **asdict(self.work), "contenders": contenders}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Outcome:
        """What :meth:`as_json` gave."""
        work = Work(**{f.name: data[f.name] for f in fields(Work)})
        series = [
            Series(
                c["name"], c["samples"], c["first errors"] + ["..."] * (c["errors"] - len(c["first errors"]))
            )
            for c in data["contenders"]
        ]
        return cls(work, series)


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count // 1_000_000} MB" if count >= 1_000_000 else f"{count // 1000} kB"


def _spread(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "q1": low,
        "q3": high,
    }


def plan(*, short: bool, full: bool) -> list[Work]:
    """What a run does."""
    if short:
        return _short()
    pairs: list[tuple[str, str, Link, list[tuple[int, int]]]] = [
        ("memory", "sync", "-", [(1, SMALL)]),
        ("sqlite", "sync", "file", [(1, SMALL), (100, SMALL), (100, MEDIUM)]),
        ("sqlite", "async", "file", [(1, SMALL), (10, SMALL), (100, SMALL), (1, MEDIUM), (100, MEDIUM)]),
        ("postgres", "sync", NEAR, [(1, SMALL), (100, SMALL), (100, MEDIUM)]),
        ("postgres", "async", NEAR, [(1, SMALL), (10, SMALL), (100, SMALL), (1, MEDIUM), (100, MEDIUM)]),
        ("postgres", "async", FAR, [(1, SMALL), (100, SMALL)]),
    ]
    if full:
        for _, colour, link, loads in pairs:
            if colour == "async":
                loads.append((500, SMALL))
                if link == FAR:
                    loads += [(10, SMALL), (100, MEDIUM)]
    works = [
        Work("steps", backend, colour, link, *load)
        for backend, colour, link, loads in pairs
        for load in loads
    ]
    backends: list[tuple[str, Link]] = [("sqlite", "file"), ("postgres", NEAR)]
    for backend, link in backends:
        works.append(Work("graph", backend, "async", link, 20, SMALL))
        works += [Work("store", backend, "async", link, n, SMALL) for n in (1, 100)]
        works += [
            Work("history", backend, colour, link, 1, LARGE // 1000, n)
            for colour in ("async", "sync")
            for n in (10, 1000)
        ]
        works += [
            Work("large", backend, "async", link, 1, state) for state in ([LARGE, HUGE] if full else [LARGE])
        ]
    works += [
        Work("transfer", "postgres", "sync", link, 1, 0, shape=shape)
        for shape in ("5 turns", "30 turns", "300 turns", "30 turns, large states")
        for link in (NEAR, FAR)
    ]
    sizes = [20 * MB, 200 * MB, *([10_000 * MB] if full else [])]
    works += [Work(MEMORY, "postgres", "sync", NEAR, 1, state, shape="30 turns") for state in sizes]
    return works


def _short() -> list[Work]:
    """One of each kind."""
    return [
        Work("steps", "memory", "sync", "-", 1, SMALL),
        Work("steps", "sqlite", "sync", "file", 3, SMALL),
        Work("steps", "postgres", "sync", NEAR, 3, SMALL),
        Work("steps", "postgres", "async", FAR, 3, SMALL),
        Work("steps", "sqlite", "async", "file", 3, SMALL),
        Work("store", "sqlite", "async", "file", 2, SMALL),
        Work("store", "postgres", "async", NEAR, 2, SMALL),
        Work("large", "sqlite", "async", "file", 1, MEDIUM),
        Work("graph", "sqlite", "async", "file", 2, SMALL),
        Work("history", "postgres", "async", NEAR, 1, SMALL, 10),
        Work("transfer", "postgres", "sync", FAR, 1, 0, shape="few short threads"),
        Work(MEMORY, "postgres", "sync", NEAR, 1, 3 * MB, shape="few short threads"),
    ]


class Arena:
    """Where the contenders work: a file or a database for each, made when it is first needed."""

    def __init__(self, folder: Path, server: Server, *, seeded: int) -> None:
        self._folder = folder
        self._server = server
        self._seeded = seeded
        self._databases: dict[tuple[str, str], str] = {}
        self.depot = transfers.Depot(folder, server)
        self._open = ExitStack()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    @contextmanager
    def places(self, work: Work, contenders: list[str]) -> Iterator[dict[str, str]]:
        """A place for each contender: files are new for each work, databases serve all works."""
        if work.shape:  # a new database each time
            yield dict.fromkeys(contenders, "")
            return
        if work.backend == "postgres":
            yield {name: self._database(work, name) for name in contenders}
            return
        files = {name: self._folder / f"{name.replace(' ', '-')}.sqlite" for name in contenders}
        try:
            yield {name: str(path) for name, path in files.items()}
        finally:
            for path in files.values():
                for end in ("", "-wal", "-shm"):
                    path.with_name(path.name + end).unlink(missing_ok=True)

    def settle(self, work: Work) -> None:
        """Let the next one begin on a disk that is at rest."""
        if work.backend == "postgres":
            self._server.settle()

    def _database(self, work: Work, name: str) -> str:
        """Conninfo of a contender's database. A new one gets some threads: plans for empty tables mislead."""
        key = ("store" if work.kind == "store" else work.colour, name)
        if key not in self._databases:
            database = self._databases[key] = self._open.enter_context(self._server.database())
            if work.kind != "store":
                contender = next(c for c in SAVERS["postgres", work.colour] if c.name == name)
                load = Load(self._seeded, SMALL, 0.0)
                measure.seed(contender, self._server.near_to(database), load, 10)
                self._server.analyze(database)
        database = self._databases[key]
        return self._server.far_from(database) if work.link == FAR else self._server.near_to(database)


def perform(work: Work, arena: Arena, *, rounds: int, warm_up: bool, seconds: float) -> Outcome:
    """Let the contenders take turns; another one begins each round, and the first round does not count."""
    names = _names(work)
    outcome = Outcome(work, [Series(name) for name in names])
    with arena.places(work, names) as places:
        actions = {name: _action(work, name, places[name], seconds, arena) for name in names}
        for number in range(-1 if warm_up else 0, rounds):
            turn = number % len(names)
            for series in outcome.series[turn:] + outcome.series[:turn]:
                arena.settle(work)
                sample = _guarded(actions[series.contender])
                series.errors += sample.errors
                if number >= 0 and sample.values:
                    series.samples.append(sample.values)
    return outcome


def _names(work: Work) -> list[str]:
    if work.kind == "store":
        return list(STORES[work.backend])
    if work.kind == "transfer":
        return transfers.contenders()
    if work.kind == MEMORY:
        return [OURS]
    names = [contender.name for contender in SAVERS[work.backend, work.colour]]
    absent = {"steps": (), "graph": (BARE, SHARED)}.get(work.kind, (SHARED,))
    return [name for name in names if name not in absent]


def _guarded(action: Callable[[], Sample]) -> Sample:
    """A contender that fails as a whole is shown with its error, and the others go on."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001 - counted and shown
        return Sample(errors=[measure.describe(error)])


def _action(work: Work, name: str, place: str, seconds: float, arena: Arena) -> Callable[[], Sample]:
    if work.kind == "transfer":
        return lambda: arena.depot.move(name, work.shape, far=work.link == FAR)
    if work.kind == MEMORY:
        return lambda: arena.depot.peak(work.shape, work.state)
    load = Load(work.workflows, work.state, seconds)
    if work.kind == "store":
        return lambda: applications.store(STORES[work.backend][name], place, load)
    contender = next(c for c in SAVERS[work.backend, work.colour] if c.name == name)
    if work.kind == "steps":
        return lambda: measure.steps(contender, place, load)
    if work.kind == "graph":
        return lambda: applications.graph(contender, place, load)
    task = child.Task("history", work.backend, work.colour, name, place, work.state)
    if work.kind == "large":
        parts = [replace(task, kind="save"), replace(task, kind="load")]
        return lambda: child.sampled(parts)
    (thread,) = measure.seed(contender, place, Load(1, work.state, 0.0), work.checkpoints)
    if work.backend == "postgres":  # as autovacuum does within a minute
        with psycopg.connect(place, autocommit=True) as conn:
            conn.execute("ANALYZE")
    listed = replace(task, thread=thread.thread, checkpoints=work.checkpoints)
    return lambda: child.sampled([listed])

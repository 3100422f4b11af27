"""Measurements of one contender: each opens it, works for a while, checks what was stored, and closes it."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from tools.benchmarks import bare
from tools.benchmarks.clients import AsyncClient, Client
from tools.benchmarks.contenders import Contender
from tools.benchmarks.material import Workflow

WARM_UP = (20, 6)
"""Workflows and steps before the clock runs: connections open, statements prepared."""

OPERATIONS = ("save", "save writes", "load")


@dataclass(frozen=True)
class Load:
    """How much is done at once, and how long."""

    workflows: int
    state: int
    """Bytes of one state."""
    seconds: float
    """A workflow begins no further step after this time; each does one at least."""


@dataclass
class Sample:
    """One measurement."""

    values: dict[str, float] = field(default_factory=dict)
    """Figures by name; the name's last word is the unit."""
    errors: list[str] = field(default_factory=list)


@dataclass
class _Walk:
    """What happened to one workflow."""

    workflow: Workflow
    steps: int = 0
    times: tuple[list[float], list[float], list[float]] = field(default_factory=lambda: ([], [], []))


def steps(contender: Contender, place: str, load: Load) -> Sample:
    """Workflows side by side; a step is put, put_writes and get: steps/s, and the time of each."""
    manager = contender.open(place)
    if isinstance(manager, AbstractAsyncContextManager):
        return asyncio.run(_asteps(manager, load))
    with manager as client:
        if isinstance(client, bare.Sqlite) and load.workflows > 1:
            return _batched(client, load)
        return _threads(client, load)


async def _asteps(manager: AbstractAsyncContextManager[AsyncClient], load: Load) -> Sample:
    async with manager as client:
        warm, limit = WARM_UP
        fresh = [Workflow(load.state) for _ in range(min(load.workflows, warm))]
        await asyncio.gather(*(_awalk(client, _Walk(w), limit=limit) for w in fresh))
        walks = [_Walk(Workflow(load.state)) for _ in range(load.workflows)]
        gc.collect()
        started = time.perf_counter()
        until = started + load.seconds
        ended = await asyncio.gather(
            *(_awalk(client, walk, until=until) for walk in walks), return_exceptions=True
        )
        elapsed = time.perf_counter() - started
        checks = await asyncio.gather(
            *(client.check(w.workflow, w.steps - 1) for w in walks if w.steps), return_exceptions=True
        )
    return _sample(walks, elapsed, [*ended, *checks])


async def _awalk(client: AsyncClient, walk: _Walk, *, until: float = 0.0, limit: int | None = None) -> None:
    """Steps one after the other, up to a time or a number."""
    clock = time.perf_counter
    save, save_writes, load = walk.times
    while True:
        begun = clock()
        await client.put(walk.workflow, walk.steps)
        put = clock()
        await client.put_writes(walk.workflow, walk.steps)
        written = clock()
        await client.get(walk.workflow, walk.steps)
        done = clock()
        save.append(put - begun)
        save_writes.append(written - put)
        load.append(done - written)
        walk.steps += 1
        if walk.steps >= limit if limit is not None else done >= until:
            return


def _threads(client: Client, load: Load) -> Sample:
    """One thread for each workflow."""
    warm, limit = WARM_UP
    with ThreadPoolExecutor(load.workflows) as pool:
        fresh = [_Walk(Workflow(load.state)) for _ in range(min(load.workflows, warm))]
        list(pool.map(lambda walk: _walk(client, walk, limit=limit), fresh))
        walks = [_Walk(Workflow(load.state)) for _ in range(load.workflows)]
        gc.collect()
        started = time.perf_counter()
        until = started + load.seconds
        futures = [pool.submit(_walk, client, walk, until=until) for walk in walks]
        ended = [future.exception() for future in futures]
        elapsed = time.perf_counter() - started
    return _sample(walks, elapsed, [*ended, *_checked(client, walks)])


def _walk(client: Client, walk: _Walk, *, until: float = 0.0, limit: int | None = None) -> None:
    clock = time.perf_counter
    save, save_writes, load = walk.times
    while True:
        begun = clock()
        client.put(walk.workflow, walk.steps)
        put = clock()
        client.put_writes(walk.workflow, walk.steps)
        written = clock()
        client.get(walk.workflow, walk.steps)
        done = clock()
        save.append(put - begun)
        save_writes.append(written - put)
        load.append(done - written)
        walk.steps += 1
        if walk.steps >= limit if limit is not None else done >= until:
            return


def _batched(client: bare.Sqlite, load: Load) -> Sample:
    """All workflows take their steps together, one transaction for all."""
    walks = [_Walk(Workflow(load.state)) for _ in range(load.workflows)]
    flows = [walk.workflow for walk in walks]
    for workflow in flows:
        client.prepare(workflow)
    save, save_writes, read = walks[0].times
    gc.collect()
    clock = time.perf_counter
    started = done = clock()
    while done < started + load.seconds or not walks[0].steps:
        begun = clock()
        client.put_many(flows, walks[0].steps)
        put = clock()
        client.put_writes_many(flows)
        written = clock()
        client.get_many(flows)
        done = clock()
        save.append(put - begun)
        save_writes.append(written - put)
        read.append(done - written)
        for walk in walks:
            walk.steps += 1
    return _sample(walks, done - started, _checked(client, walks))


def _checked(client: Client, walks: list[_Walk]) -> list[BaseException | None]:
    errors: list[BaseException | None] = []
    for walk in walks:
        try:
            if walk.steps:
                client.check(walk.workflow, walk.steps - 1)
        except Exception as error:  # noqa: BLE001 - counted and shown
            errors.append(error)
    return errors


def _sample(walks: list[_Walk], elapsed: float, outcomes: list[BaseException | None]) -> Sample:
    sample = Sample({"steps/s": sum(walk.steps for walk in walks) / elapsed})
    for number, operation in enumerate(OPERATIONS):
        times = [time_ * 1000 for walk in walks for time_ in walk.times[number]]
        sample.values |= percentiles(operation, times)
    sample.errors = [describe(outcome) for outcome in outcomes if outcome is not None]
    return sample


def describe(error: BaseException) -> str:
    """One line about an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def percentiles(name: str, times: list[float]) -> dict[str, float]:
    """The times that half, 95 and 99 of 100 calls do not exceed."""
    if len(times) < 2:
        times = (times or [0.0]) * 2
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return {f"{name} p{n} ms": cuts[n - 1] for n in (50, 95, 99)}


def seed(contender: Contender, place: str, load: Load, number: int) -> list[Workflow]:
    """Store ``number`` steps of each workflow, untimed; gives the workflows."""
    manager = contender.open(place)
    walks = [_Walk(Workflow(load.state)) for _ in range(load.workflows)]
    if isinstance(manager, AbstractAsyncContextManager):

        async def run() -> None:
            async with manager as client:
                await asyncio.gather(*(_awalk(client, walk, limit=number) for walk in walks))

        asyncio.run(run())
    else:
        with manager as client:
            for walk in walks:
                _walk(client, walk, limit=number)
    return [walk.workflow for walk in walks]

"""Measurements that need a process of their own, because they measure its memory.

``python -m tools.benchmarks.child`` reads one JSON object from its input and prints one.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tools.benchmarks.clients import AsyncClient, Client
from tools.benchmarks.contenders import SAVERS
from tools.benchmarks.material import Workflow
from tools.benchmarks.measure import Sample, describe
from tools.benchmarks.server import ROOT

MEGABYTE = 1_000_000
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Task:
    """What the child does: ``history`` of a thread, ``save`` a large state, or ``load`` it."""

    kind: str
    backend: str
    colour: str
    contender: str
    place: str
    state: int
    thread: str = ""
    checkpoints: int = 0
    last: str = ""
    """Id of the thread's latest checkpoint."""


def run(task: Task) -> tuple[dict[str, float], dict[str, str]]:
    """Have a child do it: its figures, and what it says besides.

    Raises:
        RuntimeError: The child failed; its last line is the message.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tools.benchmarks.child"],
        input=json.dumps(asdict(task)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["values"], answer["said"]


def sampled(tasks: list[Task]) -> Sample:
    """Children one after the other, their figures together; each hears what those before it said."""
    sample = Sample()
    said: dict[str, str] = {}
    for task in tasks:
        try:
            values, said = run(replace(task, **said))  # type: ignore[arg-type]  # its fields of text
        except RuntimeError as error:
            sample.errors.append(describe(error))
            break
        sample.values |= values
    return sample


class Memory:
    """How far the resident memory of this process grew above what it was at first."""

    def __init__(self) -> None:
        gc.collect()
        self._resets = False
        if _STATUS.exists():
            try:
                Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
                self._resets = True
            except OSError:
                pass
        self._base = _status("VmRSS") if self._resets else _peak()

    @property
    def grown(self) -> float:
        """Megabytes."""
        return (_status("VmHWM") if self._resets else _peak()) - self._base


def _status(name: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / MEGABYTE


def _peak() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEGABYTE


async def work(task: Task) -> tuple[dict[str, float], dict[str, str]]:
    """Open the contender and do the task."""
    contender = next(c for c in SAVERS[task.backend, task.colour] if c.name == task.contender)
    manager = contender.open(task.place)
    if isinstance(manager, AbstractAsyncContextManager):
        async with manager as client:
            return await _do(task, client)
    with manager as sync:
        return await _do(task, _Blocking(sync))


class _Blocking:
    """A synchronous client where nothing else runs: its calls may hold the loop."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def put(self, workflow: Workflow, step: int) -> None:
        self._client.put(workflow, step)

    async def put_writes(self, workflow: Workflow, step: int) -> None:
        self._client.put_writes(workflow, step)

    async def get(self, workflow: Workflow, step: int) -> None:
        self._client.get(workflow, step)

    async def check(self, workflow: Workflow, step: int) -> None:
        self._client.check(workflow, step)

    async def history(self, workflow: Workflow) -> int:
        return self._client.history(workflow)


async def _do(task: Task, client: AsyncClient) -> tuple[dict[str, float], dict[str, str]]:
    small = Workflow(2_000)
    for step in range(6):  # connections, statements and imports are not what is measured
        await client.put(small, step)
        await client.put_writes(small, step)
        await client.get(small, step)
    await client.history(small)
    if task.kind == "history":
        return await _history(task, client)
    return await (_save if task.kind == "save" else _load)(task, client)


async def _history(task: Task, client: AsyncClient) -> tuple[dict[str, float], dict[str, str]]:
    workflow = Workflow(task.state)
    workflow.thread = task.thread
    memory = Memory()
    started = time.perf_counter()
    count = await client.history(workflow)
    seconds = time.perf_counter() - started
    if count != task.checkpoints:
        raise ValueError(f"listed {count} of {task.checkpoints} checkpoints")
    return {"list ms": seconds * 1000, "list peak MB": memory.grown}, {}


async def _save(task: Task, client: AsyncClient) -> tuple[dict[str, float], dict[str, str]]:
    memory = Memory()  # the state is part of it
    workflow = Workflow(task.state)
    _ready(client, workflow)
    seconds = await _timed(lambda: client.put(workflow, 0))
    peak = memory.grown
    await client.put_writes(workflow, 0)
    return {"save ms": seconds, "save peak MB": peak}, {"thread": workflow.thread, "last": workflow.id}


async def _load(task: Task, client: AsyncClient) -> tuple[dict[str, float], dict[str, str]]:
    workflow = Workflow(2_000)
    workflow.thread, workflow.id = task.thread, task.last
    memory = Memory()
    seconds = await _timed(lambda: client.get(workflow, 0))
    peak = memory.grown
    whole = Workflow(task.state)
    whole.thread, whole.id = task.thread, task.last
    await client.check(whole, 0)
    return {"load ms": seconds, "load peak MB": peak}, {}


def _ready(client: Any, workflow: Workflow) -> None:
    """The bare driver serialises beforehand."""
    inner = client._client if isinstance(client, _Blocking) else client
    if hasattr(inner, "prepare"):
        inner.prepare(workflow)


async def _timed(call: Callable[[], Awaitable[None]]) -> float:
    gc.collect()
    started = time.perf_counter()
    await call()
    return (time.perf_counter() - started) * 1000


def main() -> None:
    """Read the task, do it, print what came out."""
    values, said = asyncio.run(work(Task(**json.loads(sys.stdin.read()))))
    print(json.dumps({"values": values, "said": said}))


if __name__ == "__main__":
    main()

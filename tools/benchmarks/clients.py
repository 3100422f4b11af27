"""A saver as the benchmark drives it: store a step, store its writes, load, list, and check."""

from __future__ import annotations

import uuid
from typing import Any, Protocol

from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple

from tools.benchmarks.material import Workflow


class WrongStateError(Exception):
    """A contender returned something else than what was stored."""


class Client(Protocol):
    """Someone who keeps workflows, for synchronous code."""

    def put(self, workflow: Workflow, step: int) -> None:
        """Store the checkpoint of ``step``."""

    def put_writes(self, workflow: Workflow, step: int) -> None:
        """Store what a node returned after ``step``."""

    def get(self, workflow: Workflow, step: int) -> None:
        """Load the latest checkpoint, and see that it is that of ``step``."""

    def check(self, workflow: Workflow, step: int) -> None:
        """Load the latest checkpoint and compare all of it."""

    def history(self, workflow: Workflow) -> int:
        """List the whole thread, keep nothing of it, and count."""


class AsyncClient(Protocol):
    """As :class:`Client`, for an event loop."""

    async def put(self, workflow: Workflow, step: int) -> None:
        """As :meth:`Client.put`."""

    async def put_writes(self, workflow: Workflow, step: int) -> None:
        """As :meth:`Client.put_writes`."""

    async def get(self, workflow: Workflow, step: int) -> None:
        """As :meth:`Client.get`."""

    async def check(self, workflow: Workflow, step: int) -> None:
        """As :meth:`Client.check`."""

    async def history(self, workflow: Workflow) -> int:
        """As :meth:`Client.history`."""


def glance(found: CheckpointTuple | None, step: int) -> None:
    """A look that costs next to nothing.

    Raises:
        WrongStateError: It is not the checkpoint of ``step``, or its writes are missing.
    """
    if found is None or found.checkpoint["channel_values"].get("step") != step:
        raise WrongStateError(f"step {step} was stored and is not the latest")
    if len(found.pending_writes or ()) != 2:
        raise WrongStateError(f"step {step} has lost writes")


def compare(found: CheckpointTuple | None, workflow: Workflow, step: int) -> None:
    """Compare state, versions and writes.

    Raises:
        WrongStateError: Something differs.
    """
    glance(found, step)
    assert found is not None  # noqa: S101 - glance() has seen to it
    writes = [(channel, value) for _, channel, value in found.pending_writes or ()]
    if found.checkpoint["channel_values"] != workflow.values(step):
        raise WrongStateError(f"the state of step {step} differs")
    if found.checkpoint["channel_versions"] != workflow.versions(step) or writes != workflow.writes(step):
        raise WrongStateError(f"versions or writes of step {step} differ")


class SaverClient:
    """A saver for synchronous code, called as LangGraph calls it."""

    def __init__(self, saver: BaseCheckpointSaver[Any]) -> None:
        self.saver = saver

    def put(self, workflow: Workflow, step: int) -> None:
        """As :meth:`Client.put`."""
        workflow.advance(step)
        self.saver.put(
            workflow.before, workflow.checkpoint(step), workflow.metadata(step), workflow.new_versions(step)
        )

    def put_writes(self, workflow: Workflow, step: int) -> None:
        """As :meth:`Client.put_writes`."""
        self.saver.put_writes(workflow.current, workflow.writes(step), str(uuid.uuid4()), "~__pregel_pull, a")

    def get(self, workflow: Workflow, step: int) -> None:
        """As :meth:`Client.get`."""
        glance(self.saver.get_tuple(workflow.latest), step)

    def check(self, workflow: Workflow, step: int) -> None:
        """As :meth:`Client.check`."""
        compare(self.saver.get_tuple(workflow.latest), workflow, step)

    def history(self, workflow: Workflow) -> int:
        """As :meth:`Client.history`."""
        return sum(1 for _ in self.saver.list(workflow.latest))


class AsyncSaverClient:
    """A saver for an event loop, called as LangGraph calls it."""

    def __init__(self, saver: BaseCheckpointSaver[Any]) -> None:
        self.saver = saver

    async def put(self, workflow: Workflow, step: int) -> None:
        """As :meth:`Client.put`."""
        workflow.advance(step)
        await self.saver.aput(
            workflow.before, workflow.checkpoint(step), workflow.metadata(step), workflow.new_versions(step)
        )

    async def put_writes(self, workflow: Workflow, step: int) -> None:
        """As :meth:`Client.put_writes`."""
        await self.saver.aput_writes(
            workflow.current, workflow.writes(step), str(uuid.uuid4()), "~__pregel_pull, a"
        )

    async def get(self, workflow: Workflow, step: int) -> None:
        """As :meth:`Client.get`."""
        glance(await self.saver.aget_tuple(workflow.latest), step)

    async def check(self, workflow: Workflow, step: int) -> None:
        """As :meth:`Client.check`."""
        compare(await self.saver.aget_tuple(workflow.latest), workflow, step)

    async def history(self, workflow: Workflow) -> int:
        """As :meth:`Client.history`."""
        count = 0
        async for _ in self.saver.alist(workflow.latest):
            count += 1
        return count

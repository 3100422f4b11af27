"""What the savers of both colours share: arguments become statements, rows become tuples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
)

from persistence import rules
from persistence.backends.postgres import steps
from persistence.backends.postgres.known import KnownRows
from persistence.backends.postgres.put import put as steps_of_put
from persistence.backends.postgres.steps import Listing, Rows, Steps
from persistence.errors import ClosedError
from persistence.metadata import clean_filter
from persistence.metrics import Meter

Statement = tuple[str, Mapping[str, Any]]


class Life:
    """What a saver shares with its clones (``with_allowlist``)."""

    def __init__(self) -> None:
        self.closed = False
        self.known = KnownRows()


class PostgresArguments(BaseCheckpointSaver[str]):
    """Checks and serialises the arguments at once; runs nothing."""

    _life: Life
    _where: str
    meter: Meter | None = None

    def _check_open(self) -> None:
        if self._life.closed:
            raise ClosedError(f"the connection to {self._where} was closed")

    def _put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> tuple[RunnableConfig, Steps[None]]:
        self._check_open()
        put = rules.put_of(config, checkpoint, metadata, new_versions)
        return put.config, steps_of_put(put, self.serde, self._life.known, self.meter)

    def _put_writes(
        self, config: RunnableConfig, writes: Iterable[tuple[str, Any]], task_id: str, task_path: str
    ) -> Statement | None:
        self._check_open()
        key = rules.key_of(config, exact=True)
        task, path, rows = rules.writes_of(key, writes, task_id, task_path, self.serde)
        if self.meter is not None:
            self.meter.size("writes", sum(len(row.blob) for row in rows))
        return steps.put_writes(key, task, path, rows) if rows else None

    def _get(self, config: RunnableConfig) -> Statement:
        self._check_open()
        return steps.get(rules.key_of(config))

    def _listing(
        self,
        config: RunnableConfig | None,
        filter: dict[str, Any] | None,
        before: RunnableConfig | None,
        limit: int | None,
    ) -> Listing:
        self._check_open()
        return Listing(rules.scope_of(config, before), clean_filter(filter), rules.check_limit(limit))

    def _tuple(self, rows: Rows) -> CheckpointTuple | None:
        """What ``get_tuple`` returns."""
        if not rows:
            return None
        if self.meter is not None:
            self.meter.size("loaded", steps.size(rows[0]))
        steps.note(rows[0], self._life.known)
        return steps.load(rows[0], self.serde)

    def _prune(self, thread_ids: Iterable[str], strategy: str) -> Callable[[], Steps[None]]:
        self._check_open()
        threads = rules.text_ids(thread_ids, "thread_id")
        rules.check_strategy(strategy)
        if strategy == "delete":
            return lambda: steps.delete_threads(threads)
        return lambda: steps.prune(threads)

    def _delete_thread(self, thread_id: str) -> Callable[[], Steps[None]]:
        self._check_open()
        thread = rules.text_id(thread_id, "thread_id")
        return lambda: steps.delete_threads([thread])

    def _delete_for_runs(self, run_ids: Iterable[str]) -> Callable[[], Steps[None]]:
        self._check_open()
        runs = rules.text_ids(run_ids, "run_id")
        return lambda: steps.delete_for_runs(runs)

    def _copy_thread(self, source_thread_id: str, target_thread_id: str) -> Callable[[], Steps[None]]:
        self._check_open()
        source = rules.text_id(source_thread_id, "source_thread_id")
        target = rules.text_id(target_thread_id, "target_thread_id")
        return lambda: steps.copy_thread(source, target)

    def _history(
        self, config: RunnableConfig, channels: Iterable[str]
    ) -> Steps[dict[str, DeltaChannelHistory]]:
        self._check_open()
        return steps.history(rules.key_of(config), rules.text_ids(channels, "channel"), self.serde)

"""The saver in memory: one class for both colours."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import ormsgpack
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
)
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.types import TASKS

from persistence import rules
from persistence.delta import Ancestor, delta_history
from persistence.errors import ClosedError, ConflictError
from persistence.lineage import Needs, Node, Place, Plan, prune_needs, prune_plan, runs_needs, runs_plan
from persistence.metadata import clean_filter, comparable, json_value, matches, run_text
from persistence.metrics import OPERATIONS, measured
from persistence.rules import Typed


@dataclass(slots=True)
class _Row:
    parent: str | None
    body: bytes
    """As msgpack."""
    metadata: str
    values: Mapping[str, Typed]
    versions: Mapping[str, str]
    has_values: bool


# Task id and idx -> task path, channel, type, blob.
_Writes = dict[tuple[str, int], tuple[str, str, str, bytes]]


@dataclass(slots=True)
class _Thread:
    rows: dict[Place, _Row] = field(default_factory=dict)
    writes: dict[Place, _Writes] = field(default_factory=dict)
    latest: dict[str, str] = field(default_factory=dict)
    """By namespace, the largest id of a checkpoint."""


_NOTHING = _Thread()
"""A thread that is not there; nobody writes to it."""


class _Memory:
    """What a saver and its clones (``with_allowlist``) share."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.threads: dict[str, _Thread] = {}
        self.closed = False

    def __enter__(self) -> dict[str, _Thread]:
        self.lock.acquire()
        if self.closed:
            self.lock.release()
            raise ClosedError("the saver in memory was closed")
        return self.threads

    def __exit__(self, *exc_info: object) -> None:
        self.lock.release()


@measured(*OPERATIONS)
class MemorySaver(InMemorySaver):
    """Checkpoints in this process's memory, serialised like everywhere else."""

    def __init__(self, *, serde: SerializerProtocol | None = None) -> None:
        BaseCheckpointSaver.__init__(self, serde=serde)
        self._memory = _Memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def thread_count(self) -> int:
        """How many threads have checkpoints or writes."""
        with self._memory as threads:
            return len(threads)

    def close(self) -> None:
        """Forget everything; every later call raises ``ClosedError``."""
        with self._memory.lock:
            self._memory.closed = True
            self._memory.threads.clear()

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint; one with the same id is replaced."""
        with self._memory as threads:
            put = rules.put_of(config, checkpoint, metadata, new_versions)
            thread = threads.get(put.thread, _NOTHING)
            values = _stored(thread.rows, put)
            serde = self.serde
            for channel, value in put.given.items():
                if channel not in values:
                    values[channel] = rules.dumps(serde, value)
            if thread is _NOTHING:
                thread = threads[put.thread] = _Thread()
            if put.id >= thread.latest.get(put.ns, ""):
                thread.latest[put.ns] = put.id
            has_values = put.has_values or bool(values)
            row = _Row(put.parent, put.packed, put.metadata, values, put.versions, has_values)
            thread.rows[put.ns, put.id] = row
        return put.config

    def put_writes(
        self,
        config: RunnableConfig,
        writes: Iterable[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """Store pending writes of one task."""
        with self._memory as threads:
            key = rules.key_of(config, exact=True)
            task, path, rows = rules.writes_of(key, writes, task_id, task_path, self.serde)
            if not rows:
                return
            thread = threads.get(key.thread) or threads.setdefault(key.thread, _Thread())
            stored = thread.writes.setdefault((key.ns, key.checkpoint or ""), {})
            for row in rows:
                if row.idx < 0 or (task, row.idx) not in stored:
                    stored[task, row.idx] = (path, row.channel, row.type, row.blob)

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint that a config names, or the latest of its namespace."""
        with self._memory as threads:
            key = rules.key_of(config)
            thread = threads.get(key.thread, _NOTHING)
            id_ = thread.latest.get(key.ns) if key.checkpoint is None else key.checkpoint
            return None if id_ is None else self._load(thread, key.thread, (key.ns, id_))

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """Checkpoints, the newest first."""
        scope, left = rules.scope_of(config, before), rules.check_limit(limit)
        wanted = {key: comparable(value) for key, value in clean_filter(filter).items()}
        with self._memory as threads:
            places = sorted(
                (thread, ns, id_)
                for thread in threads
                if scope.thread in (None, thread)
                for ns, id_ in threads[thread].rows
                if scope.ns in (None, ns)
                and scope.checkpoint in (None, id_)
                and (scope.before is None or id_ < scope.before)
            )
        places.sort(key=lambda place: place[2], reverse=True)  # stable: ties stay by thread, namespace
        return self._list(places, wanted, left)

    def _list(
        self, places: Iterable[tuple[str, str, str]], wanted: dict[str, Any], left: int | None
    ) -> Iterator[CheckpointTuple]:
        for thread, ns, id_ in places:
            if left == 0:
                return
            with self._memory as threads:
                of_thread = threads.get(thread, _NOTHING)
                row = of_thread.rows.get((ns, id_))
                if row is None or (wanted and not matches(json_value(row.metadata), wanted)):
                    continue
                found = self._load(of_thread, thread, (ns, id_))
            if found is not None:
                left = None if left is None else left - 1
                yield found

    def delete_thread(self, thread_id: str) -> None:
        """Delete everything of one thread."""
        with self._memory as threads:
            threads.pop(rules.text_id(thread_id, "thread_id"), None)

    def prune(self, thread_ids: Iterable[str], *, strategy: str = "keep_latest") -> None:
        """Delete all of the threads (``delete``), or all but the latest state (``keep_latest``)."""
        with self._memory as threads:
            ids = rules.text_ids(thread_ids, "thread_id")
            rules.check_strategy(strategy)
            if strategy == "delete":
                for id_ in ids:
                    threads.pop(id_, None)
                return
            plans = []
            for id_ in ids:
                if id_ in threads:
                    nodes = _nodes(threads[id_])
                    answers = _answers(threads[id_], prune_needs(nodes))
                    plans.append((threads[id_], prune_plan(id_, nodes, *answers)))
            for thread, plan in plans:
                _carry_out(thread, plan)

    def delete_for_runs(self, run_ids: Iterable[str]) -> None:
        """Delete the checkpoints of runs, with their writes."""
        with self._memory as threads:
            runs = set(rules.text_ids(run_ids, "run_id"))
            plans = []
            for id_, thread in threads.items():
                doomed = {
                    place for place, row in thread.rows.items() if run_text(json_value(row.metadata)) in runs
                }
                if doomed:
                    nodes = _nodes(thread)
                    answers = _answers(thread, runs_needs(nodes, doomed))
                    plans.append((thread, runs_plan(id_, nodes, doomed, *answers)))
            for thread, plan in plans:
                _carry_out(thread, plan)

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy everything of one thread to another, which must be empty."""
        with self._memory as threads:
            source = rules.text_id(source_thread_id, "source_thread_id")
            target = rules.text_id(target_thread_id, "target_thread_id")
            if threads.get(source, _NOTHING) == _NOTHING:
                return
            if threads.get(target, _NOTHING) != _NOTHING:
                raise ConflictError(f"thread {target!r} is not empty")
            old = threads[source]
            writes = {place: dict(w) for place, w in old.writes.items()}
            threads[target] = _Thread(dict(old.rows), writes, dict(old.latest))

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Iterable[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Per channel, the writes since the nearest stored value on the way to the root."""
        with self._memory as threads:
            key = rules.key_of(config)
            thread = threads.get(key.thread, _NOTHING)
            id_ = key.checkpoint or thread.latest.get(key.ns, "")
            asked = rules.text_ids(channels, "channel")
            return delta_history(asked, self._ancestors(thread, key.ns, id_))

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """As ``get_tuple``."""
        return self.get_tuple(config)

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """As ``list``."""
        for found in self.list(config, filter=filter, before=before, limit=limit):
            yield found

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """As ``put``."""
        return self.put(config, checkpoint, metadata, new_versions)

    async def aput_writes(
        self,
        config: RunnableConfig,
        writes: Iterable[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """As ``put_writes``."""
        self.put_writes(config, writes, task_id, task_path)

    async def adelete_thread(self, thread_id: str) -> None:
        """As ``delete_thread``."""
        self.delete_thread(thread_id)

    async def aprune(self, thread_ids: Iterable[str], *, strategy: str = "keep_latest") -> None:
        """As ``prune``."""
        self.prune(thread_ids, strategy=strategy)

    async def adelete_for_runs(self, run_ids: Iterable[str]) -> None:
        """As ``delete_for_runs``."""
        self.delete_for_runs(run_ids)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """As ``copy_thread``."""
        self.copy_thread(source_thread_id, target_thread_id)

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Iterable[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """As ``get_delta_channel_history``."""
        return self.get_delta_channel_history(config=config, channels=channels)

    def _load(self, thread: _Thread, thread_id: str, place: Place) -> CheckpointTuple | None:
        if (row := thread.rows.get(place)) is None:
            return None
        checkpoint = ormsgpack.unpackb(row.body)
        if row.has_values:
            loads = self.serde.loads_typed
            checkpoint["channel_values"] = {channel: loads(value) for channel, value in row.values.items()}
        if row.parent and rules.has_sends_in_parent(checkpoint):
            above = rules.pending_writes(_write_rows(thread, (place[0], row.parent)), self.serde)
            rules.add_sends(checkpoint, [value for _, channel, value in above if channel == TASKS])
        return rules.checkpoint_tuple(
            (thread_id, *place),
            row.parent,
            checkpoint,
            json_value(row.metadata),
            rules.pending_writes(_write_rows(thread, place), self.serde),
        )

    def _ancestors(self, thread: _Thread, ns: str, id_: str) -> Iterator[Ancestor]:
        seen = {id_}
        row = thread.rows.get((ns, id_))
        while row is not None and row.parent and row.parent not in seen:
            place = (ns, row.parent)
            seen.add(row.parent)
            row = thread.rows.get(place)
            if row is not None:
                yield self._ancestor(thread, place, row)

    def _ancestor(self, thread: _Thread, place: Place, row: _Row) -> Ancestor:
        return Ancestor(
            row.values.keys(),
            lambda channel: self.serde.loads_typed(row.values[channel]),
            lambda: rules.pending_writes(_write_rows(thread, place), self.serde),
        )


def _stored(rows: Mapping[Place, _Row], put: rules.Put) -> dict[str, Typed]:
    """The values that are stored for the versions of the channels that keep theirs."""
    found: dict[str, Typed] = {}
    parent = rows.get((put.ns, put.parent)) if put.parent else None
    for channel, version in put.kept.items():
        if parent is not None and parent.versions.get(channel) == version:
            value = parent.values.get(channel)
        else:
            value = _stored_elsewhere(rows, put, channel)
        if value is not None:
            found[channel] = value
    return found


def _stored_elsewhere(rows: Mapping[Place, _Row], put: rules.Put, channel: str) -> Typed | None:
    """The value that any row of the namespace holds for a channel's version."""
    version = put.versions[channel]
    for place in sorted((place for place in rows if place[0] == put.ns), reverse=True):
        row = rows[place]
        if row.versions.get(channel) == version and channel in row.values:
            return row.values[channel]
    return None


def _write_rows(thread: _Thread, place: Place) -> Iterator[tuple[str, str, int, str, str, bytes]]:
    for (task, idx), (path, channel, type_, blob) in thread.writes.get(place, {}).items():
        yield path, task, idx, channel, type_, blob


def _nodes(thread: _Thread) -> list[Node]:
    return [
        Node.of(
            place, row.parent, ormsgpack.unpackb(row.body).get("v"), json_value(row.metadata), row.versions
        )
        for place, row in thread.rows.items()
    ]


def _answers(thread: _Thread, needs: Needs) -> tuple[Collection[Place], Mapping[Place, Collection[str]]]:
    sends = {
        place
        for place in needs.sends
        if any(write[1] == TASKS for write in thread.writes.get(place, {}).values())
    }
    stored = {place: row.values.keys() for place, row in thread.rows.items() if place[0] in needs.delta}
    return sends, stored


def _carry_out(thread: _Thread, plan: Plan) -> None:
    for ns, ids in plan.delete.items():
        for id_ in ids:
            del thread.rows[ns, id_]
            thread.writes.pop((ns, id_), None)
    for ns, ids in plan.orphans.items():
        for id_ in ids:
            row = thread.rows[ns, id_]
            thread.rows[ns, id_] = _Row(
                None, row.body, row.metadata, row.values, row.versions, row.has_values
            )
    for place in [place for place in thread.writes if place[0] in plan.calls]:
        del thread.writes[place]
    thread.latest = {}
    for ns, id_ in sorted(thread.rows):
        thread.latest[ns] = id_

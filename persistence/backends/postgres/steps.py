"""What the Postgres savers do, once for both colours.

An operation is a generator: it yields statements and receives their rows. Each colour has a
small driver that runs them (``persistence.backends.postgres.savers``).
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from langgraph.checkpoint.base import CheckpointTuple, DeltaChannelHistory
from langgraph.checkpoint.serde.base import SerializerProtocol
from psycopg import errors

from persistence import rules
from persistence.backends.postgres import sql
from persistence.backends.postgres.known import Fact, KnownRows, Where
from persistence.backends.postgres.markers import MARKER
from persistence.backends.postgres.values import EMPTY, load_values, unpack
from persistence.backends.postgres.wire import LARGE
from persistence.delta import Ancestor, delta_history
from persistence.errors import ConflictError
from persistence.lineage import Needs, Node, Place, Plan, prune_needs, prune_plan, runs_needs, runs_plan
from persistence.metadata import json_text

T = TypeVar("T")
Rows = Sequence[Sequence[Any]]
Steps = Generator[tuple[str, Mapping[str, Any]], Rows, T]

_FIRST_PAGE = 16
_LARGEST_PAGE = 32
_CHAIN_PAGE = 256


def put_writes(
    key: rules.Key, task: str, path: str, writes: Sequence[rules.Write]
) -> tuple[str, dict[str, Any]]:
    """The statement that stores the writes of one task."""
    rows = [(write.idx, write.channel, write.type, write.blob) for write in writes]
    return sql.put_writes(len(rows)), {
        "thread": key.thread,
        "ns": key.ns,
        "id": key.checkpoint,
        "task": task,
        "path": path,
        **sql.row_params(("idx", "channel", "type", "blob"), rows),
    }


def get(key: rules.Key) -> tuple[str, dict[str, Any]]:
    """The statement that reads one checkpoint, or the latest."""
    rows = sql.LATEST if key.checkpoint is None else sql.EXACT
    params = {"thread": key.thread, "ns": key.ns, "id": key.checkpoint, "limit": 1}
    return sql.select(rows, one_thread=True), params


@dataclass(slots=True)
class Listing:
    """A listing that is read page by page, each where the last one ended."""

    scope: rules.Scope
    wanted: dict[str, Any]
    left: int | None
    size: int = _FIRST_PAGE
    last: tuple[str, str, str] | None = None

    def page(self) -> Steps[Rows]:
        """The next page; an empty one is the end."""
        size = self.size if self.left is None else min(self.size, self.left)
        if size == 0:
            return []
        where, params = self._where()
        statement = sql.select(where, one_thread=self.scope.thread is not None)
        rows = yield statement, {**params, "limit": size}
        if rows:
            thread, ns, id_ = rows[-1][:3]
            self.last = (thread, ns, id_)
            self.left = None if self.left is None else self.left - len(rows)
            self.size = min(self.size * 2, _LARGEST_PAGE)
        return rows

    def _where(self) -> tuple[str, dict[str, Any]]:
        scope = self.scope
        params: dict[str, Any] = {
            "thread": scope.thread,
            "ns": scope.ns,
            "id": scope.checkpoint,
            "before": scope.before,
        }
        clauses = [
            clause
            for name, clause in (
                ("thread", "thread_id = %(thread)s"),
                ("ns", "checkpoint_ns = %(ns)s"),
                ("id", "checkpoint_id = %(id)s"),
                ("before", 'checkpoint_id COLLATE "C" < %(before)s'),
            )
            if params[name] is not None
        ]
        params = {name: value for name, value in params.items() if value is not None}
        for i, (key, value) in enumerate(self.wanted.items()):
            params[f"key{i}"] = key
            if value is None:
                clauses.append(f"COALESCE(metadata -> %(key{i})s::text, 'null') = 'null'")
            else:
                params[f"value{i}"] = json_text(value)
                clauses.append(f"metadata -> %(key{i})s::text = %(value{i})s::jsonb")
        if contained := {key: value for key, value in self.wanted.items() if value is not None}:
            # What is equal is contained: says nothing new, but an index on the metadata can serve it.
            params["contained"] = json_text(contained)
            clauses.append("metadata @> %(contained)s::jsonb")
        if self.last is not None:
            params["last_thread"], params["last_ns"], params["last_id"] = self.last
            clauses.append(
                '(checkpoint_id COLLATE "C" < %(last_id)s OR checkpoint_id = %(last_id)s AND '
                '(thread_id COLLATE "C", checkpoint_ns COLLATE "C") > (%(last_thread)s, %(last_ns)s))'
            )
        return " AND ".join(clauses), params


def note(row: Sequence[Any], known: KnownRows) -> None:
    """Remember a row of :func:`sql.select`, before :func:`load` changes it."""
    checkpoint, blobs, xmin = row[4], row[6], row[12]
    versions, held = dict(checkpoint.get("channel_versions") or {}), checkpoint.get("channel_values") or {}

    def facts() -> dict[str, Fact]:
        found: dict[str, Any] = {
            channel: Where.NOWHERE if type_ == EMPTY else Where.BLOB for channel, type_, _ in blobs or ()
        }
        found.update(held)
        return {
            channel: Fact(rules.version_text(version, channel), found[channel])
            for channel, version in versions.items()
            if channel in found
        }

    known.note(row[:3], xmin, facts)  # type: ignore[arg-type]  # the key


def load(row: Sequence[Any], serde: SerializerProtocol) -> CheckpointTuple:
    """A row of :func:`sql.select` as a tuple."""
    thread, ns, id_, parent, checkpoint, metadata = row[:6]
    # A checkpoint that came without values may have got some, or only markers that there are none.
    had_values = "channel_values" in checkpoint and checkpoint.pop(MARKER, True) is not None
    values = load_values(checkpoint.pop("channel_values", None) or {}, unpack(row[6], row[7], serde), serde)
    if values or had_values:
        checkpoint["channel_values"] = values
    if row[10]:
        sends = rules.pending_writes(unpack(row[10], row[11], serde), serde)
        rules.add_sends(checkpoint, [value for _, _, value in sends])
    writes = rules.pending_writes(unpack(row[8], row[9], serde), serde)
    return rules.checkpoint_tuple((thread, ns, id_), parent, checkpoint, metadata or {}, writes)


def is_large(row: Sequence[Any]) -> bool:
    """Whether :func:`load` takes so long that an event loop should not do it."""
    return size(row) >= LARGE


def size(row: Sequence[Any]) -> int:
    """Bytes of the values and writes of a row."""
    return len(row[7] or b"") + len(row[9] or b"")


def delete_threads(threads: Sequence[str]) -> Steps[None]:
    """Delete everything of some threads; one transaction."""
    yield sql.DELETE_THREADS, {"threads": list(threads)}
    yield from _refuse_if(sql.ROBBED_THREADS, {"threads": list(threads)})


def prune(threads: Iterable[str]) -> Steps[None]:
    """Keep the latest state of some threads; one transaction."""
    for thread in sorted(threads):  # two calls at once do not wait for each other in a circle
        nodes = yield from _nodes(thread)
        if nodes:
            answers = yield from _answers(thread, prune_needs(nodes))
            yield from _carry_out(thread, prune_plan(thread, nodes, *answers))


def delete_for_runs(runs: Sequence[str]) -> Steps[None]:
    """Delete the checkpoints of some runs, in all threads; one transaction."""
    found = yield sql.RUNS, {"runs": list(runs)}
    doomed: dict[str, set[Place]] = {}
    for thread, ns, id_ in found:
        doomed.setdefault(thread, set()).add((ns, id_))
    for thread, places in sorted(doomed.items()):
        nodes = yield from _nodes(thread)
        answers = yield from _answers(thread, runs_needs(nodes, places))
        yield from _carry_out(thread, runs_plan(thread, nodes, places, *answers))


def copy_thread(source: str, target: str) -> Steps[None]:
    """Copy a thread's rows under another thread id; one transaction, on one snapshot."""
    yield sql.SNAPSHOT, {}
    ((is_empty,),) = yield sql.IS_EMPTY, {"thread": source}
    if is_empty:
        return
    ((is_empty,),) = yield sql.IS_EMPTY, {"thread": target}
    if not is_empty:
        raise ConflictError(f"thread {target!r} is not empty")
    for statement in sql.COPY_THREAD:
        yield statement, {"source": source, "target": target}


def history(
    key: rules.Key, channels: Sequence[str], serde: SerializerProtocol
) -> Steps[dict[str, DeltaChannelHistory]]:
    """The history of delta channels."""
    here = {"thread": key.thread, "ns": key.ns}
    id_ = key.checkpoint
    if id_ is None:
        latest = yield f"SELECT checkpoint_id FROM checkpoints WHERE {sql.LATEST}", here
        id_ = latest[0][0] if latest else ""
    chain = yield from _chain(here, id_, channels)
    ids = [ancestor for ancestor, _ in chain]
    rows = yield sql.CHAIN_WRITES, {**here, "ids": ids, "channels": list(channels)}
    writes: dict[str, list[tuple[str, str, int, str, str, bytes]]] = {}
    for at, path, task, idx, channel, type_, blob in rows:
        writes.setdefault(at, []).append((path, task, idx, channel, type_, blob))
    seeds = yield from _seeds(here, chain, channels, serde)

    def ancestor(id_: str, stored: Collection[str]) -> Ancestor:
        return Ancestor(
            stored,
            lambda channel: seeds[id_, channel],
            lambda: rules.pending_writes(writes.get(id_, ()), serde),
        )

    return delta_history(channels, (ancestor(id_, stored) for id_, stored in chain))


def _chain(here: Mapping[str, Any], id_: str, channels: Sequence[str]) -> Steps[list[tuple[str, set[str]]]]:
    """The ancestors of a checkpoint that are needed, nearest first, with the channels they hold."""
    chain: list[tuple[str, set[str]]] = []
    open_, seen, start = set(channels), {id_}, id_
    while open_:
        params = {**here, "id": start, "channels": list(channels), "depth": _CHAIN_PAGE}
        page = yield sql.CHAIN, params
        for at, stored in page[1:]:
            if at in seen or not open_:
                return chain
            seen.add(at)
            chain.append((at, set(stored)))
            open_.difference_update(stored)
        if len(page) <= _CHAIN_PAGE:
            break
        start = page[-1][0]
    return chain


def _seeds(
    here: Mapping[str, Any],
    chain: Iterable[tuple[str, set[str]]],
    channels: Iterable[str],
    serde: SerializerProtocol,
) -> Steps[dict[tuple[str, str], Any]]:
    """The value of each channel at the nearest ancestor that holds one."""
    open_ = set(channels)
    nearest: list[tuple[str, str]] = []
    for id_, stored in chain:
        nearest += [(id_, channel) for channel in sorted(open_ & stored)]
        open_ -= stored
    if not nearest:
        return {}
    params = {"ids": [id_ for id_, _ in nearest], "channels": [channel for _, channel in nearest]}
    rows = yield sql.SEEDS, {**here, **params}
    return {
        (id_, channel): load_values(
            held if is_held else {}, [(channel, type_, blob)] if type_ else [], serde
        )[channel]
        for id_, channel, held, is_held, type_, blob in rows
    }


def _nodes(thread: str) -> Steps[list[Node]]:
    rows = yield sql.NODES, {"thread": thread}
    return [
        Node.of((ns, id_), parent, version, metadata, channels)
        for ns, id_, parent, version, metadata, channels in rows
    ]


def _answers(thread: str, needs: Needs) -> Steps[tuple[Collection[Place], Mapping[Place, Collection[str]]]]:
    sends: set[Place] = set()
    for ns in {ns for ns, _ in needs.sends}:
        ids = [id_ for at, id_ in needs.sends if at == ns]
        rows = yield sql.WITH_SENDS, {"thread": thread, "ns": ns, "ids": ids}
        sends.update((ns, id_) for (id_,) in rows)
    stored: dict[Place, Collection[str]] = {}
    for ns, channels in needs.delta.items():
        rows = yield sql.STORED, {"thread": thread, "ns": ns, "channels": channels}
        stored.update(((ns, id_), found) for id_, found in rows)
    return sends, stored


def _carry_out(thread: str, plan: Plan) -> Steps[None]:
    if plan.calls:
        calls = {"thread": thread, "spaces": plan.calls}
        yield sql.DELETE_CALLS, calls
        yield from _refuse_if(sql.ROBBED_CALLS, calls)
    for ns, ids in plan.delete.items():
        if ns in plan.calls:
            continue
        here = {"thread": thread, "ns": ns}
        freed = {
            (channel, version) for channel, version in (yield sql.DELETE_CHECKPOINTS, {**here, "ids": ids})
        }
        if ns in plan.orphans:
            yield sql.ORPHAN, {**here, "ids": plan.orphans[ns], "deleted": ids}
        if freed:
            freed.difference_update((c, v) for c, v in (yield sql.REFERENCED, here))
        gone = sorted(freed)
        blobs = {**here, "channels": [c for c, _ in gone], "versions": [v for _, v in gone]}
        if freed:
            yield sql.DELETE_BLOBS, blobs
        yield from _refuse_if(sql.BUILT_ON, {**blobs, "ids": ids})


def _refuse_if(question: str, params: Mapping[str, Any]) -> Steps[None]:
    """Begin again if somebody has built on what this transaction deletes, before it was locked."""
    ((is_so,),) = yield question, params
    if is_so:
        raise errors.SerializationFailure("a checkpoint was stored that needs what was to be deleted")

"""What may be deleted from a thread: the rules of ``prune`` and ``delete_for_runs``.

A checkpoint can need others. One of an old format finds its pending sends in its parent's writes.
A ``DeltaChannel`` stores no value: it is rebuilt from the writes of the ancestors, back to the
nearest one that holds the value (a snapshot). What a kept checkpoint needs is kept as well.

Pure functions over light records; each backend fetches the records and carries the plan out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from persistence.errors import UnsupportedError
from persistence.rules import has_sends_in_parent

Place = tuple[str, str]
"""Namespace and id of a checkpoint."""

_COUNTERS = "counters_since_delta_snapshot"
_VERSIONED = "delta_writes_versioned"  # LangGraph.js, which names no channels


@dataclass(frozen=True, slots=True)
class Node:
    """One checkpoint of a thread, as far as deletion is concerned."""

    ns: str
    id: str
    parent: str | None
    old: bool
    """Its pending sends are in its parent's writes."""
    root: str | None
    """The root graph's checkpoint that the subgraph call started from."""
    delta: frozenset[str]
    """Channels that it cannot be read without its ancestors for."""
    opaque: bool
    """It uses delta channels, and nothing says which."""

    @classmethod
    def of(
        cls,
        place: Place,
        parent: str | None,
        version: Any,
        metadata: Mapping[str, Any],
        channels: Collection[str],
    ) -> Node:
        """From what is stored: the checkpoint format's version, and the channels that have one."""
        parents = metadata.get("parents")
        counters = metadata.get(_COUNTERS)
        root = parents.get("") if isinstance(parents, dict) else None
        return cls(
            ns=place[0],
            id=place[1],
            parent=parent or None,
            old=has_sends_in_parent({"v": version}),
            root=root if isinstance(root, str) else None,
            # A channel that was never written has no version, and nothing to rebuild.
            delta=frozenset(counters).intersection(channels) if isinstance(counters, dict) else frozenset(),
            opaque=bool(metadata.get(_VERSIONED)),
        )


@dataclass(frozen=True, slots=True)
class Needs:
    """What else must be known before a plan can be made."""

    sends: list[Place]
    """Checkpoints of which to ask whether their writes hold pending sends."""
    delta: dict[str, list[str]]
    """By namespace, the channels of which to ask which checkpoints hold a value."""


@dataclass(slots=True)
class Plan:
    """What to delete from one thread."""

    delete: dict[str, list[str]] = field(default_factory=dict)
    """By namespace, the ids of checkpoints; their writes go too."""
    orphans: dict[str, list[str]] = field(default_factory=dict)
    """By namespace, the ids of kept checkpoints whose parent is deleted: they are left with none."""
    calls: list[str] = field(default_factory=list)
    """Namespaces of finished subgraph calls, which go as a whole."""


def prune_needs(nodes: Collection[Node]) -> Needs:
    """What :func:`prune_plan` must know."""
    return _needs(_heads(nodes).values())


def prune_plan(
    thread: str,
    nodes: Collection[Node],
    sends: Collection[Place],
    stored: Mapping[Place, Collection[str]],
) -> Plan:
    """Keep the latest checkpoint of each namespace and what it needs; the rest may go.

    A subgraph call's namespace (it ends in a task id, after a colon) goes with the root checkpoint
    that the call started from, but only once that one is saved: a run saves in the background.
    """
    _refuse_opaque(thread, nodes)
    at = {(node.ns, node.id): node for node in nodes}
    keep: dict[str, set[str]] = {}
    for head in _heads(nodes).values():
        kept = keep.setdefault(head.ns, {head.id})
        if head.parent and head.old and (head.ns, head.parent) in sends:
            kept.add(head.parent)
        kept.update(node.id for node in _ancestors_needed(head, at, stored))
    calls = {
        head.ns
        for head in _heads(nodes).values()
        if ":" in head.ns and head.root and ("", head.root) in at and head.root not in keep.get("", ())
    }
    plan = _plan(nodes, lambda node: node.ns not in calls and node.id in keep[node.ns])
    plan.calls = sorted(calls)
    return plan


def runs_needs(nodes: Collection[Node], doomed: Collection[Place]) -> Needs:
    """What :func:`runs_plan` must know."""
    return _needs(node for node in nodes if (node.ns, node.id) not in doomed)


def runs_plan(
    thread: str,
    nodes: Collection[Node],
    doomed: Collection[Place],
    sends: Collection[Place],
    stored: Mapping[Place, Collection[str]],
) -> Plan:
    """Delete the doomed checkpoints.

    Raises:
        UnsupportedError: One that stays could not be read any more.
    """
    at = {(node.ns, node.id): node for node in nodes}
    live = [node for node in nodes if (node.ns, node.id) not in doomed]
    touched = {ns for ns, _ in doomed}
    _refuse_opaque(thread, [node for node in live if node.ns in touched])
    for node in live:
        needed = [(node.ns, n.id) for n in _ancestors_needed(node, at, stored)]
        if node.parent and node.old and (node.ns, node.parent) in sends:
            needed.append((node.ns, node.parent))
        if lost := next((place for place in needed if place in doomed), None):
            raise UnsupportedError(
                f"checkpoint {lost[1]!r} of thread {thread!r} cannot be deleted: "
                f"checkpoint {node.id!r}, which stays, is rebuilt from it",
                hint="delete the later runs too, or the whole thread",
            )
    return _plan(nodes, lambda node: (node.ns, node.id) not in doomed)


def _heads(nodes: Iterable[Node]) -> dict[str, Node]:
    heads: dict[str, Node] = {}
    for node in nodes:
        if node.ns not in heads or node.id > heads[node.ns].id:
            heads[node.ns] = node
    return heads


def _needs(live: Iterable[Node]) -> Needs:
    sends: list[Place] = []
    delta: dict[str, set[str]] = {}
    for node in live:
        if node.old and node.parent:
            sends.append((node.ns, node.parent))
        if node.delta:
            delta.setdefault(node.ns, set()).update(node.delta)
    return Needs(list(dict.fromkeys(sends)), {ns: sorted(channels) for ns, channels in delta.items()})


def _ancestors_needed(
    node: Node, at: Mapping[Place, Node], stored: Mapping[Place, Collection[str]]
) -> Iterator[Node]:
    """The ancestors that rebuild the node's delta channels, nearest first."""
    open_ = set(node.delta).difference(stored.get((node.ns, node.id), ()))
    seen = {node.id}
    parent = node.parent
    while open_ and parent and parent not in seen and (ancestor := at.get((node.ns, parent))):
        yield ancestor
        seen.add(parent)
        open_.difference_update(stored.get((node.ns, parent), ()))
        parent = ancestor.parent


def _plan(nodes: Collection[Node], keeps: Callable[[Node], bool]) -> Plan:
    plan = Plan()
    gone = {(node.ns, node.id) for node in nodes if not keeps(node)}
    for node in nodes:
        if (node.ns, node.id) in gone:
            plan.delete.setdefault(node.ns, []).append(node.id)
        elif node.parent and (node.ns, node.parent) in gone:
            plan.orphans.setdefault(node.ns, []).append(node.id)
    return plan


def _refuse_opaque(thread: str, nodes: Iterable[Node]) -> None:
    if any(node.opaque for node in nodes):
        raise UnsupportedError(
            f"thread {thread!r} was written by LangGraph.js with delta channels: "
            "which checkpoints the latest one needs is not recorded",
            hint="delete the whole thread, or keep it",
        )

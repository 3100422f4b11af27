"""The reference model: what docs/contract.md says a saver does, in plain Python over two dicts.

Readable in one sitting and slow on purpose. It shares no code with the savers except LangGraph's
serializer, which decides what a value is, and the types of the errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from langgraph.checkpoint.base import CheckpointTuple, get_checkpoint_metadata
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT, RESUME, SCHEDULED, TASKS

from persistence.errors import ConflictError, InvalidInputError, UnsupportedError

Place = tuple[str, str, str]
"""Thread, namespace and id of a checkpoint."""
Many = list  # the model has a method of that name

SERDE = JsonPlusSerializer()
SPECIAL = {ERROR: -1, SCHEDULED: -2, INTERRUPT: -3, RESUME: -4}
LONGEST_KEY = 2600
DEEPEST = 200
MISSING = object()


@dataclass(frozen=True)
class Row:
    """One stored checkpoint."""

    parent: str | None
    body: dict[str, Any]
    metadata: dict[str, Any]
    values: dict[str, Any] | None
    """Serialised, by channel; ``None`` where the checkpoint came without."""
    versions: dict[str, str]


class Model:
    """A saver without a database."""

    def __init__(self) -> None:
        self.rows: dict[Place, Row] = {}
        self.writes: dict[Place, dict[tuple[str, int], tuple[str, str, Any]]] = {}
        """By task and index: task path, channel, serialised value."""

    # Writing

    def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        thread, ns, parent = address(config)
        id_ = text(checkpoint.get("id"))
        fits(thread, ns, id_)
        given = {channel_name(c, thread, ns): v for c, v in checkpoint.get("channel_values", {}).items()}
        body = as_json({k: v for k, v in checkpoint.items() if k != "channel_values"}) | {"id": id_}
        versions = {text(c): version(v) for c, v in checkpoint.get("channel_versions", {}).items()}
        for channel, at in versions.items():
            fits(thread, ns, channel, at)
        new = {str(c): v for c, v in new_versions.items()}
        new = {c: version(v) for c, v in new.items() if c in versions}
        kept_metadata = as_json(dict(get_checkpoint_metadata(config, metadata)), drop="writes")
        values = {
            channel: stored
            for channel, at in versions.items()
            if new.get(channel) != at  # V5
            and (stored := self._stored((thread, ns, parent), channel, at)) is not MISSING
        }
        values |= {channel: dumps(value) for channel, value in given.items() if channel not in values}
        there = "channel_values" in checkpoint or values
        self.rows[thread, ns, id_] = Row(parent, body, kept_metadata, values if there else None, versions)
        return at_place(thread, ns, id_)

    def put_writes(self, config: Any, writes: Iterable[Any], task_id: Any, task_path: Any = "") -> None:
        thread, ns, id_ = address(config)
        if id_ is None:
            raise InvalidInputError("checkpoint_id is missing")
        task, path = text(task_id), text(task_path)
        fits(thread, ns, id_, task)
        rows: dict[tuple[str, int], tuple[str, str, Any]] = {}
        for i, (name, value) in enumerate(writes):
            channel = channel_name(name, thread, ns)
            rows[task, SPECIAL.get(channel, i)] = (path, channel, dumps(value))
        for key, row in rows.items():  # W2
            stored = self.writes.setdefault((thread, ns, id_), {})
            if key[1] < 0 or key not in stored:
                stored[key] = row

    # Reading

    def get_tuple(self, config: Any) -> CheckpointTuple | None:
        thread, ns, id_ = address(config)
        place = (thread, ns, id_ or self._latest(thread, ns))
        return self._tuple(place) if place in self.rows else None

    def list(self, config: Any, *, filter: Any = None, before: Any = None, limit: Any = None) -> Any:
        place: Many[str | None] = [None, None, None]
        if config:
            asked = config["configurable"]
            place[0] = text(asked.get("thread_id"))
            place[1] = None if asked.get("checkpoint_ns") is None else text(asked["checkpoint_ns"])
            place[2] = None if asked.get("checkpoint_id") in (None, "") else text(asked["checkpoint_id"])
        bound = (before or {}).get("configurable", {}).get("checkpoint_id")
        bound = None if bound in (None, "") else text(bound)
        if limit is not None and (type(limit) is not int or limit < 0):
            raise InvalidInputError("limit")
        wanted = as_json(filter or {})
        found = [
            at
            for at, row in self.rows.items()
            if all(part is None or part == have for part, have in zip(place, at, strict=True))
            and (bound is None or at[2].encode() < bound.encode())
            and all(same_json(row.metadata.get(key), value) for key, value in wanted.items())
        ]
        found.sort(key=lambda at: (at[0].encode(), at[1].encode()))
        found.sort(key=lambda at: at[2].encode(), reverse=True)
        return [self._tuple(at) for at in found[:limit]]

    def get_delta_channel_history(self, *, config: Any, channels: Iterable[Any]) -> Any:
        thread, ns, id_ = address(config)
        if isinstance(channels, (str, bytes)):
            raise TypeError("channels")
        here = (thread, ns, id_ or self._latest(thread, ns))
        return {channel: self._history(here, channel) for channel in map(text, channels)}

    # Maintenance

    def delete_thread(self, thread_id: Any) -> None:
        thread = text(thread_id)
        self._forget(lambda place: place[0] == thread)

    def copy_thread(self, source_thread_id: Any, target_thread_id: Any) -> None:
        source, target = text(source_thread_id), text(target_thread_id)
        threads = {place[0] for place in (*self.rows, *self.writes)}
        if source not in threads:
            return
        if target in threads:
            raise ConflictError("not empty")
        for place in [place for place in self.rows if place[0] == source]:
            self.rows[target, place[1], place[2]] = self.rows[place]
        for place in [place for place in self.writes if place[0] == source]:
            self.writes[target, place[1], place[2]] = dict(self.writes[place])

    def prune(self, thread_ids: Iterable[Any], *, strategy: str = "keep_latest") -> None:
        threads = several(thread_ids)
        if strategy not in ("keep_latest", "delete"):
            raise InvalidInputError("strategy")
        if strategy == "delete":
            self._forget(lambda place: place[0] in threads)
            return
        spaces = {place[:2] for place in self.rows if place[0] in threads}
        heads = [(thread, ns, self._latest(thread, ns)) for thread, ns in spaces]
        kept = {head: {head, *self._needed(head)} for head in heads}
        if any(
            row.metadata.get("delta_writes_versioned") for at, row in self.rows.items() if at[0] in threads
        ):
            raise UnsupportedError("LangGraph.js")
        keep = set().union(*kept.values())
        ended = {head[:2] for head in heads if self._is_ended_call(head, keep)}
        keep = {place for place in keep if place[:2] not in ended}
        self._delete({place for place in self.rows if place[0] in threads and place not in keep})
        for place in [place for place in self.writes if place[:2] in ended]:
            del self.writes[place]

    def delete_for_runs(self, run_ids: Iterable[Any]) -> None:
        runs = several(run_ids)
        doomed = {place for place, row in self.rows.items() if run_of(row) in runs}
        touched = {place[:2] for place in doomed}
        for place, row in self.rows.items():
            is_opaque = bool(row.metadata.get("delta_writes_versioned"))
            stays = place[:2] in touched and place not in doomed
            if stays and (is_opaque or doomed.intersection(self._needed(place))):
                raise UnsupportedError("a checkpoint that stays needs it")
        self._delete(doomed)

    # What these are made of

    def _latest(self, thread: str, ns: str) -> str:
        ids = [place[2] for place in self.rows if place[:2] == (thread, ns)]
        return max(ids, key=str.encode, default="")

    def _stored(self, parent: tuple[str, str, str | None], channel: str, at: str) -> Any:
        """The value of a version: the parent's, or else that of another checkpoint of the namespace."""
        row = self.rows.get((parent[0], parent[1], parent[2])) if parent[2] else None
        if row is not None and row.versions.get(channel) == at:
            return (row.values or {}).get(channel, MISSING)
        for place in sorted((p for p in self.rows if p[:2] == parent[:2]), key=lambda p: p[2], reverse=True):
            row = self.rows[place]
            if row.versions.get(channel) == at and channel in (row.values or {}):
                return (row.values or {})[channel]
        return MISSING

    def _writes(self, place: Place) -> Many[Any]:
        rows = [(p, task, i, c, v) for (task, i), (p, c, v) in self.writes.get(place, {}).items()]
        rows.sort(key=lambda row: row[:3])  # R8
        return [(task, channel, SERDE.loads_typed(value)) for _, task, _, channel, value in rows]

    def _sends(self, place: Place) -> Many[Any]:
        return [value for _, channel, value in self._writes(place) if channel == TASKS]

    def _tuple(self, place: Place) -> CheckpointTuple:
        thread, ns, _ = place
        row = self.rows[place]
        checkpoint = json.loads(json.dumps(row.body))
        if row.values is not None:
            checkpoint["channel_values"] = {c: SERDE.loads_typed(v) for c, v in row.values.items()}
        if row.parent and is_old(row) and (sends := self._sends((thread, ns, row.parent))):  # R9
            checkpoint.setdefault("channel_values", {})[TASKS] = sends
            versions = checkpoint.setdefault("channel_versions", {})
            mixed = len({isinstance(v, str) for v in versions.values()}) == 2
            highest = max(
                versions.values(),
                key=lambda v: (str(v) if mixed else v, ["float", "int", "str"].index(type(v).__name__)),
                default="0" * 31 + "1." + "0" * 16,
            )
            versions[TASKS] = highest
        return CheckpointTuple(
            at_place(*place),
            checkpoint,
            json.loads(json.dumps(row.metadata)),
            at_place(thread, ns, row.parent) if row.parent else None,
            self._writes(place),
        )

    def _ancestors(self, place: Place) -> Many[Place]:
        """From the parent to the root, or to where a circle closes."""
        chain = [place]
        while (row := self.rows.get(chain[-1])) and row.parent:
            above = (place[0], place[1], row.parent)
            if above in chain or above not in self.rows:
                break
            chain.append(above)
        return chain[1:]

    def _history(self, place: Place, channel: str) -> Any:
        writes: Many[Any] = []
        for above in self._ancestors(place):
            writes = [write for write in self._writes(above) if write[1] == channel] + writes
            if channel in (values := self.rows[above].values or {}):
                return {"writes": writes, "seed": SERDE.loads_typed(values[channel])}
        return {"writes": writes}

    def _needed(self, place: Place) -> Many[Place]:
        """The other checkpoints that this one cannot be read without."""
        row = self.rows[place]
        needed = []
        if row.parent and is_old(row) and self._sends((*place[:2], row.parent)):
            needed.append((*place[:2], row.parent))
        counters = row.metadata.get("counters_since_delta_snapshot")
        missing = set(counters if isinstance(counters, dict) else ()) & set(row.versions)
        missing -= set(row.values or {})
        for above in self._ancestors(place):
            if not missing:
                break
            needed.append(above)
            missing -= set(self.rows[above].values or {})
        return needed

    def _is_ended_call(self, head: Place, keep: set[Place]) -> bool:
        """A subgraph call's namespace goes with the root checkpoint that it was made from."""
        parents = self.rows[head].metadata.get("parents")
        root = (head[0], "", parents.get("")) if isinstance(parents, dict) else None
        return ":" in head[1] and root in self.rows and root not in keep

    def _delete(self, doomed: set[Place]) -> None:
        self._forget(lambda place: place in doomed)
        for place, row in self.rows.items():
            if row.parent and (*place[:2], row.parent) in doomed:
                self.rows[place] = replace(row, parent=None)

    def _forget(self, gone: Callable[[Place], bool]) -> None:
        self.rows = {place: row for place, row in self.rows.items() if not gone(place)}
        self.writes = {place: rows for place, rows in self.writes.items() if not gone(place)}


def dumps(value: Any) -> tuple[str, bytes]:
    kind, packed = SERDE.dumps_typed(value)
    return kind, bytes(packed)  # the serializer hands a bytearray through


def text(value: Any) -> str:
    """V3: an identifier."""
    if value is None:
        raise InvalidInputError("missing")
    name = str(value)
    if "\0" in name or any("\ud800" <= char <= "\udfff" for char in name):
        raise InvalidInputError("no database holds it")
    fits(name)
    return name


def fits(*parts: str) -> None:
    if len("".join(parts).encode()) > LONGEST_KEY:
        raise InvalidInputError("too long")


def several(values: Any) -> set[str]:
    if isinstance(values, (str, bytes)):
        raise TypeError("one text is not several ids")
    return {text(value) for value in values}


def channel_name(name: Any, thread: str, ns: str) -> str:
    channel = text(name)
    fits(thread, ns, channel)
    return channel


def address(config: Any) -> tuple[str, str, str | None]:
    """Thread, namespace and, where one is named, the checkpoint."""
    asked = config["configurable"]
    thread = text(asked.get("thread_id"))
    ns = "" if asked.get("checkpoint_ns") is None else text(asked["checkpoint_ns"])  # W4
    id_ = None if asked.get("checkpoint_id") in (None, "") else text(asked["checkpoint_id"])
    fits(thread, ns, id_ or "")
    return thread, ns, id_


def at_place(thread: str, ns: str, id_: str) -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": ns, "checkpoint_id": id_}}


def version(value: Any) -> str:
    """V6: versions with the same text are the same version."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return float_text(value)
    raise InvalidInputError("not a version")


def float_text(value: float) -> str:
    digits = f"{Decimal(repr(value + 0.0)):f}"
    return digits if "." in digits else digits + ".0"


def is_old(row: Row) -> bool:
    v = row.body.get("v")
    return v < 4 if isinstance(v, (int, float)) else True


def run_of(row: Row) -> str | None:
    run = row.metadata.get("run_id")
    if isinstance(run, float):
        return float_text(run)
    return json.dumps(run) if isinstance(run, int) else run if isinstance(run, str) else None


def as_json(value: Any, depth: int = 0, drop: str | None = None) -> Any:
    """V4: what JSON keeps of a value; pairs of surrogates are the character they mean."""
    if isinstance(value, str):
        units = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")
        return units.replace("\0", "")
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value + 0.0  # JSON has one zero
    if isinstance(value, (dict, list, tuple)) and depth < DEEPEST:
        if not isinstance(value, dict):
            return [as_json(item, depth + 1) for item in value]
        items = {as_json_key(k): (k, item) for k, item in value.items()}
        return {
            name: as_json(item, depth + 1) for name, (k, item) in items.items() if k != drop or drop is None
        }
    raise InvalidInputError("not JSON")


def as_json_key(key: Any) -> str:
    if key is None or isinstance(key, (str, bool, int, float)):
        clean = as_json(key)
        return clean if isinstance(clean, str) else json.dumps(clean)
    raise InvalidInputError("not JSON")


def same_json(left: Any, right: Any) -> bool:
    """R3: equal as JSON values."""
    kinds = {type(left), type(right)}
    if kinds <= {int, float}:
        return Decimal(repr(left)) == Decimal(repr(right))
    if len(kinds) > 1:
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_json(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same_json, left, right))
    return bool(left == right)

"""One ``put`` on Postgres: which values go where, and by which statement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from psycopg import errors

from persistence import rules
from persistence.backends.postgres import sql
from persistence.backends.postgres.known import Fact, KnownRows, Row, Where
from persistence.backends.postgres.markers import NO_VALUE, marker
from persistence.backends.postgres.steps import Rows, Steps
from persistence.backends.postgres.values import EMPTY, is_inline
from persistence.metadata import json_text
from persistence.metrics import Meter
from persistence.rules import Typed

_UNLESS_STORED = "needed"
"""In place of a kept value's JSON. The statement reads it only where nothing is stored, and then fails."""

_Kept = tuple[str, str, str | None, str | None, bytes | None]


@dataclass(slots=True)
class _Values:
    """The channel values of a ``put``, serialised: what goes where."""

    held: dict[str, Any]
    """Into the row, by channel."""
    own: list[tuple[str, str, str, bytes | None]]
    """Into the blob table, under a new version: channel, version, type, blob."""
    kept: list[_Kept]
    """Where nothing is stored for the version: channel, version, and one of JSON or type and blob."""


def put(
    put: rules.Put, serde: SerializerProtocol, known: KnownRows, meter: Meter | None = None
) -> Steps[None]:
    """Store a checkpoint; serialises its values now, before the first statement is asked for.

    But a value that is stored for its version is neither looked at nor serialised.
    """
    parent = known.get((put.thread, put.ns, put.parent)) if put.kept and put.parent else None
    values = _split_values(put, serde, parent)
    if meter is not None:
        blobs = [blob for *_, blob in (*values.own, *values.kept) if blob is not None]
        meter.checkpoint((put.thread, put.ns, put.id), sum(map(len, blobs)))

    def run() -> Steps[None]:
        key = (put.thread, put.ns, put.id)
        if (held := _held(put, values, parent)) is not None:
            statement = sql.put_known(blobs=len(values.own), kept=bool(values.kept))
            rows = yield statement, _known_params(put, values, held, parent)
            if rows:
                known.note(key, rows[0][0], _facts(put, values, held, parent))
                return
        ((xmin, in_row),) = yield from _look_and_put(put, values, serde)
        known.note(key, xmin, _facts(put, values, in_row or {}, None))

    return run()


def _look_and_put(put: rules.Put, values: _Values, serde: SerializerProtocol) -> Steps[Rows]:
    """Look up the values that are kept: in the parent, then in all rows; at last take those of the call."""
    kinds, params = {"own": bool(values.own), "kept": bool(values.kept)}, _put_params(put, values)
    with suppress(errors.InvalidTextRepresentation):
        if rows := (yield sql.put(**kinds), params):
            return rows
    try:
        return (yield sql.put(**kinds, search=True), params)
    except errors.InvalidTextRepresentation:
        values.kept = [
            row if text != _UNLESS_STORED else _kept(channel, version, put.given[channel], serde)
            for row in values.kept
            for channel, version, text, *_ in [row]
        ]
    return (yield sql.put(**kinds, search=True), _put_params(put, values))


def _split_values(put: rules.Put, serde: SerializerProtocol, parent: Row | None) -> _Values:
    values = _Values({}, [], [])
    for channel, value in put.given.items():
        version = put.versions.get(channel)
        if version is not None and channel not in put.own:
            row: _Kept = (channel, version, _UNLESS_STORED, None, None)
            if parent is None or not _is_stored(parent.facts.get(channel), version):
                with suppress(Exception):  # refused by the serializer: once more, if it is needed
                    row = _kept(channel, version, value, serde)
            values.kept.append(row)
            continue
        inline, typed = _split(value, serde)
        if version is None:
            values.held[channel] = marker(typed) if typed else inline[0]  # type: ignore[index]  # either is there
            continue
        if inline:
            values.held[channel] = inline[0]
        if typed:
            values.own.append((channel, version, *typed))
    for channel, version in put.versions.items():
        if channel not in put.given:
            if channel in put.own:
                values.own.append((channel, version, EMPTY, None))
            else:
                values.kept.append((channel, version, None, EMPTY, None))
    values.own.sort(key=itemgetter(0))  # two calls at once do not wait for each other in a circle
    return values


def _kept(channel: str, version: str, value: Any, serde: SerializerProtocol) -> _Kept:
    inline, typed = _split(value, serde)
    return channel, version, json_text(inline[0]) if inline else None, *(typed or (None, None))


def _is_stored(fact: Fact | None, version: str) -> bool:
    return fact is not None and fact.version == version and fact.value not in (Where.NOWHERE, NO_VALUE)


def _held(put: rules.Put, values: _Values, parent: Row | None) -> dict[str, Any] | None:
    """What the row will hold, if enough is known of the parent."""
    if not values.kept:
        return values.held
    if parent is None or not put.has_values:
        return None
    held = dict(values.held)
    for channel, version, text, type_, _ in values.kept:
        fact = parent.facts.get(channel)
        if fact is None or fact.version != version:
            return None
        if fact.value in (Where.NOWHERE, NO_VALUE) and (text is not None or type_ != EMPTY):
            return None
        if not isinstance(fact.value, Where):
            held[channel] = fact.value
    return held


def _facts(
    put: rules.Put, values: _Values, held: Mapping[str, Any], parent: Row | None
) -> Callable[[], dict[str, Fact]]:
    """What is known of the row that was stored, of which ``held`` is what it holds itself.

    It may be remembered for long, so it must keep neither the blobs nor the caller's objects.
    """
    own = [(channel, version, type_) for channel, version, type_, _ in values.own]
    kept = [
        (channel, version, text == _UNLESS_STORED, type_) for channel, version, text, type_, _ in values.kept
    ]
    versions, earlier = put.versions, parent.facts if parent else None

    def facts() -> dict[str, Fact]:
        found = {
            channel: Fact(version, Where.NOWHERE if type_ == EMPTY else Where.BLOB)
            for channel, version, type_ in own
        }
        for channel, version, was_stored, type_ in kept:
            if earlier is not None:
                found[channel] = earlier[channel]
            elif was_stored or type_ not in (None, EMPTY):
                found[channel] = Fact(version, Where.BLOB)  # unless it is held
        for channel, value in held.items():
            if channel in versions:
                found[channel] = Fact(versions[channel], value)
        return found

    return facts


def _key_params(put: rules.Put) -> dict[str, Any]:
    return {
        "thread": put.thread,
        "ns": put.ns,
        "id": put.id,
        "parent": put.parent,
        "metadata": put.metadata,
    }


def _known_params(
    put: rules.Put, values: _Values, held: dict[str, Any], parent: Row | None
) -> dict[str, Any]:
    has_values = put.has_values or held
    return {
        **_key_params(put),
        "checkpoint": json_text({**put.body, "channel_values": held} if has_values else put.body),
        "xmin": parent.xmin if parent else None,
        **sql.row_params(("channel", "version", "type", "blob"), values.own),
    }


def _put_params(put: rules.Put, values: _Values) -> dict[str, Any]:
    return {
        **_key_params(put),
        "body": json_text(put.body),
        "values": json_text(values.held),
        "has_values": put.has_values,
        **_columns("own", ("channels", "versions", "types", "blobs"), values.own),
        **_columns("kept", ("channels", "versions", "inline", "types", "blobs"), values.kept),
    }


def _split(value: Any, serde: SerializerProtocol) -> tuple[tuple[Any] | None, Typed | None]:
    """What of a value goes into the row, and what into the blob table; a delta snapshot goes to both."""
    if isinstance(value, _DeltaSnapshot):
        return (True,), rules.dumps(serde, value)
    if rules.writes_plain_msgpack(serde) and is_inline(value):
        return (value,), None
    return None, rules.dumps(serde, value)


def _columns(prefix: str, names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> dict[str, list[Any]]:
    if not rows:
        return {}
    columns = zip(*rows, strict=True)
    return {f"{prefix}_{name}": list(column) for name, column in zip(names, columns, strict=True)}

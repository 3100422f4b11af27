"""Strategies for the arguments of a saver's methods, whole classes of them.

A name is drawn from a few most of the time, so that calls meet; otherwise it is any text.
"""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT, RESUME, SCHEDULED, TASKS, _DeltaSnapshot

from persistence.testing.kinds import ANY_JSON, ANY_TEXT, ANY_VALUE, ID_TEXT, VALUES, Point


def mostly(usual: st.SearchStrategy[Any], rare: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One in eight is rare."""
    return st.integers(0, 7).flatmap(lambda n: rare if n == 7 else usual)


BAD_IDS = st.sampled_from(["a\0b", "\ud800", "x" * 3000, "\u20ac" * 900])
STRANGE_IDS = (
    ID_TEXT
    | ANY_TEXT
    | BAD_IDS
    | st.sampled_from(["x" * 1300, "a\\b", "100%", "%s", "o'clock", '"', "?", ";--", " ", "\U0001f600", ""])
    | st.integers()
)


def names(*usual: Any) -> st.SearchStrategy[Any]:
    return mostly(st.sampled_from(usual), STRANGE_IDS)


THREADS = names("t", "t", "t", "u", 5, "5")
NAMESPACES = names("", "", None, "a", "a|b:0f3c", "b:1", 0)
CHECKPOINTS = names("1", "2", "3", "B", "a", 2, "é")
TASK_IDS = names("one", "two", 3)
PATHS = names("", "p", "~1", "q")
CHANNELS = names("x", "y", "d", 6)
WRITE_CHANNELS = names("x", "d", "y", ERROR, SCHEDULED, INTERRUPT, RESUME, TASKS)
RUNS = names("r", "s", 7, 1, "true", "1e+22", "[1]", '{"a":1}')

VALUES_OF_EVERY_KIND = (
    st.sampled_from(list(VALUES.values()))
    | ANY_VALUE
    | st.tuples(ANY_VALUE, ANY_VALUE)
    | st.sets(st.integers(-9, 9) | st.text(max_size=3), max_size=3)
    | st.builds(bytearray, st.binary(max_size=8))
    | st.builds(_DeltaSnapshot, ANY_VALUE)
    | st.builds(Point, st.integers(-9, 9), st.floats(allow_nan=False))
    | st.lists(st.integers(0, 3), max_size=2)
)
REFUSED_VALUES = st.sampled_from([object(), 2**64, [-(2**63) - 1], {"a": object()}])
CHANNEL_VALUES = st.integers(0, 39).flatmap(lambda n: REFUSED_VALUES if n == 39 else VALUES_OF_EVERY_KIND)

VERSIONS = mostly(
    st.sampled_from([1, 2, 3, "1", "2.0", 1.5, 2.0, 1e16, 10**16, "v"]),
    st.integers(-(2**65), 2**66) | st.floats() | ID_TEXT | BAD_IDS,
)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


NOT_JSON = st.sampled_from(
    [math.nan, math.inf, b"x", {1}, object(), {"in": [-math.inf]}, {(1,): 2}, deep(250)]
)
JSON = (
    st.sampled_from([0, 1, 1.0, 1e22, True, None, "a", "", [1], [1.0], {}, {"a": 1}, {"a": 1, "b": None}])
    | ANY_JSON
)
METADATA_KEYS = names("k", "a.b", "writes", "run_id", '"', "thread_id", "checkpoint_ns")
KNOWN_METADATA = st.fixed_dictionaries(
    {},
    optional={
        "run_id": RUNS | JSON,
        "k": JSON,
        "parents": st.dictionaries(st.just(""), st.sampled_from(["1", "2", "3", "B"]), max_size=1),
        "counters_since_delta_snapshot": st.dictionaries(st.sampled_from("dx"), st.just((1, 1)), max_size=2),
    },
)
OPAQUE = st.just({"delta_writes_versioned": True})
METADATA = mostly(
    KNOWN_METADATA,
    st.dictionaries(METADATA_KEYS | ANY_TEXT, JSON, max_size=3)
    | st.dictionaries(METADATA_KEYS, NOT_JSON, min_size=1, max_size=1)
    | OPAQUE,
)
FILTERS = st.none() | mostly(
    st.dictionaries(st.sampled_from(["k", "run_id"]), JSON, max_size=2),
    st.dictionaries(METADATA_KEYS | ANY_TEXT, JSON | NOT_JSON, max_size=2),
)
LIMITS = mostly(st.none() | st.integers(0, 4), st.sampled_from([10**30, -1, 1.5, "2", True, False]))


@st.composite
def configs(draw: st.DrawFn, *, exact: bool | None = None) -> Any:
    """A config; with ``exact`` it names a checkpoint, with ``None`` perhaps."""
    configurable: dict[str, Any] = {"thread_id": draw(THREADS)}
    if draw(st.integers(0, 3)):
        configurable["checkpoint_ns"] = draw(NAMESPACES)
    if exact or (exact is None and draw(st.booleans())):
        configurable["checkpoint_id"] = draw(CHECKPOINTS)
    elif not draw(st.integers(0, 3)):
        configurable["checkpoint_id"] = draw(st.sampled_from([None, ""]))
    return {"configurable": configurable}


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[Any, dict[Any, Any]]:
    """A checkpoint, and the new versions of some of its channels."""
    values = draw(st.dictionaries(CHANNELS, CHANNEL_VALUES, max_size=3))
    versions = {c: draw(VERSIONS) for c in values if draw(st.integers(0, 7))}
    versions |= draw(st.dictionaries(CHANNELS, VERSIONS, max_size=1))
    new = {c: v for c, v in versions.items() if draw(st.booleans())}
    if not draw(st.integers(0, 15)):
        new |= draw(st.dictionaries(CHANNELS, VERSIONS, max_size=1))
    checkpoint: dict[str, Any] = {
        "v": draw(st.sampled_from([4, 4, 4, 4, 1, 2, 3, 3, 3.5, 4.0, 4.5, "4", None, True])),
        "id": draw(CHECKPOINTS),
        "ts": draw(ANY_TEXT),
        "channel_values": values,
        "channel_versions": versions,
        "versions_seen": draw(
            st.dictionaries(ANY_TEXT, st.dictionaries(ID_TEXT, st.integers(0, 3), max_size=1), max_size=1)
        ),
        "updated_channels": draw(st.none() | st.lists(ID_TEXT, max_size=2)),
    }
    if not draw(st.integers(0, 7)):  # F8
        for key in draw(st.sets(st.sampled_from(sorted(checkpoint.keys() - {"id"})), max_size=3)):
            del checkpoint[key]
    return checkpoint, new


PUTS = st.tuples(configs(), checkpoints(), METADATA)
WRITES = st.lists(st.tuples(WRITE_CHANNELS, CHANNEL_VALUES), max_size=4)
CONFIGS = configs()
LISTINGS: st.SearchStrategy[Any] = st.none() | st.just({}) | CONFIGS
BEFORES: st.SearchStrategy[Any] = st.none() | st.just({}) | CONFIGS

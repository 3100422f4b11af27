"""Values of many types, and strategies for whole classes of them."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import ipaddress
import math
import pathlib
import re
import uuid
from collections import deque
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from langgraph.types import Interrupt, Send
from pydantic import BaseModel


class Colour(enum.Enum):
    RED = "red"


class Word(enum.StrEnum):
    YES = "yes"


class Level(enum.IntEnum):
    HIGH = 3


class Pair(NamedTuple):
    left: int
    right: str


@dataclasses.dataclass
class Point:
    x: int
    y: float


class Trip(BaseModel):
    city: str
    days: int = 1


VALUES: dict[str, Any] = {
    "none": None,
    "true": True,
    "false": False,
    "zero": 0,
    "largest int": 2**64 - 1,
    "smallest int": -(2**63),
    "float": 1.5,
    "whole float": 1.0,
    "large float": 1e22,
    "tiny float": 5e-324,
    "minus zero": -0.0,
    "nan": math.nan,
    "infinity": math.inf,
    "text": "text",
    "empty text": "",
    "text with NUL": "a\0b",
    "text with a surrogate": "a\ud800b",
    "text with a pair": "a\U0001f600b",
    "long text": "x" * 5000,
    "bytes": b"\0\xff",
    "no bytes": b"",
    "bytearray": bytearray(b"\0\xff"),
    "list": [1, "a", None, [2.0]],
    "dict": {"a": 1, "b": {"c": [True]}},
    "dict with int keys": {1: "a", 2: "b"},
    "empty dict": {},
    "tuple": (1, 2),
    "set": {1, 2},
    "frozenset": frozenset({1}),
    "deque": deque([1, 2]),
    "enum": Colour.RED,
    "str enum": Word.YES,
    "int enum": Level.HIGH,
    "namedtuple": Pair(1, "b"),
    "dataclass": Point(1, 2.0),
    "pydantic": Trip(city="Rome"),
    "datetime": datetime.datetime(2025, 1, 2, 3, 4, 5, 6, tzinfo=datetime.UTC),
    "date": datetime.date(2025, 1, 2),
    "timedelta": datetime.timedelta(days=1, microseconds=2),
    "zone": ZoneInfo("Europe/Berlin"),
    "decimal": decimal.Decimal("1.10"),
    "uuid": uuid.UUID(int=5),
    "path": pathlib.Path("/a/b"),
    "pattern": re.compile("a+", re.IGNORECASE),
    "address": ipaddress.ip_address("10.0.0.1"),
    "human message": HumanMessage("hi", id="1"),
    "ai message": AIMessage("ho", id="2", tool_calls=[{"name": "f", "args": {"x": 1}, "id": "t"}]),
    "send": Send("node", {"x": [1]}),
    "interrupt": Interrupt(value={"ask": 1}, id="i"),
    "delta snapshot": _DeltaSnapshot([1, 2]),
    "marker of our own": {"__persistence__": ["msgpack", "AA=="]},
    "empty marker of our own": {"__persistence__": None},
}

ANY_TEXT = st.text(st.characters(), max_size=12)  # all of Unicode, NUL and surrogates too
ID_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | ANY_TEXT
    | st.binary(max_size=12)
)
ANY_VALUE = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
JSON_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | ANY_TEXT
)
ANY_JSON = st.recursive(
    JSON_LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(ANY_TEXT | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)
ANY_METADATA = st.dictionaries(ANY_TEXT, ANY_JSON, max_size=4)

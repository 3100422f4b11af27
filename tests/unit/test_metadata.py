"""The metadata rules by themselves: what is cleaned, refused, and equal."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistence.errors import InvalidInputError
from persistence.metadata import (
    clean_json,
    clean_text,
    comparable,
    json_text,
    matches,
    merged_metadata,
    metadata_text,
    number_text,
)


@given(text=st.text(st.characters()))
def test_clean_text_can_be_stored_anywhere(text: str) -> None:
    clean = clean_text(text)
    assert "\0" not in clean
    assert clean.encode().decode() == clean
    assert clean_text(clean) == clean


def test_clean_text_joins_a_pair_and_drops_a_single_surrogate() -> None:
    assert clean_text("a\ud83d\ude00b") == "a\U0001f600b"
    assert clean_text("a\ud83db\udc00c\0") == "abc"


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_number_text_has_no_exponent_and_is_exact(value: float) -> None:
    text = number_text(value)
    assert "e" not in text
    assert "." in text
    assert float(text) == value


@pytest.mark.parametrize(
    ("value", "text"), [(True, "true"), (3, "3"), (1.0, "1.0"), (-0.0, "0.0"), (1e22, "1" + "0" * 22 + ".0")]
)
def test_number_text(value: Any, text: str) -> None:
    assert number_text(value) == text


def test_json_text_is_json_without_exponents() -> None:
    value = {"a e+1": [1e30, 1e-9, 5, None, True, {"b": "e-1"}]}
    text = json_text(value)
    assert json.loads(text) == value
    assert "1e" not in text


def test_clean_json_settles_types() -> None:
    assert clean_json({2: (1, 2), None: "a\0", True: {"x": ()}}, "m") == {
        "2": [1, 2],
        "null": "a",
        "true": {"x": []},
    }


@pytest.mark.parametrize(
    "value", [math.nan, -math.inf, b"", {1}, 10**4300, {(1,): 1}], ids=lambda value: type(value).__name__
)
def test_what_is_not_json_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInputError, match="here"):
        clean_json([value], "here")


def test_too_deep_is_refused() -> None:
    value: Any = 1
    for _ in range(300):
        value = [value]
    with pytest.raises(InvalidInputError, match="deeper"):
        clean_json(value, "m")


def test_metadata_of_the_config_joins_and_writes_do_not() -> None:
    config: Any = {"configurable": {"thread_id": "t", "a": 1, "b": [1]}, "metadata": {"c": "x\0"}}
    metadata: Any = {"writes": {}, "a": 2}
    assert metadata_text(merged_metadata(config, metadata)) == '{"a":2,"c":"x"}'


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (1, 1.0, True),
        (1, True, False),
        (0, False, False),
        (0.0, -0.0, True),
        ("1", 1, False),
        ([1, {"a": 2}], [1.0, {"a": 2}], True),
        ([1, 2], [2, 1], False),
        ({"a": 1, "b": None}, {"b": None, "a": 1}, True),
        ({"a": 1}, {"a": 1, "b": None}, False),
        (None, [], False),
    ],
)
def test_comparable(left: Any, right: Any, equal: bool) -> None:
    assert (comparable(left) == comparable(right)) is equal


def test_matches_takes_missing_for_null() -> None:
    assert matches({}, {"a": comparable(None)})
    assert not matches({"a": 0}, {"a": comparable(None)})

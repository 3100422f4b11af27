"""One spelling for each value, which JSONB gives back as it is."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import ormsgpack
import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import _DeltaSnapshot

from persistence.transfer import canonical
from persistence.transfer.canonical import NotCanonicalError
from tests.transfer.test_values import finite_json, values

serde = JsonPlusSerializer()


@given(value=finite_json)
def test_reads_back_equal_and_is_its_own_form(value: Any) -> None:
    text = canonical.canonical_json(json.dumps(value))
    assert json.loads(text) == value
    without_minus = json.loads(json.dumps(value, sort_keys=True), parse_float=lambda text: float(text) + 0.0)
    assert repr(json.loads(text)) == repr(without_minus)  # -0.0 + 0.0 is 0.0
    assert canonical.canonical_json(text) == text
    assert canonical.json_bytes(json.loads(json.dumps(value))) == text


def test_jsonb_gives_it_back(postgres_server: str) -> None:
    with psycopg.connect(postgres_server) as conn:

        @settings(max_examples=200, deadline=None)
        @given(value=finite_json)
        def check(value: Any) -> None:
            text = canonical.canonical_json(json.dumps(value))
            row = conn.execute("SELECT (%s::text)::jsonb::text", [text.decode()]).fetchone()
            assert row is not None
            assert canonical.canonical_json(row[0]) == text

        check()


@given(value=values)
def test_inline_json_packs_to_the_same_bytes(value: Any) -> None:
    type_, data = serde.dumps_typed(value)
    if (inline := canonical.inline_json(type_, data)) is not None:
        back = json.loads(inline)
        assert type(back) is type(value)
        assert canonical.json_value(back) == (type_, data)
    else:
        assert not isinstance(value, bool | int | None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e22", "10000000000000000000000.0"),
        ("1.50", "1.5"),
        ("1E2", "100.0"),
        ("5e-324", "0." + "0" * 323 + "5"),
        ("-0.0", "0.0"),
        ("[-0.0]", "[0.0]"),
        ("100", "100"),
        ('{"b":1,"a":2,"a":3}', '{"a":3,"b":1}'),
        ('"\\u00e9\\/"', '"é/"'),
        ('{"\U0001f600":1,"\uffff":2}', '{"\uffff":2,"\U0001f600":1}'),
        ('"x:1e5"', '"x:1e5"'),
    ],
)
def test_spelling(text: str, expected: str) -> None:
    assert canonical.canonical_json(text).decode() == expected


@pytest.mark.parametrize("text", ["NaN", "[1,]", '{"a"', '"\\ud800"', "1e999", b"\xff", "[" * 5000])
def test_what_is_not_json(text: str | bytes) -> None:
    with pytest.raises(NotCanonicalError):
        canonical.canonical_json(text)


@pytest.mark.parametrize("raw", [b"\x80\x80", b"\x81\x01\x01", b"\x91\x01", b"\x81\xa1c\xc1", b"", b"\x81"])
def test_what_is_no_checkpoint(raw: bytes) -> None:
    with pytest.raises(NotCanonicalError):
        canonical.split_map(raw)


@given(value=values)
def test_slices_are_what_the_serializer_gives(value: Any) -> None:
    """A value cut out of a map has the bytes that the serializer makes of it alone."""
    _, row = serde.dumps_typed({"channel_values": {"c": value}})
    raw = bytes(canonical.split_map(bytes(canonical.split_map(row)["channel_values"]))["c"])
    assert canonical.msgpack_value(raw) == serde.dumps_typed(value)


@given(value=values, size=st.sampled_from([0, 1, 2, 4, 8, 16, 300, 70_000]))
def test_delta_snapshots_are_known_by_their_start(value: Any, size: int) -> None:
    _, plain = serde.dumps_typed(value)
    assert not canonical.is_delta(plain[:6])
    _, snapshot = serde.dumps_typed(_DeltaSnapshot("x" * size))
    assert canonical.is_delta(snapshot[:6])


@pytest.mark.parametrize("version", [None, True, b"1", float("nan"), float("inf"), [1]])
def test_what_is_no_version(version: object) -> None:
    with pytest.raises(NotCanonicalError):
        canonical.version_text(version)


@pytest.mark.parametrize(
    ("text", "held"), [('"\\u0000"', True), ('"\\\\u0000"', False), ('"\\\\\\u0000"', True), ("{}", False)]
)
def test_nul(text: str, held: bool) -> None:
    assert canonical.has_nul(text.encode()) is held


def test_unusual_bodies_are_spelled_in_full() -> None:
    fields = {"channel_versions": {"a": 1e22, "b": 2}, "v": 4, "extra": [None, True]}
    body, text = canonical.body_fields(
        {key: msgspec.Raw(ormsgpack.packb(value)) for key, value in fields.items()}
    )
    assert body == fields
    assert text == (b'{"channel_versions":{"a":10000000000000000000000.0,"b":2},"extra":[null,true],"v":4}')


@given(
    channels=st.dictionaries(st.text(), finite_json),
    versions=st.dictionaries(st.text(), st.text()),
    seen=st.dictionaries(st.text(), st.dictionaries(st.text(), st.text() | st.integers(-(2**63), 2**64 - 1))),
)
def test_a_usual_checkpoint_in_json_is_split_as_every_other(
    channels: dict[str, Any], versions: dict[str, str], seen: dict[str, dict[str, str | int]]
) -> None:
    body = {"v": 4, "channel_versions": versions, "versions_seen": seen}
    split = canonical.split_usual_json(json.dumps(body | {"channel_values": channels}))
    assert split == (channels, versions, canonical.canonical_json(json.dumps(body)))


@pytest.mark.parametrize(
    "unusual", [{"channel_versions": {"a": 1.5}}, {"channel_values": None}, {"extra": 1}]
)
def test_an_unusual_checkpoint_in_json_is_left_to_others(unusual: dict[str, Any]) -> None:
    assert canonical.split_usual_json(json.dumps({"v": 4} | unusual)) is None

"""Clauses V1 to V7: what is stored, and what is refused."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from hypothesis import assume
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import _DeltaSnapshot

from persistence.errors import InvalidInputError
from persistence.testing.kinds import ANY_JSON, ANY_METADATA, ANY_TEXT, ANY_VALUE, ID_TEXT, VALUES
from persistence.testing.marks import clause, generated
from persistence.testing.subject import Subject, at, bare, fresh, same

SERDE = JsonPlusSerializer()


def kept(value: Any) -> Any:
    """What the serializer itself makes of a value."""
    return SERDE.loads_typed(SERDE.dumps_typed(value))


@clause("V1")
def test_value_of_every_type_comes_back(saver: Subject) -> None:
    for name, value in VALUES.items():
        config = saver.put(name, "1", {"top": value, "nested": [{"in": value}]})
        saver.put_writes(config, [("top", value), ("nested", [value])])
        found = saver.get(name)
        assert found is not None
        expected = {"top": kept(value), "nested": kept([{"in": value}])}
        assert same(found.checkpoint["channel_values"], expected), name
        assert same([write[2] for write in found.pending_writes or []], [kept(value), kept([value])]), name
        (listed,) = saver.list(at(name))
        assert same(listed.checkpoint["channel_values"], expected), name


@clause("V1")
@generated(value=ANY_VALUE, channel=ID_TEXT)
def test_any_value_comes_back(saver: Subject, value: Any, channel: str) -> None:
    thread = fresh()
    config = saver.put(thread, "1", {channel: value})
    saver.put_writes(config, [(channel, value)])
    assert same(saver.values(thread), {channel: kept(value)})
    ((_, _, written),) = saver.writes(thread)
    assert same(written, kept(value))


@clause("V2")
def test_what_the_serializer_refuses_is_refused_and_nothing_is_stored(saver: Subject) -> None:
    for value in (object(), 2**64, -(2**63) - 1, {"a": [object()]}):
        thread = fresh()
        with pytest.raises(TypeError):
            saver.put(thread, "1", {"good": 1, "bad": value})
        assert saver.get(thread) is None
        config = saver.put(thread, "2", {})
        with pytest.raises(TypeError):
            saver.put_writes(config, [("good", 1), ("bad", value)])
        assert saver.writes(thread) == []


@clause("V2", "V5")
def test_value_that_is_stored_for_its_version_is_not_looked_at(saver: Subject) -> None:
    for value in ([1], 1, "text"):
        thread = fresh()
        saver.put(thread, "1", {"x": value, "y": 1}, versions={"x": 1, "y": 1})
        for id_, parent in (("2", "1"), ("3", "2"), ("4", None)):
            versions = {"x": 1, "y": id_}
            saver.put(thread, id_, {"x": object(), "y": 2}, parent=parent, versions=versions, new={"y": id_})
            assert same(saver.values(thread, id_), {"x": value, "y": 2})
        for parent in ("1", "4", None):
            with pytest.raises(TypeError):
                saver.put(thread, "5", {"x": object(), "y": 1}, parent=parent, versions={"x": 9}, new={})
        assert saver.get(thread, "5") is None


@clause("V5")
def test_value_of_a_deleted_checkpoint_is_not_kept(saver: Subject) -> None:
    for name in ("delete_thread", "prune", "delete_for_runs"):
        thread = fresh()
        saver.put(thread, "1", {"x": ["old"]}, versions={"x": 1}, metadata={"run_id": thread})
        if name == "prune":
            saver.call("prune", [thread], strategy="delete")
        else:
            saver.call(name, thread if name == "delete_thread" else [thread])
        saver.put(thread, "2", {"x": ["new"]}, parent="1", versions={"x": 1}, new={})
        assert saver.values(thread) == {"x": ["new"]}


@clause("V3")
@generated(thread=ID_TEXT, ns=ID_TEXT, id_=ID_TEXT, task=ID_TEXT, channel=ID_TEXT)
def test_identifiers_are_any_text(
    saver: Subject, thread: str, ns: str, id_: str, task: str, channel: str
) -> None:
    config = saver.put(thread, id_, {channel: [1]}, ns=ns)
    assert config == at(thread, id_, ns)
    saver.put_writes(config, [(channel, [2])], task)
    found = saver.get(thread, id_, ns)
    assert found is not None
    assert found.config == config
    assert found.checkpoint["channel_values"] == {channel: [1]}
    assert (task, channel, [2]) in (found.pending_writes or [])
    saver.call("delete_thread", thread)
    assert saver.get(thread, id_, ns) is None


@clause("V3")
def test_ids_that_are_not_text_are_taken_as_text(saver: Subject) -> None:
    config = saver.put(5, 7, {"x": [1]}, ns=3)  # type: ignore[arg-type]
    assert config == at("5", "7", "3")
    saver.put_writes(at(5, 7, 3), [("x", 1)], 9)  # type: ignore[arg-type]
    found = saver.get("5", "7", "3")
    assert found is not None
    assert found == saver.get(5, 7, 3)  # type: ignore[arg-type]
    assert found.pending_writes == [("9", "x", 1)]
    assert saver.ids(at(5, ns="3")) == ["7"]
    assert saver.history(at(5, 7, 3), ["x"]) == {"x": {"writes": []}}  # type: ignore[arg-type]
    saver.call("copy_thread", 5, 6)
    saver.call("prune", [5], strategy="delete")
    assert saver.get(5, ns="3") is None
    assert saver.get("6", ns="3") is not None
    saver.call("delete_thread", 6)
    assert saver.list() == []


BAD_TEXT = {
    "NUL": "a\0b",
    "surrogate": "a\ud800",
    "too long": "x" * 3000,
    "too long in UTF-8": "\u20ac" * 900,
}


def calls_with(saver: Subject, config: Any, bad: str) -> list[Callable[[], Any]]:
    """Every call that takes an identifier, with a bad one."""
    return [
        lambda: saver.put(bad, "1", {}),
        lambda: saver.put("t", bad, {}),
        lambda: saver.put("t", "1", {}, ns=bad),
        lambda: saver.put("t", "1", {}, parent=bad),
        lambda: saver.put("t", "1", {bad: 1}),
        lambda: saver.put("t", "1", {}, versions={"x": bad}),
        lambda: saver.put_writes(config, [("x", 1)], bad),
        lambda: saver.put_writes(config, [(bad, 1)]),
        lambda: saver.get(bad),
        lambda: saver.get("t", bad),
        lambda: saver.list(at(bad)),
        lambda: saver.list(at("t"), before=at("t", bad)),
        lambda: saver.call("delete_thread", bad),
        lambda: saver.call("prune", [bad]),
        lambda: saver.call("copy_thread", "t", bad),
        lambda: saver.call("delete_for_runs", [bad]),
        lambda: saver.history(at(bad), ["x"]),
    ]


@clause("V3")
def test_text_that_some_backend_cannot_hold_is_refused_everywhere(saver: Subject) -> None:
    config = saver.put("t", "1", {})
    for kind, bad in BAD_TEXT.items():
        for number, call in enumerate(calls_with(saver, config, bad)):
            with pytest.raises(InvalidInputError):
                pytest.fail(f"{kind}, call {number} returned {call()!r}")
    assert saver.ids() == ["1"]


def as_json(value: Any) -> Any:
    """Metadata as clause V4 says it is kept."""
    if isinstance(value, str):
        units = value.encode("utf-16-le", "surrogatepass")
        return units.decode("utf-16-le", "ignore").replace("\0", "")
    if isinstance(value, dict):
        return {as_json(k if isinstance(k, str) else json.dumps(k)): as_json(v) for k, v in value.items()}
    return [as_json(item) for item in value] if isinstance(value, (list, tuple)) else value


@clause("V4")
@generated(metadata=ANY_METADATA)
def test_metadata_is_json(saver: Subject, metadata: dict[str, Any]) -> None:
    assume(len({as_json(key) for key in metadata}) == len(metadata))
    thread = fresh()
    saver.put(thread, "1", {}, metadata=metadata)
    found = saver.get(thread)
    assert found is not None
    expected = as_json({k: v for k, v in metadata.items() if k != "writes"})
    assert same(found.metadata, expected) or found.metadata == expected  # 0.0 for -0.0 is the same JSON
    assert saver.list(at(thread))[0].metadata == found.metadata


@clause("V4")
def test_metadata_keeps_the_type_of_numbers(saver: Subject) -> None:
    metadata = {"f": 1.0, "large": 1e22, "tiny": 1e-300, "i": 1, "huge": 10**400, "b": True, "l": [2.0, 3]}
    saver.put("t", "1", {}, metadata=metadata)
    found = saver.get("t")
    assert found is not None
    assert same(found.metadata, metadata)


@clause("V4")
def test_metadata_that_is_not_json_is_refused_by_name(saver: Subject) -> None:
    for value in (math.nan, math.inf, b"x", {1}, object(), 10**5000):
        with pytest.raises(InvalidInputError, match="the_key"):
            saver.put("t", "1", {}, metadata={"outer": [{"the_key": value}]})
        assert saver.get("t") is None


@clause("V4")
def test_legacy_writes_are_dropped_and_the_config_joins_in(saver: Subject) -> None:
    config = at("t")
    config["metadata"] = {"user": "ann", "thread_id": "no"}
    config["configurable"] |= {"model": "m", "__private": "p", "tools": ["no"]}
    saver.call("put", config, bare("1", {}), {"writes": {"x": 1}, "step": 1}, {})
    found = saver.get("t")
    assert found is not None
    assert found.metadata == {"step": 1, "user": "ann", "model": "m"}


@clause("V5")
def test_channel_without_new_version_keeps_its_value(saver: Subject) -> None:
    versions = {"x": "1.x", "y": "1.y", "z": "2.z"}
    for before, after in product([[1], 1, "one", True, None, 1.5], [[1, 2], 2, "two", False]):
        t = fresh()
        config = saver.put(t, "1", {"x": before, "y": [0]})
        saver.put(t, "2", {"x": after, "z": 5}, parent="1", versions=versions, new={"z": "2.z"})
        assert same(saver.values(t), {"x": before, "y": [0], "z": 5})
        saver.put(t, "3", {"x": after}, versions=versions, new={})  # no parent: still the same version
        assert same(saver.values(t), {"x": before, "y": [0], "z": 5})
        found = saver.get(t, "1")
        assert found is not None
        assert found.config == config
        assert same(found.checkpoint["channel_values"], {"x": before, "y": [0]})


@clause("V5")
def test_value_that_was_never_stored_is_not_lost(saver: Subject) -> None:
    for value in ([1], 1, "x" * 5000, b"b", True):
        t = fresh()
        saver.put(t, "1", {"x": value}, new={})
        assert same(saver.values(t), {"x": value})
        saver.put(t, "2", {"unversioned": value}, versions={}, new={})
        assert same(saver.values(t), {"unversioned": value})
        saver.put(t, "3", {"x": value}, versions={"x": 5}, new={"x": 4})
        assert same(saver.values(t), {"x": value})


@clause("V5", "W1")
def test_version_used_twice_does_not_change_the_other_checkpoint(saver: Subject) -> None:
    for first, second in product([[1], 1, True], [[2], 2, True, None]):
        t = fresh()
        saver.put(t, "0", {}, versions={"x": 1})
        saver.put(t, "1", {"x": first}, versions={"x": 1})
        saver.put(t, "2", {"x": second}, versions={"x": 1}, parent="1")
        saver.put(t, "3", {}, versions={"x": 1}, parent="2", new={"x": 1})
        assert same(saver.values(t, "1"), {"x": first})
        assert same(saver.values(t, "2"), {"x": second})
        assert saver.values(t, "3") == {}
        assert saver.values(t, "0") == {}


@clause("V5", "W1")
def test_value_of_a_replaced_checkpoint_is_gone(saver: Subject) -> None:
    """A version that no checkpoint names any more names no value."""
    for value in (["new"], 7, "text", None):
        for given in ({"x": value}, {"x": _DeltaSnapshot(value)}, {}):
            t = fresh()
            saver.put(t, "1", {"x": ["old"]}, versions={"x": "1"})
            saver.put(t, "1", {"y": 1})
            saver.put(t, "2", given, parent="1", versions={"x": "1"}, new={})
            assert same(saver.values(t), given)


@clause("V5")
def test_version_without_a_value_takes_the_given_one(saver: Subject) -> None:
    values: list[Any] = [[1], 1, set(), None, _DeltaSnapshot([1])]
    for value in values:
        t = fresh()
        saver.put(t, "0", {"x": ["other"]}, versions={"x": 1})
        saver.put(t, "1", {}, versions={"x": 1}, parent="0")
        saver.put(t, "2", {}, versions={"x": 1}, parent="1", new={})
        saver.put(t, "3", {"x": value}, versions={"x": 1}, parent="2", new={})
        saver.put(t, "4", {"x": "late"}, versions={"x": 1}, parent="3", new={})
        assert saver.values(t, "2") == {}
        assert same(saver.values(t, "3"), {"x": value})
        assert same(saver.values(t, "4"), {"x": value})


@clause("V5", "F8")
def test_checkpoint_without_values_takes_none_from_its_version(saver: Subject) -> None:
    saver.put("t", "1", {"x": ["old"]}, versions={"x": "1"})
    saver.call("put", at("t", "1"), {"id": "2", "channel_versions": {"x": "1"}}, {}, {"x": "1"})
    found = saver.get("t")
    assert found is not None
    assert dict(found.checkpoint) == {"id": "2", "channel_versions": {"x": "1"}}


@clause("V5", "V7")
def test_mutated_value_does_not_leak_in(saver: Subject) -> None:
    value, metadata = {"list": [1]}, {"tags": ["a"]}
    config = saver.put("t", "1", {"x": value}, metadata=metadata)
    write = [1]
    saver.put_writes(config, [("x", write)])
    value["list"].append(2)
    metadata["tags"].append("b")
    write.append(2)
    config["configurable"]["thread_id"] = "other"
    found = saver.get("t")
    assert found is not None
    assert found.checkpoint["channel_values"] == {"x": {"list": [1]}}
    assert dict(found.metadata) == {"tags": ["a"]}
    assert found.pending_writes == [("task", "x", [1])]


@clause("V5")
def test_value_mutated_while_the_save_waits_does_not_leak_in(saver: Subject) -> None:
    """A save in the background serialises at once, before anybody else can run."""
    if not saver.is_async:
        value = [1]
        threads = [threading.Thread(target=saver.put, args=("t", str(i), {"x": value})) for i in range(5)]
        for thread in threads:
            thread.start()
            thread.join()
        value.append(2)
        assert all(found.checkpoint["channel_values"] == {"x": [1]} for found in saver.list())
        return

    async def race() -> None:
        import asyncio

        value = bytearray(b"before")
        checkpoint = bare("1", {"x": [1], "b": value})
        task = asyncio.create_task(saver.saver.aput(at("t"), checkpoint, {}, {}))
        await asyncio.sleep(0)
        checkpoint["channel_values"]["x"].append(2)
        value[:] = b"after!"
        await task

    saver.loop.run(race())
    assert saver.values("t") == {"x": [1], "b": bytearray(b"before")}


@clause("V6")
def test_versions_are_text_or_numbers(saver: Subject) -> None:
    for version in ("1.5", "", "a b", 0, 1, 2**63, 1.0, 1.5, 1e22, 1e-7, 5e-324, 0.1):
        t = fresh()
        versions = {"x": version, "y": version}
        saver.put(t, "1", {"x": [1], "y": 2}, versions=versions)
        found = saver.get(t)
        assert found is not None
        assert same(found.checkpoint["channel_versions"], versions)
        assert found.checkpoint["channel_values"] == {"x": [1], "y": 2}
        saver.put(t, "2", {"x": [9], "y": 9}, versions=versions, parent="1", new={})
        assert saver.values(t) == {"x": [1], "y": 2}


@clause("V5", "V6")
@pytest.mark.parametrize(
    ("stored", "same_as", "other"), [(2, "2", 2.0), (10**16, str(10**16), 1e16)], ids=repr
)
def test_versions_are_the_same_if_their_text_is(
    saver: Subject, stored: Any, same_as: Any, other: Any
) -> None:
    saver.put("t", "1", {"x": ["stored"]}, versions={"x": stored})
    for version, kept_value in ((same_as, "stored"), (other, "given")):
        saver.put("t", "2", {"x": ["given"]}, parent="1", versions={"x": version}, new={})
        assert saver.values("t") == {"x": [kept_value]}


@clause("V6")
def test_versions_of_other_kinds_are_refused(saver: Subject) -> None:
    for version in (2**70, 1e999, [1], b"1"):
        with pytest.raises(InvalidInputError):
            saver.put("t", "1", {"x": [1]}, versions={"x": version})
        assert saver.get("t") is None


@clause("V7")
def test_returned_objects_are_the_callers(saver: Subject) -> None:
    config = saver.put("t", "1", {"x": [1]}, metadata={"m": {"a": 1}}, parent="0")
    saver.put_writes(config, [("x", [1])])
    before, found = saver.get("t"), saver.get("t")
    assert found is not None
    assert found.parent_config is not None
    found.checkpoint["channel_values"]["x"].append(2)
    found.checkpoint["channel_versions"].clear()
    found.metadata["m"]["a"] = 2  # type: ignore[typeddict-item]
    found.config["configurable"].clear()
    found.parent_config["configurable"].clear()
    (found.pending_writes or []).clear()
    assert saver.get("t") == before
    assert saver.list(at("t")) == [before]


@clause("V3", "R3")
@generated(key=ANY_TEXT, value=ANY_JSON)
def test_what_was_put_is_found_by_a_filter(saver: Subject, key: str, value: Any) -> None:
    assume(key != "writes")
    thread = fresh()
    saver.put(thread, "1", {}, metadata={key: value})
    assert saver.ids(at(thread), filter={key: value}) == ["1"]


@clause("V1")
def test_delta_snapshot_of_a_channel_without_a_version_comes_back(saver: Subject) -> None:
    saver.put("t", "1", {"x": VALUES["delta snapshot"]}, versions={})
    assert same(saver.values("t"), {"x": VALUES["delta snapshot"]})


@clause("V3", "W4")
def test_namespace_zero_is_not_the_root(saver: Subject) -> None:
    assert saver.put("t", "1", {}, ns=0) == at("t", "1", "0")  # type: ignore[arg-type]
    assert saver.get("t") is None
    assert saver.get("t", ns=0) == saver.get("t", ns="0") != None  # type: ignore[arg-type]  # noqa: E711


@clause("V5")
def test_checkpoint_with_an_empty_id_is_nobodys_parent(saver: Subject) -> None:
    saver.put("t", "1", {"x": [1]}, versions={"x": 1})
    saver.put("t", "", {}, versions={"x": 1}, parent="1")
    saver.put("t", "2", {}, versions={"x": 1}, new={})
    assert saver.values("t", "2") == {"x": [1]}

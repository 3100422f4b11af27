"""Clauses R1 to R10: what is read, in which order, and what reading must not do."""

from __future__ import annotations

import threading
from itertools import permutations
from typing import Any

import pytest
from hypothesis import strategies as st
from langgraph.checkpoint.serde.types import TASKS, _DeltaSnapshot

from persistence.errors import InvalidInputError
from persistence.testing.kinds import ANY_JSON, ID_TEXT
from persistence.testing.marks import clause, generated
from persistence.testing.subject import Subject, at, fresh, same


@clause("R1")
def test_config_names_the_checkpoint_and_nothing_else(saver: Subject) -> None:
    config = at("t")
    config["configurable"]["model"] = "m"
    config["tags"] = ["x"]
    returned = saver.put("t", "1", {})
    assert returned == at("t", "1")
    config["configurable"]["checkpoint_id"] = "1"
    found = saver.call("get_tuple", config)
    assert found.config == at("t", "1")
    assert found.config is not config
    assert saver.list(config)[0].config == at("t", "1")


@clause("R2")
@generated(ids=st.lists(ID_TEXT, min_size=2, max_size=6, unique=True))
def test_newest_is_the_largest_id_by_its_bytes(saver: Subject, ids: list[str]) -> None:
    thread = fresh()
    for id_ in ids:
        saver.put(thread, id_, {})
    expected = sorted(ids, key=str.encode, reverse=True)
    assert saver.ids(at(thread)) == expected
    found = saver.get(thread)
    assert found is not None
    assert found.config["configurable"]["checkpoint_id"] == expected[0]
    bounded = saver.ids(at(thread), before=at(thread, expected[0]))
    assert bounded == expected[1:]


@clause("R2")
def test_order_across_threads_and_namespaces(saver: Subject) -> None:
    places = [(t, ns, i) for i in ("a", "B", "1", "é") for t in ("z", "A", "a") for ns in ("", "x:1", "X")]
    for thread, ns, id_ in places:
        saver.put(thread, id_, {}, ns=ns)
    expected = sorted(places, key=lambda p: (p[0].encode(), p[1].encode()))
    expected.sort(key=lambda p: p[2].encode(), reverse=True)
    listed = [found.config["configurable"] for found in saver.list()]
    assert [(c["thread_id"], c["checkpoint_ns"], c["checkpoint_id"]) for c in listed] == expected
    assert saver.ids(limit=5) == [id_ for _, _, id_ in expected[:5]]


@clause("R3")
@pytest.mark.parametrize(
    ("stored", "same", "different"),
    [
        (1, [1, 1.0], [True, "1", None, [1], 2]),
        (True, [True], [1, "true", None, False]),
        (1.5, [1.5], [1, "1.5"]),
        (0, [0, 0.0, -0.0], [False, None, ""]),
        (10**23, [10**23, 1e23], [10**23 + 1]),
        ("a", ["a"], ["A", "a ", ["a"]]),
        (None, [None], [0, False, "", "null"]),
        ([1, 2], [[1, 2], (1, 2.0)], [[2, 1], [1], [1, 2, 3], 1]),
        ([], [[], ()], [None, {}, [None]]),
        ({"a": 1, "b": 2}, [{"b": 2, "a": 1.0}], [{"a": 1}, {"a": 1, "b": 2, "c": None}]),
        ({}, [{}], [None, []]),
        ({"a": None}, [{"a": None}], [{}]),
    ],
    ids=repr,
)
def test_filter_compares_json_values(
    saver: Subject, stored: Any, same: list[Any], different: list[Any]
) -> None:
    saver.put("t", "1", {}, metadata={"k": stored})
    for value in same:
        assert saver.ids(at("t"), filter={"k": value}) == ["1"], value
    for value in different:
        assert saver.ids(at("t"), filter={"k": value}) == [], value


@clause("R3")
def test_filter_keys_are_literal(saver: Subject) -> None:
    keys = ["a.b", "a b", "$", "", '"', "'", "a]", "[0]", "%s", "?", "ä", "--", "a\\b"]
    saver.put("t", "1", {}, metadata=dict.fromkeys(keys, 1) | {"a": {"b": 2}})
    for key in keys:
        assert saver.ids(at("t"), filter={key: 1}) == ["1"], key
    assert saver.ids(at("t"), filter=dict.fromkeys(keys, 1)) == ["1"]
    assert saver.ids(at("t"), filter={"a.b": 2}) == []


@clause("R3")
def test_filter_of_nothing_and_of_missing_keys(saver: Subject) -> None:
    saver.put("t", "1", {}, metadata={"k": None})
    saver.put("t", "2", {}, metadata={})
    assert saver.ids(filter={}) == ["2", "1"]
    assert saver.ids(filter=None) == ["2", "1"]
    assert saver.ids(filter={"k": None}) == ["2", "1"]
    with pytest.raises(InvalidInputError, match="key"):
        saver.list(filter={"key": {1, 2}})


@clause("R3")
@generated(stored=ANY_JSON, asked=ANY_JSON)
def test_filter_agrees_with_json_equality(saver: Subject, stored: Any, asked: Any) -> None:
    from persistence.metadata import clean_json, comparable

    thread = fresh()
    saver.put(thread, "1", {}, metadata={"k": stored})
    equal = comparable(clean_json(stored, "")) == comparable(clean_json(asked, ""))
    assert saver.ids(at(thread), filter={"k": asked}) == (["1"] if equal else [])


@clause("R4")
def test_limit(saver: Subject) -> None:
    for i in range(5):
        saver.put("t", str(i), {}, metadata={"even": i % 2 == 0})
    assert saver.ids(limit=None) == ["4", "3", "2", "1", "0"]
    assert saver.ids(limit=2) == ["4", "3"]
    assert saver.ids(limit=0) == []
    assert len(saver.ids(limit=10**30)) == 5
    assert saver.ids(limit=2, filter={"even": True}) == ["4", "2"]
    for wrong in (-1, 1.5, "2", True):
        with pytest.raises(ValueError, match="limit"):
            saver.list(limit=wrong)


@clause("R5")
def test_before_without_an_id_bounds_nothing(saver: Subject) -> None:
    saver.put("t", "1", {})
    saver.put("u", "2", {}, ns="n")
    nothing: tuple[Any, ...] = (None, {})
    for config in nothing:
        for before in (None, {}, at("t"), {"configurable": {"checkpoint_id": None}}):
            assert saver.ids(config, before=before) == ["2", "1"]
    assert saver.ids(at("t"), before=at("t", "1")) == []
    assert saver.ids(None, before=at("t", "2")) == ["1"]


@clause("R2", "R6")
def test_long_listing_has_every_checkpoint_once(saver: Subject) -> None:
    for i in range(150):
        saver.put("t" if i % 3 else "u", f"{i // 2:04}", {"x": [i]}, ns="" if i % 2 else "n")
    listed = [tuple(found.config["configurable"].values()) for found in saver.list()]
    assert len(listed) == len(set(listed)) == 150
    assert [place[2] for place in listed] == sorted((place[2] for place in listed), reverse=True)
    assert len(saver.ids(limit=77)) == 77
    assert saver.ids(at("t"), limit=40) == saver.ids(at("t"))[:40]


@clause("R6", "F2")
def test_any_method_may_be_called_inside_the_loop(opened: Any) -> None:
    saver: Subject = opened(pool_max=1)
    for i in range(40):
        saver.put("t", f"{i:03}", {"x": [i]})

    def inside(id_: str) -> None:
        saver.put("t", f"{id_}-new", {})
        saver.put_writes(at("t", id_), [("x", 1)])
        assert saver.get("t", id_) is not None
        assert len(saver.ids(at("t"), limit=1)) == 1
        saver.call("delete_thread", "other")

    seen = []
    if saver.is_async:

        async def loop() -> None:
            import asyncio

            async for found in saver.saver.alist(at("t")):
                id_ = found.config["configurable"]["checkpoint_id"]
                seen.append(id_)
                await saver.saver.aput(at("t"), found.checkpoint | {"id": f"{id_}-new"}, {}, {})
                await saver.saver.aput_writes(at("t", id_), [("x", 1)], "task")
                assert await saver.saver.aget_tuple(at("t", id_)) is not None
                assert len([f async for f in saver.saver.alist(at("t"), limit=1)]) == 1
                await asyncio.gather(*(saver.saver.adelete_thread(f"other{i}") for i in range(3)))

        saver.loop.run(loop())
    else:
        for found in saver.saver.list(at("t")):
            seen.append(found.config["configurable"]["checkpoint_id"])
            inside(seen[-1])
            thread = threading.Thread(target=inside, args=(seen[-1],))
            thread.start()
            thread.join(60)
            assert not thread.is_alive()
    assert [id_ for id_ in seen if not id_.endswith("new")] == [f"{i:03}" for i in reversed(range(40))]
    assert len(seen) == len(set(seen))


@clause("R7")
def test_reading_what_is_not_there_leaves_nothing(saver: Subject) -> None:
    assert saver.get("t") is None
    assert saver.get("t", "1") is None
    assert saver.list(at("t")) == []
    assert saver.history(at("t"), ["x"]) == {"x": {"writes": []}}
    assert saver.history(at("t", "1"), []) == {}
    assert saver.list() == []
    saver.put_writes(at("t", "1"), [("x", 1)])
    assert saver.get("t") is None
    assert saver.list() == []
    saver.put("t", "1", {})
    assert saver.writes("t") == [("task", "x", 1)]


@clause("R7", "F2")
def test_reads_and_writes_at_once_never_fail(saver: Subject) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(10):
                config = saver.put(f"t{number % 4}", f"{number:02}-{i}", {"x": [i], "y": i})
                saver.put_writes(config, [("x", i)], f"task{number}")
                assert saver.get(f"t{number % 4}") is not None
                saver.list(at(f"t{number % 4}"), limit=5)
        except BaseException as error:  # noqa: BLE001 - to be shown in the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert not any(thread.is_alive() for thread in threads)
    assert len(saver.ids()) == 160


@clause("R8")
def test_pending_writes_come_in_order(saver: Subject) -> None:
    config = saver.put("t", "1", {})
    for task, path in (("b", "~2"), ("a", "~2"), ("c", ""), ("d", "B"), ("e", "a"), ("f", "é")):
        saver.put_writes(config, [(f"{task}{i}", i) for i in range(11)], task, path)
    order = [("c", ""), ("d", "B"), ("e", "a"), ("a", "~2"), ("b", "~2"), ("f", "é")]
    expected = [(task, f"{task}{i}", i) for task, _ in order for i in range(11)]
    assert saver.writes("t") == expected
    assert saver.list(at("t"))[0].pending_writes == expected


@clause("R9")
@pytest.mark.parametrize("more", [{"v": 1}, {"v": 3}], ids=str)
def test_sends_of_old_formats_are_found_in_the_parents_writes(saver: Subject, more: dict[str, Any]) -> None:
    parent = saver.put("t", "1", {}, **more)
    saver.put_writes(parent, [(TASKS, "b"), ("x", 0), (TASKS, "c")], "two", "q")
    saver.put_writes(parent, [(TASKS, "a")], "nine", "p")
    saver.put("t", "2", {"x": 1}, parent="1", versions={"x": 5, "y": 7}, **more)
    saver.put("t", "3", {}, parent="1", **more)
    for found in (saver.get("t", "2"), saver.list(at("t"))[1], saver.list()[1], saver.list(at("t", "2"))[0]):
        assert found is not None
        assert found.checkpoint["channel_values"] == {"x": 1, TASKS: ["a", "b", "c"]}
        assert found.checkpoint["channel_versions"] == {"x": 5, "y": 7, TASKS: 7}
    assert saver.get("t") == saver.list(limit=1)[0]
    found = saver.get("t", "1")
    assert found is not None
    assert found.checkpoint["channel_values"] == {}


@clause("R9")
def test_sends_take_the_highest_version_whatever_the_order_of_channels(saver: Subject) -> None:
    cases: list[tuple[list[Any], Any]] = [([2, 2.0], 2), (["1", 2.0, "2.0"], "2.0"), ([10, "9"], "9")]
    for values, highest in cases:
        for order in permutations(values):
            versions = dict(zip(["x", "", "long"], order, strict=False))
            config = saver.put("t", "1", {}, v=1)
            saver.put_writes(config, [(TASKS, "send")])
            saver.put("t", "2", {}, parent="1", versions=versions, v=1)
            found = saver.get("t")
            assert found is not None
            assert same(found.checkpoint["channel_versions"][TASKS], highest)


@clause("R9")
@pytest.mark.parametrize("version", [3.5, 4.0, 4.5, "4", None, True, 5], ids=repr)
def test_format_is_old_if_its_version_is_less_than_four_or_no_number(saver: Subject, version: Any) -> None:
    saver.put_writes(saver.put("t", "1", {}), [(TASKS, "a")])
    saver.put("t", "2", {"x": 1}, parent="1", v=version)
    is_new = type(version) in (int, float) and version >= 4
    assert saver.values("t") == ({"x": 1} if is_new else {"x": 1, TASKS: ["a"]})


@clause("R9")
def test_sends_of_the_new_format_stay_pending_writes(saver: Subject) -> None:
    parent = saver.put("t", "1", {})
    saver.put_writes(parent, [(TASKS, "a")])
    saver.put("t", "2", {"x": 1}, parent="1")
    assert saver.values("t") == {"x": 1}


@clause("R10")
def test_delta_history_goes_back_to_the_nearest_value(saver: Subject) -> None:
    # Ids that do not sort like the chain; one channel with a snapshot, one with a plain value,
    # one with None, one that was never stored.
    chain = ["m", "z", "a", "k", "b"]
    values: dict[str, dict[str, Any]] = {"z": {"s": _DeltaSnapshot([1])}, "m": {"p": 7, "n": None, "s": [0]}}
    parent = None
    for id_ in chain:
        config = saver.put("t", id_, values.get(id_, {}), parent=parent)
        saver.put_writes(config, [("s", f"{id_}1"), ("p", id_), ("n", id_), ("never", id_)], "two", "b")
        saver.put_writes(config, [("s", f"{id_}0")], "one", "a")
        parent = id_
    history = saver.history(at("t", "b"), ["s", "p", "n", "never", "s"])
    assert history["s"] == {
        "writes": [(task, "s", f"{id_}{i}") for id_ in "zak" for task, i in (("one", 0), ("two", 1))],
        "seed": _DeltaSnapshot([1]),
    }
    for channel, seed in (("p", {"seed": 7}), ("n", {"seed": None}), ("never", {})):
        assert history[channel] == {"writes": [("two", channel, id_) for id_ in "mzak"], **seed}
    assert saver.history(at("t", "m"), ["s"]) == {"s": {"writes": []}}
    assert saver.history(at("t"), ["p"]) == {"p": {"writes": [("two", "p", "m")], "seed": 7}}


@clause("R10")
def test_delta_history_of_a_circle_ends(saver: Subject) -> None:
    for id_, parent in (("1", "3"), ("2", "1"), ("3", "2"), ("self", "self"), ("lost", "nowhere")):
        saver.put_writes(saver.put("t", id_, {}, parent=parent), [("x", id_)])
    assert saver.history(at("t", "3"), ["x"]) == {"x": {"writes": [("task", "x", "1"), ("task", "x", "2")]}}
    assert saver.history(at("t", "self"), ["x"]) == {"x": {"writes": []}}
    assert saver.history(at("t", "lost"), ["x"]) == {"x": {"writes": []}}


@clause("R10")
def test_delta_history_is_the_same_as_langgraphs_own_walk(saver: Subject) -> None:
    from langgraph.checkpoint.base import BaseCheckpointSaver

    parent = None
    for i in range(300):
        config = saver.put("t", f"{i:04}", {"x": [i]} if i in (3, 40) else {}, parent=parent)
        saver.put_writes(config, [("x", i), ("y", i)])
        parent = f"{i:04}"
    for id_ in ("0299", "0041", "0040", "0002"):
        config = at("t", id_)
        expected: Any
        if saver.is_async:
            walk = BaseCheckpointSaver.aget_delta_channel_history(
                saver.saver, config=config, channels=["x", "y"]
            )
            expected = saver.loop.run(walk)
        else:
            expected = BaseCheckpointSaver.get_delta_channel_history(
                saver.saver, config=config, channels=["x", "y"]
            )
        assert saver.history(config, ["x", "y"]) == expected


@clause("V3", "W5", "R10")
def test_delta_history_takes_channels_as_every_other_method_takes_names(saver: Subject) -> None:
    saver.put_writes(saver.put("t", "1", {}), [(6, "a")])
    saver.put("t", "2", {}, parent="1")
    asked: list[Any] = [6]
    assert saver.history(at("t"), asked) == {"6": {"writes": [("task", "6", "a")]}}
    with pytest.raises(InvalidInputError):
        saver.history(at("t"), ["a\0b"])
    with pytest.raises(TypeError):
        saver.history(at("t"), "x")

"""Clauses W1 to W6: what a write does, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT, RESUME, SCHEDULED

from persistence.testing.marks import clause
from persistence.testing.subject import Subject, at, bare

SPECIAL = (ERROR, SCHEDULED, INTERRUPT, RESUME)


@clause("W1")
def test_put_again_replaces_all_of_a_checkpoint(saver: Subject) -> None:
    saver.put("t", "1", {"x": [1], "y": 1, "z": [3]}, parent="0", metadata={"a": 1, "b": 2})
    saver.put("t", "1", {"x": [2], "y": 2}, parent="other", metadata={"a": 3}, ts="later")
    found = saver.get("t")
    assert found is not None
    assert found.checkpoint["channel_values"] == {"x": [2], "y": 2}
    assert found.checkpoint["ts"] == "later"
    assert found.metadata == {"a": 3}
    assert found.parent_config == at("t", "other")
    saver.put("t", "1", {})
    found = saver.get("t")
    assert found is not None
    assert found.checkpoint["channel_values"] == {}
    assert found.parent_config is None
    assert saver.ids(at("t")) == ["1"]


@clause("W2")
def test_regular_write_that_is_there_stays_and_a_special_one_is_replaced(saver: Subject) -> None:
    config = saver.put("t", "1", {})
    saver.put_writes(config, [("a", 1), *((channel, "old") for channel in SPECIAL)], path="p1")
    saver.put_writes(config, [("a", 2), *((channel, "new") for channel in SPECIAL), ("b", 3)], path="p2")
    written = {channel: value for _, channel, value in saver.writes("t")}
    assert written == {"a": 1, "b": 3, **dict.fromkeys(SPECIAL, "new")}


@clause("W2")
def test_replaced_write_takes_its_new_task_path(saver: Subject) -> None:
    config = saver.put("t", "1", {})
    saver.put_writes(config, [(RESUME, 1)], "one", "a")
    saver.put_writes(config, [(RESUME, 2)], "two", "b")
    saver.put_writes(config, [(RESUME, 3)], "one", "c")
    assert saver.writes("t") == [("two", RESUME, 2), ("one", RESUME, 3)]


@clause("W2")
def test_last_of_the_same_special_channel_in_one_call_wins(saver: Subject) -> None:
    config = saver.put("t", "1", {})
    saver.put_writes(config, [(INTERRUPT, 1), ("a", 0), (INTERRUPT, 2), ("a", 1)])
    assert saver.writes("t") == [("task", INTERRUPT, 2), ("task", "a", 0), ("task", "a", 1)]


class Explodes:
    """A value that is refused only after its neighbours were accepted."""


@clause("W3")
def test_nothing_of_a_failed_call_is_stored(saver: Subject) -> None:
    config = saver.put("t", "1", {"x": [1]})
    with pytest.raises(TypeError):
        saver.put("t", "2", {"x": [2], "y": Explodes()}, parent="1")
    with pytest.raises(TypeError):
        saver.put_writes(config, [("x", 1), ("y", Explodes())])
    assert saver.ids(at("t")) == ["1"]
    assert saver.writes("t") == []


@clause("W3", "F5")
def test_cancelled_call_is_done_or_not_done(saver: Subject) -> None:
    async def cancel(after: int) -> None:
        import asyncio

        checkpoint = bare(f"{after}", {"x": [after], "y": after}, dict.fromkeys("xy", after))
        task = asyncio.create_task(saver.saver.aput(at("t"), checkpoint, {}, dict.fromkeys("xy", after)))
        for _ in range(after):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    for after in range(12):
        saver.loop.run(cancel(after))
    saver.put("t", "last", {"x": [99]})
    assert saver.values("t", "last") == {"x": [99]}
    for found in saver.list(at("t"), before=at("t", "last")):
        number = int(found.config["configurable"]["checkpoint_id"])
        assert found.checkpoint["channel_values"] == {"x": [number], "y": number}


@clause("W4")
def test_missing_namespace_is_the_root(saver: Subject) -> None:
    for thread, configurable in (("none", {"checkpoint_ns": None}), ("missing", {})):
        config: Any = {"configurable": {"thread_id": thread, **configurable}}
        assert saver.call("put", config, bare("1", {}), {}, {}) == at(thread, "1", "")
        config["configurable"]["checkpoint_id"] = "1"
        saver.put_writes(config, [("x", 1)])
        assert saver.history(config, ["x"]) == {"x": {"writes": []}}
        found = saver.call("get_tuple", config)
        assert found == saver.get(thread, "1", "")
        assert found.pending_writes == [("task", "x", 1)]
        assert saver.ids(config) == ["1"]


@clause("W5")
def test_any_iterable_will_do(saver: Subject) -> None:
    config = saver.put("t", "1", {"x": [1]}, metadata={"run_id": "r"})
    saver.put_writes(config, ((channel, i) for i, channel in enumerate("ab")))
    assert saver.writes("t") == [("task", "a", 0), ("task", "b", 1)]
    child = saver.put("t", "2", {}, parent="1")
    assert saver.history(child, iter(["x"])) == {"x": {"writes": [], "seed": [1]}}
    saver.call("prune", iter(["t"]))
    assert saver.ids(at("t")) == ["2"]
    saver.put("t", "3", {}, metadata={"run_id": "r"})
    saver.call("delete_for_runs", {"r"})
    assert saver.ids(at("t")) == ["2"]
    saver.call("prune", (t for t in ["t"]), strategy="delete")
    assert saver.ids() == []


@clause("W5")
def test_one_text_is_not_several_ids(saver: Subject) -> None:
    saver.put("t", "1", {})
    with pytest.raises(TypeError):
        saver.call("prune", "t", strategy="delete")
    with pytest.raises(TypeError):
        saver.call("delete_for_runs", "t")
    assert saver.ids() == ["1"]

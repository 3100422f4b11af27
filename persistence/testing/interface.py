"""Clauses F1 to F6 and F8: the whole interface, everywhere."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.serde.types import INTERRUPT, TASKS, _DeltaSnapshot

import persistence
from persistence.errors import (
    ClosedError,
    ConflictError,
    InvalidInputError,
    UnsupportedError,
    WrongLoopError,
)
from persistence.settings import Settings
from persistence.testing.fixtures import Opener
from persistence.testing.marks import clause
from persistence.testing.subject import Subject, Target, at, bare

METHODS: dict[str, tuple[Any, ...]] = {
    "put": (at("t"), bare("9", {}), {}, {}),
    "put_writes": (at("t", "1"), [("x", 1)], "task"),
    "get_tuple": (at("t"),),
    "get": (at("t"),),
    "list": (at("t"),),
    "delete_thread": ("t",),
    "prune": (["t"],),
    "delete_for_runs": (["r"],),
    "copy_thread": ("t", "u"),
    "get_delta_channel_history": (),
}


def arguments(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return METHODS[name], {"config": at("t"), "channels": ["x"]} if not METHODS[name] else {}


@clause("F1")
def test_every_method_is_our_own_on_the_savers_class(saver: Subject) -> None:
    for name in METHODS:
        if name != "get":
            for method in (name, "a" + name):
                assert getattr(type(saver.saver), method) is not getattr(BaseCheckpointSaver, method), method


@clause("F1")
def test_prune_keeps_the_latest_of_each_namespace(saver: Subject) -> None:
    for ns in ("", "sub"):
        for i in range(4):
            config = saver.put(
                "t", str(i), {"x": [i], "y": "same", "z": i}, ns=ns, parent=str(i - 1) if i else None
            )
            saver.put_writes(config, [("x", i), (INTERRUPT, "ask")])
    before = [saver.get("t", ns=ns) for ns in ("", "sub")]
    other = saver.put("other", "1", {})
    saver.call("prune", ["t", "nobody"])
    assert saver.ids(at("t", ns=None)) == ["3", "3"]
    for ns, old in zip(("", "sub"), before, strict=True):
        found = saver.get("t", ns=ns)
        assert found is not None
        assert old is not None
        assert found == old._replace(parent_config=None)
    assert saver.call("get_tuple", other) is not None
    saver.put_writes(at("t", "2"), [("gone", 1)])
    saver.put("t", "2", {})
    assert saver.writes("t", "2") == [("task", "gone", 1)]
    with pytest.raises(ValueError, match="strategy"):
        saver.call("prune", ["t"], strategy="half")


@clause("F1")
def test_prune_deletes_finished_subgraph_calls_and_keeps_running_ones(saver: Subject) -> None:
    for i in (1, 2):
        saver.put("t", f"root{i}", {}, parent=f"root{i - 1}")
        saver.put("t", f"call{i}", {"x": i}, ns=f"sub:{i}", metadata={"parents": {"": f"root{i}"}})
        saver.put("t", f"kept{i}", {"x": i}, ns="stateful", metadata={"parents": {"": f"root{i}"}})
    saver.put("t", "early", {"x": 3}, ns="sub:3", metadata={"parents": {"": "not saved yet"}})
    saver.put_writes(at("t", "call1", "sub:1"), [("x", 1)])
    saver.call("prune", ["t"])
    assert set(saver.ids(at("t", ns=None))) == {"root2", "call2", "kept2", "early"}


@clause("F1")
def test_prune_keeps_what_a_delta_channel_is_rebuilt_from(saver: Subject) -> None:
    parent = None
    for i in range(8):
        values: dict[str, Any] = {"plain": [i]} | ({"d": _DeltaSnapshot([i])} if i in (1, 4) else {})
        counters = {} if i in (1, 4) else {"counters_since_delta_snapshot": {"d": [1, 1]}}
        config = saver.put(
            "t", str(i), values, parent=parent, metadata=counters, versions={"plain": i, "d": i}
        )
        saver.put_writes(config, [("d", i)])
        parent = str(i)
    before = saver.history(at("t"), ["d"])
    latest = saver.get("t")
    saver.call("prune", ["t"])
    assert saver.ids(at("t")) == ["7", "6", "5", "4"]
    assert saver.history(at("t"), ["d"]) == before
    assert before["d"]["seed"] == _DeltaSnapshot([4])
    assert saver.get("t") == latest
    found = saver.get("t", "4")
    assert found is not None
    assert found.parent_config is None


@clause("F1")
def test_prune_refuses_what_it_cannot_know(saver: Subject) -> None:
    saver.put("t", "1", {}, metadata={"delta_writes_versioned": True})
    saver.put("t", "2", {}, parent="1", metadata={"delta_writes_versioned": True})
    saver.put("u", "1", {})
    saver.put("u", "2", {}, parent="1")
    with pytest.raises(UnsupportedError, match="'t'"):
        saver.call("prune", ["u", "t"])
    assert len(saver.ids()) == 4


@clause("F1", "R9")
def test_prune_keeps_the_parent_that_holds_the_sends(saver: Subject) -> None:
    for i in range(4):
        config = saver.put("t", str(i), {"x": i}, parent=str(i - 1) if i else None, v=3)
        saver.put_writes(config, [(TASKS, i)])
    before = saver.values("t")
    saver.call("prune", ["t"])
    assert saver.ids(at("t")) == ["3", "2"]
    assert saver.values("t") == before == {"x": 3, TASKS: [2]}


@clause("F1")
def test_delete_for_runs(saver: Subject) -> None:
    for i, run in enumerate(["a", "a", "b", "c"]):
        for thread in ("t", "u"):
            new = {"x": i, "y": 1} if i == 0 else {"x": i}
            values, parent = {"x": [i], "y": "kept"}, str(i - 1) if i else None
            versions, metadata = {"x": i, "y": 1}, {"run_id": run}
            config = saver.put(
                thread, str(i), values, parent=parent, metadata=metadata, versions=versions, new=new
            )
            saver.put_writes(config, [("x", i)])
    saver.put("t", "number", {}, metadata={"run_id": 7}, ns="sub")
    saver.call("delete_for_runs", ["a", "nobody"])
    for thread in ("t", "u"):
        assert saver.ids(at(thread)) == ["3", "2"]
        assert saver.values(thread, "2") == {"x": [2], "y": "kept"}
        found = saver.get(thread, "2")
        assert found is not None
        assert found.parent_config is None
        assert found.pending_writes == [("task", "x", 2)]
    saver.call("delete_for_runs", [7, "b", "c"])
    assert saver.ids() == []
    saver.call("delete_for_runs", [])


@clause("F1")
def test_run_is_named_by_text_or_a_number(saver: Subject) -> None:
    runs = {
        "text": "r",
        "number": 7,
        "float": 1e22,
        "flag": True,
        "list": [1],
        "dict": {"a": 1},
        "none": None,
    }
    for id_, run in runs.items():
        saver.put("t", id_, {}, metadata={"run_id": run})
    saver.call("delete_for_runs", ["[1]", '{"a":1}', '{"a": 1}', "null", "None", "True", "1e+22"])
    assert set(saver.ids()) == set(runs)
    for id_, name in (("text", "r"), ("number", "7"), ("float", "1" + "0" * 22 + ".0"), ("flag", "true")):
        saver.call("delete_for_runs", [name])
        assert id_ not in saver.ids()
    assert set(saver.ids()) == {"list", "dict", "none"}


@clause("F1")
def test_delete_for_runs_refuses_what_a_live_checkpoint_needs(saver: Subject) -> None:
    delta = {"counters_since_delta_snapshot": {"d": [1, 1]}}
    parent = None
    for i, run in enumerate("abc"):
        config = saver.put(
            "t", str(i), {}, parent=parent, versions={"d": i}, metadata={"run_id": run} | delta
        )
        saver.put_writes(config, [("d", i)])
        parent = str(i)
    with pytest.raises(UnsupportedError, match="'t'"):
        saver.call("delete_for_runs", ["b"])
    assert len(saver.ids(at("t"))) == 3
    saver.call("delete_for_runs", ["c"])
    saver.call("delete_for_runs", ["a", "b"])
    assert saver.ids(at("t")) == []
    saver.put_writes(saver.put("old", "1", {}, v=3, metadata={"run_id": "x"}), [(TASKS, 1)])
    saver.put("old", "2", {}, parent="1", v=3, metadata={"run_id": "y"})
    with pytest.raises(UnsupportedError, match="'old'"):
        saver.call("delete_for_runs", ["x"])


@clause("F1")
def test_copy_thread(saver: Subject) -> None:
    for ns in ("", "sub:1"):
        for i in range(3):
            config = saver.put(
                "t", str(i), {"x": [i], "y": i}, ns=ns, parent=str(i - 1) if i else None, metadata={"s": i}
            )
            saver.put_writes(config, [("x", i), (INTERRUPT, "ask")], path="p")
    saver.call("copy_thread", "t", "copy")
    originals, copies = saver.list(at("t", ns=None)), saver.list(at("copy", ns=None))
    assert len(copies) == len(originals) == 6
    for original, copy in zip(originals, copies, strict=True):
        assert copy[1:3] == original[1:3]
        assert copy.pending_writes == original.pending_writes
        assert copy.config["configurable"] == original.config["configurable"] | {"thread_id": "copy"}
    assert saver.history(at("copy"), ["x"]) == saver.history(at("t"), ["x"])
    saver.call("delete_thread", "t")
    assert saver.list(at("copy", ns=None)) == copies
    with pytest.raises(ConflictError, match="'copy'"):
        saver.call("copy_thread", "copy", "copy")
    saver.call("copy_thread", "nobody", "copy")
    assert saver.list() == copies


@clause("F1")
def test_delete_thread_deletes_all_of_it_and_nothing_else(saver: Subject) -> None:
    for thread in ("t", "t2"):
        for ns in ("", "sub"):
            saver.put_writes(saver.put(thread, "1", {"x": [1]}, ns=ns), [("x", 1)])
    saver.call("delete_thread", "t")
    assert saver.list(at("t", ns=None)) == []
    assert len(saver.list(at("t2", ns=None))) == 2
    saver.put("t", "1", {})
    assert saver.writes("t") == []


@clause("F2")
def test_other_colour_works_too(saver: Subject) -> None:
    sync = saver.saver
    if saver.is_async:  # its synchronous methods, from a thread that is not the loop's
        assert sync.put(at("t"), bare("1", {"x": [1]}), {"run_id": "r"}, {}) == at("t", "1")
        sync.put_writes(at("t", "1"), [("x", 1)], "task")
        assert sync.get_tuple(at("t")) == saver.get("t")
        assert list(sync.list(at("t"))) == saver.list(at("t"))
        assert sync.get_delta_channel_history(config=at("t"), channels=["x"]) == saver.history(at("t"), ["x"])
        sync.copy_thread("t", "u")
        sync.prune(["u"])
        sync.delete_for_runs(["r"])
        sync.delete_thread("t")
    else:

        async def work() -> None:
            assert await sync.aput(at("t"), bare("1", {"x": [1]}), {"run_id": "r"}, {}) == at("t", "1")
            await sync.aput_writes(at("t", "1"), [("x", 1)], "task")
            assert await sync.aget_tuple(at("t")) == sync.get_tuple(at("t"))
            assert [found async for found in sync.alist(at("t"))] == list(sync.list(at("t")))
            history = await sync.aget_delta_channel_history(config=at("t"), channels=["x"])
            assert history == sync.get_delta_channel_history(config=at("t"), channels=["x"])
            await sync.acopy_thread("t", "u")
            await sync.aprune(["u"])
            await sync.adelete_for_runs(["r"])
            await sync.adelete_thread("t")

        saver.loop.run(work())
    assert saver.list() == []


@clause("F2")
def test_synchronous_call_on_the_savers_own_loop_is_answered_or_refused(saver: Subject) -> None:
    async def work() -> None:
        for name in METHODS:
            args, kwargs = arguments(name)
            try:
                result = getattr(saver.saver, name)(*args, **kwargs)
                if name == "list":
                    list(result)
            except WrongLoopError as error:
                assert saver.is_async
                assert "await" in str(error)

    saver.put("t", "1", {})
    saver.loop.run(work())


@clause("F3")
def test_use_from_another_loop_does_not_hang(saver: Subject) -> None:
    async def work() -> None:
        await saver.saver.aput(at("t"), bare("1", {"x": [1]}), {}, {})
        assert await saver.saver.aget_tuple(at("t")) is not None
        assert len([found async for found in saver.saver.alist(at("t"))]) == 1
        await saver.saver.aprune(["t"])

    asyncio.run(asyncio.wait_for(work(), 60))


@clause("F3")
def test_saver_outlives_its_loop_without_hanging(target: Target) -> None:
    async def open_() -> Any:
        return await persistence.aopen(target.dsn, settings=Settings(close_timeout=1))

    loop = asyncio.new_event_loop()
    handle = loop.run_until_complete(open_())
    saver = handle.checkpointer
    calls: list[Callable[[], Any]] = [
        lambda: saver.get_tuple(at("t")),
        lambda: asyncio.run(saver.aget_tuple(at("t"))),
    ]
    for call in calls:
        try:
            assert call() is None
        except WrongLoopError as error:
            assert "does not run" in str(error)
    loop.run_until_complete(handle.close())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


@clause("F4")
def test_after_the_close_every_method_says_so(opened: Opener) -> None:
    saver = opened()
    saver.put("t", "1", {})
    saver.close()
    saver.close()
    for name in METHODS:
        args, kwargs = arguments(name)
        with pytest.raises(ClosedError):
            saver.call(name, *args, **kwargs)
    with pytest.raises(ClosedError):
        saver.call("prune", [], strategy="delete")
    with pytest.raises(ClosedError):
        saver.saver.with_allowlist([("a", "B")]).get_tuple(at("t"))


@clause("F4")
def test_close_waits_for_what_was_accepted_and_is_bounded(opened: Opener) -> None:
    saver = opened()
    outcomes: list[Any] = []

    def work(number: int) -> None:
        try:
            outcomes.append(saver.put("t", str(number), {"x": [number]}))
        except ClosedError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    begin = time.monotonic()
    saver.close()
    assert time.monotonic() - begin < 60
    for thread in threads:
        thread.join(60)
    assert len(outcomes) == 8
    again = opened()
    stored = set(again.ids(at("t")))
    if saver.target.is_durable:
        for outcome in outcomes:
            assert isinstance(outcome, ClosedError) or outcome["configurable"]["checkpoint_id"] in stored


@clause("F8")
@pytest.mark.parametrize(
    "checkpoint",
    [
        {"ts": "2024-05-04T06:32:42.235444+00:00", "id": "1", "channel_values": {"key": "value"}},
        {
            "ts": "2024-05-04T06:32:42.235444+00:00",
            "id": "1",
            "channel_values": {"key": ["value"], "b": b"1"},
        },
        {"ts": "2023-05-03T10:00:00Z", "data": {"key": "value"}, "id": "1"},
        {"id": "1"},
    ],
    ids=["docstring", "with objects", "older docstring", "id only"],
)
def test_checkpoint_with_keys_left_out_is_read_back(saver: Subject, checkpoint: Any) -> None:
    config: Any = {"configurable": {"thread_id": "1", "checkpoint_ns": ""}}
    metadata = {"source": "input", "step": 1, "writes": {"key": "value"}}
    returned = saver.call("put", config, checkpoint, metadata, {})
    assert returned == at("1", "1")
    found = saver.call("get_tuple", returned)
    assert found.checkpoint == checkpoint
    assert saver.list(at("1"))[0].checkpoint == checkpoint
    assert saver.list()[0].checkpoint == checkpoint


@clause("F8")
def test_call_that_names_no_thread_is_refused(saver: Subject) -> None:
    configs: list[Any] = [{}, {"configurable": {}}, {"configurable": {"thread_id": None}}]
    for config in configs:
        with pytest.raises(InvalidInputError):
            saver.call("put", config, bare("1", {}), {}, {})
        with pytest.raises(InvalidInputError):
            saver.call("get_tuple", config)
    with pytest.raises(InvalidInputError):
        saver.put_writes(at("t"), [("x", 1)])
    with pytest.raises(InvalidInputError):
        saver.call("put", at("t"), {"ts": ""}, {}, {})


@clause("F1")
def test_thread_of_which_nothing_is_left_is_empty(saver: Subject) -> None:
    saver.put_writes(at("target", "1"), [])
    saver.put("target", "1", {}, metadata={"run_id": "r"})
    saver.call("delete_for_runs", ["r"])
    saver.put("t", "1", {"x": [1]})
    saver.call("copy_thread", "target", "t")
    saver.call("copy_thread", "t", "target")
    assert saver.values("target") == {"x": [1]}

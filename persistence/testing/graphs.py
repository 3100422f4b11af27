"""Real graphs: the same program has the same history on every backend, in both colours."""

from __future__ import annotations

import asyncio
import operator
import re
from collections.abc import Callable, Sequence
from functools import cache
from pprint import pformat
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langchain_core.runnables import RunnableLambda
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Command, Send, interrupt

from persistence.testing import programs as more
from persistence.testing.kinds import Colour, Trip
from persistence.testing.marks import clause
from persistence.testing.subject import Subject

DURABILITIES = ("sync", "async", "exit")


class Chat(TypedDict, total=False):
    messages: Annotated[list[AnyMessage], add_messages]
    trip: Trip
    colour: Colour
    done: bool
    found: Annotated[list[str], operator.add]
    answer: str


def _plan(state: Chat) -> Chat:
    count = len(state["messages"])
    return {
        "messages": [AIMessage(f"reply {count}", id=f"ai{count}")],
        "trip": Trip(city="Rome", days=count),
        "colour": Colour.RED,
    }


def _ask(state: Chat) -> Chat:
    first, second = interrupt("sure?"), interrupt({"really": True})
    return {"answer": f"{first}, {second}"}


def _look(item: Any) -> Chat:
    return {"found": [item["name"]]}


def _fan_out(state: Chat) -> list[Send]:
    return [Send("look", {"name": f"item {i}"}) for i in range(3)]


def _inner(state: Chat) -> Chat:
    return {"found": ["inner"], "done": True}


def chat_graph(saver: Any) -> Any:
    inner = StateGraph(Chat).add_node("inner", _inner).add_node("check", _ask)
    inner = inner.add_edge(START, "inner").add_edge("inner", "check")
    outer = (
        StateGraph(Chat)
        .add_node("plan", _plan)
        .add_node("look", RunnableLambda(_look))
        .add_node("sub", inner.compile())
    )
    outer = outer.add_edge(START, "plan").add_conditional_edges("plan", _fan_out, ["look"])
    return outer.add_edge("look", "sub").add_edge("sub", END).compile(checkpointer=saver)


def _append(state: list[Any] | None, writes: Sequence[Any]) -> list[Any]:
    return [
        *(state or []),
        *(item for write in writes for item in (write if isinstance(write, list) else [write])),
    ]


class Log(TypedDict, total=False):
    log: Annotated[list[str], DeltaChannel(_append, list, snapshot_frequency=3)]
    step: int


def delta_graph(saver: Any) -> Any:
    def one(state: Log) -> Log:
        return {"log": [f"one{len(state.get('log', []))}"], "step": state.get("step", 0) + 1}

    def two(state: Log) -> Log:
        return {"log": [f"two{len(state.get('log', []))}"]}

    graph = StateGraph(Log).add_node("one", one).add_node("two", two)
    return graph.add_edge(START, "one").add_edge("one", "two").compile(checkpointer=saver)


class Driver:
    """A graph's calls without the colour."""

    def __init__(self, graph: Any, run: Callable[[Any], Any] | None, durability: str) -> None:
        self._graph, self._run, self._durability = graph, run, durability

    def invoke(self, value: Any, config: Any) -> Any:
        if self._run is None:
            return self._graph.invoke(value, config, durability=self._durability)
        return self._run(self._graph.ainvoke(value, config, durability=self._durability))

    def state(self, config: Any) -> Any:
        if self._run is None:
            return self._graph.get_state(config, subgraphs=True)
        return self._run(self._graph.aget_state(config, subgraphs=True))

    def history(self, config: Any) -> list[Any]:
        if self._run is None:
            return list(self._graph.get_state_history(config))

        async def collect() -> list[Any]:
            return [state async for state in self._graph.aget_state_history(config)]

        found: list[Any] = self._run(collect())
        return found

    def update(self, config: Any, values: Any, as_node: str) -> Any:
        if self._run is None:
            return self._graph.update_state(config, values, as_node=as_node)
        return self._run(self._graph.aupdate_state(config, values, as_node=as_node))

    def shape(self, config: Any) -> Any:
        return _shape(self.state(config))

    def shapes(self, config: Any) -> list[Any]:
        return [_shape(state) for state in self.history(config)]


def chat_program(driver: Driver) -> list[Any]:
    """Messages, parallel tasks, a subgraph with two interrupts, an update, a fork, a replay."""
    config: Any = {"configurable": {"thread_id": "chat"}, "metadata": {"user": "ann"}}
    seen: list[Any] = [driver.invoke({"messages": [HumanMessage("hello", id="h1")]}, config)]
    seen += [_shape(driver.state(config))]
    seen += [driver.invoke(Command(resume="yes"), config), driver.invoke(Command(resume="really"), config)]
    seen += [_shape(driver.state(config))]
    driver.update(config, {"answer": "corrected", "colour": Colour.RED}, "sub")
    history = driver.history(config)
    seen += [[_shape(state) for state in history]]
    fork = next((state for state in history if state.next == ("plan",)), history[-1])
    seen += [driver.invoke(None, fork.config)]
    seen += [_shape(driver.state(config)), [_shape(state) for state in driver.history(config)]]
    seen += [driver.invoke(Command(resume="again"), config)]
    return seen


def delta_program(driver: Driver) -> list[Any]:
    """A channel that is rebuilt from writes, with snapshots, an update and a fork."""
    config: Any = {"configurable": {"thread_id": "delta"}}
    seen: list[Any] = [driver.invoke({"log": [f"in{i}"]}, config) for i in range(5)]
    driver.update(config, {"log": ["patched"]}, "two")
    history = driver.history(config)
    seen += [[_shape(state) for state in history]]
    seen += [driver.invoke({"log": ["forked"]}, history[len(history) // 2].config)]
    seen += [[_shape(state) for state in driver.history(config)]]
    return seen


PROGRAMS = {"chat": (chat_graph, chat_program), "delta": (delta_graph, delta_program)}
ALL_PROGRAMS = PROGRAMS | {
    "failing": (more.failing_graph, more.failing_program),
    "asking": (more.asking_graph, more.asking_program),
    "functional": (more.functional_graph, more.functional_program),
}


def _shape(state: Any) -> Any:
    """A snapshot without what is random or a time of day: ids and versions."""
    tasks = [
        (task.name, task.interrupts and [i.value for i in task.interrupts], task.result,
         None if task.state is None or isinstance(task.state, dict) else _shape(task.state))
        for task in state.tasks
    ]  # fmt: skip
    metadata = {
        k: v
        for k, v in state.metadata.items()
        if k in ("source", "step", "user", "counters_since_delta_snapshot")
    }
    return (state.values, state.next, metadata, tasks)


def _plain(value: Any) -> str:
    """For comparison between runs: in the order of keys, without the ids that each run makes anew."""
    return re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{32}", "ID", pformat(value, width=10_000))


@cache
def _officially(name: str, durability: str, is_async: bool) -> list[str]:
    """What a program sees with LangGraph's own saver in memory."""
    build, program = ALL_PROGRAMS[name]
    run = asyncio.run if is_async else None
    return [_plain(seen) for seen in program(Driver(build(InMemorySaver()), run, durability))]


@clause("V1", "R2", "R8", "R10", "W2")
@pytest.mark.parametrize("storage", ["as it is", "slow"])
@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize("name", ALL_PROGRAMS)
def test_same_program_same_history(saver: Subject, name: str, durability: str, storage: str) -> None:
    build, program = ALL_PROGRAMS[name]
    run = saver.loop.run if saver.is_async else None
    tried = more.SlowSaver(saver.saver) if storage == "slow" else saver.saver
    got = program(Driver(build(tried), run, durability))
    expected = _officially(name, durability, saver.is_async)
    for number, (ours, official) in enumerate(zip(got, expected, strict=True)):
        assert _plain(ours) == official, number


@clause("F1")
@pytest.mark.parametrize("name", PROGRAMS)
def test_pruned_thread_goes_on_as_if_nothing_had_happened(saver: Subject, name: str) -> None:
    build, program = PROGRAMS[name]
    run = saver.loop.run if saver.is_async else None
    driver = Driver(build(saver.saver), run, "sync")
    program(driver)
    config: Any = {"configurable": {"thread_id": name}}
    saver.call("copy_thread", name, "copy")
    before = _shape(driver.state(config))
    saver.call("prune", [name])
    after = _shape(driver.state(config))
    assert _plain(after) == _plain(before)
    value: Any = Command(resume="go on") if name == "chat" else {"log": ["more"]}
    copy: Any = {"configurable": {"thread_id": "copy"}}
    assert _plain(driver.invoke(value, config)) == _plain(driver.invoke(value, copy))


@clause("F1", "R9")
def test_run_that_is_rolled_back_leaves_what_was_before(saver: Subject) -> None:
    run = saver.loop.run if saver.is_async else None
    driver = Driver(delta_graph(saver.saver), run, "sync")
    config: Any = {"configurable": {"thread_id": "t"}}
    for name in ("first", "second"):
        before = saver.ids({"configurable": {"thread_id": "t"}})
        driver.invoke({"log": [name]}, config | {"metadata": {"run_id": name}})
    saver.call("delete_for_runs", ["second"])
    assert saver.ids(config) == before
    assert driver.state(config).values["log"] == ["first", "one1", "two2"]

"""More programs of real graphs: what goes wrong and goes on, and who has a history of its own."""

from __future__ import annotations

import asyncio
import operator
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any, TypedDict

from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, RetryPolicy, interrupt

DELAY = 0.01
"""Seconds that each save of :class:`SlowSaver` takes longer."""


class Work(TypedDict, total=False):
    log: Annotated[list[str], operator.add]
    total: Annotated[int, operator.add]


class BrokenError(Exception):
    """What a node raises until it is mended."""


def failing_graph(saver: Any) -> Any:
    """Two nodes side by side, of which one fails at its first three attempts; then a fan-in."""
    attempts = {"fails": 0}
    worked = threading.Event()

    def fails(state: Work) -> Work:
        attempts["fails"] += 1
        if attempts["fails"] == 1:
            # LangGraph loses what a node did that ends while another one's failure ends the run. It takes it
            # after the node has returned, and with durability "exit" nothing outside shows when.
            worked.wait(60)
            time.sleep(0.1)
        if attempts["fails"] < 4:
            raise BrokenError(f"attempt {attempts['fails']}")
        return {"log": ["mended"], "total": 10}

    def works(state: Work) -> Work:
        attempts["works"] = attempts.get("works", 0) + 1
        worked.set()
        return {"log": [f"worked {attempts['works']}"], "total": 1}

    retry = RetryPolicy(max_attempts=2, initial_interval=0.001, jitter=False, retry_on=BrokenError)
    graph = StateGraph(Work).add_node("fails", fails, retry_policy=retry).add_node("works", works)
    graph = graph.add_node("join", lambda state: {"log": [f"joined {state['total']}"]})
    graph = graph.add_edge(START, "fails").add_edge(START, "works").add_edge(["fails", "works"], "join")
    return graph.add_edge("join", END).compile(checkpointer=saver)


def failing_program(driver: Any) -> list[Any]:
    """A run that fails is taken up again, without the work of the node that did not."""
    config: Any = {"configurable": {"thread_id": "failing"}}
    seen: list[Any] = []
    try:
        driver.invoke({"log": ["begin"]}, config)
    except BrokenError as error:
        seen.append(str(error))
    seen += [driver.shape(config), driver.invoke(None, config), driver.shape(config)]
    return [*seen, driver.shapes(config)]


def asking_graph(saver: Any) -> Any:
    """Two nodes side by side ask a question each, one of them inside a subgraph with its own history."""

    def ask(name: str) -> Any:
        return lambda state: {"log": [f"{name}: {interrupt(f'{name}?')}"]}

    inner = StateGraph(Work).add_node("count", lambda state: {"total": 1}).add_node("ask", ask("inner"))
    inner = inner.add_edge(START, "count").add_edge("count", "ask")
    graph = StateGraph(Work).add_node("left", ask("left")).add_node("sub", inner.compile(checkpointer=True))
    graph = graph.add_node("join", lambda state: Command(update={"log": ["joined"]}, goto=END))
    graph = graph.add_edge(START, "left").add_edge(START, "sub").add_edge(["left", "sub"], "join")
    return graph.compile(checkpointer=saver)


def asking_program(driver: Any) -> list[Any]:
    """Answered one after the other, by the questions' ids; then all again on the same thread."""
    config: Any = {"configurable": {"thread_id": "asking"}}
    seen: list[Any] = []
    for turn in ("first", "second"):
        driver.invoke({"log": [turn]}, config)
        seen.append(driver.shape(config))
        while questions := sorted(
            (question for job in driver.state(config).tasks for question in job.interrupts),
            key=lambda question: str(question.value),
        ):
            driver.invoke(Command(resume={questions[0].id: f"{turn} answer"}), config)
            seen.append(driver.shape(config))
    driver.update(config, {"log": ["patched"]}, "join")
    return [*seen, driver.shape(config), driver.shapes(config)]


def functional_graph(saver: Any) -> Any:
    """LangGraph's functional interface: tasks, a question, and what the run before has saved."""

    @task
    def double(number: int) -> int:
        return number * 2

    @entrypoint(checkpointer=saver)
    def flow(numbers: list[int], *, previous: Any = None) -> Any:
        doubled = [double(number) for number in numbers]
        total = sum(item.result() for item in doubled)
        extra = interrupt({"total": total})
        return entrypoint.final(value=total + extra, save=(previous or 0) + total + extra)

    return flow


def functional_program(driver: Any) -> list[Any]:
    """Two runs, each with a question."""
    config: Any = {"configurable": {"thread_id": "functional"}}
    seen: list[Any] = []
    for numbers in ([1, 2, 3], [10]):
        driver.invoke(numbers, config)
        seen += [driver.shape(config), driver.invoke(Command(resume=100), config), driver.shape(config)]
    return seen


class SlowSaver(BaseCheckpointSaver[Any]):
    """A saver on storage that takes its time: what races with a background save shows here."""

    def __init__(self, saver: BaseCheckpointSaver[Any]) -> None:
        super().__init__(serde=saver.serde)
        self.saver = saver

    def get_next_version(self, current: Any, channel: None) -> Any:
        return self.saver.get_next_version(current, channel)

    def put(self, *args: Any) -> Any:
        time.sleep(DELAY)
        return self.saver.put(*args)

    def put_writes(self, *args: Any) -> None:
        time.sleep(DELAY)
        self.saver.put_writes(*args)

    def get_tuple(self, config: Any) -> CheckpointTuple | None:
        return self.saver.get_tuple(config)

    def list(self, config: Any, **kwargs: Any) -> Iterator[CheckpointTuple]:
        return self.saver.list(config, **kwargs)

    def get_delta_channel_history(self, *, config: Any, channels: Sequence[str]) -> Any:
        return self.saver.get_delta_channel_history(config=config, channels=channels)

    async def aput(self, *args: Any) -> Any:
        await asyncio.sleep(DELAY)
        return await self.saver.aput(*args)

    async def aput_writes(self, *args: Any) -> None:
        await asyncio.sleep(DELAY)
        await self.saver.aput_writes(*args)

    async def aget_tuple(self, config: Any) -> CheckpointTuple | None:
        return await self.saver.aget_tuple(config)

    async def alist(self, config: Any, **kwargs: Any) -> AsyncIterator[CheckpointTuple]:
        async for found in self.saver.alist(config, **kwargs):
            yield found

    async def aget_delta_channel_history(self, *, config: Any, channels: Sequence[str]) -> Any:
        return await self.saver.aget_delta_channel_history(config=config, channels=channels)

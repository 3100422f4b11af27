"""A worker that takes jobs from a folder, and goes on in the middle of one after a crash.

Each file ``JOB.txt`` in the folder is a job: its numbers are added up, a line at a step. The sum is written
to ``JOB.out``, and the job is over. The thread of a job is its name, so a worker that is started again finds
the steps that were done in the database which ``PERSISTENCE_DSN`` names, and does not repeat them::

    python examples/worker.py inbox
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import StateSnapshot

import persistence


class Job(TypedDict):
    """How far a job is."""

    lines: list[str]
    done: int
    total: float


def add_line(state: Job) -> dict[str, Any]:
    """One step of the work."""
    return {"total": state["total"] + float(state["lines"][state["done"]]), "done": state["done"] + 1}


def build(checkpointer: Any) -> CompiledStateGraph[Any]:
    """A graph that repeats its step until all lines are done."""
    graph = StateGraph(Job)
    graph.add_node("add_line", add_line)
    for node in (START, "add_line"):
        graph.add_conditional_edges(
            node, lambda job: "add_line" if job["done"] < len(job["lines"]) else END, ["add_line", END]
        )
    return graph.compile(checkpointer=checkpointer)


def work(graph: CompiledStateGraph[Any], path: Path) -> StateSnapshot:
    """Do a job, or what is left of it."""
    lines = path.read_text().split()
    config: Any = {"configurable": {"thread_id": path.stem}, "recursion_limit": len(lines) + 10}
    state = graph.get_state(config)
    begun = state.created_at is not None
    print(f"{path.stem}: {state.values.get('done', 0)} of {len(lines)} lines are done already", flush=True)
    if not begun or state.tasks:  # "next" leaves out a task that had finished when the crash came
        # "sync": a step begins when the one before it is stored, so a crash repeats one step at most.
        graph.invoke(None if begun else Job(lines=lines, done=0, total=0), config, durability="sync")
    return graph.get_state(config)


def main(folder: Path) -> None:
    """Do every job of the folder that has no result yet."""
    with persistence.open() as db:
        if db.checkpointer is None:
            sys.exit("error: PERSISTENCE_ENABLE_CHECKPOINTING is off")
        graph = build(db.checkpointer)
        for path in sorted(folder.glob("*.txt")):
            result, unfinished = path.with_suffix(".out"), path.with_suffix(".part")
            if not result.exists():
                state = work(graph, path)
                unfinished.write_text(f"{state.values['total']}\n")
                unfinished.rename(result)
                db.checkpointer.delete_thread(path.stem)
                print(f"{path.stem}: done in {(state.metadata or {}).get('step')} steps", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

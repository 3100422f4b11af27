"""A conversation in a script: run it twice, and the second run goes on where the first one ended.

The lines work in a notebook just as well. The database is what ``PERSISTENCE_DSN`` names::

    PERSISTENCE_DSN=sqlite:///chat.db python examples/script.py
"""

from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.graph import START, MessagesState, StateGraph

import persistence


def reply(state: MessagesState) -> dict[str, list[tuple[str, str]]]:
    """Stand in for a language model."""
    return {"messages": [("ai", f"That was message {len(state['messages'])} of ours.")]}


builder = StateGraph(MessagesState)
builder.add_node("reply", reply)
builder.add_edge(START, "reply")
alice: RunnableConfig = {"configurable": {"thread_id": "alice"}}

with persistence.open() as db:
    graph = builder.compile(checkpointer=db.checkpointer)
    answer = graph.invoke({"messages": [HumanMessage("Hello")]}, alice)
    print(answer["messages"][-1].content)

    # Back in time: the conversation before this run, which the database has kept.
    earlier = [past for past in graph.get_state_history(alice) if past.next == ("__start__",)]
    print(f"{len(earlier)} runs so far; the last began with {len(earlier[0].values['messages'])} messages.")

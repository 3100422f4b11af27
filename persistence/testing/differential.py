"""Savers and the reference model, driven with the same calls: every answer is the same.

``FUZZ_EXAMPLES`` in the environment asks for that many examples, drawn anew in every run, of up to
``FUZZ_STEPS`` steps; without it a few examples are tried, always the same ones.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from copy import deepcopy
from typing import Any, ClassVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from persistence.testing import strategies as some
from persistence.testing.marks import clause
from persistence.testing.model import Model
from persistence.testing.subject import Subject

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))


def identical(left: Any, right: Any) -> bool:
    """Equal and of equal type, all the way down; 0.0 is not -0.0, and NaN is itself."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return struct.pack("d", left) == struct.pack("d", right) or (left != left and right != right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(identical(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(identical, left, right))
    if hasattr(left, "__dict__") and not isinstance(left, type):
        return bool(left == right) or identical(vars(left), vars(right))
    return bool(left == right) or repr(left) == repr(right)  # a NaN inside


def difference(left: Any, right: Any, path: str = "answer") -> str:
    """Where two answers differ first."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        parts = [(left[key], right[key], f"{path}[{key!r}]") for key in left]
    elif isinstance(left, (list, tuple)) and type(left) is type(right) and len(left) == len(right):
        parts = [(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(left, right, strict=True))]
    else:
        parts = []
    for a, b, at in parts:
        if not identical(a, b):
            return difference(a, b, at)
    return f"{path}\n  gave  {left!r}\n  model {right!r}"


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the type of its error."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - any error is an answer to be compared
        return type(error)


class Differential(RuleBasedStateMachine):
    """One step is one call of one method, on the model and on every saver."""

    subjects: ClassVar[dict[str, Subject]]
    steps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.given: list[Any] = []
        """Values the savers were given, to be changed and given again."""
        self.threads: set[str] = set()
        """All that were ever used."""

    def same(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Make a call everywhere, and compare."""
        type(self).steps += 1
        expected = outcome(lambda: getattr(self.model, name)(*args, **kwargs))
        for column, subject in self.subjects.items():
            answer = outcome(lambda s=subject: s.call(name, *args, **kwargs))  # type: ignore[misc]
            assert identical(answer, expected), (
                f"{column}: {name}(*{args!r}, **{kwargs!r}): {difference(answer, expected)}"
            )
            wreck(answer)  # V7
        self.threads.update(thread for thread, _, _ in (*self.model.rows, *self.model.writes))
        return expected

    @rule(config=some.CONFIGS, checkpoint=some.checkpoints(), metadata=some.METADATA)
    def put(self, config: Any, checkpoint: Any, metadata: Any) -> None:
        checkpoint, new = deepcopy(checkpoint)
        stored = self.same("put", config, checkpoint, metadata, new)
        if isinstance(stored, dict):
            self.given.append((config, checkpoint))
            self.same("get_tuple", stored)

    @precondition(lambda self: self.given)
    @rule(data=st.data(), id_=some.CHECKPOINTS, metadata=some.METADATA)
    def put_successor(self, data: st.DataObject, id_: Any, metadata: Any) -> None:
        """As LangGraph does: the parent's versions, and a few new ones; values change in place."""
        config, before = data.draw(st.sampled_from(self.given))
        for value in before.get("channel_values", {}).values():
            change(value)
        changed = data.draw(st.dictionaries(some.CHANNELS, some.CHANNEL_VALUES, max_size=2))
        new = {channel: f"{channel}.{type(self).steps}" for channel in changed}
        checkpoint = before | {"id": id_}
        checkpoint["channel_values"] = before.get("channel_values", {}) | changed
        checkpoint["channel_versions"] = before.get("channel_versions", {}) | new
        config = {"configurable": {**config["configurable"], "checkpoint_id": before["id"]}}
        stored = self.same("put", config, checkpoint, metadata, new)
        if isinstance(stored, dict):
            self.given.append((config, checkpoint))

    @rule(config=some.configs(exact=True), writes=some.WRITES, task=some.TASK_IDS, path=some.PATHS)
    def put_writes(self, config: Any, writes: Any, task: Any, path: Any) -> None:
        self.same("put_writes", config, writes, task, path)

    @rule(config=some.CONFIGS)
    def get_tuple(self, config: Any) -> None:
        self.same("get_tuple", config)

    @rule(config=some.LISTINGS, wanted=some.FILTERS, before=some.BEFORES, limit=some.LIMITS)
    def listing(self, config: Any, wanted: Any, before: Any, limit: Any) -> None:
        self.same("list", config, filter=wanted, before=before, limit=limit)

    @rule(config=some.CONFIGS, channels=st.lists(some.CHANNELS, max_size=3) | st.just("dx"))
    def history(self, config: Any, channels: Any) -> None:
        self.same("get_delta_channel_history", config=config, channels=channels)

    @rule(thread=some.THREADS)
    def delete_thread(self, thread: Any) -> None:
        self.same("delete_thread", thread)

    @rule(
        threads=st.lists(some.THREADS, max_size=3) | st.just("t"),
        strategy=st.sampled_from(["keep_latest"] * 4 + ["delete", "half"]),
    )
    def prune(self, threads: Any, strategy: str) -> None:
        self.same("prune", threads, strategy=strategy)
        self.everything()

    @rule(runs=st.lists(some.RUNS, max_size=2) | st.just("r"))
    def delete_for_runs(self, runs: Any) -> None:
        self.same("delete_for_runs", runs)
        self.everything()

    @rule(source=some.THREADS, to=some.THREADS | st.sampled_from(["v", "w"]))
    def copy_thread(self, source: Any, to: Any) -> None:
        self.same("copy_thread", source, to)

    @rule()
    def everything(self) -> None:
        self.same("list", None)

    def teardown(self) -> None:
        """What is left is the same; then nothing is left, for the next example."""
        self.everything()
        for thread in sorted(self.threads):
            self.same("delete_thread", thread)
        self.everything()


def wreck(answer: Any) -> None:
    """Change what a saver returned: it is the caller's."""
    for found in answer if isinstance(answer, list) else [answer]:
        if isinstance(found, tuple):
            for value in found[1].get("channel_values", {}).values():
                change(value)
            found[1].clear()
            found[2].clear()


def change(value: Any) -> None:
    """Change a value in place, where it can be."""
    if isinstance(value, dict):
        value["changed"] = True
    elif isinstance(value, list):
        value.append("changed")
    elif isinstance(value, bytearray):
        value += b"!"


ALL = (
    *("V1", "V2", "V3", "V4", "V5", "V6", "V7", "W1", "W2", "W4", "W5"),
    *("R1", "R2", "R3", "R4", "R5", "R8", "R9", "R10", "F1", "F8"),
)
"""The clauses that the model holds a saver to."""


def drive(subjects: dict[str, Subject]) -> None:
    """Drive savers on empty databases, by their names in a report, and the model with the same calls.

    Raises:
        AssertionError: One of them answered differently; with the call, and where the answers differ.
    """

    class Machine(Differential):
        pass

    Machine.subjects = subjects
    profile = settings(
        max_examples=EXAMPLES or 20,
        stateful_step_count=int(os.environ.get("FUZZ_STEPS", "40")),
        derandomize=not EXAMPLES,
        deadline=None,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.filter_too_much,
        ],
        # Shrinking takes minutes, as each try drives all savers; the first difference says enough.
        phases=(Phase.explicit, Phase.reuse, Phase.generate),
    )
    try:
        run_state_machine_as_test(Machine, settings=profile)
    finally:
        print(f"\n{Machine.steps} steps on {', '.join(subjects)}")  # noqa: T201 - what make fuzz is asked
    assert Machine.steps


@clause(*ALL)
def test_saver_and_the_model_agree(saver: Subject) -> None:
    drive({f"{saver.target.backend}-{saver.target.colour}": saver})

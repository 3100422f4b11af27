"""Savers and the reference model, driven with the same calls: every answer is the same.

``FUZZ_EXAMPLES`` in the environment asks for that many examples, drawn anew in every run, of up to
``FUZZ_STEPS`` steps; without it a few examples are tried, always the same ones.
"""

from __future__ import annotations

import os
from collections import Counter
from copy import deepcopy
from typing import Any, ClassVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from persistence.testing import strategies as some
from persistence.testing.marks import clause, tries
from persistence.testing.model import Model
from persistence.testing.replay import Script, change, difference, identical, outcome, tuples, wreck
from persistence.testing.subject import Subject, at

EXAMPLES = 20
MORE_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))


class Differential(RuleBasedStateMachine):
    """One step is one call of one method, on the model and on every saver."""

    subjects: ClassVar[dict[str, Subject]]
    script: ClassVar[Script]
    answers: ClassVar[Counter[tuple[str, str]]]
    """Steps so far, by method and whether the call was answered or refused."""
    found: ClassVar[int]
    """Checkpoints that were read and compared."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.given: list[Any] = []
        """Values the savers were given, to be changed and given again."""
        for subject in self.subjects.values():
            self.script.undo(subject)  # what the example before has left
        type(self).script = Script()

    def same(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Make a call everywhere, and compare."""
        call = self.script.add(name, args, kwargs)
        expected = outcome(self.model, call)
        type(self).answers[name, "refused" if isinstance(expected, type) else "answered"] += 1
        type(self).found += len(tuples(expected))
        for column, subject in self.subjects.items():
            answer = outcome(subject, call)
            if not identical(answer, expected):
                raise AssertionError(self.script.report(column, subject, difference(answer, expected)))
            wreck(answer)  # V7
        return expected

    def known(self, data: st.DataObject, other: st.SearchStrategy[Any]) -> Any:
        """A config that names a stored checkpoint, three times in four."""
        places = sorted(self.model.rows)
        if not places or not data.draw(st.integers(0, 3)):
            return data.draw(other)
        return at(*(data.draw(st.sampled_from(places))[part] for part in (0, 2, 1)))

    @initialize(puts=st.lists(some.PUTS, min_size=1, max_size=4))
    def begin(self, puts: Any) -> None:
        """So that the rules meet something."""
        for config, given, metadata in puts:
            self.put(config, given, metadata)

    def put(self, config: Any, given: Any, metadata: Any) -> None:
        checkpoint, new = deepcopy(given)
        stored = self.same("put", config, checkpoint, metadata, new)
        if isinstance(stored, dict):
            self.given.append((config, checkpoint))
            self.same("get_tuple", stored)

    @rule(data=st.data(), given=some.checkpoints(), metadata=some.METADATA)
    def put_anything(self, data: st.DataObject, given: Any, metadata: Any) -> None:
        self.put(self.known(data, some.CONFIGS), given, metadata)

    @precondition(lambda self: self.given)
    @rule(data=st.data(), id_=some.CHECKPOINTS, metadata=some.METADATA)
    def put_successor(self, data: st.DataObject, id_: Any, metadata: Any) -> None:
        """As LangGraph does: the parent's versions, and a few new ones; values change in place."""
        config, before = data.draw(st.sampled_from(self.given))
        for value in before.get("channel_values", {}).values():
            change(value)
        changed = data.draw(st.dictionaries(some.CHANNELS, some.CHANNEL_VALUES, max_size=2))
        new = {channel: f"{channel}.{len(self.script.calls)}" for channel in changed}
        checkpoint = before | {"id": id_}
        checkpoint["channel_values"] = before.get("channel_values", {}) | changed
        checkpoint["channel_versions"] = before.get("channel_versions", {}) | new
        config = {"configurable": {**config["configurable"], "checkpoint_id": before["id"]}}
        stored = self.same("put", config, checkpoint, metadata, new)
        if isinstance(stored, dict):
            self.given.append((config, checkpoint))
            self.same("get_tuple", stored)

    @rule(data=st.data(), writes=some.WRITES, task=some.TASK_IDS, path=some.PATHS)
    def put_writes(self, data: st.DataObject, writes: Any, task: Any, path: Any) -> None:
        config = self.known(data, some.configs(exact=True))
        self.same("put_writes", config, writes, task, path)
        self.same("get_tuple", config)

    @rule(data=st.data())
    def get_tuple(self, data: st.DataObject) -> None:
        self.same("get_tuple", self.known(data, some.CONFIGS))

    @rule(data=st.data(), wanted=some.FILTERS, limit=some.LIMITS)
    def listing(self, data: st.DataObject, wanted: Any, limit: Any) -> None:
        config, before = data.draw(some.LISTINGS), self.known(data, some.BEFORES)
        self.same("list", config, filter=wanted, before=before, limit=limit)

    @rule(data=st.data(), channels=some.mostly(st.lists(some.CHANNELS, max_size=3), st.just("dx")))
    def history(self, data: st.DataObject, channels: Any) -> None:
        config = self.known(data, some.CONFIGS)
        self.same("get_delta_channel_history", config=config, channels=channels)

    @rule(thread=some.THREADS)
    def delete_thread(self, thread: Any) -> None:
        self.same("delete_thread", thread)

    @rule(
        threads=some.mostly(st.lists(some.THREADS, max_size=2), st.just("t")),
        strategy=st.sampled_from(["keep_latest"] * 12 + ["delete", "half"]),
    )
    def prune(self, threads: Any, strategy: str) -> None:
        self.same("prune", threads, strategy=strategy)
        self.everything()

    @rule(runs=some.mostly(st.lists(some.RUNS, max_size=2), st.just("r")))
    def delete_for_runs(self, runs: Any) -> None:
        self.same("delete_for_runs", runs)
        self.everything()

    @rule(source=some.THREADS, to=some.THREADS | st.sampled_from(["v", "w"]))
    def copy_thread(self, source: Any, to: Any) -> None:
        self.same("copy_thread", source, to)

    def everything(self) -> None:
        self.same("list", None)

    def teardown(self) -> None:
        """What is left is the same; and nothing is left of what is deleted."""
        self.everything()
        for thread in sorted({place[0] for place in (*self.model.rows, *self.model.writes)}):
            self.same("delete_thread", thread)
        self.everything()


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
    Machine.script = Script()
    Machine.answers = Counter()
    Machine.found = 0
    profile = settings(
        max_examples=MORE_EXAMPLES or EXAMPLES,
        stateful_step_count=int(os.environ.get("FUZZ_STEPS", "40")),
        derandomize=not MORE_EXAMPLES,
        deadline=None,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.filter_too_much,
        ],
        phases=(Phase.explicit, Phase.reuse, Phase.generate),  # the script shrinks itself, faster
    )
    try:
        run_state_machine_as_test(Machine, settings=profile)
    finally:
        counts = ", ".join(f"{name} {how}: {n}" for (name, how), n in sorted(Machine.answers.items()))
        where = f"on {', '.join(subjects)}; {Machine.found} checkpoints compared"
        print(f"\n{Machine.answers.total()} steps {where} ({counts})")  # noqa: T201 - what make fuzz is asked
    assert Machine.answers


@clause(*ALL)
@tries(EXAMPLES)
def test_saver_and_the_model_agree(saver: Subject) -> None:
    drive({f"{saver.target.backend}-{saver.target.colour}": saver})

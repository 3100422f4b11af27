"""All six savers and the reference model, driven with the same calls: every answer is the same.

``make fuzz`` runs the long profile: ``FUZZ_EXAMPLES`` examples of up to ``FUZZ_STEPS`` steps.
"""

from __future__ import annotations

import os
import sqlite3
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from psycopg import sql

import persistence
from persistence.settings import Settings
from tests.conftest import _query_form
from tests.contract import strategies as some
from tests.contract.model import Model
from tests.contract.subject import LoopThread, Subject, Target

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
SCHEMAS = ("public", "other")
TABLES = ("checkpoints", "checkpoint_blobs", "checkpoint_writes")


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


class Savers:
    """The six savers, opened once; emptied from outside."""

    def __init__(self, postgres: str, folder: Path, loop: LoopThread, stack: ExitStack) -> None:
        self._loop = loop
        self._stack = stack
        self._conn = stack.enter_context(psycopg.connect(postgres, autocommit=True))
        self._conn.execute("SET synchronous_commit = off")
        self._conn.execute("CREATE SCHEMA IF NOT EXISTS other")
        dsn = "postgresql://" + _query_form(postgres) + "&options=-c%20synchronous_commit%3Doff"
        self._files = [folder / "sync.db", folder / "async.db"]
        self._memory = {colour: self._open("memory", colour, "memory://") for colour in ("sync", "async")}
        self._others = {}
        for colour, file, schema in zip(("sync", "async"), self._files, SCHEMAS, strict=True):
            url = f"sqlite:///{file}?synchronous=off"
            self._others["sqlite", colour] = self._open("sqlite", colour, url)
            url = f"{dsn}&schema={schema}"
            self._others["postgres", colour] = self._open("postgres", colour, url)

    def _open(self, backend: str, colour: str, dsn: str) -> Subject:
        if colour == "sync":  # makes the tables
            persistence.open(dsn, settings=Settings()).close()
        subject = Subject(Target(backend, colour, dsn), Settings(), self._loop)
        self._stack.callback(subject.close)
        return subject

    def emptied(self) -> dict[str, Subject]:
        """All six, with nothing stored."""
        tables = [sql.Identifier(schema, table) for schema in SCHEMAS for table in TABLES]
        for table in tables:
            self._conn.execute(sql.SQL("DELETE FROM {}").format(table))
        for file in self._files:
            with closing(sqlite3.connect(file, isolation_level=None)) as conn:
                conn.execute("DELETE FROM checkpoints")
                conn.execute("DELETE FROM writes")
        for saver in self._memory.values():
            saver.saver._memory.threads.clear()  # type: ignore[attr-defined]
        subjects = {f"memory-{colour}": saver for colour, saver in self._memory.items()}
        return subjects | {"-".join(column): saver for column, saver in self._others.items()}


@pytest.fixture(scope="module")
def savers(
    contract_postgres: str, tmp_path_factory: pytest.TempPathFactory, loop_thread: LoopThread
) -> Iterator[Savers]:
    with ExitStack() as stack:
        yield Savers(contract_postgres, tmp_path_factory.mktemp("differential"), loop_thread, stack)


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the type of its error."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - any error is an answer to be compared
        return type(error)


class Differential(RuleBasedStateMachine):
    """One step is one call of one method, on the model and on every saver."""

    opened: ClassVar[Savers]
    steps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.subjects = self.opened.emptied()
        self.given: list[Any] = []
        """Values the savers were given, to be changed and given again."""

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


@pytest.mark.clause("V1", "V2", "V3", "V4", "V5", "V6", "V7", "W1", "W2", "W4", "W5")
@pytest.mark.clause("R1", "R2", "R3", "R4", "R5", "R8", "R9", "R10", "F1", "F8")
def test_six_savers_and_the_model_agree(savers: Savers) -> None:
    Differential.opened = savers
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    profile = settings(
        max_examples=EXAMPLES or 20,
        stateful_step_count=int(os.environ.get("FUZZ_STEPS", "40")),
        derandomize=not EXAMPLES,
        deadline=None,
        suppress_health_check=checks,
        # Shrinking takes minutes, as each try drives six savers; the first difference says enough.
        phases=(Phase.explicit, Phase.reuse, Phase.generate),
    )
    try:
        run_state_machine_as_test(Differential, settings=profile)
    finally:
        print(f"\n{Differential.steps} steps on {len(savers.emptied())} savers and the model")  # noqa: T201 - what make fuzz is asked
    assert Differential.steps

"""Calls as data: made again, compared, made fewer, and shown as a plain test."""

from __future__ import annotations

import struct
import time
from copy import deepcopy
from pprint import pformat
from typing import Any, NamedTuple

from langgraph.checkpoint.base import CheckpointTuple

from persistence.testing.model import Model
from persistence.testing.subject import Subject

PATIENCE = 60.0
"""Seconds that are spent on making a failing script shorter."""


class Call(NamedTuple):
    """One call of a saver's method."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def outcome(saver: Subject | Model, call: Call) -> Any:
    """What a call returns, or the type of its error."""
    name, args, kwargs = call
    try:
        if isinstance(saver, Subject):
            return saver.call(name, *args, **kwargs)
        return getattr(saver, name)(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - any error is an answer to be compared
        return type(error)


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


def tuples(answer: Any) -> list[CheckpointTuple]:
    """The checkpoints in an answer."""
    answers = answer if isinstance(answer, list) else [answer]
    return [found for found in answers if isinstance(found, CheckpointTuple)]


def wreck(answer: Any) -> None:
    """Change what a saver returned: it is the caller's."""
    for found in tuples(answer):
        values = (found.checkpoint.get("channel_values") or {}).values()
        for value in (*values, *found.metadata.values(), *(write[2] for write in found.pending_writes or ())):
            change(value)
        parts: list[Any] = [found.checkpoint, found.metadata, found.config, found.parent_config or {}]
        for part in parts:
            part.clear()


def change(value: Any) -> None:
    """Change a value in place, where it can be."""
    if isinstance(value, dict):
        value["changed"] = True
    elif isinstance(value, list):
        value.append("changed")
    elif isinstance(value, bytearray):
        value += b"!"


class Script:
    """The calls of one example, in order, as they were when they were made."""

    def __init__(self, calls: list[Call] | None = None, threads: set[str] | None = None) -> None:
        self.calls = calls or []
        self.threads = threads or set()
        """All that were ever named: writes may be left of one that no listing shows."""

    def add(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Note a call, and return it; the note is safe from what becomes of its arguments."""
        self.calls.append(Call(name, *deepcopy((args, kwargs))))
        for place in (*args[:2], kwargs.get("config")):
            thread = place.get("configurable", {}).get("thread_id") if isinstance(place, dict) else place
            self.threads.add(str(thread))
        return Call(name, args, kwargs)

    def undo(self, subject: Subject) -> None:
        """Leave nothing of what the calls have stored."""
        for thread in self.threads:
            outcome(subject, Call("delete_thread", (thread,), {}))  # a bad name is refused
        assert subject.list() == []

    def difference(self, subject: Subject) -> str:
        """Make the calls again on an emptied saver and a new model; where they differ first, or nothing."""
        model = Model()
        self.undo(subject)
        for call in self.calls:
            answer, expected = (outcome(saver, deepcopy(call)) for saver in (subject, model))
            if not identical(answer, expected):
                return difference(answer, expected)
        return ""

    def shrunk(self, subject: Subject) -> Script:
        """A script as short as is found in the time, after which the saver still differs."""
        end, calls, size = time.monotonic() + PATIENCE, self.calls, len(self.calls) // 2
        while size and time.monotonic() < end:
            at = 0
            while at < len(calls) and time.monotonic() < end:
                fewer = Script(calls[:at] + calls[at + size :], self.threads)
                if fewer.difference(subject):
                    calls = fewer.calls
                else:
                    at += size
            size //= 2
        return Script(calls, self.threads)

    def report(self, column: str, subject: Subject, first: str) -> str:
        """The difference, and a plain test that shows it."""
        if not self.difference(subject):
            return f"{column}: {first}\n(not seen when the calls were made again)\n{self.as_test()}"
        short = self.shrunk(subject)
        return f"{column}: {short.difference(subject)}\n{short.as_test()}"

    def as_test(self) -> str:
        """Python for the suite; what the last call must give is for the reader to say."""
        lines = []
        for name, args, kwargs in self.calls:
            given = [pformat(arg, sort_dicts=False) for arg in args]
            given += [f"{key}={pformat(value, sort_dicts=False)}" for key, value in kwargs.items()]
            lines.append(f"    saver.call({', '.join([repr(name), *given])})")
        return "\n".join(["def test_found_by_the_machine(saver: Subject) -> None:", *lines])

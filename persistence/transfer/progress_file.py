"""Where a comparison that was interrupted goes on: a small file, replaced as a whole each time."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from persistence.errors import SourceError
from persistence.transfer.difference import Verdict
from persistence.transfer.records import Source

_FORMAT = "langgraph-persistence verification 1"


class SideState(msgspec.Struct, forbid_unknown_fields=True):
    """What one side was when the file was written."""

    label: str
    identity: str
    marks: list[int]


class State(msgspec.Struct, forbid_unknown_fields=True):
    """How far a comparison has come.

    Attributes:
        format: What kind of file this is.
        asked: What was to be compared, as text: another question needs another file.
        after: The last thread that was compared.
        sides: Both sides.
        verdict: What was found until then.
    """

    format: str
    asked: str
    after: str
    sides: tuple[SideState, SideState]
    verdict: Verdict


class ProgressFile:
    """The file that ``--resume`` names."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._marks: list[list[int]] = [[], []]
        self._after: str | None = None

    def begun(self) -> State | None:
        """What an earlier run has left.

        Raises:
            SourceError: It is another file.
        """
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SourceError(f"cannot read {self._path}: {error.strerror}") from None
        try:
            state = msgspec.json.decode(data, type=State)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise SourceError(f"{self._path} does not hold the progress of a comparison: {error}") from None
        if state.format != _FORMAT:
            raise SourceError(f"{self._path} is of another version of this package")
        return state

    def resume(self, state: State, asked: str, sides: tuple[Source, Source]) -> Verdict:
        """The verdict so far, if the sides are still what they were.

        Raises:
            SourceError: Something else was compared, or what was compared has changed.
        """
        if state.asked != asked:
            raise self._refusal("is of a comparison with other options")
        for source, then in zip(sides, state.sides, strict=True):
            if source.identity != then.identity:
                raise self._refusal(
                    f"is of a comparison with another database or archive than {source.label}"
                )
            if source.marks(None, state.after) != then.marks:
                raise self._refusal(
                    f"is out of date: threads of {source.label} that were compared have changed"
                )
        self._after = state.after
        self._marks = [list(side.marks) for side in state.sides]
        return state.verdict

    def save(self, asked: str, sides: tuple[Source, Source], verdict: Verdict, upto: str) -> None:
        """Note that all threads up to one were compared.

        Raises:
            SourceError: The file cannot be written.
        """
        for number, source in enumerate(sides):
            new = source.marks(self._after, upto)
            old = self._marks[number] or [0] * len(new)
            self._marks[number] = [a + b for a, b in zip(old, new, strict=True)]
        self._after = upto
        states = [
            SideState(source.label, source.identity, marks)
            for source, marks in zip(sides, self._marks, strict=True)
        ]
        self._write(State(_FORMAT, asked, upto, (states[0], states[1]), verdict))

    def done(self) -> None:
        """The comparison is complete: nothing is left to resume."""
        self._path.unlink(missing_ok=True)

    def _write(self, state: State) -> None:
        temporary = self._path.with_name(f"{self._path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(state)) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        except OSError as error:
            raise SourceError(f"cannot write {self._path}: {error.strerror}") from None

    def _refusal(self, why: str) -> SourceError:
        return SourceError(
            f"{self._path} {why}", hint="delete it, or name another file, to compare from the beginning"
        )

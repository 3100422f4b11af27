"""Which parts of a source a run follows: its threads, its store, or both. The ledger knows of each run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, cast

from persistence.errors import ConflictError
from persistence.transfer.options import THREADS, Options, Part

if TYPE_CHECKING:
    from persistence.transfer.ledger import Run

_NO_VECTORS = "left out"


def parts_of(run: Run) -> Options:
    """What a run follows; one that says nothing, as those of earlier versions, its threads."""
    named = run.options.get("include")
    include = tuple(cast(Part, part) for part in named.split()) if named else THREADS
    return Options(include=include, vectors=run.options.get("vectors") != _NO_VECTORS)


def run_options(options: Options) -> Mapping[str, str]:
    """What a new run's options say about it."""
    if "store" not in options.include:
        return {}
    note = {"include": " ".join(sorted(set(options.include)))}
    return note if options.vectors else note | {"vectors": _NO_VECTORS}


def require_same(run: Run, include: Collection[Part] | None, *, vectors: bool, target: str) -> None:
    """Raise where other parts are asked for than the run follows.

    Raises:
        ConflictError: It would have to begin anew.
    """
    mine = parts_of(run)
    others = include is not None and set(include) != set(mine.include)
    if others or ("store" in mine.include and mine.vectors and not vectors):
        what = " and ".join({"checkpoints": "threads", "store": "store"}[part] for part in mine.include)
        without = "" if mine.vectors else " without vectors"
        raise ConflictError(
            f"run {run.run_id} into {target} follows the {what}{without} of this source, not what is asked"
            " for",
            hint="leave the option out to go on with it, or begin anew after"
            f" `persistence undo {run.run_id}`",
        )

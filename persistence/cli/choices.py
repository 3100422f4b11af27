"""The options of ``migrate``, ``export``, ``import`` and ``verify`` that say what takes part."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer

from persistence.options import MAX_WORKERS

if TYPE_CHECKING:
    from persistence.transfer import Selection

Threads = Annotated[
    list[str] | None,
    typer.Option("--thread", metavar="ID", help="Only this thread; may be given repeatedly."),
]
Match = Annotated[
    list[str] | None,
    typer.Option(
        "--match", metavar="PATTERN", help="Only threads whose id matches, as in 'user-*'; repeatable."
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="KEY=VALUE",
        help="Only threads with a checkpoint that has this metadata, such as user_id=alice; repeatable.",
    ),
]
NewerThan = Annotated[
    str | None,
    typer.Option(
        "--newer-than", metavar="WHEN", help="Only threads used since: an age such as 30d or 12h, or a date."
    ),
]
OlderThan = Annotated[
    str | None,
    typer.Option("--older-than", metavar="WHEN", help="Only threads not used since: an age or a date."),
]

OnConflict = Annotated[
    Literal["error", "skip", "replace", "merge"],
    typer.Option(
        "--on-conflict",
        metavar="error|skip|replace|merge",
        help="What to do about threads and items that TARGET has already."
        " What is replaced is gone: undo does not bring it back.",
    ),
]
OnReject = Annotated[
    Literal["stop", "set-aside"],
    typer.Option(
        "--on-reject",
        metavar="stop|set-aside",
        help="Rows that cannot be moved: refuse, or move the others and end with exit code 6.",
    ),
]
MaxMbps = Annotated[
    float | None,
    typer.Option(
        "--max-mbps",
        metavar="MBPS",
        min=0.001,
        help="Write at most so many megabytes in a second, for a busy TARGET.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        min=1,
        max=MAX_WORKERS,
        help="Processes that read and write at once; not given, the settings decide.",
    ),
]

AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle", help="Take rows that are pickled. Reading them from SQLite runs the code they name."
    ),
]
Decrypt = Annotated[bool, typer.Option("--decrypt", help="Write values that were encrypted as plaintext.")]


class Part(StrEnum):
    """What ``--include`` names."""

    CHECKPOINTS = "checkpoints"
    STORE = "store"


Include = Annotated[
    list[Part] | None,
    typer.Option(
        "--include",
        help="What takes part: the threads (checkpoints), the items of the store, or both; repeatable."
        " Default: checkpoints.",
    ),
]
WithoutVectors = Annotated[
    bool,
    typer.Option("--without-vectors", help="Leave out the embeddings of the store's items."),
]

_AGE = re.compile(r"(\d+)([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def selection(
    threads: list[str] | None,
    match: list[str] | None,
    where: list[str] | None,
    newer_than: str | None,
    older_than: str | None,
) -> Selection:
    """What the options select."""
    from persistence.transfer import Selection

    return Selection(
        threads=tuple(threads or ()),
        match=tuple(match or ()),
        where=dict(map(_condition, where or ())),
        newer_than=_moment("--newer-than", newer_than),
        older_than=_moment("--older-than", older_than),
    )


def parts(include: list[Part] | None, select: Selection) -> tuple[Literal["checkpoints", "store"], ...]:
    """What takes part."""
    from persistence.transfer.options import THREADS

    if include and Part.CHECKPOINTS not in include and not select.everything:
        raise typer.BadParameter(
            "threads are selected, but not included; add --include checkpoints", param_hint="--include"
        )
    return tuple(part.value for part in include) if include else THREADS


def _condition(text: str) -> tuple[str, Any]:
    """``key=value``; the value is JSON, or the text itself where it is none."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise typer.BadParameter(f"{text!r} is not of the form KEY=VALUE", param_hint="--where")
    try:
        return key, msgspec.json.decode(value)
    except msgspec.MsgspecError:
        return key, value


def _moment(option: str, text: str | None) -> datetime | None:
    """An age before now, or a date and time; UTC where no zone is named."""
    if text is None:
        return None
    if age := _AGE.fullmatch(text):
        try:
            return datetime.now(UTC) - timedelta(**{_UNITS[age[2]]: int(age[1])})
        except OverflowError:
            raise typer.BadParameter(
                f"{text!r} is longer ago than dates go back", param_hint=option
            ) from None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither an age (30d, 12h) nor a date (2026-01-31 or 2026-01-31T12:00+01:00)",
            param_hint=option,
        ) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)

"""What the two sides of a transfer may be called by."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from persistence.dsn import Dsn
from persistence.registry import provider_for
from persistence.transfer.archive import ArchiveSource
from persistence.transfer.records import Source

if TYPE_CHECKING:
    from persistence.settings import Settings

Side = str | Dsn | Path
"""A DSN, or the path of an archive or of a SQLite file."""


def as_path(side: Side) -> str | Dsn | Path:
    """The same; a text with neither ``://`` nor ``=`` is a path."""
    if isinstance(side, str) and "://" not in side and "=" not in side:
        return Path(side)
    return side


def open_source(side: Side, settings: Settings | None) -> AbstractContextManager[Source]:
    """What a DSN or a path names, to read from."""
    side = as_path(side)
    if isinstance(side, Path):
        # A folder that is not a SQLite file can only be meant as an archive.
        if os.path.isdir(side):  # noqa: PTH112 - False where it may not look; the source says why
            return ArchiveSource(side)
        path = str(side)
        side = Dsn("sqlite", path, "", {}, f"sqlite:///{quote(path)}")
    return provider_for(side, settings).source()

"""What the two sides of a transfer may be called by."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard
from urllib.parse import quote

from persistence.dsn import Dsn
from persistence.errors import DsnError, TransferError, UnsupportedError
from persistence.registry import provider_for
from persistence.settings import get_settings
from persistence.transfer.archive import ArchiveSource
from persistence.transfer.records import Source

if TYPE_CHECKING:
    from persistence.contract import Provider
    from persistence.settings import Settings
    from persistence.transfer.live import LiveSource
    from persistence.transfer.options import Options

Side = str | Dsn | Path
"""A DSN, or the path of an archive or of a SQLite file."""


def as_path(side: Side) -> str | Dsn | Path:
    """The same; a text with neither ``://`` nor ``=`` is a path."""
    if isinstance(side, str) and "://" not in side and "=" not in side:
        return Path(side)
    return side


def open_target(target: str | Dsn, settings: Settings | None, options: Options) -> Provider:
    """The provider of a database that is written to."""
    if options.decrypt:
        settings = (settings or get_settings()).without_encryption()
    return provider_for(target, settings)


def require_decrypt(settings: Settings | None, options: Options) -> None:
    """An archive holds plaintext, which values that are encrypted become only if somebody says so.

    Raises:
        TransferError: There is a key, and nobody did.
    """
    if (settings or get_settings()).resolve_encryption_key() and not options.decrypt:
        raise TransferError(
            "an encryption key is set, and an archive would hold the values in plaintext",
            hint="--decrypt makes such an archive; a move without one encrypts the values again",
        )


def open_source(
    side: Side, settings: Settings | None, *, allow_pickle: bool = False
) -> AbstractContextManager[Source]:
    """What a DSN or a path names, to read from."""
    side = as_path(side)
    if _is_archive(side):
        return ArchiveSource(side, allow_pickle=allow_pickle)
    return provider_of(side, settings).source(allow_pickle=allow_pickle)


def open_live(side: Side, settings: Settings | None) -> AbstractContextManager[LiveSource]:
    """What a DSN or a path names, to follow.

    Raises:
        UnsupportedError: It is nothing that goes on changing.
    """
    side = as_path(side)
    if _is_archive(side):
        raise UnsupportedError(
            f"an archive cannot be followed, as it does not change: {side}",
            hint="read it with `persistence import`",
        )
    return provider_of(side, settings).live()


def workers_of(settings: Settings | None, *sides: Side) -> int | None:
    """How many workers the settings ask for, those of the first database that says so."""
    databases = (side for side in sides if not _is_archive(as_path(side)))
    asked = (provider_of(side, settings).settings.transfer_workers for side in databases)
    return next(filter(None, asked), None)


def _is_archive(side: str | Dsn | Path) -> TypeGuard[Path]:
    """A folder that is not a SQLite file can only be meant as an archive."""
    return isinstance(side, Path) and os.path.isdir(side)  # noqa: PTH112 - False where it may not look


def provider_of(side: Side, settings: Settings | None) -> Provider:
    """The provider of a DSN, or of the SQLite file that a path names."""
    side = as_path(side)
    if isinstance(side, Path):
        path = str(side)
        if any("\ud800" <= char <= "\udfff" for char in path):
            raise DsnError(f"the name of a file is no valid text: {path!r}")
        side = Dsn("sqlite", path, "", {}, f"sqlite:///{quote(path)}")
    return provider_for(side, settings)

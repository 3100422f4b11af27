"""What a sealed database says to whoever writes to it, on every backend."""

from __future__ import annotations

from persistence.errors import SealedError

MOVED = "this database has moved"
"""How the message of a refused write begins."""


def moved_to(target: str) -> str:
    """The whole message; ``target`` holds no secret."""
    return f"{MOVED} to {target}; `persistence unseal` lets it be written again"


def sealed(message: str | None = None) -> SealedError:
    """Our error, with what a refused write was told."""
    return SealedError(message, hint="use the DSN of the database that it has moved to")

"""The ``persistence`` console command."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the process's exit code."""
    from persistence.cli import app

    return app.run(sys.argv[1:] if argv is None else list(argv))

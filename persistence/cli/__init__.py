"""The ``persistence`` console command."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the process's exit code."""
    from persistence.cli import app

    atexit.register(gc.freeze)  # the interpreter's last collections would look at all modules, for nothing
    return app.run(sys.argv[1:] if argv is None else list(argv))

"""Move a SQLite database of LangGraph checkpoints into Postgres, from a checkout.

The same job as ``persistence migrate SOURCE TARGET``, with the same options and exit codes; SOURCE may be
the path of the file::

    python tools/sqlite_to_postgres.py chat.db postgresql://localhost/chat --archive backup
"""

from __future__ import annotations

import sys
from urllib.parse import quote

from persistence.cli import main


def sqlite_dsn(argument: str) -> str:
    """A path as a DSN; anything else as it is."""
    if "://" in argument or argument.startswith(("-", "env:")):
        return argument
    return f"sqlite:///{quote(argument)}"


def run(argv: list[str]) -> int:
    """Hand the arguments to ``persistence migrate``."""
    if not argv:
        print(__doc__, file=sys.stderr)
        return 2
    return main(["migrate", sqlite_dsn(argv[0]), *argv[1:]])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))

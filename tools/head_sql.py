"""Write ``migrations/head.sql``, all migrations for an empty Postgres database; ``--check`` only compares."""

from __future__ import annotations

import sys

from persistence import schema
from persistence.registry import provider_for

INTRODUCTION = """\
-- Our own tables in an empty Postgres database, to be made within a transaction; without Alembic, which takes
-- half a second to import. Written by tools/head_sql.py: run `make generate` after a new migration.

"""


def head_sql() -> str:
    """The text of the file."""
    script = schema.sql(provider_for("postgresql://localhost/nowhere"))
    own = script[script.index("-- Our own tables") :].splitlines()[1:]
    kept = "\n".join(line.rstrip() for line in own if line not in ("BEGIN;", "COMMIT;"))
    return f"{INTRODUCTION}{kept.strip()}\n"


def main() -> int:
    """Write the file, or with ``--check`` say whether it is current."""
    path = schema.migrations_folder() / "head.sql"
    if "--check" not in sys.argv[1:]:
        path.write_text(head_sql())
    elif not path.is_file() or path.read_text() != head_sql():
        print(f"{path} is not what the migrations make: run `make generate`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

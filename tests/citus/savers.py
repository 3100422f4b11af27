"""The contract suite on distributed tables.

`make citus` runs it; it is not part of `make test`, because no wheel brings a Citus: hence the name of this
file.
"""

from __future__ import annotations

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from persistence.testing import *
from persistence.testing.durable import *
from persistence.testing.subject import Target
from tests.citus.conftest import TABLES
from tests.support import query_form


@pytest.fixture
def target(cluster: str, colour: str) -> Target:
    with psycopg.connect(cluster, autocommit=True) as conn:
        conn.execute(f"TRUNCATE {', '.join(TABLES)}")

    def raw() -> bytes:
        with psycopg.connect(cluster) as conn:
            rows = [conn.execute(f"SELECT * FROM {table}").fetchall() for table in TABLES]
        return repr(rows).encode()

    dsn = "postgresql://" + query_form(make_conninfo(cluster, password="open-sesame"))
    return Target("citus", colour, dsn, "open-sesame", has_tables=True, raw=raw)

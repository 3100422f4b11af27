"""All our savers and the reference model, driven with the same calls: every answer is the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from persistence.settings import Settings
from persistence.testing.differential import ALL, EXAMPLES, drive
from persistence.testing.marks import clause, tries
from persistence.testing.subject import LoopThread, Subject, Target
from tests.support import query_form

SCHEMAS = {"sync": "public", "async": "other"}


@pytest.fixture
def savers(contract_postgres: str, tmp_path: Path, loop_thread: LoopThread) -> Iterator[dict[str, Subject]]:
    """Each on its own database, which need not survive a crash."""
    with psycopg.connect(contract_postgres, autocommit=True) as conn:
        conn.execute("TRUNCATE checkpoints, checkpoint_blobs, checkpoint_writes")
        conn.execute("DROP SCHEMA IF EXISTS other CASCADE")
        conn.execute("CREATE SCHEMA other")
    server = "postgresql://" + query_form(contract_postgres) + "&options=-c%20synchronous_commit%3Doff"
    with ExitStack() as stack:
        subjects = {}
        for colour, schema in SCHEMAS.items():
            urls = {
                "memory": "memory://",
                "sqlite": f"sqlite:///{tmp_path}/{colour}.db?synchronous=off",
                "postgres": f"{server}&schema={schema}",
            }
            for backend, url in urls.items():
                subject = Subject(Target(backend, colour, url), Settings(), loop_thread)
                stack.callback(subject.close)
                subjects[f"{backend}-{colour}"] = subject
        yield subjects


@clause(*ALL)
@tries(EXAMPLES)
def test_six_savers_and_the_model_agree(savers: dict[str, Subject]) -> None:
    drive(savers)

"""Fixtures that every test folder shares: a real Postgres server and fresh databases on it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, settings

from tests.forked import Commands
from tests.support import fresh_database
from tests.warm import Warm

# A machine that is slow, or stands still for a while, is no failure of an example.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# Compiling each module anew, in every process that the tests start, takes a fifth of their time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than there are cores: many tests wait for processes that they start."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(scope="session", autouse=True)
def root_of_inner_pytests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each pytest that starts closes its root folder to other users; ours holds the data of servers."""
    tmp_path_factory.getbasetemp()  # ours is fixed by now
    with tempfile.TemporaryDirectory(prefix="persistence-inner-") as name:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = name
        yield
        del os.environ["PYTEST_DEBUG_TEMPROOT"]


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """Conninfo of a Postgres superuser: ``PERSISTENCE_TEST_POSTGRES``, or a server of this session's own."""
    if configured := os.environ.get("PERSISTENCE_TEST_POSTGRES"):
        yield configured
        return
    from persistence.backends import embedded

    with (
        tempfile.TemporaryDirectory(prefix="persistence-tests-") as folder,
        embedded.serve(Path(folder) / "pg") as conninfo,
    ):
        # The tests end processes, never the system, which keeps what was written.
        with psycopg.connect(conninfo, autocommit=True) as conn:
            conn.execute("ALTER SYSTEM SET fsync = off")
            conn.execute("SELECT pg_reload_conf()")
        yield conninfo


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter. Each process of pytest closes pytest's own to others again."""
    with tempfile.TemporaryDirectory(prefix="persistence-tests-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder
        folder.chmod(0o777)


@pytest.fixture
def postgres_dsn(postgres_server: str) -> Iterator[str]:
    """DSN of an empty database of its own, dropped afterwards."""
    with fresh_database(postgres_server) as dsn:
        yield dsn


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    """Runs console commands, each in a process of its own."""
    commands = Commands()
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Python programs whose processes need not import LangGraph."""
    warm = Warm()
    yield warm
    warm.close()

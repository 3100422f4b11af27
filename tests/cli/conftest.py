"""What the console tests share: the command in its own process, and databases."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psycopg
import pytest

from tests.forked import Commands
from tests.support import COMMAND, Result, clean_environment, make_chat

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, commands: Commands) -> Run:
    """Run the console command in an empty folder and with none of our variables set."""

    def run(*arguments: str, env: Mapping[str, str] | None = None) -> Result:
        return commands.run(*arguments, cwd=tmp_path, env=clean_environment() | dict(env or {}))

    return run


@pytest.fixture
def run_script(tmp_path: Path) -> Run:
    """As ``run``, but a new interpreter runs the command's script."""
    return _runner(tmp_path, [])


@pytest.fixture
def run_unprivileged(tmp_path: Path) -> Run:
    """As ``run_script``, but file modes count, also where root runs the tests."""
    if os.geteuid() != 0:
        return _runner(tmp_path, [])
    return _runner(tmp_path, ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"])


def _runner(folder: Path, prefix: list[str]) -> Run:
    def run(*arguments: str, env: Mapping[str, str] | None = None) -> Result:
        return subprocess.run(
            [*prefix, COMMAND, *arguments],
            cwd=folder,
            env=clean_environment() | dict(env or {}),
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """A SQLite database with two conversations."""
    return make_chat(tmp_path)


@pytest.fixture(scope="session")
def password_server() -> Iterator[str]:
    """Conninfo of a server of its own, where the role ``locked`` needs the password ``right-secret``."""
    from persistence.backends import embedded

    # Not in pytest's folder: each pytest that starts closes it to other users, the server's too.
    with (
        tempfile.TemporaryDirectory(prefix="persistence-password-") as name,
        embedded.serve(Path(name) / "pg") as conninfo,
    ):
        with psycopg.connect(conninfo, autocommit=True) as conn:
            (found,) = conn.execute("SHOW hba_file").fetchone() or ()
            rules = Path(found)
            rules.write_text("local all locked scram-sha-256\n" + rules.read_text())
            conn.execute("CREATE ROLE locked LOGIN PASSWORD 'right-secret'")
            conn.execute("SELECT pg_reload_conf()")
        yield conninfo

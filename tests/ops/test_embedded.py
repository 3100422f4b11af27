"""A Postgres server of one's own in a folder: who starts it, who stops it, and what can be wrong."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import persistence
from persistence.backends import embedded
from persistence.errors import ConnectError, PersistenceError
from persistence.registry import provider_for
from tests.ops.conftest import counter, thread

ROOT = Path(__file__).parents[2]
OPEN = """
import sys, persistence
from tests.ops.conftest import counter, thread
db = persistence.open(sys.argv[1])
graph = counter().compile(checkpointer=db.checkpointer)
print(graph.invoke({"n": graph.get_state(thread()).values.get("n", 0)}, thread()), flush=True)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A name for a folder, short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="pg-") as parent:
        yield (Path(parent) / "pg").resolve()


def runs(folder: Path) -> bool:
    return embedded._answers(folder)


def python(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **options,
    )


def test_data_stay_and_the_last_one_stops_the_server(folder: Path) -> None:
    dsn = f"postgres+embedded:///{folder}?schema=app&pool_max=3"
    with persistence.open(dsn) as one:
        graph = counter().compile(checkpointer=one.checkpointer, store=one.store)
        graph.invoke({"n": 1}, thread())
        with persistence.open(dsn) as two:
            assert counter().compile(checkpointer=two.checkpointer).get_state(thread()).values == {"n": 2}
            assert two.settings.pool_max == 3
        assert runs(folder)
        assert graph.get_state(thread()).values == {"n": 2}
    assert not runs(folder)
    with persistence.open(dsn) as db:
        assert counter().compile(checkpointer=db.checkpointer).get_state(thread()).values == {"n": 2}
        assert db.backend == "postgres+embedded"
        info = db.ping()
        assert info is not None
        assert info.version.startswith("18.")
    assert not runs(folder)


async def test_async_code_starts_and_stops_it_too(folder: Path) -> None:
    async with persistence.aopen(f"postgres+embedded:///{folder}") as db:
        assert await counter().compile(checkpointer=db.checkpointer).ainvoke({"n": 1}, thread()) == {"n": 2}
    assert not runs(folder)


def test_processes_share_one_server_and_the_last_stops_it(folder: Path) -> None:
    dsn = f"postgres+embedded:///{folder}"
    other = python(OPEN + "sys.stdin.read(); db.close()", dsn)
    assert other.stdout is not None
    assert other.stdout.readline() == "{'n': 1}\n"
    with persistence.open(dsn) as db:
        other.communicate(timeout=60)
        assert other.returncode == 0
        assert runs(folder)
        assert counter().compile(checkpointer=db.checkpointer).get_state(thread()).values == {"n": 1}
    assert not runs(folder)


def test_a_process_that_forgets_to_close_stops_it_at_its_end_and_says_nothing(folder: Path) -> None:
    other = python(
        "import warnings; warnings.simplefilter('ignore')\n" + OPEN, f"postgres+embedded:///{folder}"
    )
    out, err = other.communicate(timeout=60)
    assert (out, other.returncode) == ("{'n': 1}\n", 0)
    assert [line for line in err.splitlines() if "chmod o+x" not in line] == []
    assert not runs(folder)


def test_a_killed_process_leaves_a_server_that_the_next_one_uses_and_stops(folder: Path) -> None:
    dsn = f"postgres+embedded:///{folder}"
    other = python(OPEN + "sys.stdin.read()", dsn)
    assert other.stdout is not None
    assert other.stdout.readline() == "{'n': 1}\n"
    other.kill()
    other.communicate(timeout=60)
    assert runs(folder)
    with persistence.open(dsn) as db:
        assert counter().compile(checkpointer=db.checkpointer).get_state(thread()).values == {"n": 1}
    assert not runs(folder)


def test_a_killed_server_recovers_without_a_restart_of_the_application(folder: Path) -> None:
    dsn = f"postgres+embedded:///{folder}"
    with persistence.open(dsn) as db:
        graph = counter().compile(checkpointer=db.checkpointer)
        graph.invoke({"n": 1}, thread())
        os.kill(int((folder / "data" / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while runs(folder) and time.monotonic() < deadline:
            time.sleep(0.05)
        with persistence.open(dsn) as again:
            assert counter().compile(checkpointer=again.checkpointer).get_state(thread()).values == {"n": 2}
        assert graph.get_state(thread()).values == {"n": 2}
    assert not runs(folder)


def test_a_half_made_database_is_made_anew(folder: Path) -> None:
    (folder / "data.new").mkdir(parents=True)
    (folder / "data.new" / "PG_VERSION").write_text("18")
    with embedded.serve(folder) as conninfo, psycopg.connect(conninfo) as conn:
        assert conn.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.parametrize("name", ['it\'s $HOME `x` "q" é %20', "x" * 150])
def test_any_folder_name_will_do(folder: Path, name: str) -> None:
    odd = folder.parent / name
    with embedded.serve(odd) as conninfo:
        with psycopg.connect(conninfo) as conn:
            assert conn.execute("SELECT 1").fetchone() == (1,)
        sockets = embedded._socket_of(odd)[0]
    assert sorted(path.name for path in odd.iterdir()) == ["data", "lock", "server.log"]
    assert Path(sockets) == odd or not Path(sockets).exists()


def test_an_existing_empty_folder_will_do(folder: Path) -> None:
    folder.mkdir()
    with embedded.serve(folder) as conninfo, psycopg.connect(conninfo) as conn:
        conn.execute("SELECT 1")


def test_it_listens_on_no_port_and_its_socket_is_private(folder: Path) -> None:
    with embedded.serve(folder) as conninfo, psycopg.connect(conninfo) as conn:
        assert conn.execute("SHOW listen_addresses").fetchone() == ("",)
        assert conn.execute("SHOW fsync").fetchone() == ("on",)
        assert (folder / ".s.PGSQL.5432").stat().st_mode & 0o077 == 0
        assert folder.stat().st_mode & 0o077 == 0


def wrong(folder: Path, kind: str) -> str:
    """Make something wrong, and say what the error must say."""
    if kind == "no parent":
        return "folder does not exist"
    folder.parent.mkdir(exist_ok=True)
    if kind == "file":
        folder.write_text("x")
        return "not a folder"
    folder.mkdir()
    if kind == "strangers":
        (folder / "thesis.tex").write_text("x")
        return "not empty.*thesis.tex"
    (folder / "data").mkdir()
    (folder / "data" / "PG_VERSION").write_text("16\n")
    return "written by Postgres 16"


@pytest.mark.parametrize("kind", ["no parent", "file", "strangers", "version"])
def test_a_folder_that_cannot_be_used_says_why_and_stays_as_it_is(folder: Path, kind: str) -> None:
    folder = folder / "deeper" if kind == "no parent" else folder
    expected = wrong(folder, kind)
    before = sorted(folder.parent.rglob("*")) if folder.parent.exists() else []
    with pytest.raises(ConnectError, match=expected) as caught:
        persistence.open(f"postgres+embedded:///{folder}")
    assert not caught.value.transient
    assert str(folder.parent) in caught.value.message
    assert (sorted(folder.parent.rglob("*")) if folder.parent.exists() else []) == before


def test_a_source_is_not_made(folder: Path) -> None:
    provider = provider_for(f"postgres+embedded:///{folder}")
    with pytest.raises(PersistenceError, match="no database"), provider.source():
        pass
    assert not folder.exists()


def test_a_server_that_does_not_start_names_the_reason_and_the_log(folder: Path) -> None:
    with embedded.serve(folder):
        pass
    config = folder / "data" / "postgresql.conf"
    config.write_text(config.read_text() + "\nnonsense = on\n")
    with pytest.raises(ConnectError, match=r": configuration file .* contains errors .*server\.log"):
        embedded.hold(folder)
    assert embedded._uses == {path: use for path, use in embedded._uses.items() if path != folder}


AS_USER = """
import os, sys, pathlib
import persistence, persistence.backends.postgres.backend, persistence.schema, persistence.backends.embedded
import encodings.idna, alembic.command, sqlalchemy.dialects.postgresql.psycopg
from tests.ops.conftest import counter, thread
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
with persistence.open(sys.argv[1]) as db:
    print(counter().compile(checkpointer=db.checkpointer).invoke({"n": 1}, thread()), os.geteuid() != 0)
"""


def test_it_runs_as_an_ordinary_user(folder: Path) -> None:
    """As root, the tests become nobody first; as an ordinary user they are one."""
    folder.parent.chmod(0o777)
    other = python(AS_USER, f"postgres+embedded:///{folder}", cwd="/")
    out, err = other.communicate(timeout=100)
    assert out == "{'n': 2} True\n", err
    assert err == ""
    assert not runs(folder)


def test_as_root_it_runs_as_somebody_else_and_lets_only_pass(folder: Path) -> None:
    folder.parent.chmod(0o700)
    with embedded.serve(folder):
        owner = (folder / "data").stat().st_uid
        assert owner != 0
        assert folder.parent.stat().st_mode & 0o077 == (0o001 if os.geteuid() == 0 else 0)


def forked(pipe: Any, folder: Path) -> None:
    embedded.release(folder)
    embedded._release_all()
    pipe.send("done")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_leaves_the_parents_server_alone(folder: Path) -> None:
    with embedded.serve(folder):
        fork = multiprocessing.get_context("fork")
        here, there = fork.Pipe()
        child = fork.Process(target=forked, args=(there, folder))
        child.start()
        assert here.poll(60)
        child.join(60)
        here.close()
        there.close()
        assert runs(folder)
        other = python(OPEN + "db.close()", f"postgres+embedded:///{folder}")
        other.communicate(timeout=60)
        assert runs(folder)  # the lock is still held
    assert not runs(folder)

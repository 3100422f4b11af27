"""What is opened, why, what the log says, and what happens where nothing answers."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from pathlib import Path

import pytest

import persistence
from persistence.errors import ConnectError, DsnError, SettingsError
from persistence.settings import Settings, get_settings
from tests.ops.conftest import PASSWORD, OwnServer, said, thread

DEAD = "postgresql://app:hunter2@127.0.0.1:1/db"
QUICK = {"connect_backoff": 0.01, "connect_backoff_max": 0.02}


def test_no_dsn_is_memory_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with persistence.open() as db:
        assert (db.backend, db.dsn, db.degraded) == ("memory", None, None)
        assert db.reason == "PERSISTENCE_DSN is not set"
        assert said(caplog) == ["persistence memory: PERSISTENCE_DSN is not set"]
    record = next(record for record in caplog.records if "not set" in record.getMessage())
    assert vars(record)["persistence_mode"] == "memory"
    assert vars(record)["persistence_reason"] == "PERSISTENCE_DSN is not set"


def test_the_dsn_comes_from_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PERSISTENCE_DSN", f"sqlite:///{tmp_path}/from-env.db?synchronous=off")
    get_settings.cache_clear()
    with persistence.open() as db:
        assert db.backend == "sqlite"
        assert db.settings.sqlite_synchronous == "off"
    assert (tmp_path / "from-env.db").exists()
    with persistence.open("memory://") as db:
        assert db.reason == "the DSN that was passed"


def test_settings_may_be_injected() -> None:
    with persistence.open(settings=Settings(dsn="sqlite://")) as db:
        assert db.backend == "sqlite"


async def test_the_master_switch_gives_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    settings = Settings(enable_checkpointing=False, dsn=DEAD)
    with persistence.open(settings=settings) as db:
        assert db.checkpointer is None
        assert db.store is None
        assert db.ping() is None
        assert db.backend == "off"
        db.setup()
    async with persistence.aopen(settings=settings) as adb:
        assert adb.checkpointer is None
        assert await adb.ping() is None
        await adb.setup()
    assert said(caplog)[0] == "persistence off: PERSISTENCE_ENABLE_CHECKPOINTING is off"


@pytest.mark.parametrize("dsn", [DEAD, "postgres+embedded:///never"])
def test_postgres_can_be_turned_off_while_its_dsn_stays(
    dsn: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with persistence.open(settings=Settings(use_postgres=False, dsn=dsn)) as db:
        assert db.backend == "memory"
        assert db.degraded is not None
        assert str(db.dsn) == dsn.replace("hunter2", "***")
    [warning] = said(caplog, logging.WARNING)
    assert "nothing will be kept" in warning
    assert "PERSISTENCE_USE_POSTGRES is off" in warning
    assert not (tmp_path / "never").exists()
    with persistence.open("sqlite://", settings=Settings(use_postgres=False)) as db:
        assert db.backend == "sqlite"  # the flag is about Postgres only


def test_postgres_without_a_dsn_names_the_variable() -> None:
    with pytest.raises(SettingsError, match="PERSISTENCE_DSN"):
        persistence.open(settings=Settings(use_postgres=True))


def test_a_server_that_does_not_answer_is_an_error_after_bounded_attempts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    begin = time.monotonic()
    with pytest.raises(ConnectError, match="after 20 attempts") as caught:
        persistence.open(DEAD, settings=Settings(connect_attempts=20, **QUICK))
    assert time.monotonic() - begin < 60  # waits that are doubled without a bound would take 90 minutes
    assert "onnection refused" in caught.value.message
    assert caught.value.hint
    assert len([line for line in said(caplog, logging.WARNING) if "again, attempt" in line]) == 19
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text + repr(caplog.records)
    assert "hunter2" not in shown
    assert "hunter2" not in str([vars(record) for record in caplog.records])


async def test_a_server_that_does_not_answer_is_an_error_async(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConnectError, match="after 2 attempts") as caught:
        await persistence.aopen(DEAD, settings=Settings(connect_attempts=2, **QUICK))
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert "hunter2" not in shown


async def test_memory_stands_in_only_by_policy_and_loudly(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(fallback="memory", connect_attempts=1)
    with persistence.open(DEAD, settings=settings) as db:
        assert db.backend == "memory"
        assert db.checkpointer is not None
        assert db.checkpointer.get_tuple(thread()) is None
        assert "onnection refused" in (db.degraded or "")
    async with persistence.aopen(DEAD, settings=settings) as adb:
        assert adb.backend == "memory"
        assert adb.degraded
    warnings = [line for line in said(caplog, logging.WARNING) if "nothing will be kept" in line]
    assert len(warnings) == 2
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize(
    ("dsn", "says"),
    [
        ("password", "password authentication failed"),
        ("database", 'database "nope" does not exist'),
    ],
)
def test_what_stays_wrong_is_not_tried_again(
    dsn: str, says: str, own_server: OwnServer, caplog: pytest.LogCaptureFixture
) -> None:
    text = own_server.dsn("wrong hunter2") if dsn == "password" else own_server.dsn(PASSWORD, "nope")
    with pytest.raises(ConnectError) as caught:
        persistence.open(text, settings=Settings(connect_attempts=3, **QUICK))
    assert says in caught.value.message
    assert "attempts" not in caught.value.message
    assert not caught.value.transient
    assert said(caplog, logging.WARNING) == []
    shown = "".join(traceback.format_exception(caught.value))
    assert PASSWORD not in shown
    assert "hunter2" not in shown


def test_the_right_password_opens_and_is_never_shown(
    own_server: OwnServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with persistence.open(own_server.dsn(PASSWORD)) as db:
        shown = f"{db!r} {db.dsn} {db.reason} {db.ping()} {db.settings!r}"
        assert db.checkpointer is not None
        shown += repr(vars(db.checkpointer))
    shown += caplog.text + str([vars(record) for record in caplog.records])
    assert PASSWORD not in shown
    assert "s3cr3t" not in shown


def test_a_slow_start_is_waited_for(own_server: OwnServer) -> None:
    own_server.stop()
    starter = threading.Timer(1.0, own_server.start)
    starter.start()
    try:
        with persistence.open(
            own_server.dsn(), settings=Settings(connect_attempts=20, connect_backoff=0.2)
        ) as db:
            assert db.ping() is not None
    finally:
        starter.join()


def test_options_that_libpq_refuses_are_a_dsn_error() -> None:
    with pytest.raises(DsnError, match="nonsense"):
        persistence.open("postgresql://u:hunter2@h/d?nonsense=1", settings=Settings(connect_attempts=3))


def test_connections_say_who_they_are_and_keep_alive(postgres_dsn: str) -> None:
    query = "SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()"
    for dsn, expected in (
        (postgres_dsn, "langgraph-persistence"),
        (f"{postgres_dsn}&application_name=mine", "mine"),
    ):
        with persistence.open(dsn) as db:
            pool = db._backend.pool  # type: ignore[union-attr]
            with pool.connection() as conn:
                assert conn.execute(query).fetchone() == {"application_name": expected}
                assert conn.autocommit
                parameters = conn.info.get_parameters()
                assert parameters["keepalives_idle"] == "30"
                assert parameters["tcp_user_timeout"] == "30000"


def test_pool_options_of_the_dsn_arrive(postgres_dsn: str) -> None:
    with persistence.open(f"{postgres_dsn}&pool_min=2&pool_max=3&pool_timeout=0.2&pool_max_idle=9") as db:
        pool = db._backend.pool  # type: ignore[union-attr]
        assert (pool.min_size, pool.max_size, pool.timeout, pool.max_idle) == (2, 3, 0.2, 9)
        held = [pool.getconn(60) for _ in range(3)]
        with pytest.raises(ConnectError, match=r"0\.20 sec.*pool_max"):
            db.ping()
        for conn in held:
            pool.putconn(conn)
        assert db.ping() is not None


@pytest.mark.parametrize(("option", "prepared"), [("", True), ("&pgbouncer=true", False)])
def test_behind_pgbouncer_nothing_is_prepared(postgres_dsn: str, option: str, prepared: bool) -> None:
    with persistence.open(f"{postgres_dsn}&pool_max=1{option}") as db:
        assert db.checkpointer is not None
        for _ in range(8):
            db.checkpointer.get_tuple(thread())
        with db._backend.pool.connection() as conn:  # type: ignore[union-attr]
            row = conn.execute("SELECT count(*) AS n FROM pg_prepared_statements").fetchone()
    assert (row["n"] > 0) is prepared


def test_the_driver_of_a_pool_never_shows_the_password(
    own_server: OwnServer, caplog: pytest.LogCaptureFixture
) -> None:
    """psycopg's own pool names itself in its log lines."""
    caplog.set_level(logging.DEBUG, "psycopg.pool")
    with persistence.open(own_server.dsn(PASSWORD)) as db:
        db.ping()
    lines = [record.getMessage() for record in caplog.records if record.name == "psycopg.pool"]
    assert any("postgresql://app:***@" in line for line in lines)
    assert "s3cr3t" not in caplog.text

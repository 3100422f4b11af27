"""The store moves: what one official store gave, the other one gives."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import persistence
from persistence import transfer
from persistence.errors import ConflictError, SourceError, VerificationError
from persistence.registry import provider_for
from persistence.transfer import RefusedError
from persistence.transfer.items import Item, ItemBatch, Rule
from persistence.transfer.ledger import LedgerEntry
from persistence.transfer.options import OnConflict
from tests.support import COMMAND, clean_environment
from tests.transfer import make, stores
from tests.transfer.stores import BOTH, STORE, items_of, official_items_of, times_to_live
from tests.transfer.test_values import finite_json, storable


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a store and nothing else; not to be changed."""
    return stores.fill(tmp_path_factory.mktemp("stored") / "store.db")


@pytest.fixture
def source(stored: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copy(stored, tmp_path / "store.db"))


def dsn(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.mark.parametrize("by_archive", [False, True], ids=["direct", "archive"])
def test_to_postgres_and_back(stored: Path, postgres_dsn: str, tmp_path: Path, by_archive: bool) -> None:
    def archive(name: str) -> Path | None:
        return tmp_path / name if by_archive else None

    # Each hop from the target of the one before: another schema, a file, another file.
    hops = [postgres_dsn, f"{postgres_dsn}&schema=other", *(dsn(tmp_path / f"{n}.db") for n in "ab")]
    with persistence.open(hops[1]):
        pass  # within one database the tables must be there
    left: str | Path = stored
    for number, right in enumerate(hops):
        report = transfer.migrate(left, right, options=STORE, archive=archive(f"archive{number}"))
        assert (report.store.items, report.store.namespaces, report.verified) == (17, 6, True)
        assert items_of(right) == items_of(dsn(stored))
        assert times_to_live(right) == times_to_live(dsn(stored))
        assert transfer.verify(stored, right, include=["store"]).items == 17
        again = transfer.migrate(left, right, options=STORE, archive=archive(f"archive{number}"))
        assert (again.already_done, again.verified) == (True, True)
        left = right


def test_what_the_postgres_store_wrote(postgres_dsn: str, tmp_path: Path) -> None:
    """Microseconds; the numbers that JSONB makes of what was put; an expired item stays where it is."""
    with stores.postgres_store(postgres_dsn) as store:
        store.setup()
        stores.put_some(store)
        store.put(("numbers",), "k", {"e22": 1e15, "minus": -0.0, "small": 1e-300, "u64": 2**64 - 1})
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("SET TIME ZONE 'Asia/Kolkata'")
        conn.execute("ALTER ROLE CURRENT_USER SET TIME ZONE 'America/New_York'")
        conn.execute("UPDATE store SET expires_at = '2020-01-01 05:30' WHERE key = 'gone'")
    try:
        target = dsn(tmp_path / "new.db")
        assert transfer.migrate(postgres_dsn, target, options=STORE).verified
        assert items_of(target) == items_of(postgres_dsn)
        assert times_to_live(target) == times_to_live(postgres_dsn)
        with closing(sqlite3.connect(tmp_path / "new.db")) as conn:
            gone, kind = conn.execute(
                "SELECT expires_at, typeof(value) FROM store WHERE key = 'gone'"
            ).fetchone()
        assert (gone, kind) == ("2020-01-01 00:00:00+00:00", "blob")
        with stores.sqlite_store(tmp_path / "new.db") as official:
            assert official.sweep_ttl() == 1
    finally:
        with psycopg.connect(postgres_dsn) as conn:
            conn.execute("ALTER ROLE CURRENT_USER RESET TIME ZONE")


def test_threads_and_items_in_one_run(filled: Path, tmp_path: Path, postgres_dsn: str) -> None:
    both = Path(shutil.copy(filled, tmp_path / "chat.db"))
    stores.fill(both)
    report = transfer.migrate(both, postgres_dsn, options=BOTH)
    assert report.totals.threads == 4
    assert report.store.items == 17
    with psycopg.connect(postgres_dsn) as conn:
        runs = conn.execute("SELECT run_id, source_fingerprint FROM persistence_transfers").fetchall()
        batches = conn.execute(
            "SELECT run_id, batch_no FROM persistence_transfer_batches ORDER BY 2"
        ).fetchall()
    assert runs == [(report.run_id, report.fingerprint)]
    assert batches == [(report.run_id, -1), (report.run_id, 0)]
    assert transfer.verify(both, postgres_dsn, include=["checkpoints", "store"]).equal
    # The items are part of what the run is bound to.
    make.execute(both, "UPDATE store SET value = '{}' WHERE key = 'k1'")
    with pytest.raises(ConflictError):
        transfer.migrate(both, postgres_dsn, options=BOTH)
    # Threads first, the store later: that run has items only.
    later = dsn(tmp_path / "later.db")
    first = transfer.migrate(filled, later, options=BOTH)
    assert (first.totals.threads, first.store.items) == (4, 0)
    second = transfer.migrate(both, later, options=STORE)
    assert (second.totals.threads, second.store.items, second.verified) == (0, 17, True)


def test_the_store_stays_unless_it_is_included(filled: Path, tmp_path: Path) -> None:
    both = Path(shutil.copy(filled, tmp_path / "chat.db"))
    stores.fill(both)
    command = [COMMAND, "migrate", dsn(both), dsn(tmp_path / "new.db")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean_environment())
    assert "17 items of the store do not move; --include store adds them" in done.stdout
    assert items_of(dsn(tmp_path / "new.db")) == {}
    compare = [COMMAND, "verify", *command[2:]]
    done = subprocess.run(compare, capture_output=True, text=True, check=True, env=clean_environment())
    said = "17 items of the store on the left and 0 on the right are not compared; --include store adds them"
    assert said in done.stdout
    command += ["--include", "store"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean_environment())
    assert "17 items in 6 namespaces, 0 vectors" in done.stdout
    assert items_of(dsn(tmp_path / "new.db")) == items_of(dsn(both))
    command = [COMMAND, "verify", dsn(both), dsn(tmp_path / "new.db"), "--include", "store", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean_environment())
    assert json.loads(done.stdout)["items"] == 17
    command = [*command[:4], "--include", "store", "--thread", "a"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean_environment())
    assert done.returncode == 2
    assert "threads are selected" in done.stderr


def test_no_store_is_no_items(filled: Path, tmp_path: Path, postgres_dsn: str) -> None:
    report = transfer.migrate(filled, postgres_dsn, options=BOTH)
    assert (report.store.items, report.verified) == (0, True)
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("DROP TABLE store, store_migrations")
    assert transfer.export(postgres_dsn, tmp_path / "archive", options=STORE).store.items == 0


def test_stores_of_old_versions(source: Path, postgres_dsn: str, tmp_path: Path) -> None:
    """Before there was a time to live, its columns were not there."""
    expected = items_of(dsn(source))
    for statement in ("DROP INDEX idx_store_expires_at",):
        make.execute(source, statement)
    for column in ("expires_at", "ttl_minutes"):
        make.execute(source, f"ALTER TABLE store DROP COLUMN {column}")
    transfer.migrate(source, postgres_dsn, options=STORE)
    assert items_of(postgres_dsn) == expected
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("ALTER TABLE store DROP COLUMN expires_at, DROP COLUMN ttl_minutes")
    transfer.migrate(postgres_dsn, dsn(tmp_path / "new.db"), options=STORE)
    assert items_of(dsn(tmp_path / "new.db")) == expected


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def target(
    request: pytest.FixtureRequest, postgres_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A database with tables for all examples."""
    from tests.support import fresh_database

    if request.param == "sqlite":
        path = tmp_path_factory.mktemp("values") / "chat.db"
        with persistence.open(dsn(path)):
            pass
        yield dsn(path)
        return
    with fresh_database(postgres_server) as found:
        with persistence.open(found):
            pass
        yield found


labels = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0."), min_size=1, max_size=15)
moments = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30))
whole = st.integers(0, 2**31 - 1)


def _fits_64_bits(value: Any) -> bool:
    try:
        return bool(orjson.dumps(value))
    except TypeError:
        return False


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    items=st.dictionaries(
        st.tuples(st.lists(labels, min_size=1, max_size=3).map(tuple), storable),
        st.tuples(
            st.dictionaries(storable, finite_json.filter(_fits_64_bits), max_size=4),
            moments,
            st.none() | moments,
            st.none() | whole,
        ),
        min_size=1,
        max_size=8,
    )
)
def test_any_value(items: dict[Any, Any], target: str, tmp_path: Path) -> None:
    """Any JSON, key, label and time, out of SQLite's rows, through the sink, to the official store."""
    path = tmp_path / "source.db"
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as conn, conn:
        conn.execute(
            "CREATE TABLE store (prefix, key, value, created_at, updated_at, expires_at, ttl_minutes)"
        )
        for (namespace, key), (value, at, expires, ttl) in items.items():
            row = (
                ".".join(namespace),
                key,
                orjson.dumps(value),
                f"{at}",
                f"{at}",
                expires and f"{expires}",
                ttl,
            )
            conn.execute("INSERT INTO store VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    with provider_for(dsn(path)).source() as source, provider_for(target).sink() as sink:
        moved = [item for item in source.store().items() if isinstance(item, Item)]
        assert len(moved) == len(items)
        preflight = sink.store().preflight()
        for item in moved:
            preflight.see_item(item)
        assert preflight.problems() == []
        entry = LedgerEntry("run", -1, "", "", 0, 0, len(moved), 0)
        sink.store().write(ItemBatch(moved, entry), Rule("it", "error", True))
        keys = [item[:2] for item in moved]
        assert sink.store().held(keys) == dict(zip(keys, moved, strict=True))
    try:
        with provider_for(target).source() as written:
            assert list(written.store().items()) == moved
        if "postgresql" not in target or all(at.year > 1000 for _, at, _, _ in items.values()):
            read = official_items_of(target)  # psycopg reads no earlier ones in some zones
            assert {key: value for key, (value, _, _) in read.items()} == {k: v[0] for k, v in items.items()}
            assert {key: at.replace(tzinfo=None) for key, (_, at, _) in read.items()} == {
                key: at for key, (_, at, _, _) in items.items()
            }
    finally:
        clear(target)


def clear(target: str) -> None:
    tables = ("store", "persistence_transfer_batches", "persistence_transfer_keys")
    statements = [f"DELETE FROM {table}" for table in tables]
    if target.startswith("sqlite"):
        for statement in statements:
            make.execute(Path(target.removeprefix("sqlite:///")), statement)
    else:
        with psycopg.connect(target) as conn:
            for statement in statements:
                conn.execute(statement.encode())


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("value", b'{"a":"x\\u0000"}', "holds the NUL character"),
        ("prefix", "a\0b", "holds the NUL character"),
        ("key", "k" * 2700, "do not fit a Postgres index"),
        ("value", b"{", "the value is not JSON"),
        ("ttl_minutes", 1.5, "no whole number of minutes"),
        ("ttl_minutes", 1e12, "no whole number of minutes"),
        ("ttl_minutes", float("inf"), "the time to live is no number"),
        ("created_at", "yesterday", "a timestamp is not one: 'yesterday'"),
        ("updated_at", 1700000000, "a timestamp is not one: 1700000000"),
        ("key", b"\xff", "not stored as text"),
    ],
)
def test_refused_by_postgres(
    source: Path, postgres_dsn: str, column: str, value: object, reason: str
) -> None:
    make.execute(source, f"UPDATE store SET {column} = ? WHERE key = 'k1'", value)
    with pytest.raises(RefusedError, match=reason):
        transfer.migrate(source, postgres_dsn, options=STORE)
    with psycopg.connect(postgres_dsn) as conn:
        assert conn.execute("SELECT to_regclass('store')").fetchone() == (None,)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("value = '{\"a\": [123456789012345678901234567890]}'", "more than 64 bits"),
        ("created_at = 'infinity'", "a timestamp is infinite"),
        ("created_at = '294247-01-01+00'", "a timestamp is infinite, or too far away"),
        ("expires_at = '20000-01-01'", "outside the years 1 to 9999"),
        ("updated_at = '0044-03-15 BC'", "outside the years 1 to 9999"),
    ],
)
def test_refused_by_sqlite(stored: Path, postgres_dsn: str, tmp_path: Path, change: str, reason: str) -> None:
    transfer.migrate(stored, postgres_dsn, options=STORE)
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute(f"UPDATE store SET {change} WHERE key = 'k1'".encode())
    with pytest.raises(RefusedError, match=reason) as raised:
        transfer.migrate(postgres_dsn, dsn(tmp_path / "new.db"), options=STORE)
    assert "namespace 'users.1.memories', key 'k1'" in str(raised.value)
    assert not (tmp_path / "new.db").exists()


def test_postgres_keeps_times_that_sqlite_cannot(stored: Path, postgres_dsn: str, tmp_path: Path) -> None:
    transfer.migrate(stored, postgres_dsn, options=STORE)
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute(
            "UPDATE store SET created_at = '0044-03-15 BC', expires_at = '294246-12-31 23:59:59.999999+00'"
        )
    with persistence.open(f"{postgres_dsn}&schema=other"):
        pass
    transfer.migrate(
        postgres_dsn, f"{postgres_dsn}&schema=other", options=STORE, archive=tmp_path / "archive"
    )
    with psycopg.connect(postgres_dsn) as conn:
        query = "SELECT prefix, key, value, created_at::text, expires_at::text FROM {}.store ORDER BY 1, 2"
        sides = [conn.execute(query.format(name).encode()).fetchall() for name in ("public", "other")]
    assert sides[0] == sides[1]
    assert sides[0][0][3].startswith("0044-03-15")


@pytest.fixture(params=["sqlite", "postgres"])
def in_use(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A target in use: one item equal to the source's, one older, one newer, one of its own."""
    found: str = dsn(tmp_path / "new.db")
    if request.param == "postgres":
        found = request.getfixturevalue("postgres_dsn")
    with persistence.open(found) as db:
        assert db.store is not None
        for key in ("equal", "older", "newer", "own"):
            db.store.put(("users",), key, {"from": "target"})
    statement = "UPDATE store SET created_at = '{0}', updated_at = '{0}' WHERE key = '{1}'"
    changes = [
        statement.format("2026-01-01 00:00:00", "older"),
        statement.format("2026-01-01 00:00:00", "equal"),
        statement.format("2026-03-01 00:00:00", "newer"),
    ]
    if found.startswith("sqlite"):
        for change in changes:
            make.execute(tmp_path / "new.db", change)
    else:
        with psycopg.connect(found) as conn:
            conn.execute("SET TIME ZONE 'UTC'")
            for change in changes:
                conn.execute(change.encode())
    return found


@pytest.fixture
def coming(tmp_path: Path) -> Path:
    path = tmp_path / "coming.db"
    with stores.sqlite_store(path) as store:
        for key in ("equal", "older", "newer", "new"):
            store.put(("users",), key, {"from": "source"})
    make.execute(path, "UPDATE store SET created_at = '2026-02-01', updated_at = '2026-02-01 00:00:00'")
    make.execute(
        path,
        "UPDATE store SET value = '{\"from\": \"target\"}', created_at = '2026-01-01',"
        " updated_at = '2026-01-01' WHERE key = 'equal'",
    )
    return path


@pytest.mark.parametrize(
    ("rule", "older", "newer", "kept"),
    [("skip", "target", "target", 2), ("replace", "source", "source", 0), ("merge", "source", "target", 1)],
)
def test_conflicts(coming: Path, in_use: str, rule: OnConflict, older: str, newer: str, kept: int) -> None:
    before = items_of(in_use)
    with pytest.raises(ConflictError, match="already has another item in namespace 'users', key 'newer'"):
        transfer.migrate(coming, in_use, options=STORE)
    assert items_of(in_use) == before
    report = transfer.migrate(coming, in_use, options=replace(STORE, on_conflict=rule))
    assert (report.verified, report.store.items, report.store.kept) == (True, 4, kept)
    left = {"equal": "target", "new": "source", "own": "target", "older": older, "newer": newer}
    assert {key[1]: value[0]["from"] for key, value in items_of(in_use).items()} == left
    assert transfer.migrate(coming, in_use, options=STORE).already_done


def test_the_rate_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stores.sqlite_store(tmp_path / "store.db") as store:
        store.setup()
        for number in range(4):
            store.put(("large",), f"{number}", {"text": "x" * 200_000})
    monkeypatch.setattr("persistence.transfer.engine.BATCH_RECORDS", 1)
    limited = transfer.Options(include=["store"], max_mbps=2.0)
    report = transfer.migrate(tmp_path / "store.db", dsn(tmp_path / "new.db"), options=limited)
    assert report.store.bytes / report.phases["write store"] < 2_100_000


def test_a_finished_run_whose_items_are_gone_is_repeated(stored: Path, tmp_path: Path) -> None:
    target = dsn(tmp_path / "new.db")
    transfer.migrate(stored, target, options=STORE)
    make.execute(tmp_path / "new.db", "DELETE FROM store WHERE key <> 'k1'")
    assert transfer.migrate(stored, target, options=STORE).already_done  # they may have expired
    make.execute(tmp_path / "new.db", "DELETE FROM store")
    assert not transfer.migrate(stored, target, options=STORE).already_done
    assert items_of(target) == items_of(dsn(stored))
    transfer.undo(transfer.runs(target)[1].run_id, target)  # the items are those of the later run
    assert items_of(target) == items_of(dsn(stored))
    transfer.undo("last", target)
    assert not items_of(target)


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ("UPDATE store SET value = '{}' WHERE key = 'k1'", "differs in value"),
        ("UPDATE store SET expires_at = '2030-01-01' WHERE key = 'k1'", "differs in expires_at"),
        ("UPDATE store SET updated_at = updated_at || '8' WHERE key = 'k1'", "differs in updated_at"),
        ("DELETE FROM store WHERE key = 'k1'", "missing in"),
        ("UPDATE store SET value = 'x' WHERE key = 'k1'", None),
    ],
)
def test_a_difference_is_named(stored: Path, source: Path, change: str, detail: str | None) -> None:
    make.execute(source, "UPDATE store SET updated_at = '2026-02-03 04:05:06.00000' WHERE key = 'k1'")
    before = Path(shutil.copy(source, source.with_name("before.db")))
    make.execute(source, change)
    if detail is None:
        with pytest.raises(SourceError, match="key 'k1'"):
            transfer.verify(before, source, include=["store"])
        return
    for left, right in ((before, source), (source, before)):
        verdict = transfer.verify(left, right, include=["store"])
        assert not verdict.equal
        assert [str(difference) for difference in verdict.item_differences] == [
            "namespace 'users.1.memories', key 'k1' of the store: "
            + (f"missing in {dsn(source)}" if detail == "missing in" else detail)
        ]
    assert transfer.verify(source, before, include=["store"], subset=True).equal == (detail == "missing in")


def test_a_failed_verification_says_so(stored: Path, postgres_dsn: str) -> None:
    """What the target's own triggers do to the rows does not go unseen."""
    with persistence.open(postgres_dsn), psycopg.connect(postgres_dsn) as conn:
        conn.execute("""CREATE FUNCTION spoil() RETURNS trigger AS
            $$ BEGIN NEW.value = '{}'; RETURN NEW; END $$ LANGUAGE plpgsql""")
        conn.execute("CREATE TRIGGER spoil BEFORE INSERT ON store FOR EACH ROW EXECUTE FUNCTION spoil()")
    with pytest.raises(VerificationError, match="16 of 17 items of the store: namespace 'Users', key ''"):
        transfer.migrate(stored, postgres_dsn, options=STORE)


def test_undo_takes_out_what_the_run_put_in(coming: Path, in_use: str) -> None:
    """Not what was equal before, nor what has changed since; an item that was only read goes, too."""
    run = transfer.migrate(coming, in_use, options=replace(STORE, on_conflict="merge")).run_id
    with persistence.open(in_use) as db:
        assert db.store is not None
        db.store.put(("users",), "older", {"from": "later"})
        db.store.put(("users",), "later", {"from": "later"})
    undone = transfer.undo(str(run), in_use)
    assert (undone.items, undone.changed) == (1, 1)
    left = {"equal": "target", "own": "target", "newer": "target", "older": "later", "later": "later"}
    assert {key[1]: value[0]["from"] for key, value in items_of(in_use).items()} == left


def test_a_dry_run_tells_of_items(coming: Path, in_use: str) -> None:
    before = items_of(in_use)
    plan = transfer.plan(coming, in_use, options=STORE)
    assert [finding.kind for finding in plan.findings if finding.severity != "note"] == ["existing-items"]
    merge = replace(STORE, on_conflict="merge")
    plan = transfer.plan(coming, in_use, options=merge, against_target=True)
    assert (plan.would_move, plan.rehearsed, plan.store.items, plan.store.kept) == (True, True, 4, 1)
    make.execute(coming, "UPDATE store SET value = 'x' WHERE key = 'new'")
    plan = transfer.plan(coming, in_use, options=merge)
    assert [finding.severity for finding in plan.findings][:1] == ["refused"]
    assert items_of(in_use) == before

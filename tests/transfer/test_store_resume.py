"""The store of a run that was interrupted: it goes on, or says why it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persistence import transfer
from persistence.backends.sqlite.transfer_store import SqliteStoreSink
from persistence.errors import ConflictError, TransferError
from tests.transfer import make, stores
from tests.transfer.stores import BOTH, STORE
from tests.transfer.test_resume import source

__all__ = ["source"]


def interrupted(source: Path, target: Path, options: transfer.Options = STORE) -> None:
    """A run that ends after two batches of 9 items; tests/transfer/kills kills runs anywhere."""
    write, batches = SqliteStoreSink.write, 0

    def ended(self: SqliteStoreSink, batch: Any, rule: Any) -> None:
        nonlocal batches
        batches += 1
        if batches > 2:
            raise KeyboardInterrupt
        write(self, batch, rule)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("persistence.transfer.engine.BATCH_RECORDS", 9)
        patch.setattr(SqliteStoreSink, "write", ended)
        transfer.migrate(source, f"sqlite:///{target}", options=options)


@pytest.fixture(scope="module")
def stored(source: Path) -> Path:
    """Threads, and 37 items: five batches."""
    stores.fill(source)
    with stores.sqlite_store(source) as store:
        for number in range(20):
            store.put(("more",), f"k{number:02}", {"n": number})
    return source


@pytest.fixture(params=["sqlite", "postgres"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        dsn: str = request.getfixturevalue("postgres_dsn")
        return dsn
    return f"sqlite:///{tmp_path}/killed.db"


def test_resumed_after_the_application_has_changed_items(stored: Path, tmp_path: Path) -> None:
    """What was moved and then changed is a conflict for a new run, not for the one that goes on."""
    target = tmp_path / "killed.db"
    interrupted(stored, target)
    batches = len(stores.rows(target)["ledger"])
    assert batches == 2
    make.execute(target, "UPDATE store SET value = '{}' WHERE key = ''")
    changed = tmp_path / "changed.db"
    changed.write_bytes(stored.read_bytes())
    make.execute(changed, "DELETE FROM store WHERE key = 'k19'")
    with pytest.raises(ConflictError, match="namespace 'Users', key ''"):
        transfer.migrate(changed, f"sqlite:///{target}", options=STORE)
    report = transfer.migrate(stored, f"sqlite:///{target}", options=STORE, verify=False)
    assert report.batches_skipped == 2
    verdict = transfer.verify(stored, target, include=["store"])
    assert [str(d) for d in verdict.item_differences] == [
        "namespace 'Users', key '' of the store: differs in value"
    ]


def test_batches_that_are_not_the_same_are_refused(stored: Path, tmp_path: Path) -> None:
    target = tmp_path / "killed.db"
    interrupted(stored, target)
    make.execute(target, "UPDATE persistence_transfer_batches SET digest = 'x' WHERE batch_no = -1")
    with pytest.raises(TransferError, match="batch -1"):
        transfer.migrate(stored, f"sqlite:///{target}", options=STORE)


def test_items_written_meanwhile_are_a_conflict(
    stored: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The application is already running on the target: its item is not overwritten."""
    monkeypatch.setattr("persistence.transfer.engine.BATCH_RECORDS", 9)
    written = False

    def write_to_target(phase: transfer.Phase, done: int, total: int, unit_bytes: int) -> None:
        nonlocal written
        if phase == "write" and not written:
            written = True
            import persistence

            with persistence.open(target) as db:
                assert db.store is not None
                db.store.put(("more",), "k07", {"from": "the application"})

    with pytest.raises(ConflictError, match="already has another item in namespace 'more', key 'k07'"):
        transfer.migrate(stored, target, options=BOTH, progress=write_to_target)
    found = stores.items_of(target)
    assert found[("more",), "k07"][0] == {"from": "the application"}
    assert transfer.migrate(stored, target, options=replace(BOTH, on_conflict="merge")).verified
    assert stores.items_of(target)[("more",), "k07"][0] == {"from": "the application"}


def test_resumed_with_another_rule(stored: Path, tmp_path: Path) -> None:
    """Items that the target has are treated as they were when the run began, and so compared."""
    target = tmp_path / "killed.db"
    with stores.sqlite_store(target) as store:
        store.put(("more",), "k00", {"n": "theirs"})
        store.put(("more",), "k19", {"n": "theirs"})
    interrupted(stored, target, replace(STORE, on_conflict="skip"))
    report = transfer.migrate(stored, f"sqlite:///{target}", options=replace(STORE, on_conflict="replace"))
    assert (report.batches_skipped, report.store.kept, report.verified) == (2, 2, True)
    with stores.sqlite_store(target) as store:
        there = [store.get(("more",), key) for key in ("k00", "k19")]
        assert [item and item.value for item in there] == [{"n": "theirs"}] * 2

"""Changing the encryption key, as docs/security.md says: which values come under the new key, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import persistence
from persistence.errors import EncryptionError
from persistence.settings import Settings, get_settings
from persistence.testing.subject import at, bare
from tests.docs.pages import DOCS, blocks

OLD, NEW = "o" * 32, "n" * 32


@pytest.fixture
def is_needed(
    table_dsn: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[], bool]:
    """What the program on the page says: whether the old key is still needed."""
    (program,) = (block.text for block in blocks(DOCS / "security.md") if block.language == "python")
    monkeypatch.setenv("PERSISTENCE_DSN", table_dsn)
    monkeypatch.setenv("PERSISTENCE_ENCRYPTION_KEY", NEW)
    monkeypatch.setenv("PERSISTENCE_ENCRYPTION_OLD_KEYS", OLD)

    def ask() -> bool:
        get_settings.cache_clear()
        capsys.readouterr()
        exec(program, {})  # noqa: S102 - our own page
        return "still needed" in capsys.readouterr().out

    return ask


@pytest.mark.parametrize("table_dsn", ["sqlite", "postgres"], indirect=True)
def test_old_key_goes_when_nothing_is_under_it(table_dsn: str, is_needed: Callable[[], bool]) -> None:
    def put(id_: str, new: list[str], **settings: Any) -> None:
        values = {"kept": ["long"], "grows": [id_]}
        versions: dict[str, str | int | float] = {"kept": id_ if "kept" in new else "1", "grows": id_}
        parent = {} if id_ == "1" else {"checkpoint_id": str(int(id_) - 1)}
        config = at("t")
        config["configurable"] |= parent
        with persistence.open(table_dsn, settings=Settings(**settings)) as db:
            assert db.checkpointer is not None
            changed = {channel: versions[channel] for channel in new}
            db.checkpointer.put(config, bare(id_, values, versions), {}, changed)

    both = {"encryption_key": NEW, "encryption_old_keys": OLD}
    put("1", ["kept", "grows"], encryption_key=OLD)
    # First every process learns to read the new key, then one after the other writes with it.
    put("2", ["grows"], **both)
    with persistence.open(table_dsn, settings=Settings(encryption_key=OLD, encryption_old_keys=NEW)) as db:
        assert db.checkpointer is not None
        assert len(list(db.checkpointer.list(at("t")))) == 2
    assert is_needed()
    prune(table_dsn, both)
    on_postgres = table_dsn.startswith("postgresql")
    assert is_needed() is on_postgres, "a SQLite checkpoint is written as a whole; here 'kept' stays"
    if on_postgres:
        with pytest.raises(EncryptionError):
            latest(table_dsn, encryption_key=NEW, encryption_old_keys=None)
    put("3", ["kept", "grows"], **both)
    prune(table_dsn, both)
    assert not is_needed()
    assert latest(table_dsn, encryption_key=NEW, encryption_old_keys=None) == {
        "kept": ["long"],
        "grows": ["3"],
    }


def prune(dsn: str, settings: dict[str, str]) -> None:
    with persistence.open(dsn, settings=Settings(**settings)) as db:
        assert db.checkpointer is not None
        db.checkpointer.prune(["t"])


def latest(dsn: str, **settings: Any) -> dict[str, Any]:
    with persistence.open(dsn, settings=Settings(**settings)) as db:
        assert db.checkpointer is not None
        found = db.checkpointer.get_tuple(at("t"))
        assert found is not None
        return found.checkpoint["channel_values"]

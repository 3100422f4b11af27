"""The entries of docs/troubleshooting.md: each error is provoked, and cured as the page says."""

from __future__ import annotations

import inspect
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

import persistence
from persistence import errors, schema, transfer
from persistence.errors import PersistenceError
from persistence.registry import provider_for, register
from persistence.settings import Settings, get_settings
from persistence.testing.subject import at, bare
from tests.support import make_chat

FILE = "sqlite:///chat.db"
KEY, NEW_KEY = "k" * 16, "n" * 16


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


@contextmanager
def fails(error: type[PersistenceError], match: str) -> Iterator[None]:
    """Exactly this error, whose message or hint says so."""
    with pytest.raises(error, match=f"(?s){match}") as caught:
        yield
    assert caught.value.code == error.code


def test_every_entry_is_provoked_here() -> None:
    tests = " ".join(name for name in globals() if name.startswith("test_"))
    for _, error in inspect.getmembers(errors, inspect.isclass):
        if issubclass(error, PersistenceError) and error is not PersistenceError:
            assert error.code.replace("-", "_") in tests, error


def open_(dsn: str, **settings: Any) -> persistence.Persistence:
    return persistence.open(dsn, settings=Settings(connect_attempts=1, **settings))


def put(thread: str = "t", meta: Any = None, value: Any = 1, dsn: str = FILE, **settings: Any) -> None:
    with open_(dsn, **settings) as db:
        saver: Any = db.checkpointer
        saver.put(at(thread), bare("1", {"x": [value]}), meta or {}, {"x": 1})


def get(**settings: Any) -> Any:
    with open_(FILE, **settings) as db:
        assert db.checkpointer is not None
        return db.checkpointer.get_tuple(at("t"))


def test_dsn() -> None:
    with fails(errors.DsnError, r"unknown scheme 'sqlit'.*known: .*postgresql.*did you mean 'sqlite'"):
        open_("sqlit:///chat.db")
    with fails(errors.DsnError, r"sqlite:///chat\.db"):
        open_("chat.db")
    with fails(errors.DsnError, "%2F"):
        open_("postgresql://ada:p@ss/word@host/db")
    assert provider_for("postgresql://ada:p%40ss%2Fword@host/db").dsn.masked == "postgresql://ada:***@host/db"


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSISTENCE_POOL_MAX", "many")
    with fails(errors.SettingsError, "PERSISTENCE_POOL_MAX"):
        Settings()
    monkeypatch.delenv("PERSISTENCE_POOL_MAX")
    Path(".env").write_text("PERSISTENCE_POOL_MX=3\n")
    with fails(errors.SettingsError, r"PERSISTENCE_POOL_MX.*PERSISTENCE_POOL_MAX"):
        Settings()
    Path(".env").unlink()
    with fails(errors.SettingsError, "OLD_KEYS is set without"):
        Settings(encryption_old_keys=KEY)


def test_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = type(provider_for("memory://"))
    with fails(errors.ConfigurationError, "'memory' has a provider already.*replace=True"):
        register(provider)
    folder = Path("acme-1.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[persistence.providers]\nacme = acme_missing:Provider\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    with fails(errors.ConfigurationError, "'acme' from acme .*cannot be loaded"):
        open_("acme://x")


def test_missing_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "Crypto.Cipher.AES", None)
    with fails(errors.MissingDriverError, r'pip install "langgraph-persistence\[encryption\]"'):
        get(encryption_key=KEY)


def test_report() -> None:
    from persistence.transfer.report_page import write_report

    with fails(errors.ReportError, "nowhere"):
        write_report(Path("nowhere/r.html"), {"command": "migrate", "outcome": "succeeded"})


def test_unsupported() -> None:
    with fails(errors.UnsupportedError, "memory"):
        schema.history(provider_for("memory://"))
    with fails(errors.UnsupportedError, "memory"):
        transfer.migrate("memory://", FILE)
    with open_(FILE) as db:
        saver: Any = db.checkpointer
        saver.put(at("t"), bare("1", {"x": [1]}), {"delta_writes_versioned": True}, {"x": 1})
        with fails(errors.UnsupportedError, "delete the whole thread"):
            saver.prune(["t"])


def test_connect(tmp_path: Path) -> None:
    with fails(errors.ConnectError, r"127\.0\.0\.1.*start the database or correct the DSN"):
        open_("postgresql://ada:secret@127.0.0.1:1/db")
    (tmp_path / "folder").mkdir()
    Path("text.db").write_text("this is no database at all, only text" * 30)
    for path, reason in (
        ("no/chat.db", "folder does not exist"),
        ("folder", "folder"),
        ("text.db", "not a SQLite database"),
    ):
        with fails(errors.ConnectError, reason):
            open_(f"sqlite:///{path}")


def test_schema(postgres_dsn: str) -> None:
    with fails(errors.SchemaError, "persistence setup"):
        put(setup_on_open=False)
    schema.setup(provider_for(FILE))
    put(setup_on_open=False)
    with psycopg.connect(postgres_dsn, autocommit=True) as conn:
        schema.setup(provider_for(postgres_dsn))
        conn.execute("DROP TABLE checkpoint_writes")
    with fails(errors.SchemaError, r"checkpoint_writes.*`persistence setup --repair`"):
        open_(postgres_dsn)
    schema.setup(provider_for(postgres_dsn), repair=True)
    open_(postgres_dsn).close()
    with psycopg.connect(postgres_dsn, autocommit=True) as conn:
        conn.execute("UPDATE persistence_alembic_version SET version_num = '9001'")
    with fails(errors.SchemaError, "older than the database"):
        open_(postgres_dsn)
    open_(postgres_dsn, setup_on_open=False).close()  # as docs/upgrading.md says


def test_source(tmp_path: Path, postgres_dsn: str) -> None:
    with fails(errors.SourceError, "chat.db"):
        transfer.migrate(FILE, postgres_dsn)
    with closing(sqlite3.connect("other.db")) as conn:
        conn.execute("CREATE TABLE shopping (item TEXT)")
    with fails(errors.SourceError, "other.db"):
        transfer.migrate("sqlite:///other.db", postgres_dsn)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.db"]


def test_archive(tmp_path: Path, postgres_dsn: str) -> None:
    make_chat(tmp_path)
    transfer.export(FILE, Path("copy"))
    part = Path("copy/part-000001.msgpack.zst")
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with fails(errors.ArchiveError, part.name):
        transfer.import_(Path("copy"), postgres_dsn)
    part.write_bytes(whole)
    Path("copy/manifest.json").unlink()
    with fails(errors.ArchiveError, "manifest"):
        transfer.import_(Path("copy"), postgres_dsn)


def test_transfer_and_conflict_and_verification(tmp_path: Path, postgres_dsn: str) -> None:
    make_chat(tmp_path)
    transfer.migrate(FILE, postgres_dsn)
    put("alice", value=7)  # after the migration
    put("alice", value=8, dsn="sqlite:///second.db")
    verdict = transfer.verify(FILE, postgres_dsn)
    with fails(errors.VerificationError, "differ in 1 of 2 threads: .*alice"):
        verdict.require()
    with fails(errors.ConflictError, "alice"):
        transfer.migrate("sqlite:///second.db", postgres_dsn)
    with open_(postgres_dsn) as db:
        assert db.checkpointer is not None
        db.checkpointer.delete_thread("alice")
    assert transfer.migrate("sqlite:///second.db", postgres_dsn).verified
    put("pickled", dsn="sqlite:///third.db")
    with closing(sqlite3.connect("third.db")) as conn, conn:
        conn.execute("UPDATE checkpoints SET metadata = '{\"a\": NaN}'")
    with fails(errors.TransferError, "pickled"):
        transfer.migrate("sqlite:///third.db", postgres_dsn)


def test_invalid_input() -> None:
    with fails(errors.InvalidInputError, "NUL"):
        put("a\0b")
    with fails(errors.InvalidInputError, "when"):
        put(meta={"when": {1, 2}})
    assert get() is None, "nothing of those calls was stored"


def test_encryption() -> None:
    put()
    with fails(errors.EncryptionError, "PERSISTENCE_ALLOW_PLAINTEXT"):
        get(encryption_key=KEY)
    assert get(encryption_key=KEY, allow_plaintext=True) is not None
    put(encryption_key=KEY)
    with fails(errors.EncryptionError, "another PERSISTENCE_ENCRYPTION_KEY"):
        get(encryption_key=NEW_KEY)
    assert get(encryption_key=NEW_KEY, encryption_old_keys=KEY) is not None
    with fails(errors.EncryptionError, "no key is set"):
        get()


async def test_wrong_loop() -> None:
    async with persistence.aopen(FILE, settings=Settings()) as db:
        assert db.checkpointer is not None
        with fails(errors.WrongLoopError, "event loop"):
            db.checkpointer.get_tuple(at("t"))
        assert await db.checkpointer.aget_tuple(at("t")) is None


def test_closed() -> None:
    with open_(FILE) as db:
        saver = db.checkpointer
    assert saver is not None
    with fails(errors.ClosedError, "closed"):
        saver.get_tuple(at("t"))


def test_sealed(postgres_dsn: str) -> None:
    put()
    transfer.cut_over(FILE, postgres_dsn)
    with fails(errors.SealedError, "has moved to postgresql.*`persistence unseal`.*use the DSN"):
        put()
    put(thread="new", dsn=postgres_dsn)
    assert get() is not None
    transfer.unseal(FILE)
    put()


def test_sealed_postgres(postgres_dsn: str) -> None:
    put(dsn=postgres_dsn)
    transfer.cut_over(postgres_dsn, FILE)
    with fails(errors.SealedError, "has moved to sqlite.*`persistence unseal`.*use the DSN"):
        put(dsn=postgres_dsn)
    assert transfer.unseal(postgres_dsn)
    put(dsn=postgres_dsn)

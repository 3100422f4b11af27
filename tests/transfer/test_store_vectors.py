"""Vectors move between LangGraph's stores, with a real pgvector."""

from __future__ import annotations

import sqlite3
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
from langgraph.store.base import BaseStore
from langgraph.store.postgres import PostgresStore
from langgraph.store.sqlite import SqliteStore
from langgraph.store.sqlite.base import SqliteIndexConfig

from persistence import transfer
from persistence.errors import ConflictError
from persistence.registry import provider_for
from persistence.transfer import RefusedError
from persistence.transfer.items import Item
from tests.support import fresh_database
from tests.transfer import make
from tests.transfer.stores import STORE
from tests.transfer.test_follow_store import follow

Vectors = dict[tuple[str, str, str], bytes]
TEXTS = {"tokyo": [1.0, 0.1, 0.0], "lisbon": [0.0, 1.0, 1 / 3], "both": [0.7, 0.7, -1e-30]}


def embed(texts: Sequence[str]) -> list[list[float]]:
    return [TEXTS[text] for text in texts]


def index(kind: str = "vector", dims: int = 3) -> Mapping[str, Any]:
    return {"dims": dims, "embed": embed, "fields": ["text"], "ann_index_config": {"vector_type": kind}}


class _Connection(sqlite3.Connection):
    """Also where Python was built without extensions."""

    def enable_load_extension(self, enable: bool, /) -> None:
        return None


@pytest.fixture(autouse=True)
def _distance(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the extension sqlite-vec brings to a search; storing needs nothing of it."""

    def cosine(left: bytes, right: bytes) -> float:
        a, b = (struct.unpack(f"<{len(v) // 4}f", v) for v in (left, right))
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return float(1 - dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5)

    monkeypatch.setattr(
        "langgraph.store.sqlite.base.sqlite_vec.load",
        lambda conn: conn.create_function("vec_distance_cosine", 2, cosine),
    )


@contextmanager
def sqlite_store(path: Path) -> Iterator[SqliteStore]:
    with closing(sqlite3.connect(path, isolation_level=None, factory=_Connection)) as conn:
        store = SqliteStore(conn, index=cast(SqliteIndexConfig, {**index(), "text_fields": ["text"]}))
        store.setup()
        yield store


@contextmanager
def postgres_store(dsn: str, kind: str = "vector", dims: int = 3) -> Iterator[PostgresStore]:
    with PostgresStore.from_conn_string(dsn, index=cast(Any, index(kind, dims))) as store:
        store.setup()
        yield store


def ranked(store: BaseStore) -> list[str]:
    return [item.key for item in store.search(("trips",), query="tokyo")]


def sqlite_vectors(path: Path) -> Vectors:
    with closing(sqlite3.connect(path)) as conn:
        query = "SELECT prefix, key, field_name, embedding FROM store_vectors"
        return {tuple(row[:3]): row[3] for row in conn.execute(query)}


def postgres_vectors(dsn: str) -> Vectors:
    """By pgvector's own text."""
    with psycopg.connect(dsn) as conn:
        rows = conn.execute("SELECT prefix, key, field_name, embedding::text FROM store_vectors").fetchall()
    numbers = {tuple(row[:3]): [float(n) for n in row[3].strip("[]").split(",")] for row in rows}
    return {key: struct.pack(f"<{len(n)}f", *n) for key, n in numbers.items()}


@pytest.fixture(scope="module")
def vector_server(postgres_server: str) -> Iterator[str]:
    """A server with pgvector: the session's, or one of our own."""
    with psycopg.connect(postgres_server) as conn:
        query = "SELECT 1 FROM pg_available_extensions WHERE name = 'vector'"
        if conn.execute(query).fetchone():
            yield postgres_server
            return
    from persistence.backends import embedded

    with (
        tempfile.TemporaryDirectory(prefix="persistence-tests-") as folder,
        embedded.serve(Path(folder) / "pg") as conninfo,
    ):
        yield conninfo


@pytest.fixture
def vector_dsn(vector_server: str) -> Iterator[str]:
    with fresh_database(vector_server) as dsn:
        yield dsn


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "store.db"
    with sqlite_store(path) as store:
        for key in TEXTS:
            store.put(("trips",), key, {"text": key})
        store.put(("trips",), "unseen", {"text": "tokyo"}, index=False)
        store.put(("trips",), "deleted", {"text": "tokyo"})
        store.delete(("trips",), "deleted")
    assert len(sqlite_vectors(path)) == 4  # SQLite keeps the vector of what was deleted
    return path


def moved(source: Path) -> Vectors:
    return {key: data for key, data in sqlite_vectors(source).items() if key[1] != "deleted"}


@pytest.mark.parametrize("by_archive", [False, True], ids=["direct", "archive"])
def test_to_pgvector_and_back(source: Path, vector_dsn: str, tmp_path: Path, by_archive: bool) -> None:
    with postgres_store(vector_dsn):
        pass  # makes its tables
    archive = tmp_path / "archive" if by_archive else None
    report = transfer.migrate(source, vector_dsn, options=STORE, archive=archive)
    assert (report.store.items, report.store.vectors, report.verified) == (4, 3, True)
    assert postgres_vectors(vector_dsn) == moved(source)
    with postgres_store(vector_dsn) as store, sqlite_store(source) as before:
        assert ranked(store) == ranked(before) == ["tokyo", "both", "lisbon"]
    assert transfer.verify(source, vector_dsn, include=["store"]).equal
    # Back into a file whose store has never had an index, and on into a third one.
    for left, right in ((vector_dsn, "back"), (f"sqlite:///{tmp_path}/back.db", "third")):
        target = tmp_path / f"{right}.db"
        assert transfer.migrate(left, f"sqlite:///{target}", options=STORE).verified
        assert sqlite_vectors(target) == moved(source)
        with sqlite_store(target) as store:
            assert ranked(store) == ["tokyo", "both", "lisbon"]
    with provider_for(vector_dsn).source() as one, provider_for(f"sqlite:///{target}").source() as other:
        assert list(one.store().items()) == list(other.store().items())


def test_the_binary_form_is_the_one_of_pgvector(vector_dsn: str) -> None:
    """As ``vector_send`` and ``halfvec_send`` write it."""
    from persistence.backends.postgres.transfer_store import _packed
    from persistence.transfer.items import Vector

    vector = Vector("f", struct.pack("<3f", 1.5, -2.0, 0.25), None, None)
    with psycopg.connect(vector_dsn) as conn:
        conn.execute("CREATE EXTENSION vector")
        for kind, form in (
            ("vector", "000300003fc00000c00000003e800000"),
            ("halfvec", "000300003e00c0003400"),
        ):
            query = f"SELECT {kind}_send('[1.5,-2,0.25]')"
            sent = conn.execute(query.encode()).fetchall()[0][0]
            assert sent == _packed(vector, kind) == bytes.fromhex(form)


def test_half_precision(source: Path, vector_dsn: str, tmp_path: Path) -> None:
    with postgres_store(vector_dsn, "halfvec"):
        pass
    with pytest.raises(RefusedError, match="3 x a vector does not fit the precision of the target"):
        transfer.migrate(source, vector_dsn, options=STORE)
    half = struct.pack("<3f", 1.5, -2.0, 0.25)
    make.execute(source, "UPDATE store_vectors SET embedding = ?", half)
    assert transfer.migrate(source, vector_dsn, options=STORE).verified
    assert set(postgres_vectors(vector_dsn).values()) == {half}
    assert transfer.migrate(vector_dsn, f"sqlite:///{tmp_path}/back.db", options=STORE).verified
    assert sqlite_vectors(tmp_path / "back.db") == moved(source)


@pytest.mark.parametrize(
    ("embedding", "reason"),
    [
        (struct.pack("<2f", 1, 2), "a vector has 2 dimensions, the target's column 3"),
        (struct.pack("<3f", 1, 2, float("nan")), "not finite"),
        (b"abc", "does not consist of float32 numbers"),
        (None, "does not consist of float32 numbers"),
    ],
)
def test_refused(source: Path, vector_dsn: str, embedding: bytes | None, reason: str) -> None:
    with postgres_store(vector_dsn):
        pass
    make.execute(source, "UPDATE store_vectors SET embedding = ? WHERE key = 'both'", embedding)
    with pytest.raises(RefusedError, match=reason):
        transfer.migrate(source, vector_dsn, options=STORE)
    assert postgres_vectors(vector_dsn) == {}


def test_without_pgvector(source: Path, postgres_dsn: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"3 x vectors cannot be kept.*--without-vectors"):
        transfer.migrate(source, postgres_dsn, options=STORE)
    with psycopg.connect(postgres_dsn) as conn:
        assert conn.execute("SELECT to_regclass('store')").fetchone() == (None,)
    bare = replace(STORE, vectors=False)
    for target in (postgres_dsn, f"sqlite:///{tmp_path}/bare.db"):
        report = transfer.migrate(source, target, options=bare)
        assert (report.store.items, report.store.vectors, report.verified) == (4, 0, True)
        assert transfer.verify(source, target, include=["store"], vectors=False).equal
        verdict = transfer.verify(source, target, include=["store"])
        assert [d.key for d in verdict.item_differences] == ["both", "lisbon", "tokyo"]
        assert {d.detail for d in verdict.item_differences} == {"differs in vectors"}


def test_replacing_replaces_the_vectors_too(source: Path, vector_dsn: str, tmp_path: Path) -> None:
    """Also those of a field that the new item has not, and what SQLite has kept of a deleted one."""
    path = tmp_path / "target.db"
    for opened in (postgres_store(vector_dsn), sqlite_store(path)):
        with opened as store:
            store.put(("trips",), "unseen", {"text": "lisbon"})
            store.put(("trips",), "tokyo", {"text": "lisbon"})
    with sqlite_store(path) as store:
        store.put(("trips",), "both", {"text": "lisbon"})
        store.delete(("trips",), "both")
    for target in (vector_dsn, f"sqlite:///{path}"):
        with pytest.raises(ConflictError, match="key 'tokyo'"):
            transfer.migrate(source, target, options=STORE)
        assert transfer.migrate(source, target, options=replace(STORE, on_conflict="replace")).verified
    assert postgres_vectors(vector_dsn) == sqlite_vectors(path) == moved(source)
    with provider_for(vector_dsn).source() as opened_source:
        items = [item for item in opened_source.store().items() if isinstance(item, Item)]
    assert [len(item.vectors) for item in items] == [1, 1, 1, 0]


@pytest.mark.parametrize("into", ["pgvector", "file"])
def test_followed(into: str, source: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A vector that changed comes along, and one whose item is gone goes; another run leaves them out."""
    target = f"sqlite:///{tmp_path}/target.db"
    if into == "pgvector":
        target = request.getfixturevalue("vector_dsn")
        with postgres_store(target):
            pass  # makes its tables
    follow(source, target, include=["store"])
    with sqlite_store(source) as store:
        store.put(("trips",), "tokyo", {"text": "lisbon"})
        store.put(("trips",), "unseen", {"text": "both"})
        store.delete(("trips",), "both")
    make.execute(source, "UPDATE store_vectors SET embedding = zeroblob(12) WHERE key = 'lisbon'")
    assert follow(source, target, include=["store"]).items == 4
    run = transfer.cut_over(source, target).run_id
    there = {key: data for key, data in sqlite_vectors(source).items() if key[1] not in ("both", "deleted")}
    held = postgres_vectors(target) if into == "pgvector" else sqlite_vectors(tmp_path / "target.db")
    assert held == there
    assert transfer.verify(source, target, include=["store"]).equal
    with pytest.raises(sqlite3.IntegrityError, match="has moved"):
        make.execute(source, "DELETE FROM store_vectors")
    transfer.undo(run, target)
    follow(source, target, include=["store"], vectors=False)
    assert transfer.verify(source, target, include=["store"], vectors=False).equal
    assert not (postgres_vectors(target) if into == "pgvector" else sqlite_vectors(tmp_path / "target.db"))


@pytest.mark.parametrize("kind", ["vector", "halfvec"])
def test_followed_from_postgres(kind: str, vector_dsn: str, tmp_path: Path) -> None:
    """Also a vector that changes and an item that does not."""
    path = tmp_path / "target.db"
    target = f"sqlite:///{path}"
    with postgres_store(vector_dsn, kind) as store:
        for key, text in (("tokyo", "tokyo"), ("both", "both"), ("kept", "both")):
            store.put(("trips",), key, {"text": text})
    follow(vector_dsn, target, include=["store"])
    with postgres_store(vector_dsn, kind) as store:
        store.put(("trips",), "unseen", {"text": "both"})
        store.delete(("trips",), "both")
    change = "UPDATE store_vectors SET embedding = '[0.5, 0.25, 2]' WHERE key = 'tokyo'"
    with psycopg.connect(vector_dsn) as conn:
        conn.execute(change)
    assert follow(vector_dsn, target, include=["store"]).items == 3
    assert transfer.verify(vector_dsn, target, include=["store"]).equal
    assert sqlite_vectors(path)["trips", "tokyo", "text"] == struct.pack("<3f", 0.5, 0.25, 2)
    done = transfer.cut_over(vector_dsn, target)
    assert done.sealed
    assert {key[1] for key in sqlite_vectors(path)} == {"tokyo", "kept", "unseen"}
    with psycopg.connect(vector_dsn) as conn, pytest.raises(psycopg.IntegrityError, match="has moved"):
        conn.execute(change)
    assert transfer.unseal(vector_dsn)
    with psycopg.connect(vector_dsn) as conn:
        conn.execute(change)

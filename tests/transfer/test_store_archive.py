"""The store in an archive: version 2 of the format, read with the same distrust as threads."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
import zstandard

from persistence import transfer
from persistence.errors import ArchiveError
from persistence.transfer import archive_format as fmt
from tests.transfer import make, stores
from tests.transfer.stores import BOTH, STORE

Frames = list[list[Any]]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    source = stores.fill(folder / "store.db")
    for statement in (
        "CREATE TABLE store_vectors (prefix, key, field_name, embedding, created_at, updated_at)",
        "INSERT INTO store_vectors VALUES ('users', 'soon', 'x', x'0000803f00000040', NULL, NULL)",
    ):
        make.execute(source, statement)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fmt, "PART_BYTES", 500)
        transfer.export(source, folder / "archive", options=STORE)
    return folder / "archive"


@pytest.fixture
def archive(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "archive"))


def frames(part: Path) -> Iterator[list[Any]]:
    """By zstd and any msgpack reader: an archive outlives this package."""
    data = zstandard.ZstdDecompressor().stream_reader(part.read_bytes()).read()
    while data:
        assert data[0] == 0xC6
        length = int.from_bytes(data[1:5])
        yield msgspec.msgpack.decode(data[5 : 5 + length])
        data = data[5 + length :]


def test_standard_tools_read_it(archive: Path) -> None:
    manifest = json.loads((archive / "manifest.json").read_text())
    assert (manifest["version"], manifest["store"]["items"], manifest["store"]["namespaces"]) == (2, 17, 6)
    parts = sorted(archive.glob("store-*"))
    assert [part.name for part in parts] == [part["file"] for part in manifest["store"]["parts"]]
    assert len(parts) > 2
    read = [list(frames(part)) for part in parts]
    assert [len(part) for part in read] == [part["records"] for part in manifest["store"]["parts"]]
    kinds = [frame[0] for part in read for frame in part]
    assert (kinds.count("i"), kinds.count("n")) == (17, 6)
    items = {(f[1], f[2]): f[3:] for part in read for f in part if f[0] == "i"}
    value, created_at, updated_at, expires_at, ttl, vectors = items["users", "soon"]
    assert json.loads(value) == {"x": 1}
    assert expires_at - created_at == pytest.approx(120 * 60 * 10**6, abs=10**7)
    assert (updated_at, ttl) == (created_at, 120.0)
    assert vectors == [["x", struct.pack("<2f", 1, 2), None, None]]


def test_without_a_store_it_is_version_1(filled: Path, tmp_path: Path) -> None:
    transfer.export(filled, tmp_path / "plain")
    manifest = json.loads((tmp_path / "plain" / "manifest.json").read_text())
    assert manifest["version"] == 1
    assert "store" not in manifest
    transfer.export(filled, tmp_path / "both", options=BOTH)
    both = json.loads((tmp_path / "both" / "manifest.json").read_text())
    assert (both["version"], both["store"]["items"], both["store"]["parts"]) == (2, 0, [])
    assert both["fingerprint"] == manifest["fingerprint"]
    assert transfer.verify_archive(tmp_path / "both").total_items == 0


def test_verifies_alone(archive: Path) -> None:
    for depth in ("digests", "checksums"):
        checked = transfer.verify_archive(archive, check=transfer.Check(depth=depth))
        assert (checked.items, checked.total_items) == (17, 17)


def test_a_sample_has_items_too(archive: Path) -> None:
    """Together the samples of all seeds find damage in any part, whether namespaces begin in it or before."""

    def check(seed: int, depth: transfer.Depth = "digests", size: str = "20%") -> transfer.ArchiveCheck:
        asked = transfer.Check(depth=depth, sample=size, seed=seed)
        return transfer.verify_archive(archive, check=asked)

    parts = sorted(archive.glob("store-*"))
    assert len(parts) == 3
    some = [check(seed) for seed in range(10)]
    assert all(4 <= each.items < 17 and each.parts < 3 for each in some)
    assert f" and {some[0].items} of 17 items of the store (--sample 20% --seed 0)" in some[0].summary()
    assert (check(1, size="100%").items, check(1, size="100%").parts) == (17, 3)
    assert (check(1, "checksums").parts, check(1, "checksums").total_parts) == (1, 3)
    for part in parts:
        data = part.read_bytes()
        part.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        for depth in ("digests", "checksums"):
            with pytest.raises(ArchiveError, match=part.name):
                [check(seed, depth) for seed in range(10)]
        part.write_bytes(data)


def test_a_part_that_was_made_up_is_no_sample(archive: Path) -> None:
    """With right checksums; where the namespace's beginning is not read, its end names it all the same."""
    rewrite(archive, lambda read: read[4].__setitem__(1, "c"))
    with pytest.raises(ArchiveError, match="namespace 'c'"):
        transfer.verify_archive(archive, check=transfer.Check(sample="1"))


def test_every_flipped_byte_is_found(archive: Path, postgres_dsn: str) -> None:
    choose = random.Random(3)  # noqa: S311 - a sample, not a secret
    for file in sorted(archive.iterdir()):
        data = file.read_bytes()
        for place in {0, len(data) // 2, len(data) - 2, *choose.sample(range(len(data)), 5)}:
            spoiled = bytearray(data)
            spoiled[place] ^= 0x20 if data[place : place + 1].strip() else 0x01
            file.write_bytes(spoiled)
            with pytest.raises(ArchiveError):
                transfer.verify_archive(archive)
        file.write_bytes(data)
    last = sorted(archive.glob("store-*"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(ArchiveError):
        transfer.import_(archive, postgres_dsn, options=STORE)
    with psycopg.connect(postgres_dsn) as conn:
        assert conn.execute("SELECT to_regclass('store')").fetchone() == (None,)


def rewrite(archive: Path, change: Callable[[Frames], Any], **claims: Any) -> None:
    """One part, with other frames and right checksums: what somebody could make."""
    for path in sorted(archive.glob("store-*"))[1:]:
        path.unlink()
    path = archive / fmt.store_part_name(1)
    read: Frames = [
        ["i", "a", "k1", b"{}", 1, 2, 3, 4.0, []],
        ["i", "a", "k2", b'{"x":1}', 1, 2, None, None, [["f", b"\0\0\0\0", 1, 2]]],
        ["n", "a", b"", 2],
        ["i", "b", "k1", b"{}", None, None, None, None, []],
        ["n", "b", b"", 1],
    ]
    change(read)
    digest, everything = hashlib.sha256(), hashlib.sha256()
    for frame in read:
        if frame[0] == "i":
            vectors = [[f, hashlib.sha256(data).digest(), c, u] for f, data, c, u in frame[8]]
            digest.update(msgspec.msgpack.encode([*frame[:8], vectors]))
        elif frame[0] == "n":
            frame[2] = frame[2] or digest.digest()
            everything.update(msgspec.msgpack.encode([frame[1], frame[2]]))
            digest = hashlib.sha256()
    encoded = [msgspec.msgpack.encode(frame) for frame in read]
    raw = b"".join(b"\xc6" + len(data).to_bytes(4) + data for data in encoded)
    path.write_bytes(zstandard.ZstdCompressor().compress(raw))
    manifest = msgspec.json.decode((archive / fmt.MANIFEST).read_bytes(), type=fmt.Manifest)
    assert isinstance(manifest.store, fmt.Store)
    data = path.read_bytes()
    part = fmt.StorePart(path.name, hashlib.sha256(data).hexdigest(), len(data), len(raw), len(read))
    sizes = sum(len(f[3]) + sum(len(v[1]) for v in f[8]) for f in read if f[0] == "i")
    section = {"namespaces": 2, "items": 3, "vectors": 1, "bytes": sizes} | claims
    manifest.store = fmt.Store(everything.hexdigest(), **section, parts=[part])
    (archive / fmt.MANIFEST).write_bytes(fmt.manifest_bytes(manifest))


def test_what_somebody_else_wrote_by_the_page(archive: Path, postgres_dsn: str) -> None:
    """Digests and all, from the description of the format alone."""
    rewrite(archive, lambda read: None)
    assert transfer.verify_archive(archive).items == 3
    report = transfer.import_(
        archive, postgres_dsn, options=transfer.Options(include=["store"], vectors=False)
    )
    assert (report.store.items, report.verified) == (3, True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda read: read.insert(1, read.pop(0)), "out of order"),
        (lambda read: read.insert(1, read[0]), "out of order"),
        (lambda read: read.pop(2), "namespace 'a' does not end"),
        (lambda read: read.pop(), "does not hold what its manifest says"),
        (lambda read: read.append(["n", "c", b"", 0]), "namespace 'c' does not have the digest"),
        (lambda read: read.insert(3, ["i", "a", "k3", b"{}", 1, 2, 3, 4.0, []]), "goes on after its end"),
        (lambda read: read[2].__setitem__(2, b"x" * 32), "does not have the digest"),
        (lambda read: read[2].__setitem__(3, 1), "does not have the digest"),
        (lambda read: read[0].__setitem__(3, b'{"b":1,"a":2}'), "not canonical"),
        (lambda read: read[0].__setitem__(3, b"{"), "is damaged"),
        (lambda read: read[0].__setitem__(7, float("nan")), "is no number"),
        (lambda read: read[0].__setitem__(8, [["f", b"abc", 1, 2]]), "float32"),
        (lambda read: read[0].__setitem__(8, [["f", b"", 1, 2]]), "float32"),
        (lambda read: read[0].__setitem__(8, [["f", b"abcd", 1, 2]] * 2), "not sorted"),
        (lambda read: read[0].append(1), "holds no valid record"),
        (lambda read: read.append(["t", "thread", False]), "holds no valid record"),
    ],
)
def test_damage_is_named(archive: Path, tmp_path: Path, change: Callable[[Frames], Any], reason: str) -> None:
    rewrite(archive, change)
    with pytest.raises(ArchiveError, match=reason):
        transfer.verify_archive(archive)
    with pytest.raises(ArchiveError):
        transfer.import_(archive, f"sqlite:///{tmp_path}/new.db", options=STORE)
    assert not (tmp_path / "new.db").exists()


@pytest.mark.parametrize("claim", ["namespaces", "items", "vectors", "bytes"])
def test_claims_are_checked(archive: Path, claim: str) -> None:
    rewrite(archive, lambda read: None, **{claim: 99})
    with pytest.raises(ArchiveError, match="does not hold what its manifest says"):
        transfer.verify_archive(archive)


@pytest.mark.parametrize(("version", "keep"), [(1, True), (2, False), (3, True)])
def test_versions_that_are_not(archive: Path, version: int, keep: bool) -> None:
    manifest = msgspec.json.decode((archive / fmt.MANIFEST).read_bytes(), type=fmt.Manifest)
    manifest.version = version
    manifest.store = manifest.store if keep else msgspec.UNSET
    (archive / fmt.MANIFEST).write_bytes(fmt.manifest_bytes(manifest))
    with pytest.raises(ArchiveError, match=f"format version {version}, which is not known"):
        transfer.verify_archive(archive)


@pytest.mark.parametrize("name", ["store-000001.msgpack.zst", "store-000099.msgpack.zst"])
def test_parts_are_all_there_and_no_more(archive: Path, name: str) -> None:
    path = archive / name
    path.unlink() if path.exists() else path.write_bytes(b"")
    with pytest.raises(ArchiveError, match=name):
        transfer.verify_archive(archive)

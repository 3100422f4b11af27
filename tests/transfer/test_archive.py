"""An archive proves its own content, and a damaged or hostile one is refused in plain words."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
import zstandard

from persistence import transfer
from persistence.errors import ArchiveError
from persistence.transfer import archive_format as fmt
from persistence.transfer import archive_writer
from tests.transfer import make
from tests.transfer.conftest import postgres_tuples, sqlite_tuples


@pytest.fixture(scope="session")
def intact(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives") / "archive"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fmt, "PART_BYTES", 20_000)
        transfer.export(filled, folder)
    assert len(list(folder.glob("part-*"))) > 2
    return folder


@pytest.fixture
def archive(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "archive"))


def test_verifies_alone(archive: Path) -> None:
    report = transfer.verify_archive(archive)
    assert report.verified
    assert report.totals.threads == 4


def test_imports(filled: Path, archive: Path, postgres_dsn: str) -> None:
    assert transfer.import_(archive, postgres_dsn).verified
    assert transfer.verify(filled, postgres_dsn).equal
    assert transfer.verify(archive, postgres_dsn).equal
    assert len(postgres_tuples(postgres_dsn)) == len(sqlite_tuples(filled))


def test_from_postgres(filled: Path, postgres_dsn: str, tmp_path: Path) -> None:
    transfer.migrate(filled, postgres_dsn)
    report = transfer.export(postgres_dsn, tmp_path / "archive")
    assert transfer.verify(filled, tmp_path / "archive").equal
    assert report.fingerprint == transfer.export(filled, tmp_path / "other").fingerprint


def test_standard_tools_read_it(archive: Path) -> None:
    """zstd and any msgpack reader: an archive outlives this package."""
    manifest = json.loads((archive / "manifest.json").read_text())
    data = (
        zstandard.ZstdDecompressor().stream_reader((archive / "part-000001.msgpack.zst").read_bytes()).read()
    )
    kinds, rest = [], data
    while rest:
        assert rest[0] == 0xC6
        length = int.from_bytes(rest[1:5])
        kinds.append(msgspec.msgpack.decode(rest[5 : 5 + length])[0])
        rest = rest[5 + length :]
    assert set(kinds) <= {"t", "v", "c", "w", "e"}
    assert len(kinds) == manifest["parts"][0]["records"]


def test_every_flipped_byte_is_found(archive: Path, postgres_dsn: str) -> None:
    files = sorted(archive.iterdir())
    choose = random.Random(7)  # noqa: S311 - a sample, not a secret
    for file in files:
        data = file.read_bytes()
        places = {0, 1, len(data) // 2, len(data) - 2, *choose.sample(range(len(data)), min(12, len(data)))}
        for place in sorted(places):
            spoiled = bytearray(data)
            spoiled[place] ^= 0x20 if data[place : place + 1].strip() else 0x01
            file.write_bytes(spoiled)
            with pytest.raises(ArchiveError):
                transfer.verify_archive(archive)
        file.write_bytes(data)
    files[-1].write_bytes(files[-1].read_bytes()[:-1])
    with pytest.raises(ArchiveError):
        transfer.import_(archive, postgres_dsn)
    with psycopg.connect(postgres_dsn) as conn:
        assert conn.execute("SELECT to_regclass('checkpoints')").fetchone() == (None,)


def parts(archive: Path) -> list[Path]:
    return sorted(archive.glob("part-*"))


def rewrite_manifest(archive: Path, change: Callable[[fmt.Manifest], None]) -> None:
    """A manifest that someone made, checksum and all."""
    manifest = msgspec.json.decode((archive / fmt.MANIFEST).read_bytes(), type=fmt.Manifest)
    change(manifest)
    (archive / fmt.MANIFEST).write_bytes(fmt.manifest_bytes(manifest))


def rewrite_part(archive: Path, number: int, data: bytes, **claims: Any) -> None:
    """A part that someone made, with a manifest that vouches for it."""
    name = fmt.part_name(number)
    packed = zstandard.ZstdCompressor().compress(data)
    (archive / name).write_bytes(packed)

    def vouch(manifest: fmt.Manifest) -> None:
        part = manifest.parts[number - 1]
        part.sha256, part.bytes = hashlib.sha256(packed).hexdigest(), len(packed)
        part.raw_bytes = len(data)
        for name, value in claims.items():
            setattr(part, name, value)

    rewrite_manifest(archive, vouch)


OF_X = {"first_thread": "x", "last_thread": "x"}


def frame(*items: Any) -> bytes:
    data = msgspec.msgpack.encode(items)
    return b"\xc6" + len(data).to_bytes(4) + data


def no_manifest(archive: Path) -> None:
    (archive / "manifest.json").unlink()


def missing_part(archive: Path) -> None:
    parts(archive)[1].unlink()


def extra_part(archive: Path) -> None:
    shutil.copy(parts(archive)[0], archive / "part-000099.msgpack.zst")


def swapped_parts(archive: Path) -> None:
    one, other = parts(archive)[:2]
    one.rename(archive / "x")
    other.rename(one)
    (archive / "x").rename(other)


def truncated_part(archive: Path) -> None:
    part = parts(archive)[0]
    part.write_bytes(part.read_bytes()[:-10])


def longer_part(archive: Path) -> None:
    with parts(archive)[0].open("ab") as file:
        file.write(b"more")


def newer_version(archive: Path) -> None:
    rewrite_manifest(archive, lambda manifest: setattr(manifest, "version", 2))


def other_format(archive: Path) -> None:
    (archive / "manifest.json").write_text('{"format": "something else"}')


def path_out_of_the_folder(archive: Path) -> None:
    rewrite_manifest(archive, lambda manifest: setattr(manifest.parts[0], "file", "../../etc/passwd"))


def duplicate_part(archive: Path) -> None:
    rewrite_manifest(archive, lambda manifest: manifest.parts.append(manifest.parts[0]))


def symbolic_link(archive: Path) -> None:
    part = parts(archive)[0]
    target = archive.parent / "elsewhere"
    part.rename(target)
    part.symlink_to(target)


def flipped_bit(archive: Path) -> None:
    data = bytearray(parts(archive)[0].read_bytes())
    data[len(data) // 2] ^= 1
    parts(archive)[0].write_bytes(data)


def named_pipe(archive: Path) -> None:
    part = parts(archive)[0]
    part.unlink()
    os.mkfifo(part)


def part_not_compressed(archive: Path) -> None:
    data = b"not zstd at all"
    parts(archive)[0].write_bytes(data)

    def vouch(manifest: fmt.Manifest) -> None:
        manifest.parts[0].sha256, manifest.parts[0].bytes = hashlib.sha256(data).hexdigest(), len(data)

    rewrite_manifest(archive, vouch)


def claimed_length(archive: Path) -> None:
    rewrite_part(archive, 1, b"\xc6\xff\xff\xff\xff" + b"x")


def claimed_length_with_a_claimed_part(archive: Path) -> None:
    rewrite_part(archive, 1, b"\xc6\x3f\xff\xff\xff" + b"x", raw_bytes=(1 << 30) + 4)


def part_beyond_any_size(archive: Path) -> None:
    rewrite_part(archive, 1, b"\xc6\x3f\xff\xff\xff" + b"x", raw_bytes=1 << 40)


def bomb(archive: Path) -> None:
    rewrite_part(archive, 1, b"\xc6\x1f\xff\xff\xff" + bytes(1 << 20), raw_bytes=100)


def unknown_kind(archive: Path) -> None:
    rewrite_part(archive, 1, frame("z", 1), records=1)


def wrong_fields(archive: Path) -> None:
    rewrite_part(archive, 1, frame("t", 5, False), records=1)


def deep_nesting(archive: Path) -> None:
    data = b"\x92\xa1t" + b"\x91" * 100_000
    rewrite_part(archive, 1, b"\xc6" + len(data).to_bytes(4) + data, records=1)


def value_that_is_missing(archive: Path) -> None:
    ref = ["c", "1", "msgpack", bytes(32), None, 5, False]
    body = b'{"channel_versions":{"c":"1"},"v":4}'
    data = frame("t", "x", False) + frame("c", "", "id", None, body, b"{}", [ref])
    rewrite_part(archive, 1, data, records=2, **OF_X)


def body_with_values(archive: Path) -> None:
    body = b'{"channel_values":{"c":1},"v":4}'
    rewrite_part(
        archive, 1, frame("t", "x", False) + frame("c", "", "id", None, body, b"{}", []), records=2, **OF_X
    )


def body_not_json(archive: Path) -> None:
    data = frame("t", "x", False) + frame("c", "", "id", None, b'{"v":4}, {"', b"{}", [])
    rewrite_part(archive, 1, data, records=2, **OF_X)


def wrong_digest(archive: Path) -> None:
    data = (
        frame("t", "x", False)
        + frame("w", "", "c", "t", 0, "", "a", "null", b"")
        + frame("e", bytes(32), 0, 1)
    )
    rewrite_part(archive, 1, data, records=3, **OF_X)


def threads_out_of_order(archive: Path) -> None:
    rewrite_part(archive, 2, frame("t", "", False), records=1, first_thread="")


def thread_that_is_hidden(archive: Path) -> None:
    """Who looks for a thread by the manifest would pass over the part that has it."""
    rewrite_manifest(archive, lambda manifest: setattr(manifest.parts[0], "last_thread", "a"))


def same_write_twice(archive: Path) -> None:
    write = frame("w", "", "c", "t", 0, "", "a", "null", b"")
    rewrite_part(archive, 1, frame("t", "x", False) + write + write, records=3, **OF_X)


def snapshot_that_is_none(archive: Path) -> None:
    data = b"\x91\x01"
    ref = ["c", "1", "msgpack", hashlib.sha256(data).digest(), None, len(data), True]
    body = b'{"channel_versions":{"c":"1"},"v":4}'
    rewrite_part(
        archive,
        1,
        frame("t", "x", False)
        + frame("v", "", "c", "1", "msgpack", data)
        + frame("c", "", "id", None, body, b"{}", [ref]),
        records=3,
        **OF_X,
    )


def folder_for_a_part(archive: Path) -> None:
    parts(archive)[0].unlink()
    (archive / "part-000001.msgpack.zst").mkdir()


def manifest_of_another_shape(archive: Path) -> None:
    (archive / "manifest.json").write_text('[{"format": 1}]')


def wrong_fingerprint(archive: Path) -> None:
    rewrite_manifest(archive, lambda manifest: setattr(manifest, "fingerprint", "0" * 64))


def wrong_totals(archive: Path) -> None:
    rewrite_manifest(archive, lambda manifest: setattr(manifest.totals, "writes", 1))


CASES = {
    no_manifest: "has no manifest.json",
    missing_part: "lacks part-000002",
    extra_part: "part-000099.*does not list",
    swapped_parts: "part-000001.*(damaged|bytes it should have)",
    flipped_bit: "its checksum does not match",
    truncated_part: "bytes it should have",
    longer_part: "bytes it should have",
    newer_version: "format version 2, which is not known",
    other_format: "not an archive",
    path_out_of_the_folder: "not numbered",
    duplicate_part: "not numbered",
    symbolic_link: "cannot read part-000001",
    named_pipe: "not a regular file",
    part_not_compressed: "cannot be decompressed",
    claimed_length: "more than its manifest says",
    claimed_length_with_a_claimed_part: "ends within a record",
    part_beyond_any_size: "larger than parts are",
    bomb: "more than its manifest says",
    unknown_kind: "no valid record",
    wrong_fields: "no valid record",
    deep_nesting: "no valid record",
    value_that_is_missing: "value of channel 'c' is missing",
    body_with_values: "body is not a checkpoint's",
    body_not_json: "checkpoint 'id'",
    wrong_digest: "digest it should have",
    threads_out_of_order: "does not end|out of order",
    thread_that_is_hidden: "ends with thread",
    same_write_twice: "there twice, or out of order",
    snapshot_that_is_none: "not of the kind it should be",
    folder_for_a_part: "not a regular file",
    manifest_of_another_shape: "is damaged",
    wrong_fingerprint: "what its manifest says",
    wrong_totals: "what its manifest says",
}


@pytest.mark.parametrize(("spoil", "reason"), CASES.items(), ids=[case.__name__ for case in CASES])
def test_damage_is_named(archive: Path, spoil: Callable[[Path], None], reason: str) -> None:
    spoil(archive)
    with pytest.raises(ArchiveError, match=reason) as raised:
        transfer.verify_archive(archive)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 5


def test_not_there(tmp_path: Path, filled: Path) -> None:
    with pytest.raises(ArchiveError, match="does not exist"):
        transfer.verify_archive(tmp_path / "nothing")
    with pytest.raises(ArchiveError, match="not an archive"):
        transfer.verify_archive(filled)


def test_a_huge_claim_takes_no_memory(archive: Path) -> None:
    claimed_length_with_a_claimed_part(archive)
    script = (
        "import resource, sys; from pathlib import Path; from persistence import transfer\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: transfer.verify_archive(Path(sys.argv[1]))\n"
        "except transfer.archive.ArchiveError: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(archive)], check=True, capture_output=True, text=True, timeout=60
    )
    grown = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 50_000_000, resource.getpagesize()


@pytest.mark.parametrize("lacking", [None, 100])
def test_no_room_for_it(filled: Path, tmp_path: Path, lacking: int | None) -> None:
    """None, or for all but the last bytes: those wait in a buffer, and closing the file fails once more."""
    folder = tmp_path / "full"
    transfer.export(filled, tmp_path / "whole")
    (part,) = (tmp_path / "whole").glob("*.zst")
    room = 1_000 if lacking is None else part.stat().st_size - lacking
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(ArchiveError, match=r"cannot write archive .*full: File too large"):
            transfer.export(filled, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not folder.exists()


def test_an_archive_that_is_complete_stays(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the very last moment, while the disk is waited for."""

    def interrupted(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(archive_writer, "_sync_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        transfer.export(filled, tmp_path / "copy")
    assert transfer.verify_archive(tmp_path / "copy").verified


def test_export_does_not_overwrite(filled: Path, archive: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="exists already"):
        transfer.export(filled, archive)
    other = tmp_path / "documents"
    other.mkdir()
    (other / "letter.txt").write_text("keep me")
    with pytest.raises(ArchiveError, match=r"letter\.txt"):
        transfer.export(filled, other)
    assert (other / "letter.txt").read_text() == "keep me"


def test_export_goes_over_what_a_killed_one_left(filled: Path, archive: Path) -> None:
    no_manifest(archive)
    transfer.export(filled, archive)
    assert transfer.verify_archive(archive).verified


def test_a_thread_may_span_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres_dsn: str) -> None:
    monkeypatch.setattr(fmt, "PART_BYTES", 500)
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        for number in range(20):
            make.put(saver, "one", {"c": ["x" * 300]}, versions={"c": number // 3})
        make.put(saver, "two", {"c": [2]})
    transfer.export(path, tmp_path / "archive")
    assert len(parts(tmp_path / "archive")) > 10
    assert transfer.verify_archive(tmp_path / "archive").totals.checkpoints == 21
    transfer.import_(tmp_path / "archive", postgres_dsn)
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("UPDATE checkpoints SET parent_checkpoint_id = 'x' WHERE thread_id = 'two'")
    verdict = transfer.verify(tmp_path / "archive", postgres_dsn)
    assert [difference.thread_id for difference in verdict.differences] == ["two"]


def test_two_exports_into_one_folder(filled: Path, tmp_path: Path) -> None:
    """Each would delete the other's parts."""
    from persistence.transfer.archive_writer import ArchiveWriter

    folder = tmp_path / "archive"
    with pytest.raises(ZeroDivisionError), ArchiveWriter(folder):
        with pytest.raises(ArchiveError, match=r"another export into archive .* is under way"):
            transfer.export(filled, folder)
        1 / 0  # noqa: B018 - the first one fails
    assert not folder.exists()
    transfer.export(filled, folder)

"""Whatever bytes an archive has: it is refused by an ArchiveError, or it has the content it had."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import msgspec
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persistence import transfer
from persistence.errors import ArchiveError
from persistence.transfer import archive_format as fmt
from persistence.transfer.archive import ArchiveSource
from persistence.transfer.records import Record
from tests.transfer import graphs, make

MEGABYTE = 1_000_000
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "25")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize="FUZZ_EXAMPLES" not in os.environ,
)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small archive with everything in it: a thread that spans parts, a snapshot, writes, scalars."""
    folder = tmp_path_factory.mktemp("fuzz")
    with make.database(folder / "chat.db") as saver:
        graph = graphs.log(saver)
        for _ in range(3):
            graph.invoke({"lines": ["asked"]}, graphs.config("log"))
        make.put(saver, "é", {"a": ["x"], "b": 1, "c": None}, metadata={"n": 1.5})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fmt, "PART_BYTES", 4_000)
        transfer.export(folder / "chat.db", folder / "archive")
    return folder / "archive"


@pytest.fixture
def archive(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "archive"))


@cache
def content(intact: Path) -> list[Record]:
    return read(intact)


def read(archive: Path) -> list[Record]:
    with ArchiveSource(archive) as source:
        return list(source.records())


def restore(intact: Path, archive: Path) -> None:
    for path in intact.iterdir():
        shutil.copyfile(path, archive / path.name)


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, float, bytes]:
    """What is done to some bytes, where (as a share of their length), and with which bytes."""
    how = draw(st.sampled_from(["flip", "set", "cut", "insert", "repeat", "drop"]))
    return how, draw(st.floats(0, 1, exclude_max=True)), draw(st.binary(min_size=1, max_size=6))


def changed(data: bytes, change: tuple[str, float, bytes]) -> bytes:
    how, share, new = change
    at = int(share * len(data))
    match how:
        case "flip":
            return data[:at] + bytes([data[at] ^ (new[0] or 1)]) + data[at + 1 :]
        case "set":
            return data[:at] + new + data[at + len(new) :]
        case "cut":
            return data[:at]
        case "insert":
            return data[:at] + new + data[at:]
        case "repeat":
            return data[:at] + data[at : at + 40 * new[0]] + data[at:]
        case _:
            return data[:at] + data[at + new[0] :]


def require_refused_or_same(archive: Path, records: list[Record]) -> None:
    """Also for the ways that read only some of it."""
    try:
        assert read(archive) == records
        transfer.verify_archive(archive)
        with ArchiveSource(archive) as source:
            assert set(source.threads()) == {record.thread_id for record in records}
    except ArchiveError as error:
        assert "\n" not in str(error)
    threads = sorted({record.thread_id for record in records})
    for thread in threads:
        try:
            with ArchiveSource(archive) as source:
                found = list(source.records([thread]))
            assert found == [record for record in records if record.thread_id == thread]
        except ArchiveError:
            pass
    for number in range(3):
        try:
            with ArchiveSource(archive) as source:
                found = list(source.begun_in(number))
            assert all(record in records for record in found)
        except ArchiveError:
            pass


@FUZZ
@given(change=changes(), number=st.integers(0, 10))
def test_any_bytes_of_any_file(
    intact: Path, archive: Path, change: tuple[str, float, bytes], number: int
) -> None:
    restore(intact, archive)
    files = sorted(archive.iterdir())
    path = files[number % len(files)]
    data = path.read_bytes()
    path.write_bytes(changed(data, change))
    require_refused_or_same(archive, content(intact))


@FUZZ
@given(change=changes(), number=st.integers(0, 10))
def test_any_bytes_inside_a_part_with_right_checksums(
    intact: Path, archive: Path, change: tuple[str, float, bytes], number: int
) -> None:
    """Whoever changed it has made the checksums anew: only the content can tell."""
    restore(intact, archive)
    manifest = msgspec.json.decode((archive / fmt.MANIFEST).read_bytes(), type=fmt.Manifest)
    part = manifest.parts[number % len(manifest.parts)]
    raw = zstandard.ZstdDecompressor().stream_reader((archive / part.file).read_bytes()).read()
    new = changed(raw, change)
    packed = zstandard.ZstdCompressor().compress(new)
    (archive / part.file).write_bytes(packed)
    part.sha256, part.bytes, part.raw_bytes = hashlib.sha256(packed).hexdigest(), len(packed), len(new)
    (archive / fmt.MANIFEST).write_bytes(fmt.manifest_bytes(manifest))
    require_refused_or_same(archive, content(intact))


@FUZZ
@given(change=changes(), number=st.integers(0, 10))
def test_any_bytes_inside_a_record_with_right_lengths(
    intact: Path, archive: Path, change: tuple[str, float, bytes], number: int
) -> None:
    """The frame is right, and so is everything but the content of one record."""
    restore(intact, archive)
    manifest = msgspec.json.decode((archive / fmt.MANIFEST).read_bytes(), type=fmt.Manifest)
    part = manifest.parts[0]
    raw = zstandard.ZstdDecompressor().stream_reader((archive / part.file).read_bytes()).read()
    frames = []
    while raw:
        length = int.from_bytes(raw[1:5])
        frames.append(raw[5 : 5 + length])
        raw = raw[5 + length :]
    at = number * len(frames) // 11
    frames[at] = changed(frames[at], change)
    new = b"".join(b"\xc6" + len(data).to_bytes(4) + data for data in frames)
    packed = zstandard.ZstdCompressor().compress(new)
    (archive / part.file).write_bytes(packed)
    part.sha256, part.bytes, part.raw_bytes = hashlib.sha256(packed).hexdigest(), len(packed), len(new)
    (archive / fmt.MANIFEST).write_bytes(fmt.manifest_bytes(manifest))
    require_refused_or_same(archive, content(intact))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just(-1)
    | st.just(1 << 70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(value=VALUES, where=st.sampled_from(["manifest", "totals", "part"]), which=st.integers(0, 20))
def test_any_value_in_the_manifest(
    intact: Path, archive: Path, value: object, where: str, which: int
) -> None:
    """With and without a checksum that fits."""
    import json

    restore(intact, archive)
    manifest = json.loads((archive / fmt.MANIFEST).read_text())
    place = {"manifest": manifest, "totals": manifest["totals"], "part": manifest["parts"][-1]}[where]
    place[sorted(place)[which % len(place)]] = value
    bare = {**manifest, "checksum": ""}
    text = json.dumps(bare, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    manifest["checksum"] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    (archive / fmt.MANIFEST).write_text(json.dumps(manifest))
    require_refused_or_same(archive, content(intact))


# What would take much memory to look at: a child process looks, and its memory is measured.


def vouched(archive: Path, raw: bytes, records: int) -> None:
    """One part with this content, and a manifest that says so."""
    for path in archive.glob("part-*"):
        path.unlink()
    packed = zstandard.ZstdCompressor().compress(raw)
    (archive / fmt.part_name(1)).write_bytes(packed)
    manifest = msgspec.json.decode((archive / fmt.MANIFEST).read_bytes(), type=fmt.Manifest)
    digest = hashlib.sha256(packed).hexdigest()
    manifest.parts = [fmt.Part(fmt.part_name(1), digest, len(packed), len(raw), records, "t", "t")]
    (archive / fmt.MANIFEST).write_bytes(fmt.manifest_bytes(manifest))


def framed(*datas: bytes) -> bytes:
    return b"".join(b"\xc6" + len(data).to_bytes(4) + data for data in datas)


THREAD = msgspec.msgpack.encode(("t", "t", False))


def manifest_of_many_small_things(archive: Path) -> None:
    things = b"[]," * (fmt.MAX_MANIFEST_BYTES // 3 - 20)
    (archive / fmt.MANIFEST).write_bytes(b'{"parts":[' + things + b"[]]}")


def manifest_of_many_parts(archive: Path) -> None:
    part = b'{"file":"","sha256":"","bytes":0,"raw_bytes":0,"records":0,"first_thread":"","last_thread":""},'
    text = (archive / fmt.MANIFEST).read_text().split('"parts"')[0].encode()
    many = part * (fmt.MAX_MANIFEST_BYTES // len(part) - 10)
    (archive / fmt.MANIFEST).write_bytes(text + b'"parts":[' + many[:-1] + b'],"checksum":""}')


def manifest_beyond_its_size(archive: Path) -> None:
    with (archive / fmt.MANIFEST).open("wb") as file:
        file.truncate(1 << 40)


def manifest_nested_deeply(archive: Path) -> None:
    (archive / fmt.MANIFEST).write_bytes(b'{"format":' + b"[" * 10 * MEGABYTE)


def body_beyond_its_size(archive: Path) -> None:
    body = b"[]," * (20 * MEGABYTE)
    data = msgspec.msgpack.encode(("c", "", "1", None, body, b"{}", []))
    vouched(archive, framed(THREAD, data), 2)


def many_channels(archive: Path) -> None:
    ref = b"\x97\xa0\xc0\xa0\xc4\x00\xc0\x00\xc2"
    count = 6 * MEGABYTE
    head = b"\x97\xa1c\xa0\xa11\xc0\xc4\x02{}\xc4\x02{}\xdd" + count.to_bytes(4)
    vouched(archive, framed(THREAD, head + ref * count), 2)


def many_records(archive: Path) -> None:
    data = msgspec.msgpack.encode(("w", "", "c", "t", 0, "", "c", "null", bytes(1000)))
    vouched(archive, framed(THREAD, *[data] * 60_000), 60_001)


def body_of_many_small_things(archive: Path) -> None:
    body = b'{"a":[' + b"[]," * MEGABYTE + b"[]]}"
    data = msgspec.msgpack.encode(("c", "", "1", None, body, b"{}", []))
    vouched(archive, framed(THREAD, data), 2)


HOSTILE = [
    manifest_of_many_small_things,
    manifest_of_many_parts,
    manifest_beyond_its_size,
    manifest_nested_deeply,
    body_beyond_its_size,
    many_channels,
    many_records,
    body_of_many_small_things,
]
SCRIPT = """
import resource, sys
from pathlib import Path
from persistence import transfer
from persistence.errors import ArchiveError
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for archive in sys.argv[1:]:
    try:
        transfer.verify_archive(Path(archive))
    except ArchiveError as error:
        print(Path(archive).name, peak() - before, str(error))
    else:
        print(Path(archive).name, "was not refused")
"""


def test_memory_is_bounded(intact: Path, tmp_path: Path) -> None:
    archives = []
    for spoil in HOSTILE:
        archives.append(shutil.copytree(intact, tmp_path / spoil.__name__))
        spoil(archives[-1])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, *map(str, archives)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert [name for name, grown, _ in lines if grown.isdigit()] == [spoil.__name__ for spoil in HOSTILE]
    grown = [int(grown) * (1 if sys.platform == "darwin" else 1024) for _, grown, _ in lines]
    assert max(grown) < 250 * MEGABYTE, done.stdout

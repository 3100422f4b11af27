"""Checks an archive by itself: its checksums, or the digests of its threads too; in whole or by sample."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from persistence.transfer.archive import ArchiveSource
from persistence.transfer.archive_format import StorePart
from persistence.transfer.difference import Depth, sample_words
from persistence.transfer.digest import Digester
from persistence.transfer.engine import Clock, Meter, scan
from persistence.transfer.options import Options
from persistence.transfer.preflight import Findings, ItemFindings
from persistence.transfer.report import Totals, counted
from persistence.transfer.sampling import Sample
from persistence.transfer.spool import Spool
from persistence.transfer.store import StoreMove


@dataclass(frozen=True, slots=True)
class ArchiveCheck:
    """An archive that was found intact, as far as it was read; damage is an error.

    Attributes:
        archive: What was read.
        depth: ``checksums`` or ``digests``.
        fingerprint: SHA-256 over the content of the whole archive, as its manifest says.
        totals: What was checked; after checksums alone, what the manifest says.
        parts: How many parts were read, of threads and of the store.
        total_parts: How many there are.
        total_threads: How many threads the archive has, as its manifest says.
        sampled: Only a sample was checked: nothing is said about the other threads.
        sample: The size of the sample, as it was asked for.
        seed: What chooses the same sample again.
        items: How many items of the store were checked; after checksums alone, what the manifest says.
        total_items: How many there are, as the manifest says.
        seconds: Duration.
        verified: Always true.
    """

    archive: str
    depth: Depth
    fingerprint: str
    totals: Totals
    parts: int
    total_parts: int
    total_threads: int
    sampled: bool
    sample: str | None
    seed: int | None
    items: int
    total_items: int
    seconds: float
    verified: bool = field(default=True)

    def summary(self) -> str:
        """The outcome in words."""
        intact = "intact" if self.depth == "digests" else "its checksums match"
        if not self.sampled:
            return f"{intact}, verified by content" if self.depth == "digests" else intact
        if self.depth == "digests":
            also = (
                f" and {self.items:,} of {self.total_items:,} items of the store" if self.total_items else ""
            )
            sampled = (self.totals.threads, self.total_threads, self.sample, self.seed)
            return intact + sample_words(*sampled, also)
        return (
            f"{intact} in a sample of {self.parts:,} of {self.total_parts:,} parts"
            f" (--sample {self.sample} --seed {self.seed})"
        )

    def to_json(self) -> str:
        """The outcome as one JSON object."""
        return json.dumps(asdict(self), sort_keys=True)


def check_archive(archive: ArchiveSource, depth: Depth, sample: Sample | None, clock: Clock) -> ArchiveCheck:
    """Check an archive.

    Raises:
        ArchiveError: It is damaged.
    """
    section = archive.manifest.store
    total_parts = len(archive.manifest.parts) + (len(section.parts) if section else 0)
    if depth == "checksums":
        totals, parts = _checksums(archive, sample, clock)
        items = section.items if section else 0
    elif sample is None:
        with Spool() as spool, StoreMove(archive, Options(), clock) as store:
            totals = scan(archive, spool, clock, Findings()).totals
            store.scan(ItemFindings())
        items, parts = store.totals.items, total_parts
    else:
        totals, parts = _sampled(archive, sample, clock)
        items, store_parts = _sampled_items(archive, sample, clock)
        parts += store_parts
    return ArchiveCheck(
        archive=archive.label,
        depth=depth,
        fingerprint=archive.manifest.content,
        totals=totals,
        parts=parts,
        total_parts=total_parts,
        total_threads=archive.manifest.totals.threads,
        sampled=sample is not None,
        sample=sample.size if sample else None,
        seed=sample.seed if sample else None,
        items=items,
        total_items=section.items if section else 0,
        seconds=clock.seconds(),
    )


def _checksums(archive: ArchiveSource, sample: Sample | None, clock: Clock) -> tuple[Totals, int]:
    """Of a sample, so many parts as there would be if all threads, or items, were of one size."""
    manifest = archive.manifest
    claimed = manifest.totals
    parts = _share(manifest.parts, claimed.threads, sample)
    if manifest.store:
        parts += _share(manifest.store.parts, manifest.store.items, sample)
    with clock.phase("read"):
        for part in parts:
            archive.check_part(part)
    totals = Totals(claimed.threads, claimed.checkpoints, claimed.writes, claimed.values, bytes=claimed.bytes)
    return totals, len(parts)


def _share(parts: Sequence[StorePart], total: int, sample: Sample | None) -> list[StorePart]:
    order = [parts[number] for number in _order(parts, sample)]
    if sample is None or not order:
        return order
    return order[: max(1, round(len(order) * sample.of(total) / max(1, total)))]


def _sampled(archive: ArchiveSource, sample: Sample, clock: Clock) -> tuple[Totals, int]:
    """Part after part in the order of the seed, each as a whole, until they hold enough threads."""
    wanted, parts = sample.of(archive.manifest.totals.threads), 0
    with clock.phase("read"):
        meter = Meter(clock, "read", 0)
        for number in _order(archive.manifest.parts, sample):
            if meter.totals.threads >= wanted:
                break
            digester = Digester()
            for record in counted(archive.begun_in(number), meter):
                meter.totals.threads += digester.see(record) is not None
            meter.totals.threads += digester.end() is not None
            parts += 1
        meter.tell()
    return meter.totals, parts


def _sampled_items(archive: ArchiveSource, sample: Sample, clock: Clock) -> tuple[int, int]:
    """As :func:`_sampled`, of the store's parts: how many items there were, and in how many parts."""
    section = archive.manifest.store
    items = parts = 0
    if section:
        with clock.phase("read store"):
            for number in _order(section.parts, sample):
                if items >= sample.of(section.items):
                    break
                items += sum(1 for _ in archive.store().in_part(number))
                parts += 1
                clock.progress("read store", items, section.items, 0)
    return items, parts


def _order(parts: Sequence[StorePart], sample: Sample | None) -> list[int]:
    """Parts, by their indexes, in the order in which a sample takes them."""
    if sample is None:
        return list(range(len(parts)))
    return sorted(range(len(parts)), key=lambda number: sample.rank(parts[number].file))

"""Checks an archive by itself: its checksums, or the digests of its threads too; in whole or by sample."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from persistence.transfer.archive import ArchiveSource
from persistence.transfer.difference import Depth, sample_words
from persistence.transfer.digest import Digester
from persistence.transfer.engine import Clock, Meter, scan
from persistence.transfer.options import Options
from persistence.transfer.preflight import Findings, ItemFindings
from persistence.transfer.report import Totals
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
        parts: How many parts were read.
        total_parts: How many there are.
        total_threads: How many threads the archive has, as its manifest says.
        sampled: Only a sample was checked: nothing is said about the other threads.
        sample: The size of the sample, as it was asked for.
        seed: What chooses the same sample again.
        items: How many items of the store were checked; a sample of threads has none.
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
            return intact + sample_words(self.totals.threads, self.total_threads, self.sample, self.seed)
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
    section, items = archive.manifest.store, 0
    if depth == "checksums":
        if section and sample is None:
            for part in section.parts:
                archive.check_part(part)
            items = section.items
        totals, parts = _checksums(archive, sample, clock)
    elif sample is None:
        with Spool() as spool, StoreMove(archive, Options(), clock) as store:
            totals = scan(archive, spool, clock, Findings()).totals
            store.scan(ItemFindings())
        items, parts = store.totals.items, len(archive.manifest.parts)
    else:
        totals, parts = _sampled(archive, sample, clock)
    return ArchiveCheck(
        archive=archive.label,
        depth=depth,
        fingerprint=archive.manifest.content,
        totals=totals,
        parts=parts,
        total_parts=len(archive.manifest.parts),
        total_threads=archive.manifest.totals.threads,
        sampled=sample is not None,
        sample=sample.size if sample else None,
        seed=sample.seed if sample else None,
        items=items,
        total_items=section.items if section else 0,
        seconds=clock.seconds(),
    )


def _checksums(archive: ArchiveSource, sample: Sample | None, clock: Clock) -> tuple[Totals, int]:
    """Of a sample, so many parts as there would be if all threads were of one size."""
    manifest = archive.manifest
    order = _order(archive, sample)
    if sample is not None and order:
        share = sample.of(manifest.totals.threads) / max(1, manifest.totals.threads)
        order = order[: max(1, round(share * len(order)))]
    with clock.phase("read"):
        for number in order:
            archive.check_part(manifest.parts[number])
    claimed = manifest.totals
    totals = Totals(claimed.threads, claimed.checkpoints, claimed.writes, claimed.values, bytes=claimed.bytes)
    return totals, len(order)


def _sampled(archive: ArchiveSource, sample: Sample, clock: Clock) -> tuple[Totals, int]:
    """Part after part in the order of the seed, each as a whole, until they hold enough threads."""
    wanted, parts = sample.of(archive.manifest.totals.threads), 0
    with clock.phase("read"):
        meter = Meter(clock, "read", 0)
        for number in _order(archive, sample):
            if meter.totals.threads >= wanted:
                break
            digester = Digester()
            for record in archive.begun_in(number):
                meter.see(record)
                meter.totals.threads += digester.see(record) is not None
            meter.totals.threads += digester.end() is not None
            parts += 1
        meter.tell()
    return meter.totals, parts


def _order(archive: ArchiveSource, sample: Sample | None) -> list[int]:
    """The parts, by their indexes, in the order in which a sample takes them."""
    parts = archive.manifest.parts
    if sample is None:
        return list(range(len(parts)))
    return sorted(range(len(parts)), key=lambda number: sample.rank(parts[number].file))

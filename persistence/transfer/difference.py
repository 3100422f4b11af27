"""What a comparison finds: single differences, and the verdict on two sides."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Literal

from persistence.errors import VerificationError

Depth = Literal["checksums", "digests", "semantic"]

SHOWN_THREADS = 20
_SHOWN_PER_THREAD = 20
_SHOWN_ITEMS = 20


@dataclass(frozen=True, slots=True)
class Difference:
    """One place where two sides differ."""

    thread_id: str
    detail: str
    checkpoint_ns: str | None = None
    checkpoint_id: str | None = None
    channel: str | None = None

    def __str__(self) -> str:
        where = f"thread {self.thread_id!r}"
        if self.checkpoint_ns:
            where += f", namespace {self.checkpoint_ns!r}"
        if self.checkpoint_id is not None:
            where += f", checkpoint {self.checkpoint_id!r}"
        if self.channel is not None:
            where += f", channel {self.channel!r}"
        return f"{where}: {self.detail}"


@dataclass(frozen=True, slots=True)
class ItemDifference:
    """An item of the store that differs."""

    namespace: str
    """As both databases hold it: joined with dots."""
    key: str
    detail: str

    def __str__(self) -> str:
        return f"namespace {self.namespace!r}, key {self.key!r} of the store: {self.detail}"


@dataclass(slots=True)
class Verdict:
    """Whether two sides hold the same.

    Attributes:
        left: The one side; holds no secret.
        right: The other side.
        depth: What was compared: digests of the rows, or the tuples of the official savers.
        threads: How many threads were compared.
        total_threads: How many threads the two sides have together; ``None`` where only given ones were read.
        sampled: Only a sample was compared: whatever was found, nothing is said about the other threads.
        sample: The size of the sample, as it was asked for.
        seed: What chooses the same sample again.
        checkpoints: How many checkpoints the left side has in them.
        writes: How many pending writes the left side has in them.
        differing_threads: How many threads differ, or are on one side only.
        differences: What differs, for the first of these threads.
        items: How many items of the store were compared.
        differing_items: How many of them differ, or are on one side only.
        item_differences: What differs, for the first of these items.
        items_left_out: How many items the left and the right store have that were not to be compared.
        beside: How many values of a semantic comparison are equal although LangGraph's Postgres saver shows
            another one: its layout has no place for them, so they stand in the checkpoints' rows, where this
            package's savers read them. A state that was changed in place leaves such values.
    """

    left: str
    right: str
    depth: Depth = "digests"
    threads: int = 0
    total_threads: int | None = None
    sampled: bool = False
    sample: str | None = None
    seed: int | None = None
    checkpoints: int = 0
    writes: int = 0
    differing_threads: int = 0
    differences: list[Difference] = field(default_factory=list)
    items: int = 0
    differing_items: int = 0
    item_differences: list[ItemDifference] = field(default_factory=list)
    items_left_out: tuple[int, int] = (0, 0)
    beside: int = 0

    @property
    def equal(self) -> bool:
        """Nothing differs in what was compared; see ``sampled``."""
        return self.differing_threads == 0 and self.differing_items == 0

    def note(self, found: Iterable[Difference]) -> None:
        """Count a thread that differs; the first of its differences are kept, for the first such threads."""
        self.differing_threads += 1
        if self.differing_threads <= SHOWN_THREADS:
            self.differences += islice(found, _SHOWN_PER_THREAD)

    def note_item(self, difference: ItemDifference) -> None:
        """Count an item that differs; the first of them are kept."""
        self.differing_items += 1
        if self.differing_items <= _SHOWN_ITEMS:
            self.item_differences.append(difference)

    def summary(self) -> str:
        """The outcome in words."""
        differing = f"{self.differing_threads} threads"
        if self.items:
            differing += f" and {self.differing_items} items of the store"
        equal = "equal" if self.equal else f"the two sides differ in {differing}"
        compared = sample_words(self.threads, self.total_threads, self.sample, self.seed)
        known = ""
        if self.beside:
            known = f"; LangGraph's saver shows {self.beside:,} values of states changed in place otherwise"
        return f"{equal}{compared if self.sampled else ''}{known}"

    def require(self) -> None:
        """Raise where the sides differ.

        Raises:
            VerificationError: It names the first differences.
        """
        if self.equal:
            return
        shown = "; ".join(map(str, [*self.differences, *self.item_differences][:3]))
        where = f"{self.differing_threads} of {self.threads} threads"
        if self.items:
            where += f" and {self.differing_items} of {self.items} items of the store"
        raise VerificationError(f"{self.left} and {self.right} differ in {where}: {shown}")

    def to_json(self) -> str:
        """The verdict as one JSON object."""
        return json.dumps(asdict(self) | {"equal": self.equal}, sort_keys=True)


def sample_words(threads: int, total: int | None, size: str | None, seed: int | None, also: str = "") -> str:
    """That it was a sample, and how to draw it again."""
    return f" in a sample of {threads:,} of {total or 0:,} threads{also} (--sample {size} --seed {seed})"

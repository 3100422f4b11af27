"""What a source whose store is followed must offer, and what a target that follows it.

As with threads (:mod:`persistence.transfer.live`) a *stamp* tells by marks that are cheap to read that an
item has changed. Here each item has its own, and the target keeps it beside the item, with a mark of the
content: an item of the target without such a claim, or with another content, is somebody else's.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from persistence.errors import ConflictError
from persistence.transfer.items import BadItem, Item, Key, describe
from persistence.transfer.keys import item_mark
from persistence.transfer.ledger import Tables

CLAIM = "prefix, key, stamp, mark, updated_at, expires_at"
"""The columns of a claim, as :func:`claim_of` reads them."""


class ItemStamp(NamedTuple):
    """What tells that an item has changed."""

    prefix: str
    key: str
    text: str
    size: int
    """Bytes of its content, about."""


class ItemClaim(NamedTuple):
    """An item that a run has brought, as it was then."""

    prefix: str
    key: str
    stamp: str
    mark: bytes
    """Of its content; see :func:`persistence.transfer.keys.item_mark`."""
    updated_at: int | None
    expires_at: int | None

    @classmethod
    def of(cls, stamp: ItemStamp, item: Item) -> ItemClaim:
        """What is noted of an item that is brought."""
        return cls(*stamp[:3], item_mark(item), item.updated_at, item.expires_at)

    def holds(self, item: Item) -> bool:
        """Whether this content was brought."""
        return (self.mark, self.expires_at) == (item_mark(item), item.expires_at)

    @property
    def has_expired(self) -> bool:
        """Whether the target's own store may have deleted it, as its time is over."""
        return self.expires_at is not None and self.expires_at <= time.time() * 1_000_000


def key_of(claim: ItemClaim) -> Key:
    """What claims are sorted by."""
    return claim[:2]


class ItemChange(NamedTuple):
    """What becomes of one item in the target."""

    key: Key
    after: ItemClaim | None
    """``None`` where the source does not have it any more."""
    item: Item | None = None
    """What is written; without it, only the claim is."""

    @property
    def writes(self) -> bool:
        """Whether the item's row is written or deleted."""
        return self.item is not None or self.after is None


def require_ours(change: ItemChange, claim: ItemClaim | None, there: Item | BadItem | None, to: str) -> None:
    """Raise where an item of the target is not as the run left it.

    Args:
        change: What is about to be done.
        claim: What the target has noted of it.
        there: What it holds.
        to: The target, for the message.

    Raises:
        ConflictError: Somebody else has written it.
    """
    if there is None and (claim is None or change.after is None or claim.has_expired):
        return
    if claim is not None and isinstance(there, Item) and item_mark(there) == claim.mark:
        return
    raise ConflictError(
        f"the item in {describe(BadItem(*change.key, ''))} of the store of {to} is not as this transfer left"
        " it, or was there before",
        hint="nothing else may write to these items until the cut-over; delete them from the target"
        " or move into another database, schema or file",
    )


class LiveStore(Protocol):
    """The store within one state of a source that goes on changing."""

    def count(self) -> int:
        """How many items there are."""

    def stamps(self) -> Iterator[ItemStamp]:
        """Every item, in order."""

    def some(self, keys: Sequence[Key]) -> Mapping[Key, Item | BadItem]:
        """Those of these items that are there, with their vectors."""

    def seal(self, target: str) -> None:
        """As :meth:`persistence.transfer.live.Locked.seal`, for the store; in a locked state only."""


@runtime_checkable
class WatchedStore(LiveStore, Protocol):
    """One whose stamps may not show every change; during a cut-over it notes all of them."""

    def stamps_of(self, keys: Sequence[Key]) -> Mapping[Key, ItemStamp]:
        """Those of these items that are there."""

    def noted(self, after: int) -> tuple[set[Key], int]:
        """Items that were written or deleted under a watch, and how far that goes.

        Raises:
            TransferError: Tables of the store are not watched.
        """


class StoreFollower(Protocol):
    """A target's store and the items in it that one run has brought."""

    def claims(self, after: Key | None, limit: int) -> list[ItemClaim]:
        """The next items of this run, in order."""

    def claims_of(self, keys: Sequence[Key]) -> Mapping[Key, ItemClaim]:
        """Those of these items that the run has brought."""

    def apply(self, changes: Sequence[ItemChange]) -> None:
        """Carry out changes, and note the claims, in one transaction.

        Raises:
            ConflictError: An item is not as this run left it.
        """

    def count(self) -> int:
        """How many items the run has brought and not deleted again."""

    def strays(self) -> Collection[Key]:
        """Items of this run, the first few, that are gone or were written by somebody else since."""


def claimed_items(tables: Tables, run_id: str, after: Key | None, limit: int) -> list[ItemClaim]:
    """See :meth:`StoreFollower.claims`; the same query on every database."""
    rows = tables.query(
        f"SELECT {CLAIM} FROM persistence_followed_items WHERE run_id = ?"
        f" {'' if after is None else 'AND (prefix, key) > (?, ?)'} ORDER BY prefix, key LIMIT {limit}",
        [run_id, *(after or ())],
    )
    return list(map(claim_of, rows))


def claim_of(row: Sequence[Any]) -> ItemClaim:
    """A claim as both databases give it."""
    prefix, key, stamp, mark, updated_at, expires_at = row
    return ItemClaim(prefix, key, stamp, bytes(mark), updated_at, expires_at)


def count_items(tables: Tables, run_id: str) -> int:
    """See :meth:`StoreFollower.count`."""
    query = "SELECT count(*) FROM persistence_followed_items WHERE run_id = ?"
    return int(tables.query(query, [run_id])[0][0])

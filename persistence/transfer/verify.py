"""Compares two sides by content: a digest per thread from each, then what differs, in detail.

Each side computes its digests from its own rows. Only a thread whose digests differ is read again.
"""

from __future__ import annotations

from collections.abc import Iterable

from persistence.transfer.detail import thread_differences
from persistence.transfer.difference import SHOWN_THREADS, Difference, Verdict
from persistence.transfer.digest import ThreadDigest
from persistence.transfer.records import Source


def compare(
    left: Source,
    right: Source,
    left_digests: Iterable[ThreadDigest],
    right_digests: Iterable[ThreadDigest],
    verdict: Verdict,
) -> None:
    """Walk both sides' digests, sorted by thread, and add what differs to the verdict."""
    lefts, rights = iter(left_digests), iter(right_digests)
    one, other = next(lefts, None), next(rights, None)
    differing: list[str] = []
    room = SHOWN_THREADS - verdict.differing_threads
    while one is not None or other is not None:
        verdict.threads += 1
        thread = min(side.thread_id for side in (one, other) if side is not None)
        mine = one if one is not None and one.thread_id == thread else None
        theirs = other if other is not None and other.thread_id == thread else None
        if mine is not None:
            verdict.checkpoints += mine.checkpoints
            verdict.writes += mine.writes
            one = next(lefts, None)
        if theirs is not None:
            other = next(rights, None)
        if mine is None or theirs is None:
            side = verdict.left if mine is None else verdict.right
            verdict.note([Difference(thread, f"missing in {side}")])
        elif mine.sha256 != theirs.sha256:
            if len(differing) < room:
                # Later: the sides' cursors are still in use for the digests.
                differing.append(thread)
            else:
                verdict.note([])
    for thread in differing:
        verdict.note(thread_differences(thread, left, right))

"""Threads on the move: between databases, and into and out of archives, compared by content.

``docs/moving-data.md`` says how to use it, ``docs/archive-format.md`` what an archive and a digest are.
"""

from persistence.transfer.api import (
    export,
    import_,
    migrate,
    rejects,
    retry_rejects,
    runs,
    undo,
    verify,
    verify_archive,
)
from persistence.transfer.archive_check import ArchiveCheck
from persistence.transfer.comparison import Check
from persistence.transfer.difference import Depth, Difference, Verdict
from persistence.transfer.follow import CutOver, Followed, cut_over, follow, unseal
from persistence.transfer.inspection import Inspection, inspect
from persistence.transfer.options import OnConflict, Options
from persistence.transfer.plan import Estimate, Plan, plan
from persistence.transfer.preflight import RefusedError
from persistence.transfer.removal import Later, Undone
from persistence.transfer.report import Phase, Progress, Report, Totals
from persistence.transfer.selection import Selection
from persistence.transfer.sides import Side
from persistence.transfer.survey import Finding, Sizes
from persistence.transfer.sync import Round

__all__ = [
    "ArchiveCheck",
    "Check",
    "CutOver",
    "Depth",
    "Difference",
    "Estimate",
    "Finding",
    "Followed",
    "Inspection",
    "Later",
    "OnConflict",
    "Options",
    "Phase",
    "Plan",
    "Progress",
    "RefusedError",
    "Report",
    "Round",
    "Selection",
    "Side",
    "Sizes",
    "Totals",
    "Undone",
    "Verdict",
    "cut_over",
    "export",
    "follow",
    "import_",
    "inspect",
    "migrate",
    "plan",
    "rejects",
    "retry_rejects",
    "runs",
    "undo",
    "unseal",
    "verify",
    "verify_archive",
]

"""Threads on the move: between databases, and into and out of archives, compared by content.

``docs/moving-data.md`` says how to use it, ``docs/archive-format.md`` what an archive and a digest are.
"""

from persistence.transfer.api import Side, export, import_, migrate, runs, undo, verify, verify_archive
from persistence.transfer.options import OnConflict, Options
from persistence.transfer.preflight import RefusedError
from persistence.transfer.removal import Later, Undone
from persistence.transfer.report import Phase, Progress, Report, Totals
from persistence.transfer.selection import Selection
from persistence.transfer.verify import Difference, Verdict

__all__ = [
    "Difference",
    "Later",
    "OnConflict",
    "Options",
    "Phase",
    "Progress",
    "RefusedError",
    "Report",
    "Selection",
    "Side",
    "Totals",
    "Undone",
    "Verdict",
    "export",
    "import_",
    "migrate",
    "runs",
    "undo",
    "verify",
    "verify_archive",
]

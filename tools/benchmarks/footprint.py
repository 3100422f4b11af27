"""How much memory a migration takes: ``python -m tools.benchmarks.footprint SOURCE TARGET``.

A process of its own, which imports nothing of the package before it has looked how large it is without.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
from pathlib import Path

MEGABYTE = 1_000_000
_PROC = Path("/proc")


def main() -> None:
    """Migrate, then print how far memory grew above that of the idle interpreter."""
    idle = _high(os.getpid())
    source, target = sys.argv[1:]

    from persistence import transfer

    children = _Children()
    transfer.migrate(Path(source), target)
    children.stop()
    own = _high(os.getpid())
    largest = max([own, *children.peaks.values()])
    print(json.dumps({"peak MB": own + sum(children.peaks.values()) - idle, "largest MB": largest - idle}))


class _Children:
    """Looks at this process's children while they live."""

    def __init__(self) -> None:
        self.peaks: dict[int, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            for task in _PROC.glob("self/task/*/children"):
                try:
                    for pid in map(int, task.read_text().split()):
                        self.peaks[pid] = max(self.peaks.get(pid, 0.0), _high(pid))
                except (OSError, StopIteration):  # it has ended
                    continue


def _high(pid: int) -> float:
    """The most memory that a process has had, in megabytes."""
    if not _PROC.exists():  # macOS, where only this process can be asked
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEGABYTE
    lines = (_PROC / str(pid) / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / MEGABYTE


if __name__ == "__main__":
    main()

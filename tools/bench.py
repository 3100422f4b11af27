"""Our savers against the official ones: the same work on the same server, in one run, taking turns.

    python tools/bench.py                      # a quarter of an hour
    python tools/bench.py --short              # seconds: shows that it runs, not how fast it is
    python tools/bench.py --full --json bench.json --chart bench.svg
    python tools/bench.py --read bench.json --page docs/figures.md

``docs/speed.md`` says what is measured, and how to read it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.benchmarks.app import main

if __name__ == "__main__":
    sys.exit(main())

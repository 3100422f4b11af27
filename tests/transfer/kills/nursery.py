"""A process that has imported everything forks a child for each run, so that hundreds of kills take minutes.

Reads one request per line, as JSON, and answers with one line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from typing import Any

from persistence.registry import provider_for
from persistence.transfer import ahead, archive_format, engine, removal
from tests.transfer.kills.scenarios import SCENARIOS, Place
from tests.transfer.kills.traps import Trap

BATCH_RECORDS = 25
PART_BYTES = 20_000


def main() -> None:
    """Answer until standard input ends."""
    engine.BATCH_RECORDS = BATCH_RECORDS
    ahead.LIMIT = -1  # many commits, but for the scenarios that are about one
    archive_format.PART_BYTES = PART_BYTES
    removal._THREADS_AT_ONCE = 1
    for line in sys.stdin:
        request = json.loads(line)
        place = Place.of(request["place"])
        for dsn in (place.postgres, place.sqlite):  # drivers are imported once, here
            provider_for(dsn).sink()
        children = [_fork(request["scenario"], place, each) for each in request["runs"]]
        print(json.dumps([_wait(*child) for child in children]), flush=True)  # noqa: T201 - the answer


def _fork(scenario: str, place: Place, run: dict[str, Any]) -> tuple[int, int, float | None, float]:
    """Start a child; gives its id, what it tells, when it is to be killed, and when it began."""
    tells, told = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(tells)
        _child(scenario, place, run["die_at"], told)
    os.close(told)
    return pid, tells, run["kill_after"], began


def _child(scenario: str, place: Place, die_at: int | None, told: int) -> None:
    code, answer = 1, ""
    try:
        trap = Trap(die_at)
        trap.install()
        SCENARIOS[scenario].run(place)
        code, answer = 0, json.dumps({"steps": trap.names})
    except BaseException as error:  # noqa: BLE001 - a child ends here, whatever happens
        answer = json.dumps({"error": type(error).__name__, "text": traceback.format_exc()})
    finally:
        with open(told, "w") as pipe:
            pipe.write(answer)
        os._exit(code)


def _wait(pid: int, tells: int, kill_after: float | None, began: float) -> dict[str, Any]:
    if kill_after is not None:
        time.sleep(max(0.0, began + kill_after - time.monotonic()))
        os.kill(pid, signal.SIGKILL)
    with open(tells) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    told = json.loads(answer) if answer else {}
    return {"killed": os.WIFSIGNALED(status), "seconds": time.monotonic() - began, **told}


if __name__ == "__main__":
    main()

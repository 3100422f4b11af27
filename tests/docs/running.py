"""Runs all blocks of a page, one after the other, as a reader would: in one folder, by one shell.

What stands for something of the reader's is replaced: ``db.example.com`` by the session's Postgres
server, ports from 8000 to 8099 by free ones, roles that the page makes by roles of the test's own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from ruamel.yaml import YAML

import persistence
from persistence.backends.embedded import BIN
from tests.docs.pages import Block, Command, blocks, commands
from tests.support import ROOT, clean_environment

NOT_RUN = {
    "installs from the network": 8,
    "runs the tests themselves": 3,
    "needs Docker": 6,
    "needs Kubernetes": 6,
}
"""Why a block may be left out, as ``<!-- not run: needs Docker -->`` above it says, and how many may be."""

PARSERS: dict[str, Callable[[str], object]] = {
    "toml": tomllib.loads,
    "json": json.loads,
    "yaml": lambda text: list(YAML(typ="safe").load_all(text)),
}
OUTPUT = "text"
"""The language of what is neither code nor a command: drawings, and what a program prints."""

_DATABASE = re.compile(r"postgresql://(?:(?P<user>\w+)(?::[\w-]+)?@)?db\.example\.com(?::\d+)?/\w+")
_PORT = re.compile(r"(?<=[: =])80\d\d\b")
_ROLE = re.compile(r"CREATE ROLE (\w+)")
_WAIT = "for _ in {{1..300}}; do (: < /dev/tcp/127.0.0.1/{port}) 2> /dev/null && break; sleep 0.1; done"


class PageRun:
    """The shell script of a page."""

    def __init__(self, page: Path, postgres_dsn: str) -> None:
        self.blocks = [block for block in blocks(page) if not is_left_out(block)]
        self.commands: list[Command] = []
        self._server = conninfo_to_dict(persistence.Dsn.parse(postgres_dsn).conninfo)
        self._shell = "".join(block.text for block in self.blocks if block.language in ("console", "bash"))
        everything = "".join(block.text for block in self.blocks)
        database = str(self._server["dbname"])
        self.roles = {name: f"{name}_{database}" for name in _ROLE.findall(everything)}
        self._ports = {port: str(_free_port()) for port in sorted(set(_PORT.findall(everything)))}
        self.script = ["set -eu", "trap 'kill $(jobs -p) 2> /dev/null || true; wait || true' EXIT"]
        for number, block in enumerate(self.blocks):
            self.script += self._lines(block, number)

    def own(self, text: str) -> str:
        """A text of the page, with what stands for something of the reader's replaced."""
        text = _DATABASE.sub(self._dsn, text)
        text = re.sub(r"\bDATABASE app\b", f"DATABASE {self._server['dbname']}", text)
        for name, mine in self.roles.items():
            text = re.sub(rf"\b{name}\b", mine, text)
        return _PORT.sub(lambda found: self._ports[found[0]], text)

    def _dsn(self, found: re.Match[str]) -> str:
        """The session's server, as its superuser unless the page made the role."""
        parts = self._server
        login = ":".join(quote(str(parts[key]), safe="") for key in ("user", "password") if key in parts)
        login = found[0].split("//")[1].split("@")[0] if found["user"] in self.roles else login
        host = quote(str(parts.get("host", "localhost")), safe="")
        return f"postgresql://{login}@{host}:{parts.get('port', 5432)}/{parts['dbname']}"

    def _lines(self, block: Block, number: int) -> list[str]:
        if block.language == "console":
            return [line for command in commands(block) for line in self._command(command)]
        if block.language == "bash":
            return [self.own(block.text)]
        name = block.file_name or f"block_{number}.{block.language.replace('python', 'py')}"
        lines = [f'mkdir -p "$(dirname {name})"', f"cat > {name} <<'END_OF_BLOCK'"]
        lines += [self.own(block.text).rstrip("\n"), "END_OF_BLOCK"]
        if block.language == "sql":
            return [
                *lines,
                f"psql -X -q -v ON_ERROR_STOP=1 -f {name} {self.own('postgresql://db.example.com/app')}",
            ]
        if block.language in PARSERS:
            PARSERS[block.language](block.text)
        if block.language != "python" or self._is_used(name):
            return lines
        return [*lines, f"{'pytest -q' if name.startswith('test_') else 'python'} {name}"]

    def _is_used(self, name: str) -> bool:
        """Whether the page runs it, by ``chat.py`` or ``chat:app``, or it is there to be imported."""
        stem = Path(name).stem
        return "/" in name or any(
            re.search(rf"\b{stem}(\.py\b|:)|DJANGO_SETTINGS_MODULE={stem}\b", self._shell)
            or re.search(rf"^from {stem} import", block.text, re.MULTILINE)
            for block in self.blocks
        )

    def _command(self, command: Command) -> list[str]:
        text = self.own(command.text)
        self.commands.append(command)
        lines = [rf"printf '\n@@ %s\n' {len(self.commands) - 1}"]
        if not text.endswith("&"):
            return [*lines, text]
        lines.append(f"{text.removesuffix('&')} >> background.log 2>&1 &")
        return lines + [_WAIT.format(port=port) for port in self._ports.values() if port in text]

    def run(self, folder: Path, programs: Path) -> None:
        """Run it, with ``programs`` first on the ``PATH``; compare its output with what the page shows."""
        with _shell(["bash", "-c", "\n".join(self.script)], folder, programs) as shell:
            output, errors = shell.communicate(timeout=280)
        background = folder / "background.log"
        told = background.read_text() if background.exists() else ""
        assert shell.returncode == 0, f"{output}\n{errors}\n{told}"
        outputs = re.split(r"^@@ \d+\n", output, flags=re.MULTILINE)[1:]
        for command, printed in zip(self.commands, outputs, strict=True):
            lines = [line.split() for line in printed.splitlines()]  # how wide a column is, depends
            for line in map(self.own, command.expected):
                assert line.split() in lines, f"{command.block}: {command.text} printed {printed!r}"

    def drop_roles(self, postgres_dsn: str) -> None:
        """Drop the roles that the page has made, with what they own."""
        with psycopg.connect(postgres_dsn, autocommit=True) as conn:
            for role in map(sql.Identifier, self.roles.values()):
                with suppress(psycopg.errors.UndefinedObject):
                    conn.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(role))
                    conn.execute(sql.SQL("DROP ROLE {}").format(role))


def is_left_out(block: Block) -> bool:
    """Whether a remark says why the block is not run here, or the language that there is nothing to run.

    ``run by tests/x.py`` names a test that runs it and so knows the page.
    """
    if block.language == OUTPUT:
        return True
    if found := re.fullmatch(r"run by (tests/\S+\.py)", block.remark):
        assert block.page.name in (ROOT / found[1]).read_text(), f"{block}: {found[1]} does not know the page"
        return True
    return block.remark.startswith("not run")


@contextmanager
def _shell(command: list[str], folder: Path, programs: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is ended with all that it has started."""
    path = f"{programs}:{Path(sys.executable).parent}:/usr/bin:/bin:{BIN}"
    environment = clean_environment() | {"PATH": path}
    shell = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield shell
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGTERM)
        shell.wait(60)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

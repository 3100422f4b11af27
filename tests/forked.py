"""The console command in a process of its own that need not import anything: forked from one that has.

A command takes most of its time for its imports. Tests that are about the program itself (its script, what it
imports, a changed ``sys.path``) start it as usual.

This module is also the program that is forked: it reads a request a line, and answers with the exit code as
``subprocess`` gives it. It has one thread, so that its children lack nothing.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import persistence
from tests.support import ROOT, Result

ALSO = ("alembic.config", "pydantic.types", "rich.progress", "sqlalchemy.dialects.sqlite")
"""What is imported by commands when they need it, and takes long."""


class Commands:
    """Runs commands, as children of one process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, cwd: Path, env: Mapping[str, str], timeout: int = 120) -> Result:
        """Run a command; SIGALRM ends one that takes longer."""
        with tempfile.TemporaryDirectory() as name:
            outputs = [Path(name) / "out", Path(name) / "err"]
            request = {
                "arguments": arguments,
                "cwd": str(cwd),
                "env": dict(env),
                "outputs": list(map(str, outputs)),
                "timeout": timeout,
            }
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            texts = (path.read_text() for path in outputs)
            return Result(["persistence", *arguments], code, *texts)

    def close(self) -> None:
        """End the process that is forked."""
        self._process.communicate(timeout=60)


def _serve() -> None:
    """Fork a child for each request; it leaves this function, and does what the command's script does."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for line in requests:
        if (child := os.fork()) == 0:
            _become(**json.loads(line))
            return
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        answers.flush()
    os._exit(0)


def _modules() -> Iterator[str]:
    """All of the package but the suite for tests."""
    for module in walk_packages(persistence.__path__, "persistence."):
        if not module.name.startswith("persistence.testing"):
            yield module.name


def _become(arguments: list[str], cwd: str, env: dict[str, str], outputs: list[str], timeout: int) -> None:
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["persistence", *arguments]
    signal.alarm(timeout)


if __name__ == "__main__":
    for name in (*_modules(), *ALSO):
        import_module(name)
    gc.freeze()  # a collection would write to the pages of all these modules, and so copy them
    _serve()
    sys.exit(sys.modules["persistence.cli"].main())

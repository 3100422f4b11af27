"""Python programs in processes of their own that need not import LangGraph: forked from one that has.

A program of a page, an example or a tool takes most of its time for the imports of others' packages.
``Warm`` makes a folder for the ``PATH`` with ``python`` and some console scripts. Each is a launcher that
asks this process for a fork, which gets its arguments, folder, environment, umask and standard streams,
and imports ``persistence`` itself. The launcher hands on signals and the exit code; when it is killed, so
is the program, an instant later. To the program, ``sys.executable`` is the launcher, so that what it starts
is quick as well. ``python`` with options, or with more open files than the streams, is started as usual.

This module is also the program that is forked. It has one thread, so that its children lack nothing.
"""

from __future__ import annotations

import gc
import marshal
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path

MODULES = (
    "aiosqlite",
    "alembic.command",
    "alembic.config",
    "alembic.context",
    "fastapi.responses",
    "httpx",
    "langchain_core.messages",
    "langgraph.checkpoint.memory",
    "langgraph.checkpoint.postgres.aio",
    "langgraph.checkpoint.sqlite.aio",
    "langgraph.func",
    "langgraph.graph.message",
    "langgraph.prebuilt",
    "langgraph.store.memory",
    "langgraph.store.postgres.aio",
    "langgraph.store.sqlite.aio",
    "prometheus_client",
    "psycopg_pool",
    "pydantic_settings",
    "rich.live",
    "rich.progress",
    "sqlalchemy.dialects.postgresql",
    "sqlalchemy.dialects.sqlite",
    "stamina",
    "typer",
    "uvicorn",
    "uvicorn.lifespan.on",
    "uvicorn.protocols.http.auto",
)
"""What our programs import of others, now or when they need it."""

LAUNCHER = """#!{python} -IS
import _signal, _socket, marshal, os, sys
name, first = os.path.basename(sys.argv[0]), sys.argv[1:2]
options = first[0].startswith("-") and first[0] not in ("-c", "-m")
if name == "python" and (options or len(os.listdir("/dev/fd")) > 4):  # 4: the listing is open itself
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
ended = {{_signal.SIGHUP, _signal.SIGINT, _signal.SIGQUIT, _signal.SIGTERM}}
_signal.pthread_sigmask(_signal.SIG_BLOCK, ended)
mask = os.umask(0)
os.umask(mask)
request = marshal.dumps((sys.argv, os.getcwd(), dict(os.environ), mask))
server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
server.connect({address!r})
streams = b"".join(number.to_bytes(4, sys.byteorder) for number in range(3))
server.sendmsg([len(request).to_bytes(8, "big")], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, streams)])
server.sendall(request)
child = int.from_bytes(server.recv(8), "big")
for number in ended:  # also where it is ignored here, as by workers of pytest-xdist: the program may want it
    _signal.signal(number, lambda number, frame: os.kill(child, number))
_signal.pthread_sigmask(_signal.SIG_UNBLOCK, ended)
code = int.from_bytes(server.recv(8), "big", signed=True)
if code < 0:
    _signal.signal(-code, _signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""

Request = tuple[list[str], str, dict[str, str], int]


class Warm:
    """The process that is forked, and the folder with the launchers."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="persistence-warm-")
        folder = Path(self._folder.name)
        folder.chmod(0o755)
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        self.bin.mkdir()
        address = str(folder / "socket")
        for name in ("python", "persistence", "uvicorn", "django-admin"):
            path = self.bin / name
            path.write_text(LAUNCHER.format(python=sys.executable, address=address))
            path.chmod(0o755)
        command = [sys.executable, __file__, address]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        assert self._process.stdout is not None
        assert self._process.stdout.read() == b"ready"

    def close(self) -> None:
        """End the process that is forked."""
        self._process.terminate()
        self._process.communicate()
        self._folder.cleanup()


def _serve(address: str) -> Request:
    """Fork a child for each request; it returns from here with what it is to become."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(50)
    os.write(1, b"ready")
    os.dup2(2, 1)
    signal.signal(signal.SIGCHLD, _reap)
    while True:
        launcher = listener.accept()[0]
        if os.fork() == 0:
            listener.close()
            return _guard(launcher)
        launcher.close()


def _reap(number: int, frame: object) -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _guard(launcher: socket.socket) -> Request:
    """Fork the child, and tell the launcher how it ended."""
    length, streams, _, _ = socket.recv_fds(launcher, 8, 3)
    received = launcher.makefile("rb").read(int.from_bytes(length, "big"))
    request: Request = marshal.loads(received)  # noqa: S302 - of our own launcher
    wakes, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(woken)
    if (child := os.fork()) == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for unused in (launcher.detach(), wakes, woken):
            os.close(unused)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        # As an interpreter makes them for what they lead to now; ours may have been files, which can seek.
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - open to the end, as those below
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        return request
    for number in (*streams, *range(3)):
        os.close(number)
    launcher.sendall(child.to_bytes(8, "big"))
    ended, _, _ = select.select([launcher.fileno(), wakes], [], [])
    if launcher.fileno() in ended:  # it says nothing more: it was killed
        os.kill(child, signal.SIGKILL)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    launcher.sendall(code.to_bytes(8, "big", signed=True))
    os._exit(0)


def _become(arguments: list[str], folder: str, environment: dict[str, str], umask: int) -> None:
    """Be in the place of a new interpreter, with the program to run in ``sys.argv``."""
    os.umask(umask)
    os.chdir(folder)
    before = _for_imports(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    launcher = Path(arguments.pop(0))
    if launcher.name != "python":
        arguments = [str(Path(sys.executable).with_name(launcher.name)), *arguments]
    if _for_imports(environment) != before:
        os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 - a program of our own
    sys.executable = str(launcher.with_name("python"))
    sys.argv = arguments
    sys.path[0] = folder if arguments[0] in ("-c", "-m") else str(Path(arguments[0]).resolve().parent)


def _for_imports(environment: Mapping[str, str]) -> dict[str, str]:
    """What is looked at by the interpreter when it starts, or by LangGraph when it is imported."""
    return {k: v for k, v in environment.items() if k.startswith(("PYTHON", "LANG"))}


def _run() -> None:
    """Run the program as the main module."""
    if sys.argv[0] == "-m":
        sys.argv.pop(0)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if sys.argv[0] == "-c":
        source: str | bytes = sys.argv.pop(1)
    else:
        main.__file__ = sys.argv[0]
        source = Path(sys.argv[0]).read_bytes()
    exec(compile(source, sys.argv[0], "exec"), vars(main))  # noqa: S102


if __name__ == "__main__":
    for _name in MODULES:
        import_module(_name)
    gc.collect()
    gc.freeze()  # a collection would write to the pages of all these modules, and so copy them
    _this = sys.modules["__main__"]  # lives as long as the process
    _become(*_serve(sys.argv[1]))
    _run()

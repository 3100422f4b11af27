"""TLS to Postgres, as the DSN asks for it.

The server in the wheel is built without TLS, so TLS ends at a proxy before it, as it does in many clouds.
"""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict

import persistence
from persistence.errors import ConnectError
from persistence.settings import Settings

SSL_REQUEST = (8).to_bytes(4, "big") + (80877103).to_bytes(4, "big")


class TlsProxy:
    """Takes Postgres connections by TLS, or without a context in plaintext, and hands all on to a server."""

    def __init__(self, server: str, context: ssl.SSLContext | None) -> None:
        info = conninfo_to_dict(server)
        self.target = f"{info['host']}/.s.PGSQL.{info.get('port', 5432)}"
        self.context = context
        self.tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        try:
            if await reader.readexactly(8) != SSL_REQUEST:
                return
            writer.write(b"S" if self.context else b"N")
            if self.context:
                await writer.start_tls(self.context)
            there_reader, there_writer = await asyncio.open_unix_connection(self.target)
            try:
                await asyncio.gather(_copy(reader, there_writer), _copy(there_reader, writer))
            finally:
                there_writer.close()
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client does not trust us, and hangs up
        finally:
            writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


def certificate(folder: Path, name: str) -> Path:
    """A self-signed certificate, and its key beside it."""
    path = folder / f"{name}.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    command += ["-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    command += ["-keyout", str(path.with_suffix(".key")), "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return path


@asynccontextmanager
async def proxy(postgres_dsn: str, context: ssl.SSLContext | None) -> AsyncIterator[str]:
    """A DSN by way of a proxy; more options may follow."""
    server = persistence.Dsn.parse(postgres_dsn).conninfo
    running = TlsProxy(server, context)
    listening = await asyncio.start_server(running.serve, "127.0.0.1", 0)
    info, port = conninfo_to_dict(server), listening.sockets[0].getsockname()[1]
    login = ":".join(str(info[key]) for key in ("user", "password") if key in info)
    yield f"postgresql://{login}@localhost:{port}/{info['dbname']}?hostaddr=127.0.0.1"
    listening.close()
    for task in list(running.tasks):
        task.cancel()
    await asyncio.gather(*running.tasks, return_exceptions=True)


@pytest.fixture
async def dsn(postgres_dsn: str, tmp_path: Path) -> AsyncIterator[str]:
    """Of a proxy whose certificate names ``localhost``."""
    path = certificate(tmp_path, "localhost")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(path, path.with_suffix(".key"))
    async with proxy(postgres_dsn, context) as dsn:
        yield dsn


ONCE = Settings(connect_attempts=1, connect_timeout=10)


async def open_(dsn: str) -> None:
    async with persistence.aopen(dsn, settings=ONCE) as db:
        assert db.checkpointer is not None
        assert await db.checkpointer.aget_tuple({"configurable": {"thread_id": "t"}}) is None
    await asyncio.to_thread(_open_sync, dsn)


def _open_sync(dsn: str) -> None:
    with persistence.open(dsn, settings=ONCE) as db:
        assert db.ping() is not None


async def test_server_with_the_right_certificate_is_reached(dsn: str, tmp_path: Path) -> None:
    await open_(f"{dsn}&sslmode=verify-full&sslrootcert={tmp_path}/localhost.pem")


async def test_encryption_without_a_check_reaches_anybody(dsn: str) -> None:
    await open_(f"{dsn}&sslmode=require")
    await open_(f"{dsn}&ssl=true")


async def test_variables_of_libpq_work(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    monkeypatch.setenv("PGSSLROOTCERT", f"{tmp_path}/localhost.pem")
    await open_(dsn)
    monkeypatch.setenv("PGSSLROOTCERT", str(certificate(tmp_path, "other")))
    await refused(dsn, "certificate verify failed")


async def refused(dsn: str, reason: str) -> None:
    with pytest.raises(ConnectError, match=reason):
        await persistence.aopen(dsn, settings=ONCE)
    with pytest.raises(ConnectError, match=reason):
        await asyncio.to_thread(_open_sync, dsn)


async def test_unknown_certificate_is_refused(dsn: str, tmp_path: Path) -> None:
    other = certificate(tmp_path, "other")
    await refused(f"{dsn}&sslmode=verify-full&sslrootcert={other}", "certificate verify failed")
    await refused(f"{dsn}&sslmode=verify-full&sslrootcert={tmp_path}/none.pem", "none.pem")


async def test_certificate_of_another_host_is_refused(dsn: str, tmp_path: Path) -> None:
    there = dsn.replace("@localhost:", "@db.example.com:")
    trusted = f"sslrootcert={tmp_path}/localhost.pem"
    await refused(f"{there}&sslmode=verify-full&{trusted}", "does not match host name")
    await open_(f"{there}&sslmode=verify-ca&{trusted}")


async def test_server_without_tls_is_refused_where_tls_is_asked_for(
    postgres_dsn: str, tmp_path: Path
) -> None:
    trusted = f"sslrootcert={certificate(tmp_path, 'localhost')}"
    async with proxy(postgres_dsn, None) as dsn:
        await open_(dsn)  # libpq's default, "prefer", does without
        for mode in ("require", "verify-full"):
            await refused(f"{dsn}&sslmode={mode}&{trusted}", "server does not support SSL")

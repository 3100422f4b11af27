"""A TCP proxy that holds everything for a while, in each direction.

    python -m tools.benchmarks.proxy HOST PORT MILLISECONDS

``HOST`` may be the folder of a Unix socket. It prints the port it listens on and serves until it is stopped.
"""

from __future__ import annotations

import asyncio
import selectors
import sys
from collections import deque


class Pipe(asyncio.Protocol):
    """One direction of a connection: what arrives here leaves there, ``delay`` seconds later, in order."""

    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._waiting: deque[bytes | None] = deque()
        self.transport: asyncio.Transport | None = None
        self.other: Pipe | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Hold it."""
        self._later(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """The other side hears of it after what was sent before."""
        self._later(None)

    def _later(self, data: bytes | None) -> None:
        self._waiting.append(data)
        asyncio.get_running_loop().call_later(self._delay, self._forward)

    def _forward(self) -> None:
        data = self._waiting.popleft()
        if self.other is None or self.other.transport is None:
            return
        if data is None:
            self.other.transport.close()
        elif not self.other.transport.is_closing():
            self.other.transport.write(data)


class Entrance(Pipe):
    """The side of the client: connects to the server before it reads."""

    def __init__(self, host: str, port: int, delay: float) -> None:
        super().__init__(delay)
        self._server = (host, port)
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        super().connection_made(transport)
        assert self.transport is not None  # noqa: S101
        self.transport.pause_reading()
        self._connecting = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        exit_ = Pipe(self._delay)
        exit_.other, self.other = self, exit_
        host, port = self._server
        assert self.transport is not None  # noqa: S101
        try:
            if host.startswith("/"):
                await loop.create_unix_connection(lambda: exit_, f"{host}/.s.PGSQL.{port}")
            else:
                await loop.create_connection(lambda: exit_, host, port)
        except OSError:
            self.transport.close()
            return
        self.transport.resume_reading()


async def serve(host: str, port: int, delay: float) -> None:
    """Serve until stopped."""
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: Entrance(host, port, delay), "127.0.0.1", 0)
    print(listener.sockets[0].getsockname()[1], flush=True)
    await listener.serve_forever()


def main() -> None:
    """Read the arguments and serve."""
    host, port, milliseconds = sys.argv[1:]
    # select() waits for microseconds; epoll, which asyncio would choose, rounds up to whole milliseconds.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    loop.run_until_complete(serve(host, int(port), float(milliseconds) / 1000))


if __name__ == "__main__":
    main()

"""The event loop that an asynchronous saver or store belongs to, as other threads and loops reach it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import Any, TypeVar

from persistence.errors import WrongLoopError

T = TypeVar("T")

_LOOK = 0.5
"""Seconds after which who waits for another loop looks whether it still runs."""


class Home:
    """Runs work on the loop that it was made on; nobody waits for a loop that has ended."""

    def __init__(self, of: str) -> None:
        """``of`` is what belongs to the loop, as a message names it."""
        self.loop = asyncio.get_running_loop()
        self._of = of

    @property
    def runs(self) -> bool:
        """Whether the loop still does anything."""
        return self.loop.is_running()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Have it run, and wait for it in another thread."""
        future = self._begin(work)
        while not wait_for([future], timeout=_LOOK).done:
            self._check_running()
        return future.result()

    def here(self, work: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        """Have it run, from whatever loop."""
        return work if asyncio.get_running_loop() is self.loop else self._elsewhere(work)

    async def _elsewhere(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.wrap_future(self._begin(work))
        try:
            while not (await asyncio.wait([future], timeout=_LOOK))[0]:
                self._check_running()
        except asyncio.CancelledError:
            future.cancel()
            raise
        return await future

    def _begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        try:
            self._check_running()
            return asyncio.run_coroutine_threadsafe(work, self.loop)
        except BaseException:
            work.close()
            raise

    def _check_running(self) -> None:
        if not self.runs:
            raise WrongLoopError(
                f"{self._of} belongs to an event loop that does not run any more",
                hint="open the database on the loop that uses it: async with persistence.aopen(...)",
            )

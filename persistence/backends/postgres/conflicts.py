"""What is done again because another transaction got into its way."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from psycopg import errors

T = TypeVar("T")

CONFLICTS = (errors.SerializationFailure, errors.DeadlockDetected)
"""Errors of who got into the way of another transaction: nothing was done, and it may try again."""
_ATTEMPTS = 10
_PAUSE = 0.005
"""Seconds before the second attempt, at most; twice as many before each further one."""


def again(work: Callable[[], T], conflicts: tuple[type[Exception], ...] = CONFLICTS) -> T:
    """Do some work until nobody is in its way; the last of ten attempts keeps its error."""
    for attempt in range(1, _ATTEMPTS):
        with suppress(*conflicts):
            return work()
        time.sleep(_pause(attempt))
    return work()


async def again_async(
    work: Callable[[], Awaitable[T]], conflicts: tuple[type[Exception], ...] = CONFLICTS
) -> T:
    """As :func:`again`."""
    for attempt in range(1, _ATTEMPTS):
        with suppress(*conflicts):
            return await work()
        await asyncio.sleep(_pause(attempt))
    return await work()


def _pause(attempt: int) -> float:
    """Seconds to wait after an attempt, so that those who meet again and again part."""
    return random.uniform(0, _PAUSE * 2 ** (attempt - 1))  # noqa: S311 - nothing secret

"""Open with an ASGI application and close with it: ``FastAPI(lifespan=persistence.asgi.lifespan)``.

Works with every framework that takes a lifespan context manager (FastAPI, Starlette); none is
imported here. The handle is ``app.state.persistence``.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

from persistence.handle import aopen

if TYPE_CHECKING:
    from persistence.dsn import Dsn
    from persistence.settings import Settings

logger = logging.getLogger("persistence")

Lifespan = Callable[[Any], AbstractAsyncContextManager[None]]


def make_lifespan(dsn: str | Dsn | None = None, *, settings: Settings | None = None) -> Lifespan:
    """A lifespan for the given database instead of the one in the settings.

    Example:
        >>> app = FastAPI(lifespan=make_lifespan("sqlite:///chat.db"))
    """

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        logger.info("persistence starts with the application")
        async with aopen(dsn, settings=settings) as db:
            app.state.persistence = db
            yield
            logger.info("persistence stops with the application")

    return lifespan


lifespan = make_lifespan()
"""Opens the database of the settings, read when the application starts."""

"""The fixtures of the suite. They stand on one that its user writes: ``target``, an empty database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from persistence.settings import Settings
from persistence.testing.subject import LoopThread, Subject, Target

Opener = Callable[..., Subject]


@pytest.fixture(params=["sync", "async"])
def colour(request: pytest.FixtureRequest) -> str:
    """The colour of the saver under test."""
    return str(request.param)


@pytest.fixture(scope="session")
def loop_thread() -> Iterator[LoopThread]:
    """The event loop of asynchronous savers."""
    thread = LoopThread()
    yield thread
    thread.stop()


@pytest.fixture
def opened(target: Target, loop_thread: LoopThread) -> Iterator[Opener]:
    """Opens the database, with settings; all is closed after the test."""
    with ExitStack() as stack:

        def open_(**kwargs: Any) -> Subject:
            settings = Settings(setup_on_open=not target.has_tables, **kwargs)
            subject = Subject(target, settings, loop_thread)
            stack.callback(subject.close)
            return subject

        yield open_


@pytest.fixture
def saver(opened: Opener) -> Subject:
    """The saver under test, on an empty database."""
    return opened()

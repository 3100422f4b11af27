"""Clause F4 on our own savers: one may be closed by itself, while its connections serve others."""

from __future__ import annotations

import pytest

from persistence.errors import ClosedError
from persistence.testing.interface import METHODS, arguments
from persistence.testing.marks import clause
from persistence.testing.subject import Subject


@clause("F4")
def test_saver_that_was_closed_itself_says_so(saver: Subject) -> None:
    saver.put("t", "1", {})
    if hasattr(saver.saver, "aclose"):
        saver.loop.run(saver.saver.aclose())
    else:
        saver.saver.close()  # type: ignore[attr-defined]  # our savers have it
    for name in METHODS:
        args, kwargs = arguments(name)
        with pytest.raises(ClosedError):
            saver.call(name, *args, **kwargs)

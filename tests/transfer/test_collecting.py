"""How often Python looks for cycles of garbage while records pass."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from persistence.transfer.collecting import rarely_collected


@pytest.fixture
def thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


@pytest.mark.usefixtures("thresholds")
@pytest.mark.parametrize(("before", "within"), [(700, 50_000), (0, 0), (90_000, 90_000)])
def test_it_is_as_before_when_the_last_of_several_blocks_has_ended(before: int, within: int) -> None:
    gc.set_threshold(before, 7, 8)
    one, other = rarely_collected(), rarely_collected()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert gc.get_threshold() == (within, 7, 8)
    other.__exit__(None, None, None)
    assert gc.get_threshold() == (before, 7, 8)


@pytest.mark.usefixtures("thresholds")
def test_it_is_as_before_after_an_error() -> None:
    gc.set_threshold(700)
    with pytest.raises(ValueError, match="x"), rarely_collected():
        raise ValueError("x")
    assert gc.get_threshold()[0] == 700

"""What a test proves, and how many examples it tries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings

Test = TypeVar("Test", bound=Callable[..., Any])

CLAUSES = "__contract_clauses__"
EXAMPLES = 40

tried: Counter[str] = Counter()
"""Generated examples that each test has tried in this process, by the test's name."""


def clause(*ids: str) -> Callable[[Test], Test]:
    """Name the clauses of the contract that a test proves.

    An attribute and not a pytest marker, so that a project with ``--strict-markers`` need not know it.
    """

    def mark(test: Test) -> Test:
        setattr(test, CLAUSES, (*ids, *getattr(test, CLAUSES, ())))
        return test

    return mark


def generated(**strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Try a test with generated arguments: always the same ones, so that a failure is no accident."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def counted(*args: Any, **kwargs: Any) -> None:
            tried[test.__name__] += 1
            test(*args, **kwargs)

        profile = settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        )
        # A pool's own threads draw their jitter from `random` while Hypothesis watches it.
        quiet = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
        decorated: Callable[..., None] = quiet(profile(given(**strategies)(counted)))
        return decorated

    return decorate

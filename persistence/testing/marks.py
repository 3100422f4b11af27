"""What a test proves, and how many examples it tries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings

Test = TypeVar("Test", bound=Callable[..., Any])

CLAUSES = "__contract_clauses__"
EXAMPLES = "__contract_examples__"


def clause(*ids: str) -> Callable[[Test], Test]:
    """Name the clauses of the contract that a test proves.

    An attribute and not a pytest marker, so that a project with ``--strict-markers`` need not know it.
    """

    def mark(test: Test) -> Test:
        setattr(test, CLAUSES, (*ids, *getattr(test, CLAUSES, ())))
        return test

    return mark


def tries(examples: int) -> Callable[[Test], Test]:
    """Say how many examples a test generates."""

    def mark(test: Test) -> Test:
        setattr(test, EXAMPLES, examples)
        return test

    return mark


def generated(**strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Try a test with generated arguments: always the same ones, so that a failure is no accident."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        profile = settings(
            max_examples=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        )
        # A pool's own threads draw their jitter from `random` while Hypothesis watches it.
        quiet = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
        decorated: Callable[..., None] = quiet(profile(given(**strategies)(test)))
        return tries(profile.max_examples)(decorated)

    return decorate

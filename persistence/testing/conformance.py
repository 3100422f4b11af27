"""LangGraph's own conformance suite, one test for each of its specs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import pytest
from langgraph.checkpoint.conformance import checkpointer_test, spec, validate
from langgraph.checkpoint.conformance.capabilities import ALL_CAPABILITIES, DetectedCapabilities

from persistence.testing.marks import clause
from persistence.testing.subject import Subject

Spec = Callable[[Any], Coroutine[Any, Any, None]]


def specs() -> dict[str, Spec]:
    """Every spec of the installed suite."""
    found: dict[str, Spec] = {}
    for module in pkgutil.iter_modules(spec.__path__):
        loaded = importlib.import_module(f"{spec.__name__}.{module.name}")
        (names,) = (name for name in vars(loaded) if name.startswith("ALL_") and name.endswith("_TESTS"))
        found |= {function.__name__: function for function in getattr(loaded, names)}
    return found


SPECS = specs()


@clause("F1")
@pytest.mark.parametrize("colour", ["async"])
@pytest.mark.parametrize("name", SPECS)
def test_spec(saver: Subject, name: str) -> None:
    saver.loop.run(SPECS[name](saver.saver))


@clause("F1")
def test_full_level_and_nothing_undetected(saver: Subject) -> None:

    @checkpointer_test(name=f"{saver.target.backend}-{saver.target.colour}")
    async def registered() -> AsyncGenerator[Any, None]:
        yield saver.saver

    report = saver.loop.run(validate(registered))
    assert report.conformance_level() == "FULL"
    assert report.passed_all_base()
    assert DetectedCapabilities.from_instance(saver.saver).detected == ALL_CAPABILITIES
    results = report.to_dict()["results"]
    assert set(results) == {capability.value for capability in ALL_CAPABILITIES}
    assert all(result["detected"] and result["passed"] for result in results.values())
    assert sum(result["tests_passed"] for result in results.values()) == len(SPECS)
    assert not any(result["tests_skipped"] for result in results.values())

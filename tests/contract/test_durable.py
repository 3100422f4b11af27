import sys

import pytest

from persistence.testing.durable import *
from tests.contract.conftest import DURABLE
from tests.warm import Warm


@pytest.fixture(params=DURABLE)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def quick_programs(warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs that the suite starts need not import LangGraph anew."""
    monkeypatch.setattr(sys, "executable", str(warm.python))

import pytest

from persistence.testing.durable import *
from tests.contract.conftest import DURABLE


@pytest.fixture(params=DURABLE)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)

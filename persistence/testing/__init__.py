"""The contract as a test suite, for anybody's backend.

A test module of two imports and a fixture runs all of it on a backend, in both colours::

    import pytest
    from persistence.testing import *
    from persistence.testing.durable import *

    @pytest.fixture
    def target(colour, tmp_path):
        path = tmp_path / "conversations"
        return Target("mine", colour, f"mine://{path}", raw=path.read_bytes)

``target`` is an empty database each time. The second import is for a backend that keeps what was
stored when its process ends. See ``docs/testing.md``.

Needs ``pip install 'langgraph-persistence[testing]'``.
"""

from __future__ import annotations

from persistence.errors import MissingDriverError

try:
    import hypothesis  # noqa: F401
    import langgraph.checkpoint.conformance  # noqa: F401
    import pytest
except ModuleNotFoundError as error:
    raise MissingDriverError(
        f"the contract suite needs {error.name}",
        hint="install it with: pip install 'langgraph-persistence[testing]'",
    ) from error

_SUITE = "concurrency conformance differential durable graphs interface reading secrets values writing"
pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in _SUITE.split()))

from persistence.testing.concurrency import *  # noqa: E402
from persistence.testing.conformance import *  # noqa: E402
from persistence.testing.differential import *  # noqa: E402
from persistence.testing.fixtures import *  # noqa: E402
from persistence.testing.graphs import *  # noqa: E402
from persistence.testing.interface import *  # noqa: E402
from persistence.testing.reading import *  # noqa: E402
from persistence.testing.secrets import *  # noqa: E402
from persistence.testing.subject import *  # noqa: E402
from persistence.testing.values import *  # noqa: E402
from persistence.testing.writing import *  # noqa: E402

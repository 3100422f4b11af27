"""The contract as a test suite, for anybody's backend.

A test module of three parts runs all of it on a backend, in both colours::

    import pytest
    from persistence.testing import *

    @pytest.fixture
    def target(colour, tmp_path):
        return Target("mine", colour, f"mine:///{tmp_path}/conversations")

``target`` is an empty database each time. For a backend that keeps what was stored when its process
ends, add ``from persistence.testing.durable import *``; it needs ``Target(raw=...)``.

Needs ``pip install langgraph-persistence[testing]``.
"""

from __future__ import annotations

import pytest

_SUITE = "conformance differential durable graphs interface reading secrets values writing"
pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in _SUITE.split()))

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

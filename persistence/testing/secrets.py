"""Clauses S3 and S4: what may be read by whom."""

from __future__ import annotations

import pytest

from persistence.testing.fixtures import Opener
from persistence.testing.kinds import Trip
from persistence.testing.marks import clause
from persistence.testing.subject import Target


@clause("S3")
def test_strict_deserialisation_is_one_setting(opened: Opener) -> None:
    trip = Trip(city="Rome")
    strict = opened(strict_msgpack=True)
    strict.put("t", "1", {"trip": trip, "nested": [trip], "b": bytearray(b"1")})
    assert strict.values("t") == {
        "trip": {"city": "Rome", "days": 1},
        "nested": [{"city": "Rome", "days": 1}],
        "b": bytearray(b"1"),
    }
    allowed = opened(strict_msgpack=True, allowed_msgpack=["persistence.testing.kinds:Trip"])
    allowed.put("t", "1", {"trip": trip, "nested": [trip]})
    assert allowed.values("t") == {"trip": trip, "nested": [trip]}


@clause("S4")
def test_no_password_in_an_error_or_a_repr(
    opened: Opener, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    import traceback

    caplog.set_level("DEBUG")
    saver = opened()
    shown = [repr(saver.handle), repr(saver.saver), str(saver.handle.dsn)]
    saver.close()
    try:
        saver.get("t")
    except Exception:  # noqa: BLE001
        shown.append(traceback.format_exc())
    text = "\n".join(shown) + caplog.text
    assert "closed" in text
    assert target.password is None or target.password not in text

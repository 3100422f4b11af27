"""Clauses S1 to S4: what may be read by whom."""

from __future__ import annotations

from typing import Any

import pytest

from persistence.errors import EncryptionError
from tests.contract.conftest import Opener
from tests.contract.kinds import Trip
from tests.contract.subject import Subject, Target, at, fresh

KEY = "0123456789abcdef"
SECRET = "attack-at-dawn"


def fill(saver: Subject) -> str:
    thread = fresh()
    values: dict[str, Any] = {
        "text": SECRET,
        "list": [SECRET],
        "number": 918273645546372819,
        "float": 0.918273645,
    }
    config = saver.put(thread, "1", values, metadata={"public": "yes"})
    saver.put_writes(config, [("text", SECRET), ("__error__", SECRET), ("number", 918273645546372819)])
    saver.put(thread, "2", {"unversioned": SECRET}, parent="1", versions={"text": "1.text"}, new={})
    saver.put(thread, "3", {"text": SECRET + "!"}, parent="2", versions={"text": "1.text"})
    return thread


@pytest.mark.clause("S1")
def test_no_value_is_stored_in_plaintext(durable: Target, opened: Opener) -> None:
    saver = opened(encryption_key=KEY)
    thread = fill(saver)
    assert saver.values(thread, "1")["text"] == SECRET
    assert saver.values(thread, "2") == {"text": SECRET, "unversioned": SECRET}
    assert saver.values(thread) == {"text": SECRET + "!"}
    assert durable.raw is not None
    stored = durable.raw()
    assert b"public" in stored
    for plain in (SECRET.encode(), b"918273645", b"YXR0YWNrLWF0", (918273645546372819).to_bytes(8, "big")):
        assert plain not in stored
    assert saver.ids(at(thread), filter={"public": "yes"}) == ["1"]
    saver.close()
    plain_again = opened()
    with pytest.raises(EncryptionError):
        plain_again.get(thread, "1")


@pytest.mark.clause("S1")
def test_plaintext_would_be_found(durable: Target, opened: Opener) -> None:
    """The test above can fail: without a key the values are there to be seen."""
    fill(opened())
    assert durable.raw is not None
    assert SECRET.encode() in durable.raw()


@pytest.mark.clause("S2")
@pytest.mark.parametrize("values", [{"x": [1]}, {"x": "short"}, {"x": 1}, {"x": None}], ids=str)
def test_plaintext_is_refused_under_encryption(
    durable: Target, opened: Opener, values: dict[str, Any]
) -> None:
    plain = opened()
    config = plain.put("t", "1", values)
    plain.put_writes(config, [("x", values["x"])])
    plain.close()
    strict = opened(encryption_key=KEY)
    with pytest.raises(EncryptionError):
        strict.get("t")
    with pytest.raises(EncryptionError):
        strict.list(at("t"))
    strict.close()
    lenient = opened(encryption_key=KEY, allow_plaintext=True)
    assert lenient.values("t") == values
    lenient.put("t", "2", {"y": [2]}, parent="1", versions={"x": "1.x", "y": 2}, new={"y": 2})
    assert lenient.values("t") == {**values, "y": [2]}


@pytest.mark.clause("S3")
def test_strict_deserialisation_is_one_setting(opened: Opener) -> None:
    trip = Trip(city="Rome")
    strict = opened(strict_msgpack=True)
    strict.put("t", "1", {"trip": trip, "nested": [trip], "b": bytearray(b"1")})
    assert strict.values("t") == {
        "trip": {"city": "Rome", "days": 1},
        "nested": [{"city": "Rome", "days": 1}],
        "b": bytearray(b"1"),
    }
    allowed = opened(strict_msgpack=True, allowed_msgpack=["tests.contract.kinds:Trip"])
    allowed.put("t", "1", {"trip": trip, "nested": [trip]})
    assert allowed.values("t") == {"trip": trip, "nested": [trip]}


@pytest.mark.clause("S4")
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

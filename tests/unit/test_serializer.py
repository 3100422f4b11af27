"""The serializer: LangGraph's formats, strictness by setting, and no plaintext under encryption."""

from __future__ import annotations

import dataclasses
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import Checkpoint, empty_checkpoint
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, StateGraph
from pydantic import BaseModel

import persistence
from persistence.errors import EncryptionError, MissingDriverError, PersistenceError
from persistence.serializer import make_serializer
from persistence.settings import Settings

KEY = "k" * 32
SECRET = "Zq7secret"


class Person(BaseModel):
    name: str


@dataclasses.dataclass
class Order:
    number: int


VALUES: list[Any] = [
    None,
    True,
    5,
    1.5,
    "text",
    b"bytes",
    bytearray(b"bytes"),
    "",
    b"",
    [HumanMessage("hi", id="1"), AIMessage("ho", id="2")],
    {"a": [1, {2}]},
    Person(name="Ada"),
    Order(7),
]


def settings(**values: Any) -> Settings:
    return Settings(_env_file=None, **values)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("key", [None, KEY])
def test_values_come_back_equal_and_of_the_same_type(value: Any, key: str | None) -> None:
    serde = make_serializer(settings(encryption_key=key))
    back = serde.loads_typed(serde.dumps_typed(value))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_langgraphs_own_serializers_read_ours_and_the_other_way_round(value: Any) -> None:
    pairs = [
        (make_serializer(settings()), JsonPlusSerializer()),
        (
            make_serializer(settings(encryption_key=KEY)),
            EncryptedSerializer.from_pycryptodome_aes(key=KEY.encode()),
        ),
    ]
    for ours, theirs in pairs:
        assert theirs.loads_typed(ours.dumps_typed(value)) == value
        assert ours.loads_typed(theirs.dumps_typed(value)) == value


def test_encrypted_means_that_nothing_is_readable() -> None:
    serde = make_serializer(settings(encryption_key=KEY))
    assert isinstance(serde, EncryptedSerializer)
    for value in (SECRET, SECRET.encode(), {"a": SECRET}, Person(name=SECRET)):
        kind, data = serde.dumps_typed(value)
        assert kind.endswith("+aes")
        assert SECRET.encode() not in data


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("strict", [False, True])
def test_plaintext_is_refused_under_encryption(value: Any, strict: bool) -> None:
    plain = JsonPlusSerializer().dumps_typed(value)
    serde = make_serializer(settings(encryption_key=KEY, strict_msgpack=strict))
    with pytest.raises(EncryptionError, match=r"not encrypted .*PERSISTENCE_ALLOW_PLAINTEXT"):
        serde.loads_typed(plain)


def test_plaintext_is_read_where_it_is_allowed() -> None:
    serde = make_serializer(settings(encryption_key=KEY, allow_plaintext=True))
    assert serde.loads_typed(JsonPlusSerializer().dumps_typed("old")) == "old"
    assert serde.dumps_typed("new")[0] == "msgpack+aes"


def test_an_encrypted_value_without_a_key_another_key_or_damaged() -> None:
    kind, data = make_serializer(settings(encryption_key=KEY)).dumps_typed({"a": 1})
    with pytest.raises(EncryptionError, match=r"no key is set .*PERSISTENCE_ENCRYPTION_KEY"):
        make_serializer(settings()).loads_typed((kind, data))
    other = make_serializer(settings(encryption_key="o" * 32))
    for damaged in (data, data[:-1], data[:20], b""):
        with pytest.raises(EncryptionError, match="cannot be decrypted"):
            other.loads_typed((kind, damaged))
    with pytest.raises(EncryptionError, match="'rot13'"):
        other.loads_typed(("msgpack+rot13", data))


def test_old_keys_read_and_the_new_one_writes() -> None:
    old, older, newest = "o" * 32, "p" * 16, "n" * 24
    values = {key: make_serializer(settings(encryption_key=key)).dumps_typed(key) for key in (old, older)}
    serde = make_serializer(settings(encryption_key=newest, encryption_old_keys=f"{old},{older}"))
    for key, typed in values.items():
        assert serde.loads_typed(typed) == key
    written = serde.dumps_typed("new")
    assert EncryptedSerializer.from_pycryptodome_aes(key=newest.encode()).loads_typed(written) == "new"
    assert serde.loads_typed(written) == "new"
    kind, data = values[old]
    for bad in (data[:-1] + bytes([data[-1] ^ 1]), data[:20], b""):
        with pytest.raises(EncryptionError, match="cannot be decrypted"):
            serde.loads_typed((kind, bad))
    with pytest.raises(EncryptionError, match="cannot be decrypted"):
        make_serializer(settings(encryption_key=newest, encryption_old_keys=older)).loads_typed(values[old])


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    yield connection
    connection.close()


class State(TypedDict):
    person: Person
    text: str


def run_graph(saver: SqliteSaver) -> None:
    graph = StateGraph(State)
    graph.add_node("greet", lambda state: {"text": state["person"].name})
    graph.add_edge(START, "greet")
    compiled = graph.compile(checkpointer=saver)
    compiled.invoke({"person": Person(name=SECRET), "text": ""}, {"configurable": {"thread_id": "1"}})


@pytest.mark.parametrize("strict", [False, True])
def test_the_refusal_survives_langgraphs_allowlist(connection: sqlite3.Connection, strict: bool) -> None:
    config: Any = {"configurable": {"thread_id": "1", "checkpoint_ns": ""}}
    run_graph(SqliteSaver(connection))
    serde = make_serializer(settings(encryption_key=KEY, strict_msgpack=strict))
    saver = SqliteSaver(connection, serde=serde).with_allowlist([(Person.__module__, "Person")])
    assert (saver.serde is serde) is not strict  # strict: LangGraph has built a new one
    with pytest.raises(EncryptionError):
        saver.get_tuple(config)
    saver.delete_thread("1")
    run_graph(saver)  # type: ignore[arg-type]
    kinds = connection.execute("SELECT type FROM checkpoints UNION SELECT type FROM writes").fetchall()
    assert {kind.partition("+")[2] for (kind,) in kinds} == {"aes"}
    stored = b"".join(row[0] for row in connection.execute("SELECT checkpoint FROM checkpoints").fetchall())
    assert SECRET.encode() not in stored
    found = saver.get_tuple(config)
    assert found is not None
    assert found.checkpoint["channel_values"]["person"] == Person(name=SECRET)


def test_strict_msgpack_restores_only_registered_types(caplog: pytest.LogCaptureFixture) -> None:
    data = make_serializer(settings()).dumps_typed([Person(name="Ada"), Order(7), HumanMessage("hi", id="1")])
    assert make_serializer(settings()).loads_typed(data)[0] == Person(name="Ada")
    allowed = f"{Person.__module__}:Person"
    person, order, message = make_serializer(
        settings(strict_msgpack=True, allowed_msgpack=allowed)
    ).loads_typed(data)
    assert person == Person(name="Ada")
    assert not isinstance(order, Order)
    assert message == HumanMessage("hi", id="1")
    assert "Order" in caplog.text


def test_a_missing_driver_is_an_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "Crypto.Cipher.AES", None)
    with pytest.raises(
        MissingDriverError, match=r'pip install "langgraph-persistence\[encryption\]"'
    ) as caught:
        make_serializer(settings(encryption_key=KEY))
    assert isinstance(caught.value, PersistenceError)
    assert make_serializer(settings()).dumps_typed(1)[0] == "msgpack"


def test_a_bytearray_is_known_in_strict_mode(tmp_path: Path) -> None:
    """The SQLite savers store one at the top of a channel by the name of its type."""
    with persistence.open(f"sqlite:///{tmp_path}/x.db", settings=Settings(strict_msgpack=True)) as db:
        assert db.checkpointer is not None
        checkpoint: Checkpoint = {
            **empty_checkpoint(),
            "channel_values": {"b": bytearray(b"xx")},
            "channel_versions": {"b": "1"},
        }
        start: RunnableConfig = {"configurable": {"thread_id": "1", "checkpoint_ns": ""}}
        stored = db.checkpointer.get(db.checkpointer.put(start, checkpoint, {}, {"b": "1"}))
        assert stored is not None
        assert type(stored["channel_values"]["b"]) is bytearray

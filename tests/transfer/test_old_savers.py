"""Databases that old versions of LangGraph's SQLite saver wrote; ``make_fixtures.py`` made them there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver

from persistence import transfer
from tests.transfer import graphs
from tests.transfer.fixture_state import SENDS, Colour, Money, Profile, listed
from tests.transfer.make_fixtures import graph_on

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.db"))
JSON_ROWS = "1.0.0"


def serde() -> JsonPlusSerializer:
    return JsonPlusSerializer(allowed_msgpack_modules=[Colour, Profile, Money])


def today(saver: Any) -> list[dict[str, Any]]:
    saver.serde = serde()
    return listed(saver.list(None))


@pytest.fixture(params=FIXTURES, ids=[path.stem for path in FIXTURES])
def fixture(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copy(request.param, tmp_path / Path(request.param).name))


def as_it_was(fixture: Path) -> list[dict[str, Any]]:
    """What the saver that wrote a fixture listed."""
    expected: list[dict[str, Any]] = json.loads(
        (Path(__file__).parent / "fixtures" / f"{fixture.stem}.json").read_text()
    )
    return expected


def test_every_version_is_there() -> None:
    assert [path.stem for path in FIXTURES] == ["1.0.0", "1.0.4", "2.0.11", "3.0.0", "3.1.2"]
    kinds = str([as_it_was(path) for path in FIXTURES[:2]])
    assert all(
        kind in kinds for kind in ("AIMessage", "Profile", "Money", "Send", "set", "bytes", "Interrupt")
    )
    assert all(path.stat().st_size < 100_000 for path in FIXTURES)


def test_into_postgres_sqlite_and_an_archive(fixture: Path, postgres_dsn: str, tmp_path: Path) -> None:
    expected = as_it_was(fixture)
    again, archive = tmp_path / "again.db", tmp_path / "archive"
    assert transfer.migrate(fixture, postgres_dsn).verified
    transfer.export(fixture, archive)
    assert transfer.import_(archive, f"sqlite:///{again}").verified
    assert transfer.verify(fixture, archive).equal
    assert transfer.verify(again, postgres_dsn).equal
    with PostgresSaver.from_conn_string(postgres_dsn) as saver:
        assert today(saver) == expected
    with SqliteSaver.from_conn_string(str(again)) as saver:
        assert today(saver) == expected
    if fixture.stem != JSON_ROWS:  # of which today's saver reads only a part
        assert transfer.verify(fixture, postgres_dsn, check=transfer.Check(depth="semantic")).equal
        with SqliteSaver.from_conn_string(str(fixture)) as saver:
            assert today(saver) == expected


@pytest.mark.filterwarnings("ignore:NodeInterrupt is deprecated")
def test_packets_that_wait_are_sent(fixture: Path, postgres_dsn: str) -> None:
    """A graph of today goes on where one of then has stopped."""
    transfer.migrate(fixture, postgres_dsn)
    (latest,) = [
        entry
        for entry in as_it_was(fixture)
        if entry["place"][0] == "packets wait" and SENDS in entry["values"]
    ]
    assert len(latest["values"][SENDS]) == 2
    with PostgresSaver.from_conn_string(postgres_dsn) as saver:
        saver.serde = serde()
        graph = graph_on(saver)
        assert sorted(graph.get_state(graphs.config("packets wait")).next) == ["inner", "look", "look"]
        done = graph.invoke(None, graphs.config("packets wait"))
    assert {"item 0", "item 1"} <= set(done["found"])

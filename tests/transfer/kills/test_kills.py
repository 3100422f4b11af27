"""Killed with SIGKILL at every commit boundary and at random instants: all rows are those of one clean run.

By default a few kills of each kind; ``make kills`` does them at every boundary.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from persistence import transfer
from tests.support import fresh_database
from tests.transfer import graphs, make, stores
from tests.transfer.kills.harness import Campaign, Nursery, nursery
from tests.transfer.kills.scenarios import SCENARIOS

FULL = os.environ.get("KILLS") == "full"
killed: dict[str, tuple[int, int]] = {}


@pytest.fixture(scope="module")
def forks() -> Iterator[Nursery]:
    with nursery() as process:
        yield process


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kills") / "chat.db"
    graphs.fill(path, threads=1, turns=1)
    with make.database(path) as saver:
        for number in range(40):  # one thread that spans batches and parts
            make.put(saver, "long", {"c": ["x" * (20 * (number // 2))]}, versions={"c": number // 2})
        for number in range(
            30
        ):  # a state that was changed in place: markers in other batches than their value
            make.put(saver, "mutated", {"c": [number // 3], "d": None if number % 2 else [number]})
    stores.fill(path)
    with stores.sqlite_store(path) as store:
        for number in range(20):
            store.put(("more",), f"k{number:02}", {"n": number})
    return path


@pytest.fixture(scope="module")
def server(postgres_server: str, source: Path) -> Iterator[str]:
    with fresh_database(postgres_server) as dsn:
        transfer.migrate(source, f"{dsn}&schema=source")
        yield dsn


@pytest.mark.timeout(0 if FULL else 300)
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed(forks: Nursery, server: str, source: Path, tmp_path: Path, name: str) -> None:
    campaign = Campaign(forks, SCENARIOS[name], tmp_path, server, source)
    every = range(1, len(campaign.steps) + 1)
    choose = random.Random(name)  # noqa: S311 - places, not secrets
    if not SCENARIOS[name].repeats:
        campaign.at_random(50 if FULL else 3, choose)
    elif FULL:
        campaign.at_commits(every)
        campaign.at_random(25, choose)
        campaign.two_at_once(choose.sample(every, 8))
    else:
        campaign.at_commits(choose.sample(every, 1))
        campaign.at_random(1, choose)
        if name in ("sqlite-postgres", "sqlite-sqlite"):
            campaign.two_at_once([None, *choose.sample(every, 1)])
    killed[name] = campaign.kills, len(campaign.steps)
    print(f"\n{name}: {campaign.kills} kills, {len(campaign.steps)} commit boundaries")  # noqa: T201


if FULL:

    def test_enough_kills() -> None:
        assert sum(kills for kills, _ in killed.values()) >= 200, killed

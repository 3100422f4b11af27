"""What is shown of a phase, and how often."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from persistence.cli import progress as module
from persistence.cli.console import invocation
from persistence.cli.progress import EVENT_EVERY, LINE_EVERY, progress


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def as_json() -> Iterator[None]:
    invocation.json = True
    yield
    invocation.json = False


def run(clock: Clock, steps: int, seconds: float, total: int) -> None:
    with progress() as show:
        show("write", 0, total, 0)
        for step in range(1, steps + 1):
            clock.now += seconds / steps
            show("write", step * total // steps, total, step * 1_000_000)


def test_events_are_limited_in_rate(clock: Clock, as_json: None, capsys: pytest.CaptureFixture[str]) -> None:
    run(clock, steps=1000, seconds=10 * EVENT_EVERY, total=5000)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["event"] for event in events] == ["begin", *["progress"] * 9, "end"]
    middle = events[5]
    assert middle["done"] == pytest.approx(2500, rel=0.02)
    assert middle["checkpoints_per_second"] == pytest.approx(500, rel=0.02)
    assert middle["bytes_per_second"] == pytest.approx(100e6, rel=0.02)
    assert middle["seconds_left"] == pytest.approx(5, rel=0.02)


def test_lines_say_the_rates_and_the_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run(clock, steps=1000, seconds=4 * LINE_EVERY, total=5000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("write: 2,50")
    assert lines[1].endswith("25.0 MB/s, 125 cp/s, 20 s left")
    assert lines[-1] == "write: 5,000 of 5,000 checkpoints, 1.0 GB, 25.0 MB/s, 125 cp/s"


def test_a_phase_that_ends_early(clock: Clock, as_json: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as show:
        show("read", 0, 10, 0)
        show("read", 5, 10, 500)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(event["event"], event["done"]) for event in events] == [("begin", 0), ("end", 5)]


def test_a_phase_with_nothing_to_do(clock: Clock, as_json: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as show:
        show("read", 0, 0, 0)
        show("read", 0, 0, 0)
    events = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
    assert events == ["begin", "end"]


def test_a_failure_ends_no_phase(clock: Clock, as_json: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), progress() as show:
        show("read", 0, 10, 0)
        raise KeyError
    assert json.loads(capsys.readouterr().err)["event"] == "begin"

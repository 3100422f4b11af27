"""What the savers do is measured, once for each operation, for OpenTelemetry and for Prometheus."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.base import empty_checkpoint
from prometheus_client.parser import text_string_to_metric_families

import persistence
from persistence import metrics, transfer
from persistence.errors import InvalidInputError
from tests.ops.conftest import counter, thread

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples() -> Samples:
    """What a scrape shows."""
    _, body = metrics.exposition()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
        if sample.name.startswith("persistence_") and "le" not in sample.labels
    }


def calls(before: Samples, after: Samples, error: str = "") -> dict[str, float]:
    """How often each operation was counted between two scrapes."""
    found: dict[str, float] = {}
    for (name, labels), value in after.items():
        told = dict(labels)
        if name == "persistence_operation_duration_seconds_count" and told["error"] == error:
            increase = value - before.get((name, labels), 0)
            if increase:
                found[told["operation"]] = found.get(told["operation"], 0) + increase
    return found


def exercise(saver: Any) -> None:
    config = saver.put({"configurable": {"thread_id": "t", "checkpoint_ns": ""}}, empty_checkpoint(), {}, {})
    saver.put_writes(config, [("a", "x" * 100)], "task")
    assert saver.get_tuple(config) is not None
    assert len(list(saver.list(config))) == 1
    next(saver.list({"configurable": {"thread_id": "t"}}))  # left in the middle
    saver.get_delta_channel_history(config=config, channels=["a"])
    saver.copy_thread("t", "u")
    saver.prune(["u"], strategy="delete")
    saver.delete_for_runs(["r"])
    saver.delete_thread("t")


async def aexercise(saver: Any) -> None:
    given = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
    config = await saver.aput(given, empty_checkpoint(), {}, {})
    await saver.aput_writes(config, [("a", "x" * 100)], "task")
    assert await saver.aget_tuple(config) is not None
    for _ in range(2):
        assert len([found async for found in saver.alist(config)]) == 1
    await saver.aget_delta_channel_history(config=config, channels=["a"])
    await saver.acopy_thread("t", "u")
    await saver.aprune(["u"], strategy="delete")
    await saver.adelete_for_runs(["r"])
    await saver.adelete_thread("t")


ONCE_EACH = {name: 2 if name == "list" else 1 for name in metrics.OPERATIONS}


def test_each_operation_is_counted_once(dsn: str) -> None:
    with persistence.open(dsn) as db:
        before = samples()
        exercise(db.checkpointer)
        assert calls(before, samples()) == ONCE_EACH
        before = samples()
        asyncio.run(aexercise(db.checkpointer))  # in the other colour
        assert calls(before, samples()) == ONCE_EACH


async def test_each_operation_is_counted_once_async(dsn: str) -> None:
    async with persistence.aopen(dsn) as db:
        before = samples()
        await aexercise(db.checkpointer)
        assert calls(before, samples()) == ONCE_EACH
        before = samples()
        await asyncio.to_thread(exercise, db.checkpointer)
        assert calls(before, samples()) == ONCE_EACH


async def test_errors_are_counted_by_their_class(dsn: str) -> None:
    wrong: Any = {"configurable": {"thread_id": "a\0b", "checkpoint_ns": ""}}
    async with persistence.aopen(dsn) as db:
        saver: Any = db.checkpointer
        before = samples()
        with pytest.raises(InvalidInputError):
            await saver.aput(wrong, empty_checkpoint(), {}, {})
        with pytest.raises(InvalidInputError):
            async for _ in saver.alist(wrong):
                pass
        assert calls(before, samples(), "InvalidInputError") == {"put": 1, "list": 1}
        assert calls(before, samples()) == {}


def test_a_clone_of_a_saver_is_measured_too(dsn: str) -> None:
    """LangGraph compiles with ``with_allowlist``, which copies the saver."""
    with persistence.open(dsn) as db:
        assert db.checkpointer is not None
        clone = db.checkpointer.with_allowlist([("tests.ops.test_metrics", "Nothing")])
        before = samples()
        exercise(clone)
        assert calls(before, samples()) == ONCE_EACH


def test_sizes_and_gauges(table_dsn: str) -> None:
    with persistence.open(table_dsn) as db:
        before = samples()
        saver: Any = db.checkpointer
        checkpoint = empty_checkpoint()
        checkpoint["channel_values"] = {"text": ["x" * 5000]}
        checkpoint["channel_versions"] = {"text": "1"}
        given = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
        config = saver.put(given, checkpoint, {}, {"text": "1"})
        saver.put_writes(config, [("a", "x" * 3000)], "task")
        saver.get_tuple(config)
        db.health()
        after = samples()
        kind = {"backend": db.backend}
        for name, least in (("checkpoint", 5000), ("writes", 3000), ("loaded", 8000)):
            key = ("persistence_value_size_bytes_sum", tuple(sorted({**kind, "kind": name}.items())))
            assert least <= after[key] - before.get(key, 0) < least + 1000, name
        gauges = {name for name, labels in after if dict(labels) == kind}
        assert {"persistence_ready", "persistence_degraded", "persistence_memory_only_threads"} <= gauges
        if db.backend == "postgresql":
            assert {"persistence_pool_waiting", "persistence_storage_checkpoints_bytes"} <= gauges
        else:
            assert {"persistence_queue_length", "persistence_commits"} <= gauges
    assert not any(name == "persistence_ready" and dict(labels) == kind for name, labels in samples())


TELEMETRY = """
import persistence
from langgraph.checkpoint.base import empty_checkpoint
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

with persistence.open("sqlite:///x.db") as db:
    reader = InMemoryMetricReader()
    metrics.set_meter_provider(MeterProvider([reader]))  # later than the opening
    saver = db.checkpointer
    saver.put({"configurable": {"thread_id": "t", "checkpoint_ns": ""}}, empty_checkpoint(), {}, {})
    for resource in reader.get_metrics_data().resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    print(metric.name, dict(point.attributes), getattr(point, "count", None))
"""


def test_open_telemetry(tmp_path: Path) -> None:
    """In a process of its own: the provider can be set once."""
    result = subprocess.run(
        [sys.executable, "-c", TELEMETRY],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    put = "persistence.operation.duration {'backend': 'sqlite', 'operation': 'put', 'error': ''} 1"
    assert put in result.stdout
    assert "persistence.value.size {'backend': 'sqlite', 'kind': 'checkpoint'} 1" in result.stdout
    assert "persistence.gauge {'name': 'commits', 'backend': 'sqlite'}" in result.stdout


def test_checkpoints_are_logged_at_debug_only(table_dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    with persistence.open(table_dsn) as db:
        graph = counter().compile(checkpointer=db.checkpointer)
        for level in (logging.INFO, logging.DEBUG):
            caplog.clear()
            caplog.set_level(level, logger="persistence")
            graph.invoke({"n": 1}, thread("thread-of-alice"))
            found = [record for record in caplog.records if hasattr(record, "persistence_checkpoint")]
            if level == logging.INFO:
                assert "alice" not in caplog.text
            else:
                state = graph.get_state(thread("thread-of-alice"))
                last: Any = found[-1]
                assert last.persistence_checkpoint == state.config["configurable"]["checkpoint_id"]
                assert last.persistence_thread == "thread-of-alice"
                assert last.persistence_bytes >= 0


def test_no_label_holds_data_of_users(dsn: str) -> None:
    with persistence.open(dsn) as db:
        graph = counter().compile(checkpointer=db.checkpointer, store=db.store)
        graph.invoke({"n": 1}, thread("thread-of-alice"))
        db.health()
        assert b"alice" not in metrics.exposition()[1]


def test_the_progress_of_a_transfer(tmp_path: Path) -> None:
    source = f"sqlite:///{tmp_path}/x.db"
    with persistence.open(source) as db:
        graph = counter().compile(checkpointer=db.checkpointer)
        graph.invoke({"n": 1}, thread())
    seen: list[Samples] = []
    transfer.export(source, tmp_path / "archive", progress=lambda *_: seen.append(samples()))
    key = ("persistence_transfer_read_checkpoints", (("backend", "transfer"),))
    assert seen[-1][key] == 3

"""What the savers do, in figures: by OpenTelemetry always, for Prometheus where it is asked for.

Without an OpenTelemetry SDK in the application its API does nothing, so recording costs next to nothing.
:func:`enable_prometheus` adds a recorder whose figures :func:`exposition` prints; the HTTP endpoints of
``persistence.asgi`` do that by themselves. No label holds anybody's data.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from time import perf_counter
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

from persistence.errors import MissingDriverError

logger = logging.getLogger("persistence")

C = TypeVar("C", bound=type)
Labels = Mapping[str, str]

OPERATIONS = (
    "put",
    "put_writes",
    "get_tuple",
    "list",
    "delete_thread",
    "prune",
    "delete_for_runs",
    "copy_thread",
    "get_delta_channel_history",
)
"""The operations of a saver, by the names of its synchronous methods."""
ASYNC_OPERATIONS = tuple(f"a{name}" for name in OPERATIONS)
"""By the names of its asynchronous methods."""

_KIB = 1024.0


@dataclass(frozen=True, slots=True, eq=False)  # so its hash is its identity: it is looked up all the time
class Histogram:
    """One measured quantity."""

    name: str
    unit: str
    description: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...]
    records: list[Callable[[float, Labels], None]] = field(default_factory=list)
    """Where its figures go."""


DURATION = Histogram(
    "operation.duration",
    "s",
    "Duration of a saver's operation; error is the exception's class, empty where there was none.",
    ("backend", "operation", "error"),
    (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
SIZE = Histogram(
    "value.size",
    "By",
    "Bytes of values that one operation stored or loaded: kind is checkpoint, writes or loaded.",
    ("backend", "kind"),
    tuple(_KIB * 4**power for power in range(10)),
)
_HISTOGRAMS = (DURATION, SIZE)


class Observed(Protocol):
    """An open database, as the gauges see it."""

    @property
    def backend(self) -> str:
        """The scheme that serves."""

    def gauges(self) -> Mapping[str, float]:
        """Figures by name, as they are now; does no I/O."""


class Meter:
    """Records what the saver of one open database does."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._labels: dict[tuple[str, str], Labels] = {}
        self._kinds: dict[str, Labels] = {}
        with _recorders_lock:
            _enable_open_telemetry()

    def operation(self, name: str, seconds: float, error: BaseException | None = None) -> None:
        """One call is over."""
        key = (name, type(error).__name__ if error else "")
        labels = self._labels.get(key)
        if labels is None:
            labels = self._labels[key] = {"backend": self._backend, "operation": key[0], "error": key[1]}
        for record in DURATION.records:
            record(seconds, labels)

    def checkpoint(self, key: tuple[str, str, str], size: int) -> None:
        """A checkpoint with so many bytes of values is stored: thread, namespace and checkpoint id."""
        self.size("checkpoint", size)
        if logger.isEnabledFor(logging.DEBUG):
            thread, ns, checkpoint = key
            extra = {
                "persistence_thread": thread,
                "persistence_ns": ns,
                "persistence_checkpoint": checkpoint,
                "persistence_bytes": size,
            }
            logger.debug("checkpoint %s of thread %r: %d bytes", checkpoint, thread, size, extra=extra)

    def size(self, kind: str, size: int) -> None:
        """So many bytes of values were stored or loaded."""
        labels = self._kinds.get(kind)
        if labels is None:
            labels = self._kinds[kind] = {"backend": self._backend, "kind": kind}
        for record in SIZE.records:
            record(size, labels)


_recorders_lock = threading.Lock()
_observed: WeakSet[Any] = WeakSet()
_observed_lock = threading.Lock()


def observe(handle: Observed) -> None:
    """Show the handle's gauges as long as it lives."""
    with _observed_lock:
        _observed.add(handle)


def gauges() -> dict[str, dict[str, float]]:
    """The gauges of all open databases by name and backend, added up where a backend is open twice."""
    found: dict[str, dict[str, float]] = {}
    with _observed_lock:
        handles = list(_observed)
    for handle in handles:
        for name, value in handle.gauges().items():
            of_name = found.setdefault(name, {})
            of_name[handle.backend] = of_name.get(handle.backend, 0) + value
    return found


def measured(*names: str) -> Callable[[C], C]:
    """A class decorator: the named methods of a saver are timed while its ``meter`` is set.

    A method that calls another one of them must not be named, or it would count twice; nor one that the class
    inherits, which LangGraph would take for the class's own.

    Example:
        >>> @measured("put", "put_writes", "get_tuple", "list")
        ... class RedisSaver(BaseCheckpointSaver): ...
    """

    def decorate(cls: C) -> C:
        for name in names:
            setattr(cls, name, _timed(vars(cls)[name]))
        cls.meter = None  # type: ignore[attr-defined]
        return cls

    return decorate


def attach(saver: Any, backend: str) -> None:
    """Measure a saver, if its class is :func:`measured`."""
    if hasattr(saver, "meter"):
        saver.meter = Meter(backend)


def _timed(method: Callable[..., Any]) -> Callable[..., Any]:
    name = method.__name__
    operation = name.removeprefix("a") if name.startswith("a") else name
    if inspect.isasyncgenfunction(method):
        return _timed_async_iterator(method, operation)
    if inspect.iscoroutinefunction(method):
        return _timed_coroutine(method, operation)
    if operation == "list":
        return _timed_iterator(method, operation)
    return _timed_call(method, operation)


def _timed_call(method: Callable[..., Any], operation: str) -> Callable[..., Any]:
    @wraps(method)
    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (meter := self.meter) is None:
            return method(self, *args, **kwargs)
        begin = perf_counter()
        try:
            result = method(self, *args, **kwargs)
        except Exception as error:
            meter.operation(operation, perf_counter() - begin, error)
            raise
        meter.operation(operation, perf_counter() - begin)
        return result

    return timed


def _timed_coroutine(method: Callable[..., Any], operation: str) -> Callable[..., Any]:
    @wraps(method)
    async def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (meter := self.meter) is None:
            return await method(self, *args, **kwargs)
        begin = perf_counter()
        try:
            result = await method(self, *args, **kwargs)
        except Exception as error:
            meter.operation(operation, perf_counter() - begin, error)
            raise
        meter.operation(operation, perf_counter() - begin)
        return result

    return timed


class _Stopwatch:
    """The time that an iterator took for itself, without the consumer's."""

    def __init__(self, meter: Meter, operation: str) -> None:
        self._meter = meter
        self._operation = operation
        self.seconds = 0.0
        self.error: BaseException | None = None

    def tell(self) -> None:
        self._meter.operation(self._operation, self.seconds, self.error)


def _timed_iterator(method: Callable[..., Any], operation: str) -> Callable[..., Any]:
    def timed_items(found: Iterator[Any], meter: Meter) -> Iterator[Any]:
        watch, clock = _Stopwatch(meter, operation), perf_counter
        try:
            begin = clock()
            for item in found:
                watch.seconds += clock() - begin
                yield item
                begin = clock()
            watch.seconds += clock() - begin
        except Exception as error:
            watch.error = error
            raise
        finally:
            watch.tell()

    @wraps(method)
    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            found = method(self, *args, **kwargs)
        except Exception as error:
            if self.meter is not None:
                self.meter.operation(operation, 0.0, error)
            raise
        return found if self.meter is None else timed_items(found, self.meter)

    return timed


def _timed_async_iterator(method: Callable[..., Any], operation: str) -> Callable[..., Any]:
    @wraps(method)
    async def timed(self: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        watch = _Stopwatch(self.meter, operation) if self.meter is not None else None
        async with aclosing(method(self, *args, **kwargs)) as found:
            if watch is None:
                async for item in found:
                    yield item
                return
            clock = perf_counter
            try:
                begin = clock()
                async for item in found:
                    watch.seconds += clock() - begin
                    yield item
                    begin = clock()
                watch.seconds += clock() - begin
            except Exception as error:
                watch.error = error
                raise
            finally:
                watch.tell()

    return timed


class _OpenTelemetry:
    """The instruments of the application's SDK, or ones that do nothing."""

    def __init__(self) -> None:
        from opentelemetry import metrics

        self._meter = metrics.get_meter("persistence")
        for histogram in _HISTOGRAMS:
            instrument = self._meter.create_histogram(
                f"persistence.{histogram.name}",
                unit=histogram.unit,
                description=histogram.description,
                explicit_bucket_boundaries_advisory=histogram.buckets,
            )
            histogram.records.append(instrument.record)
        self._meter.create_observable_gauge(
            "persistence.gauge",
            callbacks=[self._observe],
            description="Figures of the open databases: see the attribute name.",
        )

    def _observe(self, options: object) -> Iterable[Any]:
        from opentelemetry.metrics import Observation

        for name, values in gauges().items():
            for backend, value in values.items():
                yield Observation(value, {"name": name, "backend": backend})


class _Prometheus:
    """The same in the default registry of ``prometheus_client``."""

    def __init__(self) -> None:
        import prometheus_client

        for histogram in _HISTOGRAMS:
            instrument = prometheus_client.Histogram(
                "persistence_" + histogram.name.replace(".", "_"),
                histogram.description,
                histogram.labels,
                unit={"s": "seconds", "By": "bytes"}[histogram.unit],
                buckets=histogram.buckets,
            )
            histogram.records.append(partial(self._record, instrument))
        prometheus_client.REGISTRY.register(self)

    def _record(self, instrument: Any, value: float, labels: Labels) -> None:
        instrument.labels(**labels).observe(value)

    def collect(self) -> Iterable[Any]:
        """The gauges, at the moment of the scrape."""
        from prometheus_client.core import GaugeMetricFamily

        for name, values in gauges().items():
            family = GaugeMetricFamily(
                f"persistence_{name}", "See the operations page of the documentation.", labels=["backend"]
            )
            for backend, value in values.items():
                family.add_metric([backend], value)
            yield family


@cache
def _enable_open_telemetry() -> _OpenTelemetry:
    return _OpenTelemetry()


def enable_prometheus() -> None:
    """Record for Prometheus, too, from now on. Idempotent.

    Raises:
        MissingDriverError: ``prometheus-client`` is not installed.
    """
    with _recorders_lock:
        _enable_prometheus()


@cache
def _enable_prometheus() -> None:
    try:
        _Prometheus()
    except ModuleNotFoundError as error:
        raise MissingDriverError(
            "metrics for Prometheus need prometheus-client, which is not installed",
            hint='pip install "langgraph-persistence[serve]"',
        ) from error


def exposition() -> tuple[str, bytes]:
    """Content type and body for a Prometheus scrape: everything in the default registry.

    Raises:
        MissingDriverError: ``prometheus-client`` is not installed.
    """
    enable_prometheus()
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    return CONTENT_TYPE_LATEST, generate_latest()

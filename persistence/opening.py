"""From a DSN to an open backend: what to open, attempts, setup, and the fallback if it is allowed.

Both colours follow the same plan; only the waiting differs.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from persistence.contract import AsyncBackend, Backend, Capability, Provider
from persistence.dsn import Dsn
from persistence.errors import ConnectError
from persistence.metrics import attach
from persistence.registry import provider_for
from persistence.settings import Settings, get_settings

if TYPE_CHECKING:
    from persistence.fallback import Fallback

logger = logging.getLogger("persistence")

B = TypeVar("B", Backend, AsyncBackend)

_MEMORY = "memory://"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be opened, and why.

    Attributes:
        provider: ``None`` where checkpointing is switched off.
        dsn: The DSN that was asked for; ``None`` where there is none.
        reason: Why this backend, in words, for the log and for ``status``.
        degraded: Why memory stands in for the database that was configured, or ``None``.
    """

    settings: Settings
    provider: Provider | None
    dsn: Dsn | None
    reason: str
    degraded: str | None = None

    @property
    def mode(self) -> str:
        """The scheme that serves, or ``off``."""
        return self.provider.dsn.scheme if self.provider else "off"


@dataclass(frozen=True, slots=True)
class Opened(Generic[B]):
    """An open backend with the plan that led to it; no backend where checkpointing is off.

    ``fallback`` is there where memory stood in at first, because the database did not answer.
    """

    plan: Plan
    backend: B | None
    fallback: Fallback | None = None


def make_plan(dsn: str | Dsn | None, settings: Settings | None) -> Plan:
    """Decide what to open, without touching any database.

    Raises:
        DsnError: The DSN is malformed, or its scheme is not known.
        SettingsError: A setting is wrong.
        MissingDriverError: The DSN's driver is not installed.
    """
    settings = settings or get_settings()
    if dsn is None:
        asked, origin = settings.resolve_dsn(), "the DSN of the settings"
    else:
        asked, origin = (Dsn.parse(dsn) if isinstance(dsn, str) else dsn), "the DSN that was passed"
    if not settings.enable_checkpointing:
        return Plan(settings, None, asked, "PERSISTENCE_ENABLE_CHECKPOINTING is off")
    if asked is None:
        return Plan(settings, _memory(settings), None, "PERSISTENCE_DSN is not set")
    if settings.use_postgres is False and asked.scheme.startswith("postgres"):
        reason = f"PERSISTENCE_USE_POSTGRES is off, so {asked} is not used"
        return Plan(settings, _memory(settings), asked, reason, degraded=reason)
    provider = provider_for(asked, settings)
    return Plan(provider.settings, provider, asked, origin)


def open_backend(plan: Plan) -> Opened[Backend]:
    """Connect with bounded attempts, and make the tables unless told not to.

    Raises:
        ConnectError: The database does not answer, and memory may not stand in.
        SchemaError: The tables cannot be made.
    """
    provider = plan.provider
    if provider is None:
        return _report(Opened(plan, None))
    import stamina

    try:
        for attempt in stamina.retry_context(**_attempts(plan)):
            with attempt:
                _note(plan, attempt.num)
                backend = provider.open()
    except ConnectError as error:
        from persistence.fallback import StandIn

        fallback = _fall_back(plan, error)
        memory = _memory(plan.settings).open()
        attach(memory.checkpointer, "memory")
        reopen = partial(_open_once, plan, provider)
        stand_in = StandIn(memory, fallback, provider.dsn.masked, plan.settings, reopen)
        return _report(Opened(plan, stand_in, fallback))
    return _report(Opened(plan, _set_up(plan, provider, backend)))


def _open_once(plan: Plan, provider: Provider) -> Backend:
    return _set_up(plan, provider, provider.open())


def _set_up(plan: Plan, provider: Provider, backend: Backend) -> Backend:
    try:
        if plan.settings.setup_on_open:
            make_tables(provider)
    except BaseException:
        backend.close(plan.settings.close_timeout)
        raise
    attach(backend.checkpointer, provider.dsn.scheme)
    return backend


async def aopen_backend(plan: Plan) -> Opened[AsyncBackend]:
    """As :func:`open_backend`, for the running event loop."""
    provider = plan.provider
    if provider is None:
        return _report(Opened(plan, None))
    import stamina

    try:
        async for attempt in stamina.retry_context(**_attempts(plan)):
            with attempt:
                _note(plan, attempt.num)
                backend = await provider.aopen()
    except ConnectError as error:
        from persistence.fallback import AsyncStandIn

        fallback = _fall_back(plan, error)
        memory = await _memory(plan.settings).aopen()
        attach(memory.checkpointer, "memory")
        reopen = partial(_aopen_once, plan, provider)
        stand_in = AsyncStandIn(memory, fallback, provider.dsn.masked, plan.settings, reopen)
        return _report(Opened(plan, stand_in, fallback))
    return _report(Opened(plan, await _aset_up(plan, provider, backend)))


async def _aopen_once(plan: Plan, provider: Provider) -> AsyncBackend:
    return await _aset_up(plan, provider, await provider.aopen())


async def _aset_up(plan: Plan, provider: Provider, backend: AsyncBackend) -> AsyncBackend:
    try:
        if plan.settings.setup_on_open:
            await asyncio.to_thread(make_tables, provider)
    except BaseException:
        await backend.close(plan.settings.close_timeout)
        raise
    attach(backend.checkpointer, provider.dsn.scheme)
    return backend


def make_tables(provider: Provider) -> None:
    """Run setup where the backend has tables."""
    if Capability.TABLES in provider.capabilities:
        from persistence.schema import setup

        setup(provider)


def _memory(settings: Settings) -> Provider:
    return provider_for(_MEMORY, settings)


def _attempts(plan: Plan) -> dict[str, Any]:
    settings = plan.settings
    return {
        "on": lambda error: isinstance(error, ConnectError) and error.transient,
        "attempts": settings.connect_attempts,
        "timeout": None,
        "wait_initial": settings.connect_backoff,
        "wait_max": settings.connect_backoff_max,
        "wait_jitter": settings.connect_backoff,
    }


def _note(plan: Plan, number: int) -> None:
    if number > 1:
        logger.warning("connecting to %s again, attempt %d", plan.dsn, number)


def _fall_back(plan: Plan, error: ConnectError) -> Fallback:
    """Memory in place of a database that does not answer, if that is the policy."""
    settings = plan.settings
    if settings.fallback != "memory":
        tried = settings.connect_attempts if error.transient else 1
        times = f" after {tried} attempts" if tried > 1 else ""
        hint = error.hint
        if hint is None and error.transient:
            hint = "start the database or correct the DSN; PERSISTENCE_FALLBACK=memory runs without it"
        raise ConnectError(f"{error.message}{times}", hint=hint, transient=error.transient) from None
    from persistence.fallback import Fallback

    return Fallback(error.message)


def _report(opened: Opened[B]) -> Opened[B]:
    """One line that says which backend serves and why; a warning where data will be lost."""
    plan, mode, reason, degraded = opened.plan, opened.plan.mode, opened.plan.reason, opened.plan.degraded
    if opened.fallback is not None:
        mode, degraded = "memory", opened.fallback.reason
        reason = f"fallback: {degraded}"
    extra = {
        "persistence_mode": mode,
        "persistence_reason": reason,
        "persistence_dsn": str(plan.dsn) if plan.dsn else None,
        "persistence_degraded": degraded is not None,
    }
    if degraded:
        logger.warning("persistence in %s, nothing will be kept: %s", mode, reason, extra=extra)
    else:
        logger.info("persistence %s: %s", mode, reason, extra=extra)
    return opened

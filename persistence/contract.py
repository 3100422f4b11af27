"""What a backend is: the contract between the package and its providers.

A backend is one :class:`Provider` subclass, found by the scheme of a DSN (see
``persistence.registry``). Third parties write one and name it in the entry-point group
``persistence.providers``. Feature modules (schema, transfer, status) never name a backend:
they ask a provider for a :class:`Capability` and use the protocol that comes with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from persistence.errors import UnsupportedError

if TYPE_CHECKING:
    from langgraph.checkpoint.base import BaseCheckpointSaver
    from langgraph.store.base import BaseStore

    from persistence.dsn import Dsn
    from persistence.settings import Settings
    from persistence.transfer.live import LiveSource
    from persistence.transfer.records import Sink, Source


class Capability(StrEnum):
    """What a provider can do beyond opening a checkpointer."""

    DURABLE = "durable"
    """What was acknowledged is still there after the process has ended."""
    STORE = "store"
    """``store()`` gives LangGraph's ``BaseStore``."""
    TABLES = "tables"
    """The database has tables that setup makes and the drift check reads: ``tables()``."""
    SOURCE = "source"
    """Its threads can be read for a transfer: ``source()``."""
    SINK = "sink"
    """Threads can be written to it by a transfer: ``sink()``."""
    FOLLOW = "follow"
    """A transfer can follow it while an application goes on writing, and seal it: ``live()``."""


_LACKS = {
    Capability.DURABLE: "keeps nothing beyond the process",
    Capability.STORE: "has no store",
    Capability.TABLES: "has no tables to look after",
    Capability.SOURCE: "cannot be the source of a transfer",
    Capability.SINK: "cannot be the target of a transfer",
    Capability.FOLLOW: "cannot be followed while it is written to",
}
"""What a provider without the capability says of itself."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What answers at the other end of a connection."""

    product: str
    version: str


@dataclass(frozen=True, slots=True)
class Probe:
    """What one look at an open database found; see :meth:`Backend.probe`.

    Attributes:
        server: Who answered, ``None`` where nobody did.
        read_seconds: Duration of reading the canary row, ``None`` where it could not be read.
        write_seconds: Duration of writing it durably, ``None`` where it could not be written.
        storage: Bytes on disk by table or by file.
        error: The first thing that went wrong; it holds no secret.
    """

    server: ServerInfo | None = None
    read_seconds: float | None = None
    write_seconds: float | None = None
    storage: Mapping[str, int] = field(default_factory=dict)
    error: Exception | None = None


class Backend(Protocol):
    """One open database for synchronous code."""

    @property
    def checkpointer(self) -> BaseCheckpointSaver[Any]:
        """The saver; the same object every time."""

    def store(self) -> BaseStore:
        """The store; made at the first call, then the same object every time."""

    def ping(self) -> ServerInfo:
        """Ask the database who it is.

        Raises:
            ConnectError: It does not answer.
        """

    def probe(self, timeout: float) -> Probe:
        """Write and read a row by the way that the savers take, within about ``timeout`` seconds.

        What goes wrong is in the result, not raised: the database stopped, hangs, is full, may only
        be read, has no tables. A hanging database must not make it wait longer.
        """

    def figures(self) -> Mapping[str, float]:
        """How busy the connections are, by name; does no I/O."""

    def close(self, timeout: float) -> None:
        """Wait for acknowledged work, then let go of everything, within ``timeout`` seconds."""


class AsyncBackend(Protocol):
    """One open database for the event loop that opened it."""

    @property
    def checkpointer(self) -> BaseCheckpointSaver[Any]:
        """The saver; the same object every time."""

    def store(self) -> BaseStore:
        """The store; made at the first call, then the same object every time. Does no I/O."""

    async def ping(self) -> ServerInfo:
        """As :meth:`Backend.ping`."""

    async def probe(self, timeout: float) -> Probe:  # noqa: ASYNC109 - a bound on waiting, not a cancellation
        """As :meth:`Backend.probe`."""

    def figures(self) -> Mapping[str, float]:
        """As :meth:`Backend.figures`."""

    async def close(self, timeout: float) -> None:  # noqa: ASYNC109 - as above
        """As :meth:`Backend.close`."""


@dataclass(frozen=True, slots=True)
class TableShape:
    """What a saver relies on in one table; observed tables may have more."""

    columns: frozenset[str]
    primary_key: tuple[str, ...]
    indexes: frozenset[str] = frozenset()


class Tables(Protocol):
    """The administrator's view of one database: what setup and the drift check work on."""

    dialect: Literal["sqlite", "postgresql"]
    schema: str | None
    """The configured Postgres schema; ``None`` where the connection's own search path decides."""
    required: Mapping[str, TableShape]
    """LangGraph's tables as the installed savers and stores need them."""

    def observed(self) -> Mapping[str, TableShape]:
        """Every table that is there now, ours and LangGraph's."""

    def own_revision(self) -> str | None:
        """The Alembic revision of our own tables, ``None`` where there is none yet."""

    def langgraph_pending(self) -> Mapping[str, str]:
        """LangGraph's version tables that lag behind the installed savers, and a line about each."""

    def setup_lock(self) -> AbstractContextManager[None]:
        """Keep other processes out of setup; waits, bounded in time, without blocking DDL."""

    def create_langgraph_tables(self) -> None:
        """Run LangGraph's own setup for its tables, checkpoints and store. Idempotent."""

    def repair_langgraph_tables(self) -> None:
        """Make again what the version tables say was made and is not there. Idempotent."""

    def langgraph_sql(self) -> str:
        """The statements of LangGraph's own setup, for a person to run; needs no connection."""

    def connect(self) -> Any:
        """A new DBAPI connection to the same database, for Alembic."""


class Provider(ABC):
    """One database system behind one or more DSN schemes.

    An instance belongs to one DSN and holds no connection until it is opened. ``settings`` already
    has the DSN's own options merged in (see ``Settings.for_dsn``).

    Example:
        >>> class RedisProvider(Provider):
        ...     schemes = ("redis",)
        ...     def open(self): ...
        ...     async def aopen(self): ...
    """

    schemes: ClassVar[tuple[str, ...]]
    capabilities: ClassVar[frozenset[Capability]] = frozenset()

    def __init__(self, dsn: Dsn, settings: Settings) -> None:
        self.dsn = dsn
        self.settings = settings

    def __reduce__(self) -> tuple[type[Provider], tuple[Dsn, Settings]]:
        """In another process it begins anew."""
        return type(self), (self.dsn, self.settings)

    @abstractmethod
    def open(self) -> Backend:
        """Connect, for synchronous code. Makes no tables.

        Raises:
            ConnectError: The database does not answer (one attempt; the caller retries).
        """

    @abstractmethod
    async def aopen(self) -> AsyncBackend:
        """Connect, for the running event loop. Otherwise as :meth:`open`."""

    def tables(self) -> AbstractContextManager[Tables]:
        """The administrator's view of the database (``Capability.TABLES``)."""
        raise self._unsupported(Capability.TABLES)

    def source(self, *, allow_pickle: bool = False) -> AbstractContextManager[Source]:
        """One consistent snapshot of the database, to read threads from (``Capability.SOURCE``).

        Args:
            allow_pickle: Unpickle rows that are pickled, which runs code; otherwise they are rejected.
        """
        raise self._unsupported(Capability.SOURCE)

    def sink(self) -> AbstractContextManager[Sink]:
        """The database as the target of a transfer (``Capability.SINK``)."""
        raise self._unsupported(Capability.SINK)

    def live(self) -> AbstractContextManager[LiveSource]:
        """The database as a source that goes on changing (``Capability.FOLLOW``)."""
        error = self._unsupported(Capability.FOLLOW)
        error.hint = "stop the application, then run `persistence migrate`"
        raise error

    def _unsupported(self, capability: Capability) -> UnsupportedError:
        return UnsupportedError(f"{self.dsn.scheme} {_LACKS[capability]}: {self.dsn}")

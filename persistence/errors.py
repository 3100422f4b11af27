"""The errors that this package raises.

One root, few leaves. The docstring's first line of a leaf is its default message; an error
carries what was wrong, and ``hint``: what to do next. ``code`` names the entry in
``docs/troubleshooting.md``; ``exit_code`` is what the console command ends with.
"""

from __future__ import annotations

from typing import ClassVar


class PersistenceError(Exception):
    """The persistence layer failed.

    Attributes:
        message: One line: what is wrong, and with which value. Never holds a secret.
        hint: What to do next, or ``None`` where the message says it all.
        code: A stable name for programs and for the troubleshooting page.
        exit_code: The console command's exit code for this error.
    """

    code: ClassVar[str] = "persistence"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str | None = None, *, hint: str | None = None) -> None:
        self.message = message or _default_message(type(self))
        self.hint = hint
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


def _default_message(cls: type[PersistenceError]) -> str:
    return (cls.__doc__ or cls.__name__).strip().splitlines()[0]


class ConfigurationError(PersistenceError, ValueError):
    """The configuration is wrong."""

    code = "configuration"
    exit_code = 2


class DsnError(ConfigurationError):
    """The DSN is not usable."""

    code = "dsn"


class SettingsError(ConfigurationError):
    """A setting has a value that is not usable."""

    code = "settings"


class MissingDriverError(ConfigurationError, ImportError):
    """The driver for this DSN is not installed."""

    code = "missing-driver"


class ConnectError(PersistenceError, ConnectionError):
    """The database could not be reached.

    Attributes:
        transient: Whether another attempt may succeed; a wrong password or an unknown database
            stays wrong.
    """

    code = "connect"
    exit_code = 3

    def __init__(
        self, message: str | None = None, *, hint: str | None = None, transient: bool = True
    ) -> None:
        super().__init__(message, hint=hint)
        self.transient = transient


class SchemaError(PersistenceError):
    """The database does not have the tables that this version needs."""

    code = "schema"
    exit_code = 4


class SourceError(PersistenceError):
    """The source cannot be read."""

    code = "source"
    exit_code = 5


class ArchiveError(SourceError):
    """The archive is damaged, incomplete, or of a version that is not known."""

    code = "archive"


class TransferError(PersistenceError):
    """The data cannot be moved as asked; the target was left as it was."""

    code = "transfer"
    exit_code = 6


class ConflictError(TransferError):
    """The target holds something that the transfer would have to overwrite."""

    code = "conflict"


class VerificationError(PersistenceError):
    """The two sides differ."""

    code = "verification"
    exit_code = 7


class ReportError(PersistenceError):
    """The report file cannot be written; what the run did is done."""

    code = "report"


class SealedError(PersistenceError):
    """The database has moved, and takes no more writes."""

    code = "sealed"


class UnsupportedError(PersistenceError, NotImplementedError):
    """This backend cannot do that."""

    code = "unsupported"
    exit_code = 2


class InvalidInputError(PersistenceError, ValueError):
    """A value given to a saver cannot be stored."""

    code = "invalid-input"


class WrongLoopError(PersistenceError, RuntimeError):
    """A saver was called in a way that would block its own event loop."""

    code = "wrong-loop"


class EncryptionError(PersistenceError):
    """A stored value does not fit the encryption settings."""

    code = "encryption"


class ClosedError(PersistenceError, RuntimeError):
    """The connection to the database was closed."""

    code = "closed"

"""Settings of the persistence layer: environment variables ``PERSISTENCE_*`` and ``.env`` files.

The process environment wins over ``.env.<PERSISTENCE_ENV>``, which wins over ``.env``. Every field's
description appears in ``docs/settings.md`` and ``.env.example``; ``tools/settings_table.py`` writes both.
"""

from __future__ import annotations

import base64
import difflib
import logging
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from persistence.dsn import Dsn
from persistence.errors import DsnError, SettingsError
from persistence.masking import mask_dsn, mask_text
from persistence.options import (
    MAX_BUSY_SECONDS,
    MAX_POOL_SIZE,
    MAX_SECONDS,
    MAX_WORKERS,
    schema_name,
    shorten,
)

logger = logging.getLogger(__name__)

PREFIX = "PERSISTENCE_"

Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)]

DSN_OPTION_FIELDS: Mapping[str, str] = {
    "schema": "db_schema",
    "pool_min": "pool_min",
    "pool_max": "pool_max",
    "pool_timeout": "pool_timeout",
    "pool_max_idle": "pool_max_idle",
    "pool_max_lifetime": "pool_max_lifetime",
    "pgbouncer": "pgbouncer",
    "synchronous": "sqlite_synchronous",
    "busy_timeout": "sqlite_busy_timeout",
    "workers": "transfer_workers",
    "allow_plaintext": "allow_plaintext",
}
"""The DSN's options, and the settings that they override."""

_SECRETS = frozenset({"dsn", "encryption_key", "encryption_old_keys"})
_NEVER_EMPTY = ("dsn", "dsn_file", "encryption_key", "encryption_key_file")
"""Empty, these would mean memory in place of a database, or plaintext in place of encryption."""


class Settings(BaseSettings):
    """What can be configured, checked and immutable.

    Keyword arguments win over the environment. Every wrong value is one ``SettingsError`` that names
    the variables and shows no secret.

    Example:
        >>> Settings(dsn="sqlite:///chat.db", pool_max=20).pool_max
        20
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",  # names are checked below: .env files are shared with other programs
        frozen=True,
        hide_input_in_errors=True,
    )

    dsn: SecretStr | None = Field(
        None,
        examples=["sqlite:///chat.db"],
        description="The database to open, see [DSNs](dsn.md). Not set: memory, and nothing is kept.",
    )
    dsn_file: Path | None = Field(
        None,
        examples=["/run/secrets/persistence_dsn"],
        description="A file that holds the DSN, for container secrets. Instead of `PERSISTENCE_DSN`.",
    )
    env: str | None = Field(
        None,
        examples=["production"],
        description="Name of the environment: `production` reads `.env.production` after `.env`.",
    )
    enable_checkpointing: bool = Field(
        True,
        description="Master switch. Off: `db.checkpointer` is `None`, and graphs run without persistence.",
    )
    use_postgres: bool | None = Field(
        None,
        examples=["true"],
        description="`true`: a Postgres DSN is required. `false`: memory, even while a Postgres DSN is set. "
        "Not set: the DSN decides.",
    )
    pool_min: int = Field(1, ge=0, le=MAX_POOL_SIZE, description="Postgres connections kept open, at least.")
    pool_max: int = Field(
        10, ge=1, le=MAX_POOL_SIZE, description="Postgres connections open at once, at most."
    )
    pool_timeout: Seconds = Field(30.0, description="Seconds to wait for a free Postgres connection.")
    pool_max_idle: Seconds = Field(
        600.0, description="Seconds after which an unused Postgres connection above the minimum is closed."
    )
    pool_max_lifetime: Seconds = Field(
        3600.0, description="Seconds after which a Postgres connection is replaced by a new one."
    )
    db_schema: str | None = Field(
        None,
        examples=["agents"],
        validation_alias="PERSISTENCE_SCHEMA",
        description="Postgres schema of all tables. Not set: the search path of the role decides.",
    )
    pgbouncer: bool = Field(
        False, description="PgBouncer in transaction mode is in front of Postgres: no prepared statements."
    )
    sqlite_synchronous: Literal["off", "normal", "full", "extra"] = Field(
        "full", description="SQLite's `PRAGMA synchronous`. `full` survives a power loss, `normal` may not."
    )
    sqlite_busy_timeout: float = Field(
        30.0,
        ge=0,
        le=MAX_BUSY_SECONDS,
        allow_inf_nan=False,
        description="Seconds to wait for another process that is writing to the same SQLite file.",
    )
    connect_attempts: int = Field(
        5, ge=1, le=1000, description="How often opening a database is tried before it is an error."
    )
    connect_timeout: Seconds = Field(
        10.0, description="Seconds for one attempt to connect; `connect_timeout` in the DSN wins."
    )
    connect_backoff: Seconds = Field(
        0.5, description="Seconds before the second attempt; doubled for each further one, with jitter."
    )
    connect_backoff_max: Seconds = Field(10.0, description="Seconds between two attempts, at most.")
    fallback: Literal["never", "memory"] = Field(
        "never",
        description="What opening does when the database does not answer: `never` raises, `memory` goes on "
        "without durability, with a warning, until the database answers.",
    )
    setup_on_open: bool = Field(
        True,
        description="Make or upgrade the tables when a database is opened. Off: run `persistence setup`.",
    )
    strict_msgpack: bool = Field(
        False, description="Restore only known types from checkpoints, see [Security](security.md)."
    )
    allowed_msgpack: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        examples=["myapp.models:Person,myapp.models:Order"],
        description="Types of yours to restore under strict msgpack: `module:Class`, separated by commas.",
    )
    encryption_key: SecretStr | None = Field(
        None,
        examples=["base64:<openssl rand -base64 32>"],
        description="AES key that encrypts values: text of 16, 24 or 32 bytes, or `base64:` and the bytes. "
        "Needs the extra `encryption`.",
    )
    encryption_key_file: Path | None = Field(
        None,
        examples=["/run/secrets/persistence_key"],
        description="A file that holds the key. Instead of `PERSISTENCE_ENCRYPTION_KEY`.",
    )
    encryption_old_keys: SecretStr | None = Field(
        None,
        examples=["base64:<the key until now>"],
        description="Keys that values may still be stored under, separated by commas. They only read, see "
        "[Security](security.md).",
    )
    encryption_old_keys_file: Path | None = Field(
        None,
        examples=["/run/secrets/persistence_old_keys"],
        description="A file that holds old keys. Instead of `PERSISTENCE_ENCRYPTION_OLD_KEYS`.",
    )
    allow_plaintext: bool = Field(
        False, description="Read values that were stored without encryption although a key is set."
    )
    transfer_workers: int | None = Field(
        None,
        ge=1,
        le=MAX_WORKERS,
        examples=["4"],
        description="Processes that read, write into Postgres and compare while data is moved, see "
        "[Moving data](moving-data.md#workers). Not set: one for each two cores, up to four.",
    )
    health_timeout: Seconds = Field(
        2.0, description="Seconds that a health check may take, also while the database hangs."
    )
    close_timeout: Seconds = Field(5.0, description="Seconds that closing may take.")

    file_pairs: ClassVar[tuple[tuple[str, str], ...]] = (
        ("dsn", "dsn_file"),
        ("encryption_key", "encryption_key_file"),
        ("encryption_old_keys", "encryption_old_keys_file"),
    )

    def __init__(self, **values: Any) -> None:
        unknown = [
            name for name in values if name not in type(self).model_fields and not name.startswith("_")
        ]
        if unknown:
            raise SettingsError(f"no such setting: {unknown[0]}", hint=_suggestion(variable_name(unknown[0])))
        for pair in self.file_pairs:
            if (
                sum(values.get(name) is not None for name in pair) == 1
            ):  # an argument wins over the environment
                values = {**dict.fromkeys(pair), **values}
        if "db_schema" in values:  # "schema" is a method of pydantic's models, hence the alias
            values[variable_name("db_schema")] = values.pop("db_schema")
        problem = None
        try:
            super().__init__(**values)
        except ValidationError as error:
            problem = "; ".join(map(_describe, error.errors(include_url=False)))
        if problem:  # outside of the handler: pydantic's error holds the input, secrets too
            raise SettingsError(problem)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Add ``.env.<name>`` to the files, and look at names that pydantic-settings would pass over."""
        assert isinstance(init_settings, InitSettingsSource)  # noqa: S101  # narrows pydantic-settings' own types
        assert isinstance(env_settings, EnvSettingsSource)  # noqa: S101
        assert isinstance(dotenv_settings, DotEnvSettingsSource)  # noqa: S101
        key = variable_name("env").lower()
        name = (
            init_settings.init_kwargs.get("env")
            or env_settings.env_vars.get(key)
            or dotenv_settings.env_vars.get(key)
        )
        files = dotenv_settings.env_file
        if name and isinstance(files, str | Path):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", str(name)):
                shown = f"{variable_name('env')}={shorten(mask_text(str(name), ()))!r}"
                raise SettingsError(
                    f"{shown} is not the name of an environment", hint="letters, digits, '-' and '_'"
                )
            files = (files, f"{files}.{name}")
            dotenv_settings = DotEnvSettingsSource(settings_cls, env_file=files)
        written = DotEnvSettingsSource(settings_cls, env_file=files, env_ignore_empty=False).env_vars
        _check_names(written, set(init_settings.init_kwargs))
        return init_settings, env_settings, dotenv_settings

    @field_validator("db_schema")
    @classmethod
    def _is_schema_name(cls, value: str | None) -> str | None:
        return None if value is None else schema_name(value)

    @field_validator("sqlite_synchronous", "fallback", mode="before")
    @classmethod
    def _in_lower_case(cls, value: Any) -> Any:
        return value.strip().lower() if isinstance(value, str) else value

    @field_validator("allowed_msgpack", mode="before")
    @classmethod
    def _split_types(cls, value: Any) -> Any:
        names = value.replace(",", " ").split() if isinstance(value, str) else value
        for name in names:
            if not (isinstance(name, str) and re.fullmatch(r"[\w.]+:\w+", name)):
                raise ValueError(f"{name!r} is not of the form module:Class")
        return tuple(names)

    @model_validator(mode="after")
    def _is_consistent(self) -> Settings:
        _check_pool(self)
        for pair in self.file_pairs:
            if all(getattr(self, name) is not None for name in pair):
                raise SettingsError(
                    f"{' and '.join(map(variable_name, pair))} are both set", hint="unset one of them"
                )
        if self.encryption_key is not None:
            _parse_key(self.encryption_key.get_secret_value(), variable_name("encryption_key"))
        if self.encryption_old_keys is not None:
            _parse_keys(self.encryption_old_keys.get_secret_value(), variable_name("encryption_old_keys"))
        if _is_any_set(self, "encryption_old_keys") and not _is_any_set(self, "encryption_key"):
            raise SettingsError(
                f"{variable_name('encryption_old_keys')} is set without {variable_name('encryption_key')}",
                hint="an old key only reads; set the key that writes",
            )
        return self

    def for_dsn(self, dsn: Dsn) -> Settings:
        """A copy in which the DSN's own options win.

        Raises:
            SettingsError: An option of the DSN contradicts a setting.
        """
        merged = self.model_copy(
            update={DSN_OPTION_FIELDS[option]: value for option, value in dsn.options.items()}
        )
        _check_pool(merged)
        return merged

    def resolve_dsn(self) -> Dsn | None:
        """The configured DSN, ``None`` where there is none.

        Raises:
            DsnError: It is malformed; the error names the variable.
            SettingsError: Its file cannot be read, or Postgres is required and the DSN is another's.
        """
        text, source = self._secret("dsn", "dsn_file")
        if text is None:
            dsn = None
        else:
            try:
                dsn = Dsn.parse(text)
            except DsnError as error:
                raise DsnError(f"{source}: {error.message}", hint=error.hint) from None
        if self.use_postgres and not (dsn and dsn.scheme in {"postgresql", "postgres+embedded"}):
            found = f"is {dsn}" if dsn else "is not set"
            raise SettingsError(
                f"{variable_name('use_postgres')} is true and {source} {found}",
                hint=f"set {variable_name('dsn')} to postgresql://user:password@host/database",
            )
        return dsn

    def resolve_encryption_key(self) -> bytes | None:
        """The AES key, ``None`` where values are not encrypted.

        Raises:
            SettingsError: Its file cannot be read, or it is no AES key.
        """
        text, source = self._secret("encryption_key", "encryption_key_file")
        return None if text is None else _parse_key(text, source)

    def without_encryption(self) -> Settings:
        """A copy that has no keys."""
        names = ("encryption_key", "encryption_key_file", "encryption_old_keys", "encryption_old_keys_file")
        return self.model_copy(update=dict.fromkeys(names))

    def resolve_encryption_old_keys(self) -> tuple[bytes, ...]:
        """The AES keys that values may still be stored under.

        Raises:
            SettingsError: Their file cannot be read, or one is no AES key.
        """
        text, source = self._secret("encryption_old_keys", "encryption_old_keys_file")
        return () if text is None else _parse_keys(text, source)

    def _secret(self, field: str, file_field: str) -> tuple[str | None, str]:
        """A secret from its field or its file, and the variable that it came from."""
        path: Path | None = getattr(self, file_field)
        if path is not None:
            return _read_secret(path, variable_name(file_field)), variable_name(file_field)
        value: SecretStr | None = getattr(self, field)
        return (None if value is None else value.get_secret_value()), variable_name(field)


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process, read once; ``get_settings.cache_clear()`` reads them anew."""
    return Settings()


def variable_name(field: str) -> str:
    """The environment variable of a setting."""
    info = Settings.model_fields.get(field)
    alias = info.validation_alias if info else None
    return alias if isinstance(alias, str) else PREFIX + field.upper()


def _check_pool(settings: Settings) -> None:
    if settings.pool_min > settings.pool_max:
        raise SettingsError(
            f"{variable_name('pool_min')}={settings.pool_min} is greater than "
            f"{variable_name('pool_max')}={settings.pool_max}",
            hint="either may also come from the DSN, as pool_min and pool_max",
        )


def _check_names(written: Mapping[str, str | None], arguments: set[str]) -> None:
    """Look at the names in the environment and in the ``.env`` files (``written``, lower case).

    A name that is not known is an error in a file, which is ours to keep right. In the environment it
    is a warning: Kubernetes puts ``PERSISTENCE_PORT`` there for a service that is called persistence.
    """
    environment = {name.lower(): value for name, value in os.environ.items()}
    known = {variable_name(field).lower() for field in Settings.model_fields}
    for values, is_file in ((environment, False), (written, True)):
        for name in sorted(values):
            if (
                not name.startswith(PREFIX.lower())
                or name in known
                or name.startswith(f"{PREFIX.lower()}test_")
            ):
                continue
            hint = _suggestion(name.upper())
            if is_file:
                raise SettingsError(f"{name.upper()} in the .env file is not a setting", hint=hint)
            logger.warning("The variable %s is not a setting (%s)", name.upper(), hint)
    for field in _NEVER_EMPTY:
        key = variable_name(field).lower()
        value = environment.get(key, written.get(key))
        if value is not None and not value.strip() and field not in arguments:
            raise SettingsError(
                f"{variable_name(field)} is set, but empty", hint="give it a value or unset it"
            )


def _suggestion(variable: str) -> str:
    names = [variable_name(field) for field in Settings.model_fields]
    nearest = difflib.get_close_matches(variable, names, n=1, cutoff=0.8)
    return f"did you mean {nearest[0]}?" if nearest else "docs/settings.md lists them all"


def _describe(error: ErrorDetails) -> str:
    """One of pydantic's errors in a line that names the variable and shows no secret."""
    cause = error.get("ctx", {}).get("error")
    if not error["loc"]:
        return str(cause or error["msg"])
    field = str(error["loc"][0])
    name = field if field.startswith(PREFIX) else variable_name(field)
    message = str(cause) if cause else error["msg"][0].lower() + error["msg"][1:]
    if field in _SECRETS:
        return f"{name}: {message}"
    return f"{name}={shorten(mask_text(str(error['input']), ()))!r}: {message}"


def _read_secret(path: Path, variable: str) -> str:
    shown = f"{variable}={mask_dsn(str(path))}"  # masked: people put the DSN itself there
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise SettingsError(
            f"{shown} cannot be read: {error.strerror}", hint="check the path and its rights"
        ) from None
    except UnicodeDecodeError:
        text = None
    if text is None:
        raise SettingsError(f"{shown} is not UTF-8 text", hint="write a binary key as base64:...")
    text = text.strip("\r\n")
    if not text.strip():
        raise SettingsError(f"{shown} is empty")
    return text


def _is_any_set(settings: Settings, field: str) -> bool:
    """Whether a secret is there, or the file that holds it."""
    return getattr(settings, field) is not None or getattr(settings, f"{field}_file") is not None


def _parse_keys(text: str, variable: str) -> tuple[bytes, ...]:
    return tuple(_parse_key(key.strip(), variable) for key in text.split(","))


def _parse_key(text: str, variable: str) -> bytes:
    key: bytes | None = text.encode("utf-8", "surrogatepass")
    if text.startswith("base64:"):
        encoded = text.removeprefix("base64:").translate(str.maketrans("-_", "+/"))
        try:
            key = base64.b64decode(encoded, validate=True)
        except ValueError:
            key = None
    if key is None or len(key) not in {16, 24, 32}:
        raise SettingsError(
            f"{variable} is not an AES key: it has {'broken base64' if key is None else f'{len(key)} bytes'}",
            hint='16, 24 or 32 bytes are needed; echo "base64:$(openssl rand -base64 32)" makes one',
        )
    return key

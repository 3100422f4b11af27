"""The options that a DSN may carry for us: their names, ranges, and which database takes them.

Whatever is not listed here belongs to the driver. Ranges are shared with ``persistence.settings``.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from persistence.errors import DsnError

OptionValue = str | int | float | bool

MAX_POOL_SIZE = 262_143
"""The highest ``max_connections`` that a Postgres server can be given."""
MAX_WORKERS = 64
"""Each is a process with a connection to the source and one to the target."""
MAX_SECONDS = 31_536_000.0
"""A year. Longer waits overflow the timers of some platforms."""
MAX_BUSY_SECONDS = 2_147_483.0
"""SQLite keeps its busy timeout as milliseconds in 32 bits."""
MAX_IDENTIFIER_BYTES = 63
"""Postgres cuts longer names off silently."""
SYNCHRONOUS = ("off", "normal", "full", "extra")

_KEYWORDS = """
    application_name channel_binding client_encoding connect_timeout dbname fallback_application_name
    gssdelegation gssencmode gsslib host hostaddr keepalives keepalives_count keepalives_idle
    keepalives_interval krbsrvname load_balance_hosts max_protocol_version min_protocol_version
    oauth_client_id oauth_client_secret oauth_issuer oauth_scope options passfile password port
    replication require_auth requirepeer scram_client_key scram_server_key service
    ssl_max_protocol_version ssl_min_protocol_version sslcert sslcertmode sslcompression sslcrl
    sslcrldir sslkey sslkeylogfile sslmode sslnegotiation sslpassword sslrootcert sslsni
    target_session_attrs tcp_user_timeout user
"""
LIBPQ_KEYWORDS = frozenset(_KEYWORDS.split())
"""What libpq 18 knows. Only used to word errors: a keyword that is not here still goes to libpq."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option of ours: what it accepts, and for which DSN schemes."""

    expects: str
    convert: Callable[[str], OptionValue]
    schemes: frozenset[str]


def option_value(scheme: str, name: str, text: str) -> OptionValue:
    """The typed value of an option.

    Raises:
        DsnError: The option is another database's, or the value is not one it accepts.
    """
    option = OPTIONS[name]
    if scheme not in option.schemes:
        owners = " and ".join(sorted(option.schemes))
        raise DsnError(f"the DSN option {name!r} is for {owners}, not for {scheme}", hint="remove it")
    try:
        return option.convert(text)
    except ValueError:
        pass  # raised below, so that no traceback chains to the conversion's own message
    raise DsnError(f"the DSN option {name}={shorten(text)!r} is not {option.expects}")


def check_pool_bounds(options: Mapping[str, OptionValue]) -> None:
    """Refuse a pool whose minimum is above its maximum, where the DSN gives both."""
    low, high = options.get("pool_min"), options.get("pool_max")
    if low is not None and high is not None and low > high:  # type: ignore[operator]  # both are int here
        raise DsnError(f"the DSN option pool_min={low} is greater than pool_max={high}")


def nearest_option(name: str) -> str | None:
    """The option of ours that a misspelt name most likely means."""
    found = difflib.get_close_matches(name.lower(), OPTIONS, n=1, cutoff=0.8)
    return found[0] if found else None


def options_for(scheme: str) -> list[str]:
    """The names of the options that a scheme takes."""
    return sorted(name for name, option in OPTIONS.items() if scheme in option.schemes)


def shorten(text: str, limit: int = 60) -> str:
    """Text for an error message, at most one line long."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def schema_name(text: str) -> str:
    """A Postgres schema name, any identifier the server would keep unchanged.

    Raises:
        ValueError: Empty, longer than Postgres keeps, or not text that it can store.
    """
    if not text or "\0" in text:
        raise ValueError("empty, or holds a NUL")
    if len(text.encode()) > MAX_IDENTIFIER_BYTES:  # an unpaired surrogate is a ValueError too
        raise ValueError("too long")
    return text


def boolean(text: str) -> bool:
    """``true`` or ``false`` in the usual spellings."""
    lowered = text.lower()
    if lowered in {"true", "1", "yes", "on"}:
        return True
    if lowered in {"false", "0", "no", "off"}:
        return False
    raise ValueError(text)


def _integer(low: int, high: int = MAX_POOL_SIZE) -> Callable[[str], int]:
    def convert(text: str) -> int:
        # int() would also take " 5", "1_0" and digits of other scripts
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(text)
        return int(text)

    return convert


def _seconds(high: float, *, zero: bool = False) -> Callable[[str], float]:
    def convert(text: str) -> float:
        if not re.fullmatch(r"[0-9.eE+-]+", text):
            raise ValueError(text)
        value = float(text)
        if not math.isfinite(value) or value > high or value < 0 or (value == 0 and not zero):
            raise ValueError(text)
        return value

    return convert


def _synchronous(text: str) -> str:
    if text.lower() not in SYNCHRONOUS:
        raise ValueError(text)
    return text.lower()


_ANY_POSTGRES = frozenset({"postgresql", "postgres+embedded"})
_POSITIVE_SECONDS = f"a number of seconds above 0 and up to {MAX_SECONDS:.0f}"

OPTIONS: Mapping[str, Option] = {
    "schema": Option(f"a name of 1 to {MAX_IDENTIFIER_BYTES} bytes", schema_name, _ANY_POSTGRES),
    "pool_min": Option(f"a whole number from 0 to {MAX_POOL_SIZE}", _integer(0), _ANY_POSTGRES),
    "pool_max": Option(f"a whole number from 1 to {MAX_POOL_SIZE}", _integer(1), _ANY_POSTGRES),
    "pool_timeout": Option(_POSITIVE_SECONDS, _seconds(MAX_SECONDS), _ANY_POSTGRES),
    "pool_max_idle": Option(_POSITIVE_SECONDS, _seconds(MAX_SECONDS), _ANY_POSTGRES),
    "pool_max_lifetime": Option(_POSITIVE_SECONDS, _seconds(MAX_SECONDS), _ANY_POSTGRES),
    "workers": Option(f"a whole number from 1 to {MAX_WORKERS}", _integer(1, MAX_WORKERS), _ANY_POSTGRES),
    "pgbouncer": Option("true or false", boolean, frozenset({"postgresql"})),
    "synchronous": Option("one of " + ", ".join(SYNCHRONOUS), _synchronous, frozenset({"sqlite"})),
    "busy_timeout": Option(
        f"a number of seconds from 0 to {MAX_BUSY_SECONDS:.0f}",
        _seconds(MAX_BUSY_SECONDS, zero=True),
        frozenset({"sqlite"}),
    ),
    "allow_plaintext": Option("true or false", boolean, frozenset({"sqlite"}) | _ANY_POSTGRES),
}

"""Data source names: which database to open, as one immutable value that never shows a secret.

Parsing normalises the spellings that people bring along (SQLAlchemy's, asyncpg's), takes our own
options out and checks them, and leaves everything else to libpq as it was written. No driver is
imported here. What the schemes mean is described in ``docs/dsn.md``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import quote, unquote

from persistence.errors import DsnError
from persistence.masking import KEYWORD_FORM, KEYWORD_TOKEN, MASK, URL_FORM, mask_dsn, mask_text
from persistence.options import (
    LIBPQ_KEYWORDS,
    OPTIONS,
    OptionValue,
    check_pool_bounds,
    nearest_option,
    option_value,
    options_for,
    shorten,
)

_CANONICAL = {
    "postgres": "postgresql",
    "postgresql+asyncpg": "postgresql",
    "postgresql+psycopg": "postgresql",
    "postgresql+psycopg2": "postgresql",
    "postgresql+psycopg_async": "postgresql",
    "postgres+asyncpg": "postgresql",
    "postgres+psycopg": "postgresql",
    "postgres+psycopg2": "postgresql",
    "sqlite+aiosqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
}

_SSL_MODES = {
    **{mode: mode for mode in ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")},
    # what libpq itself makes of ssl=true
    **dict.fromkeys(("true", "1", "on", "yes"), "require"),
    **dict.fromkeys(("false", "0", "off", "no"), "disable"),
}

_OTHER_DRIVERS = {
    "async_fallback": "remove it",
    "command_timeout": "use options=-c%20statement_timeout=<milliseconds>",
    "connection_limit": "use pool_max",
    "direct_tls": "use sslnegotiation=direct",
    "max_cacheable_statement_size": "remove it",
    "max_cached_statement_lifetime": "remove it",
    "pool_size": "use pool_max",
    "prepared_statement_cache_size": "for PgBouncer use pgbouncer=true, otherwise remove it",
    "prepared_statement_name_func": "for PgBouncer use pgbouncer=true, otherwise remove it",
    "prepareThreshold": "for PgBouncer use pgbouncer=true, otherwise remove it",
    "server_settings": "use options=-c%20<name>=<value>",
    "statement_cache_size": "for PgBouncer use pgbouncer=true, otherwise remove it",
    "timeout": "use connect_timeout",
}
"""Options of asyncpg, SQLAlchemy, Prisma and JDBC that libpq refuses, and what to write instead."""


class _Secret(str):
    """Text that keeps out of reprs, and so out of tracebacks with locals, ``asdict`` and assertions."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(mask_dsn(str(self)))


class _Options(dict[str, OptionValue]):
    """A mapping that is read-only and hashable, and unlike ``MappingProxyType`` can be copied and pickled."""

    def _refuse(self, *_: object, **__: object) -> None:
        raise TypeError("the options of a Dsn are read-only")

    __setitem__ = __delitem__ = update = setdefault = clear = pop = popitem = _refuse  # type: ignore[assignment]
    __ior__ = _refuse  # type: ignore[assignment]

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type[_Options], tuple[dict[str, OptionValue]]]:
        return _Options, (dict(self),)


@dataclass(frozen=True, slots=True, repr=False)
class Dsn:
    """Which database to open.

    ``str`` and ``repr`` are masked; ``conninfo`` and ``url`` hold the secrets and are for drivers only.

    Attributes:
        scheme: The canonical scheme: ``memory``, ``sqlite``, ``postgresql``, ``postgres+embedded``, or a
            third party's, as written but in lower case.
        path: The file or folder of ``sqlite`` and ``postgres+embedded``; ``None`` for an SQLite database
            in memory and for every other scheme.
        conninfo: What goes to libpq, without our own options; empty for every other scheme. Secret.
        options: Our own options, checked and typed. Read-only.
        url: The DSN as given, for third-party providers. Secret.
    """

    scheme: str
    path: str | None = None
    conninfo: str = ""
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    url: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "conninfo", _Secret(self.conninfo))
        object.__setattr__(self, "url", _Secret(self.url))
        object.__setattr__(self, "options", _Options(self.options))

    @classmethod
    def parse(cls, text: str) -> Dsn:
        """Read a DSN.

        Raises:
            DsnError: It is malformed, or an option is wrong. A scheme that is not known is no error
                here, since third parties bring their own.
        """
        if not isinstance(text, str):
            raise DsnError(f"a DSN is text, not {type(text).__name__}")
        if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
            raise DsnError(f"the DSN holds a NUL or an unpaired surrogate: {mask_dsn(text)}")
        if KEYWORD_FORM.match(text):
            return _parse_keywords(text)
        text = text.strip()
        form = URL_FORM.match(text)
        if form is None:
            raise _not_a_dsn(text)
        if re.search(r"[\x00-\x20\x7f]", text) and not form["scheme"].lower().startswith("sqlite"):
            raise DsnError(
                f"the DSN holds a space or a control character: {mask_dsn(text)}",
                hint="percent-encode it, a space is %20",
            )
        scheme = form["scheme"].lower()
        return _parse_url(text, scheme, text[form.end() :])

    @property
    def masked(self) -> str:
        """The DSN as given, without its secrets."""
        return mask_dsn(self.url)

    def __str__(self) -> str:
        return self.masked

    def __repr__(self) -> str:
        return f"Dsn({self.masked!r})"


def mask_secrets(text: str, *dsns: Dsn) -> str:
    """Text, a driver's message for instance, without the secrets of the given DSNs and anything like them."""
    return mask_text(text, tuple(str.__str__(part) for dsn in dsns for part in (dsn.url, dsn.conninfo)))


def _parse_url(text: str, scheme: str, rest: str) -> Dsn:
    canonical = _CANONICAL.get(scheme, scheme)
    head, mark, query = rest.partition("?")
    if canonical == "postgresql":
        head, pieces = _postgres_parts(text, rest)
        if scheme != canonical and "+" in scheme:
            pieces = list(_from_sqlalchemy(text, pieces))
        options, pieces = _take_options(text, canonical, pieces)
        conninfo = f"{'postgres' if scheme == 'postgres' else canonical}://{head}"
        return Dsn(canonical, None, conninfo + ("?" + "&".join(pieces) if pieces else ""), options, text)
    if canonical not in {"memory", "sqlite", "postgres+embedded"}:
        return Dsn(scheme, None, "", {}, text)
    if canonical == "memory" and head.strip("/"):
        raise DsnError(f"a DSN for memory names nothing: {mask_dsn(text)}", hint="write memory://")
    path = None if canonical == "memory" else _file(text, canonical, head)
    options, unknown = _take_options(text, canonical, query.split("&") if mark else [])
    if unknown:
        raise _unknown_option(canonical, unknown[0].partition("=")[0])
    return Dsn(canonical, path, "", options, text)


def _file(text: str, scheme: str, head: str) -> str | None:
    """The path behind ``sqlite://``; ``None`` for a database in memory."""
    if scheme == "sqlite" and head in {"", "/:memory:"}:
        return None
    hint = f"write {scheme}:///relative or {scheme}:////absolute"
    if head.startswith("/file:"):
        raise DsnError(f"SQLite's file: URIs are not supported: {mask_dsn(text)}", hint=hint)
    if not head.startswith("/"):
        shown = mask_dsn(text)
        if head and MASK not in shown:
            hint = f"a file is written {shown.replace('://', ':///', 1)}"
        raise DsnError(f"a {scheme} DSN names no host, the path follows a third slash: {shown}", hint=hint)
    path = _decode(text, "path", head[1:])
    if not path.strip("/"):
        raise DsnError(f"the DSN names no file: {mask_dsn(text)}", hint=hint)
    return path


def _postgres_parts(text: str, rest: str) -> tuple[str, list[str]]:
    """User, hosts and database name as one text, and the pieces of the query; cut as libpq cuts.

    What libpq would take for something else, an unencoded "@" or "/" in a password, is refused here, as
    libpq would name pieces of the password in its own message.
    """
    slash = rest.find("/")
    at = rest.find("@", 0, slash if slash >= 0 else len(rest))
    mark = rest.find("?", at + 1)
    head, query = (rest, None) if mark < 0 else (rest[:mark], rest[mark + 1 :])
    if "@" in head[at + 1 :]:
        raise DsnError(
            f"the DSN holds an '@' or '/' that is not percent-encoded: {mask_dsn(text)}",
            hint="in a user name, password or database name write %40 for '@' and %2F for '/'",
        )
    _decode(text, "part before the query", head)
    for host in head[at + 1 :].partition("/")[0].split(","):
        _check_port(text, host)
    pieces = query.split("&") if query else []
    for piece in pieces:
        name, equals, value = piece.partition("=")
        if not equals:
            raise DsnError(
                f"the DSN's query has a part without '=': {mask_dsn(text)}",
                hint="write %26 for '&' inside a value",
            )
        _decode(text, "query", name)
        _decode(text, "query", value)
    return head, pieces


def _check_port(text: str, host: str) -> None:
    address = re.fullmatch(r"(?:\[[^\[\]]*\]|[^:\[\]]*)(?::(?P<port>.*))?", host)
    if address is None:
        raise DsnError(f"the DSN has a host whose '[' is not closed: {mask_dsn(text)}", hint="write [::1]")
    port = address["port"]
    if port and "%" not in port and not (re.fullmatch(r"[0-9]{1,5}", port) and 1 <= int(port) <= 65535):
        raise DsnError(
            f"the DSN's port is not a number from 1 to 65535: {mask_dsn(text)}",
            hint="an IPv6 address stands in brackets; a password is followed by '@' and percent-encoded",
        )


def _from_sqlalchemy(text: str, pieces: list[str]) -> Iterator[str]:
    """A query as SQLAlchemy reads it, written as libpq reads it."""
    hosts: list[str] = []
    names = [unquote(piece.partition("=")[0]) for piece in pieces]
    for name, piece in zip(names, pieces, strict=True):
        value = piece.partition("=")[2].replace("+", "%20")  # SQLAlchemy's "+" is a space, libpq's is not
        if name == "host" and (names.count("host") > 1 or re.search(r":[0-9]+$", unquote(value))):
            hosts.append(unquote(value))
        elif name == "ssl":
            mode = _SSL_MODES.get(unquote(value).lower())
            if mode is None or "sslmode" in names:
                known = ", ".join(sorted(set(_SSL_MODES.values())))
                raise DsnError(
                    f"the DSN option ssl={shorten(unquote(value))!r} is not usable: {mask_dsn(text)}",
                    hint=f"write sslmode=, once, with one of {known}",
                )
            yield f"sslmode={mode}"
        else:
            yield f"{name}={value}"
    if hosts:  # SQLAlchemy repeats host=name:port; libpq takes the last and would look "name:port" up
        pairs = [host.rpartition(":") if re.search(r":[0-9]+$", host) else (host, "", "") for host in hosts]
        yield "host=" + quote(",".join(name for name, _, _ in pairs), safe=",")
        if any(port for _, _, port in pairs):
            yield "port=" + ",".join(port for _, _, port in pairs)


def _take_options(text: str, scheme: str, pieces: list[str]) -> tuple[dict[str, OptionValue], list[str]]:
    """Our own options, and the pieces that are not ours, untouched."""
    options: dict[str, OptionValue] = {}
    rest: list[str] = []
    for piece in pieces:
        name, _, value = piece.partition("=")
        if not _add_option(options, scheme, unquote(name), _decode(text, "query", value)):
            rest.append(piece)
    check_pool_bounds(options)
    return options, rest


def _add_option(options: dict[str, OptionValue], scheme: str, name: str, value: str) -> bool:
    """Keep the option if it is ours; refuse it if it is neither ours nor libpq's but meant to be."""
    if name in options:
        raise DsnError(f"the DSN option {name!r} is given twice")
    if name in OPTIONS:
        options[name] = option_value(scheme, name, value)
        return True
    if scheme == "postgresql" and name not in LIBPQ_KEYWORDS:
        if name in _OTHER_DRIVERS:
            raise DsnError(f"the DSN option {name!r} belongs to another driver", hint=_OTHER_DRIVERS[name])
        if nearest := nearest_option(name):
            raise DsnError(f"the DSN option {name!r} is not known", hint=f"did you mean {nearest!r}?")
    return False


def _unknown_option(scheme: str, name: str) -> DsnError:
    nearest = nearest_option(unquote(name))
    if nearest:
        hint = f"did you mean {nearest!r}?"
    else:
        hint = f"{scheme} takes {', '.join(options_for(scheme)) or 'no options'}"
    return DsnError(f"the DSN option {shorten(unquote(name))!r} is not known", hint=hint)


def _parse_keywords(text: str) -> Dsn:
    """Keywords as libpq reads them, ``host=... dbname=...``; our own options may stand among them."""
    options: dict[str, OptionValue] = {}
    rest: list[str] = []
    position = 0
    while match := KEYWORD_TOKEN.match(text, position):
        position = match.end()
        value = match["value"]
        value = re.sub(r"\\(.)", r"\1", value[1:-1] if value.startswith("'") else value, flags=re.DOTALL)
        if not _add_option(options, "postgresql", match["key"], value):
            rest.append(match[0])
    if text[position:].strip():
        raise DsnError(
            f"the DSN's keywords cannot be read: {mask_dsn(text)}",
            hint="a value with spaces stands in single quotes, in which ' and \\ are written \\' and \\\\",
        )
    check_pool_bounds(options)
    return Dsn("postgresql", None, "".join(rest).lstrip(), options, text)


def _decode(text: str, part: str, value: str) -> str:
    """Undo percent-encoding; refuse what libpq refuses, without repeating a piece of it."""
    try:
        if not re.search(r"%(?![0-9A-Fa-f]{2})|%00", value):
            return unquote(value, errors="strict")
    except UnicodeDecodeError:
        pass  # raised below, without the bytes
    raise DsnError(
        f"the DSN's {part} has a '%' that is not percent-encoding of UTF-8 text: {mask_dsn(text)}",
        hint="write %25 for '%'",
    )


def _not_a_dsn(text: str) -> DsnError:
    """The error for text that is neither a URL nor keywords, with the spelling that was meant."""
    if not text:
        return DsnError("the DSN is empty", hint="write sqlite:///chat.db for a file, or memory://")
    shown = mask_dsn(text)
    scheme = _CANONICAL.get(*[text.partition(":")[0].lower()] * 2)
    if text == ":memory:":
        return DsnError("':memory:' is not a DSN", hint="write sqlite:///:memory:, or memory://")
    if text.startswith("file:"):
        return DsnError(
            "SQLite's file: URIs are not supported", hint="write sqlite:///chat.db for the file chat.db"
        )
    if scheme in {"memory", "sqlite", "postgresql", "postgres+embedded"}:
        return DsnError(f"the DSN is not a URL: {shown}", hint=f"two slashes follow the colon: {scheme}://")
    path = text.replace("%", "%25").replace("?", "%3F") if shown == text else "chat.db"
    return DsnError(f"not a DSN: {shown}", hint=f"a file is written sqlite:///{path}")

"""Parsing: spellings, options, refusals, and what reaches libpq."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict

from persistence.dsn import Dsn
from persistence.errors import DsnError
from persistence.options import LIBPQ_KEYWORDS, OPTIONS


def libpq(text: str) -> dict[str, str]:
    """What libpq makes of a DSN."""
    return {key: str(value) for key, value in conninfo_to_dict(Dsn.parse(text).conninfo).items()}


@pytest.mark.parametrize(
    ("text", "scheme", "path"),
    [
        ("memory://", "memory", None),
        ("MEMORY://", "memory", None),
        ("sqlite://", "sqlite", None),
        ("sqlite:///:memory:", "sqlite", None),
        ("sqlite:///relative.db", "sqlite", "relative.db"),
        ("sqlite:///a/b.db", "sqlite", "a/b.db"),
        ("sqlite:////absolute.db", "sqlite", "/absolute.db"),
        ("  sqlite:///chat.db\n", "sqlite", "chat.db"),
        ("sqlite:///a b.db", "sqlite", "a b.db"),
        ("sqlite:///a%20b%3F%23%25.db", "sqlite", "a b?#%.db"),
        ("sqlite:///gr%C3%BC%C3%9Fe/ä.db", "sqlite", "grüße/ä.db"),
        ("sqlite:///~/chat.db", "sqlite", "~/chat.db"),
        ("sqlite:///a+b#c.db", "sqlite", "a+b#c.db"),
        ("sqlite:///me@home:1.db", "sqlite", "me@home:1.db"),
        ("sqlite+aiosqlite:///chat.db", "sqlite", "chat.db"),
        ("sqlite+pysqlite:////chat.db", "sqlite", "/chat.db"),
        ("postgres+embedded:///data/pg", "postgres+embedded", "data/pg"),
        ("postgres+embedded:////var/pg", "postgres+embedded", "/var/pg"),
        ("redis://host:6379/0", "redis", None),
        ("mongodb+srv://u:p@host/?w=majority", "mongodb+srv", None),
    ],
)
def test_scheme_and_path(text: str, scheme: str, path: str | None) -> None:
    dsn = Dsn.parse(text)
    assert (dsn.scheme, dsn.path, dsn.conninfo) == (scheme, path, "")
    assert dsn.url == text.strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://", {}),
        ("postgresql:///db", {"dbname": "db"}),
        (
            "postgres://u:p@h:5433/db",
            {"user": "u", "password": "p", "host": "h", "port": "5433", "dbname": "db"},
        ),
        ("PostgreSQL://h/db", {"host": "h", "dbname": "db"}),
        ("postgresql://h1:5432,h2:5433/db", {"host": "h1,h2", "port": "5432,5433", "dbname": "db"}),
        ("postgresql://h1,h2/db", {"host": "h1,h2", "port": ",", "dbname": "db"}),
        ("postgresql://[::1]:5432,[fe80::1]/db", {"host": "::1,fe80::1", "port": "5432,", "dbname": "db"}),
        ("postgresql:///db?host=/var/run/pg", {"host": "/var/run/pg", "dbname": "db"}),
        ("postgresql://%2Fvar%2Frun/db", {"host": "/var/run", "dbname": "db"}),
        ("postgresql://?service=chat&passfile=/x/.pgpass", {"service": "chat", "passfile": "/x/.pgpass"}),
        (
            "postgresql://u:p%40%3A%2F%25@h/db",
            {"user": "u", "password": "p@:/%", "host": "h", "dbname": "db"},
        ),
        ("postgresql://u:p#?w@h/db", {"user": "u", "password": "p#?w", "host": "h", "dbname": "db"}),
        ("postgresql://h/db?user=me@corp", {"host": "h", "dbname": "db", "user": "me@corp"}),
        ("postgresql://h/db?ssl=true", {"host": "h", "dbname": "db", "sslmode": "require"}),
        ("postgresql+psycopg://u@h/db", {"user": "u", "host": "h", "dbname": "db"}),
        ("postgresql+psycopg2://u@h/db", {"user": "u", "host": "h", "dbname": "db"}),
        ("postgresql+asyncpg://h/db?ssl=require", {"host": "h", "dbname": "db", "sslmode": "require"}),
        ("postgresql+asyncpg://h/db?ssl=true", {"host": "h", "dbname": "db", "sslmode": "require"}),
        ("postgresql+asyncpg://h/db?ssl=False", {"host": "h", "dbname": "db", "sslmode": "disable"}),
        (
            "postgresql+asyncpg://h/db?ssl=verify-full",
            {"host": "h", "dbname": "db", "sslmode": "verify-full"},
        ),
        (
            "postgresql+asyncpg://u:p@/db?host=h1:5432&host=h2:5433",
            {"user": "u", "password": "p", "dbname": "db", "host": "h1,h2", "port": "5432,5433"},
        ),
        ("postgresql+psycopg2:///db?host=h1:6432", {"dbname": "db", "host": "h1", "port": "6432"}),
        ("postgresql+psycopg2:///db?host=/var/run", {"dbname": "db", "host": "/var/run"}),
        ("postgresql+psycopg2://h?options=-c+geqo%3Doff", {"host": "h", "options": "-c geqo=off"}),
        ("postgresql://h?application_name=a+b", {"host": "h", "application_name": "a+b"}),
        ("host=h dbname=db password='a b'", {"host": "h", "dbname": "db", "password": "a b"}),
        (r"host = h password='it\'s \\'", {"host": "h", "password": "it's \\"}),
        (r"password=a\ b host=h", {"host": "h", "password": "a b"}),
        ("  host=h\n port=1", {"host": "h", "port": "1"}),
        ("service=chat", {"service": "chat"}),
    ],
)
def test_what_reaches_libpq(text: str, expected: dict[str, str]) -> None:
    assert Dsn.parse(text).scheme == "postgresql"
    assert libpq(text) == expected


@pytest.mark.parametrize(
    ("text", "conninfo"),
    [
        (
            "postgresql://h/db?b%61r=1&schema=s&application_name=%41+b",
            "postgresql://h/db?b%61r=1&application_name=%41+b",
        ),
        ("postgres://h/db?pool_max=3", "postgres://h/db"),
        ("postgresql://h/db?connect_timeout=3&schema=s&user=u", "postgresql://h/db?connect_timeout=3&user=u"),
        ("host=h  schema='my one' dbname=d", "host=h dbname=d"),
        ("schema=s", ""),
    ],
)
def test_our_options_are_cut_out_and_the_rest_is_untouched(text: str, conninfo: str) -> None:
    assert Dsn.parse(text).conninfo == conninfo


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (
            "postgresql://h?schema=Agents%201&pool_min=0&pool_max=20&pool_timeout=2.5&pgbouncer=yes",
            {"schema": "Agents 1", "pool_min": 0, "pool_max": 20, "pool_timeout": 2.5, "pgbouncer": True},
        ),
        (
            "postgresql://h?pool_max_idle=60&pool_max_lifetime=1e3",
            {"pool_max_idle": 60.0, "pool_max_lifetime": 1e3},
        ),
        ("host=h pool_max=7 pgbouncer=off", {"pool_max": 7, "pgbouncer": False}),
        ("postgres+embedded:///pg?schema=s&pool_max=2", {"schema": "s", "pool_max": 2}),
        ("sqlite:///a?synchronous=NORMAL&busy_timeout=0", {"synchronous": "normal", "busy_timeout": 0.0}),
        ("sqlite:///a?allow_plaintext=true", {"allow_plaintext": True}),
        (f"postgresql://h?schema={'s' * 63}", {"schema": "s" * 63}),
    ],
)
def test_options_are_typed(text: str, options: dict[str, object]) -> None:
    found = dict(Dsn.parse(text).options)
    assert found == options
    assert {name: type(value) for name, value in found.items()} == {n: type(v) for n, v in options.items()}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty", "sqlite:///chat.db"]),
        ("   ", ["empty"]),
        ("chat.db", ["not a DSN: chat.db", "sqlite:///chat.db"]),
        ("/data/x.sqlite", ["sqlite:////data/x.sqlite"]),
        ("100%.db", ["sqlite:///100%25.db"]),
        (":memory:", ["sqlite:///:memory:"]),
        ("file:chat.db?mode=ro", ["file:", "sqlite:///chat.db"]),
        ("sqlite:///file:chat.db?mode=ro&uri=true", ["file:", "sqlite:///"]),
        ("sqlite:chat.db", ["two slashes", "sqlite://"]),
        ("postgres:/host/db", ["two slashes", "postgresql://"]),
        ("sqlite:///", ["names no file"]),
        ("sqlite:////", ["names no file"]),
        ("sqlite://chat.db", ["sqlite:///chat.db"]),
        ("postgres+embedded://", ["postgres+embedded:///relative"]),
        ("sqlite:///a%zz.db", ["path", "%25"]),
        ("sqlite:///a%00.db", ["path"]),
        ("sqlite:///a%ff.db", ["UTF-8"]),
        ("memory://chat", ["memory"]),
        ("memory://?pool_max=3", ["pool_max", "memory"]),
        ("memory://?x=1", ["'x'", "no options"]),
        ("sqlite:///a?pool_mx=3", ["'pool_mx'", "'pool_max'"]),
        ("sqlite:///a?cache=shared", ["'cache'", "synchronous"]),
        ("sqlite:///a?schema=x", ["'schema'", "postgresql", "not for sqlite"]),
        ("postgresql://h?synchronous=full", ["'synchronous'", "for sqlite", "not for postgresql"]),
        ("postgres+embedded:///a?pgbouncer=1", ["'pgbouncer'", "postgres+embedded"]),
        ("postgresql://h?pool_mx=3", ["'pool_mx'", "'pool_max'"]),
        ("postgresql://h?POOL_MAX=3", ["'POOL_MAX'", "'pool_max'"]),
        ("host=h pool_mn=3", ["'pool_mn'", "'pool_min'"]),
        (
            "postgresql://h?prepared_statement_cache_size=0",
            ["prepared_statement_cache_size", "pgbouncer=true"],
        ),
        ("postgresql+asyncpg://h?server_settings=x", ["server_settings", "options="]),
        ("postgresql+asyncpg://h?command_timeout=5", ["command_timeout", "statement_timeout"]),
        ("postgresql+asyncpg://h?ssl=maybe", ["ssl='maybe'", "verify-full"]),
        ("postgresql+asyncpg://h?ssl=require&sslmode=disable", ["ssl=", "once"]),
        ("postgresql://h?pool_max=3&pool_max=4", ["'pool_max'", "twice"]),
        ("postgresql://h?pool_max=", ["pool_max=''", "whole number"]),
        ("postgresql://h?pool_max=many", ["pool_max='many'", "whole number from 1"]),
        ("postgresql://h?pool_max=1_0", ["pool_max='1_0'"]),
        ("postgresql://h?pool_max=٣", ["pool_max='٣'"]),
        ("postgresql://h?pool_max=0", ["pool_max='0'"]),
        ("postgresql://h?pool_max=-1", ["pool_max='-1'"]),
        ("postgresql://h?pool_max=999999999999", ["pool_max="]),
        ("postgresql://h?pool_min=5&pool_max=2", ["pool_min=5", "pool_max=2"]),
        ("postgresql://h?pool_timeout=nan", ["pool_timeout='nan'", "seconds"]),
        ("postgresql://h?pool_timeout=inf", ["pool_timeout='inf'"]),
        ("postgresql://h?pool_timeout=1e999", ["pool_timeout='1e999'"]),
        ("postgresql://h?pool_timeout=0", ["pool_timeout='0'"]),
        ("postgresql://h?pool_timeout=-1", ["pool_timeout='-1'"]),
        ("postgresql://h?pgbouncer=maybe", ["pgbouncer='maybe'", "true or false"]),
        ("postgresql://h?schema=", ["schema=''"]),
        (f"postgresql://h?schema={'%C3%A4' * 32}", ["schema=", "63 bytes"]),
        ("sqlite:///a?synchronous=none", ["synchronous='none'", "off, normal, full, extra"]),
        ("sqlite:///a?busy_timeout=1e12", ["busy_timeout='1e12'"]),
        ("postgresql://h:port/db", ["port"]),
        ("postgresql://h:70000/db", ["port"]),
        ("postgresql://::1/db", ["port", "brackets"]),
        ("postgresql://[::1/db", ["]"]),
        ("postgresql://u:p/w@h/db", ["percent-encoded", "%2F"]),
        ("postgresql://u:p@w@h/db", ["percent-encoded", "%40"]),
        ("postgresql://h/db@x", ["percent-encoded"]),
        ("postgresql://h/db?schema", ["without '='"]),
        ("postgresql://h/db?user=%zz", ["query", "%25"]),
        ("postgresql://h/d b", ["space", "%20"]),
        ("host=h dbname", ["keywords"]),
        ("host=h password='open", ["keywords", "quotes"]),
        ("postgresql://h/\0", ["NUL"]),
        ("sqlite:///\ud800.db", ["surrogate"]),
    ],
)
def test_refusals_name_what_is_wrong_and_what_to_do(text: str, words: list[str]) -> None:
    with pytest.raises(DsnError) as caught:
        Dsn.parse(text)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message
    assert message.isprintable()
    assert caught.value.__context__ is None


@pytest.mark.parametrize("value", [None, b"memory://", 5])
def test_what_is_not_text_is_refused(value: object) -> None:
    with pytest.raises(DsnError, match=type(value).__name__):
        Dsn.parse(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["postgresql://h?frobnicate=1", "host=h frobnicate=1"])
def test_a_keyword_of_a_newer_libpq_is_libpqs_business(text: str) -> None:
    assert "frobnicate" in Dsn.parse(text).conninfo


def test_the_list_of_libpq_keywords_is_complete() -> None:
    assert {option.keyword.decode() for option in pq.Conninfo.get_defaults()} <= LIBPQ_KEYWORDS
    assert not LIBPQ_KEYWORDS & OPTIONS.keys()


def test_a_dsn_is_a_value() -> None:
    text = "postgresql://u:secret@h/db?schema=s&pool_max=3"
    dsn = Dsn.parse(text)
    assert dsn == Dsn.parse(text)
    assert dsn != Dsn.parse(text + "4")
    assert len({dsn, Dsn.parse(text), Dsn.parse("memory://")}) == 2
    for twin in (copy.copy(dsn), copy.deepcopy(dsn), pickle.loads(pickle.dumps(dsn))):  # noqa: S301
        assert twin == dsn
        assert twin.conninfo == "postgresql://u:secret@h/db"
        assert twin.options == {"schema": "s", "pool_max": 3}
    assert dataclasses.asdict(dsn)["options"] == {"schema": "s", "pool_max": 3}
    with pytest.raises(dataclasses.FrozenInstanceError):
        dsn.scheme = "sqlite"  # type: ignore[misc]
    with pytest.raises(TypeError, match="read-only"):
        dsn.options["schema"] = "x"  # type: ignore[index]
    with pytest.raises(TypeError, match="read-only"):
        dsn.options |= {"schema": "x"}  # type: ignore[misc,operator]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)


@given(user=TEXT, password=TEXT, database=TEXT, name=TEXT)
def test_encoded_parts_reach_libpq_unchanged(user: str, password: str, database: str, name: str) -> None:
    from urllib.parse import quote

    parts = [quote(part, safe="") for part in (user, password, database, name)]
    text = "postgresql+psycopg://{}:{}@h:1/{}?schema=s&application_name={}&pool_max=2".format(*parts)
    assert libpq(text) == {
        "user": user,
        "password": password,
        "host": "h",
        "port": "1",
        "dbname": database,
        "application_name": name,
    }


@given(password=TEXT, name=TEXT)
def test_keywords_reach_libpq_unchanged(password: str, name: str) -> None:
    quoted = ["'" + part.replace("\\", "\\\\").replace("'", "\\'") + "'" for part in (password, name)]
    text = "host=h password={} schema=s application_name={} pool_max=2".format(*quoted)
    assert libpq(text) == {"host": "h", "password": password, "application_name": name}
    assert Dsn.parse(text).options == {"schema": "s", "pool_max": 2}


@given(st.text(st.characters(), max_size=60) | st.text("postgresql:/@?&= '\\%h4[],", max_size=40))
def test_any_text_is_parsed_or_refused_in_one_line(text: str) -> None:
    for candidate in (text, "postgresql://" + text, "sqlite://" + text, "x://" + text, "host=" + text):
        try:
            dsn = Dsn.parse(candidate)
        except DsnError as error:
            assert str(error).isprintable()
        else:
            assert isinstance(hash(dsn), int)
            assert str(dsn).isprintable()


def test_importing_needs_no_driver() -> None:
    code = "import sys, persistence.dsn; print({'psycopg', 'pydantic', 'langgraph'} & sys.modules.keys())"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "set()"

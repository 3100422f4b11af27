"""No secret in anything that people see: DSNs, errors, reprs, drivers' messages."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pprint
import traceback
from collections.abc import Callable
from urllib.parse import quote

import psycopg
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from persistence.dsn import Dsn, mask_secrets
from persistence.errors import DsnError
from persistence.masking import mask_dsn


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("postgresql://u:pw@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u@h/db", "postgresql://u@h/db"),
        ("postgresql://h:5432/db", "postgresql://h:5432/db"),
        ("postgresql://h1:1,[::1]:2/db", "postgresql://h1:1,[::1]:2/db"),
        ("postgresql://u:@h/db", "postgresql://u:***@h/db"),
        ("postgres://u:p%40w@h1:1,h2:2/db?pool_max=3", "postgres://u:***@h1:1,h2:2/db?pool_max=3"),
        ("postgresql+asyncpg://u:p@h/db?ssl=require", "postgresql+asyncpg://u:***@h/db?ssl=require"),
        (
            "postgresql://h/db?user=me@corp&password=pw&port=1",
            "postgresql://h/db?user=me@corp&password=***&port=1",
        ),
        ("postgresql://h/db?password=pw&user=u&rest", "postgresql://h/db?password=***"),
        ("postgresql://h?p%61ssword=pw&sslpassword=x", "postgresql://h?p%61ssword=***&sslpassword=***"),
        ("postgresql://h?oauth_client_secret=x", "postgresql://h?oauth_client_secret=***"),
        (
            "postgresql://h?passfile=/x/.pgpass&keepalives=1",
            "postgresql://h?passfile=/x/.pgpass&keepalives=1",
        ),
        ("postgresql://h?password=a&b&user=u", "postgresql://h?password=***&user=u"),
        ("postgresql://h?password=a&b=c&user=u", "postgresql://h?password=***&user=u"),
        ("postgresql://h?dbname=postgresql://u:pw@h/db", "postgresql://h?dbname=***"),
        ("postgresql://u:p/w@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:p?w@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:p@w@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:pw", "postgresql://u:***"),
        ("host=h password='a b' user=u", "host=h password=*** user=u"),
        (r"host=h PASSWORD = 'it\'s' user=u", "host=h PASSWORD = *** user=u"),
        (r"password=a\ b user=u", "password=*** user=u"),
        ("host=h password=a b user=u", "host=h password=*** ***"),
        ("host=h password='open user=u", "host=h ***"),
        ("password=a b=c user=u", "password=*** user=u"),
        ("host= password=pw", "host= ***"),
        ("redis://:pw@h:6379/0", "redis://:***@h:6379/0"),
        ("redis://h:6379/0?db=1&api_key=k&Token=t", "redis://h:6379/0?db=1&api_key=***&Token=***"),
        (
            "x://u:p@h?pwd=1&passwd=2&secret=3&accessKey=4",
            "x://u:***@h?pwd=***&passwd=***&secret=***&accessKey=***",
        ),
        ("sqlite:///a:b@c.db", "sqlite:///a:b@c.db"),
        ("sqlite:///a.db?synchronous=full", "sqlite:///a.db?synchronous=full"),
        ("postgres+embedded:////var/pg?schema=s", "postgres+embedded:////var/pg?schema=s"),
        ("chat.db", "chat.db"),
        ("u:pw@h/db", "***"),
        ("postgresql:/u:pw@h/db", "***"),
        ("postgresql//u:pw@h/db", "***"),
        ("two words", "***"),
        ("", ""),
    ],
)
def test_what_a_masked_dsn_shows(text: str, masked: str) -> None:
    assert mask_dsn(text) == masked
    assert mask_dsn(masked) == masked


ENCODINGS: list[Callable[[str], str]] = [
    lambda secret: quote(secret, safe=""),
    lambda secret: "".join(f"%{byte:02x}" for byte in secret.encode()),
    str,
]
KEYWORD_ENCODINGS: list[Callable[[str], str]] = [
    lambda secret: "'" + secret.replace("\\", "\\\\").replace("'", "\\'") + "'",
    lambda secret: "'" + secret + "'",
    str,
]
PLACES = [
    "postgresql://u:{}@h/db",
    "postgres://u:{}@h:1,h2:2/db?pool_max=3",
    "postgresql+asyncpg://u:{}@h/db?ssl=require",
    "postgresql://:{}@/db",
    "postgresql://h/db?password={}",
    "postgresql://h/db?user=u&password={}&sslmode=prefer",
    "postgresql://u:{0}@h/db?password={0}&sslpassword={0}",
    "postgresql://u:{}@h/db?pool_mx=3",
    "postgresql://u:{}@h:port/db?pool_max=x",
    "sqlite://u:{}@h/db",
    "memory://u:{}@h",
    "redis://u:{}@h:6379/0",
    "redis://h/0?token={}",
    "redis://u:{0}@h/0?api_key={0}&db=1",
    "postgresql:/u:{}@h/db",
    "u:{}@h/db",
]
KEYWORD_PLACES = [
    "host=h password={}",
    "password={} host=h schema=s",
    "host=h password = {} pool_mx=1",
    "host=h sslpassword={0} password={0} user=u",
]
# A marker on both sides: with "any text" alone, short texts occur in the DSN by chance.
MARK = "Zq7x"
ODD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8) | st.text(
    "@:/?#%&='\\ \n;,[]+a", max_size=8
)


def everything_seen(text: str) -> str:
    """All that a program is likely to print about a DSN."""
    try:
        dsn = Dsn.parse(text)
    except DsnError as error:
        return "\n".join([str(error), repr(error), *traceback.format_exception(error)])
    seen = [str(dsn), repr(dsn), f"{dsn}", f"{dsn!r:>9}", pprint.pformat(dsn), repr(dataclasses.asdict(dsn))]
    try:
        raise ValueError(dsn)
    except ValueError as error:
        trace = traceback.TracebackException.from_exception(error, capture_locals=True)
        trace.stack.pop()  # this frame holds the text itself
        seen += trace.format()
    seen.append(repr(dataclasses.fields(dsn)) + repr([getattr(dsn, f.name) for f in dataclasses.fields(dsn)]))
    seen.append(
        mask_secrets(f'connection to "{str.__str__(dsn.url)}" failed, {str.__str__(dsn.conninfo)}', dsn)
    )
    with contextlib.suppress(DsnError):  # an odd password may leave less than a DSN
        seen.append(str(Dsn.parse(dsn.masked)))
    return "\n".join(seen)


@given(st.sampled_from(PLACES), st.sampled_from(ENCODINGS), ODD)
@example(PLACES[0], str, "@a/b?c=d@e")
@example(PLACES[4], str, "&user=x&y")
@example(PLACES[0], str, "%zz")
@example(PLACES[6], str, "@&")
def test_no_url_shows_its_password(place: str, encode: Callable[[str], str], odd: str) -> None:
    seen = everything_seen(place.format(encode(MARK + odd + MARK)))
    assert MARK not in seen
    assert quote(MARK) not in seen


@given(st.sampled_from(KEYWORD_PLACES), st.sampled_from(KEYWORD_ENCODINGS), ODD)
@example(KEYWORD_PLACES[0], str, " b=c ")
def test_no_keywords_show_their_password(place: str, encode: Callable[[str], str], odd: str) -> None:
    assert MARK not in everything_seen(place.format(encode(MARK + odd + MARK)))


@given(st.sampled_from(PLACES), ODD)
def test_a_drivers_message_loses_every_spelling(place: str, odd: str) -> None:
    secret = MARK + odd + MARK
    try:
        dsn = Dsn.parse(place.format(quote(secret, safe="")))
    except DsnError:
        return
    quoted = secret.replace("\\", "\\\\").replace("'", "\\'")
    for spelling in (secret, quote(secret, safe=""), f"password='{quoted}'", repr(secret), quote(secret)):
        assert MARK not in mask_secrets(f"could not use {spelling}, sorry", dsn)


@pytest.mark.parametrize(
    "spelling",
    [
        r"p/w@'\ü+ z",
        "p%2Fw%40%27%5C%C3%BC%2B%20z",
        "p%2fw%40%27%5c%c3%bc%2b%20z",
        r"p/w@\'\\ü+ z",
        r"p/w@'\\ü+ z",
    ],
)
def test_spellings_other_than_the_dsns_own(spelling: str) -> None:
    dsn = Dsn.parse(r"host=h password='p/w@\'\\ü+ z'")
    assert mask_secrets(f"near {spelling}, sorry", dsn) == "near ***, sorry"


@pytest.mark.parametrize("password", ["a", "u1", "postgres", "db"])
def test_a_short_or_public_password_does_not_mangle_the_message(password: str) -> None:
    dsn = Dsn.parse(f"postgresql://postgres:{password}@db/postgres")
    text = 'connection to "db" failed: FATAL: password authentication failed for user "postgres"'
    assert mask_secrets(text, dsn) == text
    assert mask_secrets(f"in {str.__str__(dsn.url)}", dsn) == "in postgresql://postgres:***@db/postgres"
    assert mask_secrets(f"with password={password} host=db", dsn) == "with password=*** host=db"


def test_text_without_a_dsn_is_cleaned_by_its_look() -> None:
    text = "tried postgresql://u:pw@h/db and 'password=x y', passfile=/a SSLPassword = 'a b'."
    assert mask_secrets(text) == (
        "tried postgresql://u:***@h/db and 'password=*** y', passfile=/a SSLPassword = ***."
    )


def test_a_real_drivers_error_is_clean(caplog: pytest.LogCaptureFixture) -> None:
    dsn = Dsn.parse(f"postgresql://u:{MARK}%40@h:1/db?frobnicate=1")
    with pytest.raises(psycopg.Error) as caught:
        psycopg.connect(dsn.conninfo)
    shown = mask_secrets(str(caught.value), dsn)
    assert "frobnicate" in shown
    logging.getLogger("test").warning("%s %r %s", dsn, dsn, shown)
    assert MARK not in caplog.text
    assert "***" in caplog.text

"""Take secrets out of text that people will see.

Two jobs: show a DSN without its secrets, and clean a driver's message that may quote one. Both must
also hold for text that no parser would accept, since that is what ends up in error messages. Where
it is not certain that a part is harmless it is masked: an ugly message is better than a leak.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from urllib.parse import quote, quote_plus, unquote

from persistence.options import LIBPQ_KEYWORDS, OPTIONS

MASK = "***"

URL_FORM = re.compile(r"\s*(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*)://")
KEYWORD_FORM = re.compile(r"\s*[A-Za-z_][A-Za-z0-9_]*\s*=")
KEYWORD_TOKEN = re.compile(
    r"\s*(?P<key>[^=\s]+)\s*=\s*(?P<value>'(?:[^'\\]|\\.)*'|(?!')(?:\\.|\\\Z|[^\s\\])*)",
    re.ASCII | re.DOTALL,  # libpq's white space is C's; what follows a backslash may be a newline
)

_SECRET_NAME = re.compile(r"pass(?!file)|pwd|secret|token|credential|key|sig(nature)?$")
_KNOWN_NAMES = LIBPQ_KEYWORDS | OPTIONS.keys() | {"ssl"}
_NESTED_SECRET = re.compile(r"(pass(?!file)|pwd|secret|token|key)\w*\s*=|://[^/]*:.*@", re.I | re.S)
_HARMLESS = re.compile(r"[^\s@=:?&]*")
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://\S+")
_PAIR_IN_TEXT = re.compile(
    r"(?P<name>\b\w*(?:password|passwd|passphrase|pwd|secret|token|api_?key)(?!\w*file)\w*\s*=\s*)"
    r"(?:'(?:[^'\\]|\\.)*'|[^\s&]+)",
    re.I | re.S,
)

Span = tuple[int, int]


def mask_dsn(text: str) -> str:
    """The text of a DSN in one printable line, every secret replaced by ``***``, well formed or not."""
    parts, position = [], 0
    for start, end in secret_spans(text):
        parts += [text[position:start], MASK]
        position = end
    masked = "".join(parts) + text[position:]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in masked)


def secrets_of(text: str) -> set[str]:
    """The secrets in the text of a DSN, as written there and decoded."""
    found: set[str] = set()
    for start, end in secret_spans(text):
        raw = text[start:end]
        if raw.startswith("'") and raw.endswith("'"):
            raw = raw[1:-1]
        found |= {raw, unquote(raw), re.sub(r"\\(.)", r"\1", raw, flags=re.S)}
    return found - {"", MASK}


def mask_text(text: str, dsns: tuple[str, ...]) -> str:
    """Any text without the secrets of the given DSN texts, and without what looks like a secret.

    A password of one or two characters, or one that the masked DSN shows anyway (the user's name, say),
    is taken out only where it stands as a password: elsewhere its letters say nothing.
    """
    for dsn in sorted(filter(None, dsns), key=len, reverse=True):
        text = text.replace(dsn, mask_dsn(dsn))
    spellings: set[str] = set()
    for dsn in dsns:
        public = mask_dsn(dsn)
        for secret in secrets_of(dsn):
            if len(secret) > 2 and secret not in public:
                spellings |= _spellings(secret)
    for spelling in sorted(spellings, key=len, reverse=True):
        text = text.replace(spelling, MASK)
    text = _URL_IN_TEXT.sub(lambda match: mask_dsn(match[0]), text)
    return _PAIR_IN_TEXT.sub(lambda match: match["name"] + MASK, text)


def _spellings(secret: str) -> set[str]:
    escaped = secret.replace("\\", "\\\\").replace("'", "\\'")
    encoded = quote(secret, safe="", errors="surrogatepass")
    return {
        secret,
        escaped,
        encoded,
        quote(secret, errors="surrogatepass"),
        quote_plus(secret, errors="surrogatepass"),
        re.sub(r"%[0-9A-F]{2}", lambda match: match[0].lower(), encoded),
        repr(secret)[1:-1],
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
    }


def secret_spans(text: str) -> list[Span]:
    """Where the secrets are in the text of a DSN, in order and without overlap."""
    if match := URL_FORM.match(text):
        return _union(_url_spans(text, match.end(), match["scheme"].lower()))
    if KEYWORD_FORM.match(text):
        return list(_merge_pairs(_keyword_pairs(text)))
    # Neither form: a file's name is worth showing, anything else may be a DSN without its beginning.
    return [] if _HARMLESS.fullmatch(text) else [(0, len(text))]


def _url_spans(text: str, start: int, scheme: str) -> Iterator[Span]:
    is_file = text.startswith("/", start) and scheme.startswith(("sqlite", "postgres+embedded"))
    at = -1 if is_file else _password_end(text, start)
    host = max(start, at + 1)
    if at >= 0:
        yield text.index(":", start) + 1, at
    query = text.find("?", host)
    if not is_file:
        yield from _odd_ports(text, host, query if query >= 0 else len(text))
    # From both question marks: the "@" that was found may itself stand in a query's password.
    for mark in {query, text.find("?", start)} - {-1}:
        yield from _merge_pairs(_query_pairs(text, mark + 1))


def _password_end(text: str, start: int) -> int:
    """The index of the "@" that ends the password, or -1 where there is no password.

    The last "@" counts, even behind "/" or "?", since an unencoded password may hold them; only in
    a query of well-known options is an "@" just a character.
    """
    query = text.find("?", start)
    stop = len(text)
    if query >= 0 and all(key in _KNOWN_NAMES for key, _, _, _ in _query_pairs(text, query + 1)):
        stop = query
    at = text.rfind("@", start, stop)
    return at if at >= 0 and text.find(":", start, at) >= 0 else -1


def _odd_ports(text: str, start: int, stop: int) -> Iterator[Span]:
    """Ports that are not numbers: a password whose "@" is missing looks like one."""
    end = text.find("/", start, stop)
    for match in re.compile(r"(?:\[[^\]]*\]|[^:,\[]*):(?P<port>[^,]*),?").finditer(
        text, start, end if end >= 0 else stop
    ):
        if not re.fullmatch(r"[0-9]*|\*\*\*", match["port"]):
            yield match.span("port")


def _union(spans: Iterable[Span]) -> list[Span]:
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


Pair = tuple[str, str, int, int]
"""Name (lower case, "" where there is none), decoded value, and the value's place in the text."""


def _query_pairs(text: str, start: int) -> Iterator[Pair]:
    while start <= len(text):
        end = text.find("&", start)
        end = end if end >= 0 else len(text)
        equals = text.find("=", start, end)
        if equals < 0:
            yield "", "", start, end
        else:
            yield (
                unquote(text[start:equals]).strip().lower(),
                unquote(text[equals + 1 : end]),
                equals + 1,
                end,
            )
        start = end + 1


def _keyword_pairs(text: str) -> Iterator[Pair]:
    position = 0
    while match := KEYWORD_TOKEN.match(text, position):
        position = match.end()
        yield match["key"].lower(), match["value"], *match.span("value")
    if text[position:].strip():  # what libpq would not understand either: likely a piece of a password
        yield "password", "", position + len(text[position:]) - len(text[position:].lstrip()), len(text)


def _merge_pairs(pairs: Iterator[Pair]) -> Iterator[Span]:
    """The spans of the secret values.

    An unencoded "&" or space in a password leaves pairs behind it whose names nobody knows: everything
    from the last secret up to such a pair is masked.
    """
    spans: list[Span] = []
    for name, value, start, end in pairs:
        if _SECRET_NAME.search(name) and not name.endswith("file"):
            spans.append((start, end))
        elif spans and name not in _KNOWN_NAMES:
            spans[-1] = spans[-1][0], end
        elif _NESTED_SECRET.search(value):
            spans.append((start, end))
    yield from spans

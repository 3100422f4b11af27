"""The report file of a run: JSON for programs, or one HTML page that needs nothing else and no script.

A page is made from the JSON document, so that both say the same. All text in it may come from users of the
application, as thread ids do: it is escaped, and control characters are spelled out.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from persistence.errors import ReportError
from persistence.transfer.report import amount

SUFFIXES = (".json", ".html")

_SIDES = ("source", "target", "left", "right")
_GOOD = frozenset({"succeeded", "would move", "equal", "intact"})
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c2330 }
h1 { font-size: 1.5rem; margin-bottom: 0 }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.outcome { display: inline-block; padding: .1rem .6rem; border-radius: 1rem; color: #fff;
  background: #b3261e }
.outcome.good { background: #1b7f4b }
.outcome.open { background: #8a6d00 }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #e3e6ea;
  vertical-align: top; overflow-wrap: anywhere }
td.number { text-align: right; white-space: nowrap }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif }
.bar { fill: #3b6fb6 }
.label { fill: #1c2330 }
.muted, .value { color: #5b6472; fill: #5b6472 }
@media (prefers-color-scheme: dark) {
  body { background: #14181f; color: #dfe4ea }
  .label { fill: #dfe4ea }
  td, th { border-color: #2b323d }
  .muted, .value { color: #98a2b1; fill: #98a2b1 }
  .bar { fill: #6c9be0 }
}
"""
_LABEL, _BAR, _WIDTH, _ROW = 210, 380, 800, 22
_LONGEST_LABEL = 34


def write_report(path: Path, document: Mapping[str, Any], mask: Callable[[str], str] = str) -> None:
    """Write a report in the form that the path's suffix names; all of it or nothing.

    Args:
        path: Ends in ``.json`` or ``.html``.
        document: Plain values: ``command``, ``outcome``, and what there is of ``error``, ``result``,
            ``progress``.
        mask: Takes the secrets out of a text.

    Raises:
        ReportError: It cannot be written.
    """
    masked = _masked(document, mask)
    text = page(masked) if path.suffix == ".html" else json.dumps(masked, indent=2, sort_keys=True) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise ReportError(f"cannot write the report {path}: {error.strerror}") from None


def page(document: Mapping[str, Any]) -> str:
    """The HTML page of a report."""
    result: Mapping[str, Any] = document.get("result") or {}
    title = f"persistence {document['command']}"
    outcome = str(document["outcome"])
    colour = "good" if outcome in _GOOD else "open" if outcome == "running" else ""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}: {_text(outcome)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1>",
        f'<p><span class="outcome {colour}">{_text(outcome)}</span> <span class="muted">',
        f"{_text(document.get('written', ''))}, {_text(document.get('creator', ''))}</span></p>",
        *_error(document.get("error")),
        *_figures(document, result),
        *_findings(result),
        *_differences(result),
        *_charts(result),
        *_progress(document.get("progress") or ()),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _error(error: Mapping[str, Any] | None) -> Iterable[str]:
    if not error:
        return
    yield "<h2>Error</h2>"
    yield _table((name, error[name]) for name in ("code", "message", "hint") if error.get(name))
    problems = error.get("problems") or ()
    if problems:
        yield _table(
            ((p["reason"], p["count"], "; ".join(p["examples"])) for p in problems),
            head=("what cannot be moved", "rows", "first"),
        )


def _figures(document: Mapping[str, Any], result: Mapping[str, Any]) -> Iterable[str]:
    """What the result says; what this page does not know is shown as it is."""
    rows: list[tuple[Any, ...]] = [
        (name, document[name]) for name in _SIDES if document.get(name) and name not in result
    ]
    first = [name for name in _SIDES if name in result]
    for name in [*first, *(name for name in result if name not in first)]:
        value = result[name]
        if name in ("findings", "sizes", "phases", "totals", "differences", "estimate") or value in (
            None,
            [],
            {},
        ):
            continue
        rows.append((name.replace("_", " "), _plain(name, value)))
    for group in ("totals", "estimate"):
        rows += [(_spoken(name), _plain(name, value)) for name, value in (result.get(group) or {}).items()]
    if rows:
        yield "<h2>Figures</h2>"
        yield _table(rows)


def _findings(result: Mapping[str, Any]) -> Iterable[str]:
    if found := result.get("findings"):
        yield "<h2>Worth knowing</h2>"
        yield _table(
            ((f["severity"], f["count"], f["what"], "; ".join(f["examples"]), f["advice"]) for f in found),
            head=("", "count", "what", "first", "what to do"),
        )


def _differences(result: Mapping[str, Any]) -> Iterable[str]:
    if "verified" in result:
        yield "<h2>Comparison by content</h2>"
        compared = (
            "All was compared by content, and is equal." if result["verified"] else "Nothing was compared."
        )
        yield f"<p>{compared}</p>"
    if "differences" not in result:
        return
    yield "<h2>Comparison by content</h2>"
    if not result["differences"]:
        yield "<p>The two sides hold the same.</p>"
        return
    names = ("thread_id", "checkpoint_ns", "checkpoint_id", "channel", "detail")
    yield _table(
        (tuple("" if d[name] is None else d[name] for name in names) for d in result["differences"]),
        head=("thread", "namespace", "checkpoint", "channel", "difference"),
    )


def _charts(result: Mapping[str, Any]) -> Iterable[str]:
    totals, sizes = result.get("totals") or {}, result.get("sizes") or {}
    if buckets := sizes.get("histogram"):
        rows = [
            (f"less than {amount(b['below'])}", b["checkpoints"], f"{b['checkpoints']:,}") for b in buckets
        ]
        yield from _chart("Checkpoints by size", rows)
    if threads := sizes.get("largest_threads"):
        rows = [
            (t["thread_id"], t["bytes"], f"{amount(t['bytes'])}, {t['checkpoints']:,} checkpoints")
            for t in threads
        ]
        yield from _chart("Largest threads", rows)
    if totals.get("bytes_referenced"):
        stored, referenced = totals["bytes"], totals["bytes_referenced"]
        rows = [
            ("each value once", stored, amount(stored)),
            ("a copy in every checkpoint", referenced, amount(referenced)),
        ]
        yield from _chart("Content without and with copies", rows)
    if phases := result.get("phases"):
        rows = [(name, seconds, f"{seconds:.1f} s") for name, seconds in phases.items()]
        yield from _chart("Durations", rows)


def _progress(steps: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    if steps:
        yield "<h2>How far it came</h2>"
        yield _table(
            (
                (s["phase"], f"{s['done']:,} of {s['total']:,}", amount(s["bytes"]), f"{s['seconds']:.1f} s")
                for s in steps
            ),
            head=("phase", "checkpoints", "content", "time"),
        )


def _chart(title: str, rows: Sequence[tuple[str, float, str]]) -> Iterable[str]:
    """Horizontal bars, each with its label and its figure."""
    most = max((value for _, value, _ in rows), default=0) or 1
    yield f"<h2>{_text(title)}</h2>"
    yield f'<svg viewBox="0 0 {_WIDTH} {len(rows) * _ROW}" role="img" aria-label="{_text(title)}">'
    for number, (label, value, figure) in enumerate(rows):
        y = number * _ROW
        width = max(1.0, value / most * _BAR) if value else 0.0
        shown = _spelled(label)
        shown = shown if len(shown) <= _LONGEST_LABEL else shown[: _LONGEST_LABEL - 1] + "…"
        yield (
            f"<g><title>{_text(label)}: {_text(figure)}</title>"
            f'<text class="label" x="{_LABEL - 8}" y="{y + 15}" text-anchor="end">{_text(shown)}</text>'
            f'<rect class="bar" x="{_LABEL}" y="{y + 3}" width="{width:.1f}" height="{_ROW - 6}"></rect>'
            f'<text class="value" x="{_LABEL + width + 6:.1f}" y="{y + 15}">{_text(figure)}</text></g>'
        )
    yield "</svg>"


def _table(rows: Iterable[tuple[Any, ...]], head: Sequence[str] = ()) -> str:
    lines = ["<table>"]
    if head:
        lines.append("<tr>" + "".join(f"<th>{_text(name)}</th>" for name in head) + "</tr>")
    for row in rows:
        first, *others = row
        cells = [f"<th>{_text(first)}</th>" if not head else _cell(first), *map(_cell, others)]
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td class="number">{value:,}</td>'
    return f"<td>{_text(value)}</td>"


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _plain(name: str, value: Any) -> str:
    """A figure for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        if name.endswith("bytes_per_second"):
            return f"{amount(value)}/s"
        if "bytes" in name:
            return amount(value)
        return f"{value:.1f} s" if "seconds" in name else f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(value: Any) -> str:
    """A text for HTML: escaped, and its control characters spelled out."""
    return html.escape(_spelled(value))


def _spelled(value: Any) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def _masked(value: Any, mask: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {name: _masked(item, mask) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(item, mask) for item in value]
    return value

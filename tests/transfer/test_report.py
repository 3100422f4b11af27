"""What a run leaves behind: figures that are right, in a page that no content can break."""

from __future__ import annotations

import json
import xml.dom.minidom
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from persistence import transfer
from persistence.errors import ReportError
from persistence.transfer.report_page import page, write_report
from tests.transfer import make

EVIL = [
    '<script>alert("1")</script>',
    "nul\0in it",
    '"><img src=http://example.com/x onerror=alert(1)>',
    "</svg></title></style><b>",
    "\u202egnp.exe",
    "line\nbreak\x1b[31m",
    "&lt;&amp;",
    "x" * 500,
]


class Elements(HTMLParser):
    """Every element and attribute of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(html: str) -> Elements:
    elements = Elements()
    elements.feed(html)
    return elements


def require_harmless(html: str) -> Elements:
    """No script, nothing from elsewhere, no control character but the line break."""
    elements = parsed(html)
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "p",
        "span",
        "table",
        "tr",
        "th",
        "td",
    }
    assert {tag for tag, _ in elements.found} <= allowed | {"svg", "g", "text", "rect"}
    attributes = {name for _, attributes in elements.found for name in attributes}
    assert not {name for name in attributes if name.startswith("on")} | (
        attributes & {"src", "href", "style"}
    )
    assert all(char.isprintable() or char == "\n" for char in html)
    return elements


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    path = tmp_path / "evil.db"
    with make.database(path) as saver:
        for number, thread in enumerate(EVIL):
            make.put(saver, thread, {"c": ["x" * 1000 * number]}, parent="<b>gone</b>")
    return path


def document(result: str, **more: Any) -> dict[str, Any]:
    return {"command": "migrate", "outcome": "succeeded", "result": json.loads(result)} | more


def test_the_page_is_harmless_whatever_threads_are_called(evil: Path, tmp_path: Path) -> None:
    report = transfer.migrate(evil, f"sqlite:///{tmp_path}/t.db")
    html = page(document(report.to_json()))
    elements = require_harmless(html)
    assert '<script>alert("1")</script>' in elements.text  # as text, for people
    assert r"nul\x00in it" in elements.text
    assert r"\u202egnp.exe" in elements.text
    for svg in html.split("<svg")[1:]:
        xml.dom.minidom.parseString("<svg" + svg.split("</svg>")[0] + "</svg>")  # noqa: S318 - our own


def test_the_page_of_a_plan_and_of_a_comparison(evil: Path, tmp_path: Path, postgres_dsn: str) -> None:
    plan = transfer.plan(evil, postgres_dsn)
    elements = require_harmless(page(document(plan.to_json(), outcome="would stop")))
    assert "NUL character" in elements.text
    assert "refused" in elements.text
    transfer.migrate(evil, f"sqlite:///{tmp_path}/t.db")
    make.execute(tmp_path / "t.db", "DELETE FROM checkpoints WHERE thread_id LIKE '<script%'")
    verdict = transfer.verify(evil, f"sqlite:///{tmp_path}/t.db")
    elements = require_harmless(page(document(verdict.to_json(), outcome="different")))
    assert "missing in" in elements.text
    assert '<script>alert("1")</script>' in elements.text


def test_the_page_has_the_figures(database: Path, postgres_dsn: str) -> None:
    report = transfer.migrate(database, postgres_dsn)
    elements = require_harmless(page(document(report.to_json())))
    assert report.sizes is not None
    for text in (
        report.fingerprint,
        str(report.run_id),
        f"{report.totals.checkpoints:,}",
        "compared by content",
    ):
        assert text in elements.text
    bars = [attributes for tag, attributes in elements.found if tag == "rect"]
    charts = len(report.sizes.histogram) + len(report.sizes.largest_threads) + 2 + len(report.phases)
    assert len(bars) == charts
    assert [attributes for tag, attributes in elements.found if tag == "svg"][-1]["aria-label"] == "Durations"


def test_the_page_of_a_failure() -> None:
    failed = {
        "command": "migrate",
        "outcome": "failed",
        "source": "a <b>",
        "error": {
            "code": "transfer",
            "message": "<i>no</i>",
            "hint": None,
            "problems": [{"reason": "<u>", "count": 2, "examples": ["thread '<script>'"]}],
        },
        "progress": [{"phase": "read", "done": 5, "total": 10, "bytes": 1000, "seconds": 1.5}],
    }
    elements = require_harmless(page(failed))
    assert "<i>no</i>" in elements.text
    assert "5 of 10" in elements.text
    assert "succeeded" not in elements.text


def test_secrets_are_masked_in_both_forms(tmp_path: Path) -> None:
    written = {"command": "migrate", "outcome": "failed", "error": {"message": 'with "h&unter" it failed'}}
    for name in ("r.json", "r.html"):
        write_report(tmp_path / name, written, lambda text: text.replace('"h&unter"', "***"))
        text = (tmp_path / name).read_text()
        assert "with *** it failed" in text
        assert "unter" not in text


def test_a_report_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_report(path, {"command": "a", "outcome": "b"})
    with pytest.raises(TypeError):
        write_report(path, {"command": "a", "outcome": object()})
    assert json.loads(path.read_text()) == {"command": "a", "outcome": "b"}
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ReportError, match=r"folder\.html"):
        write_report(tmp_path / "folder.html", {"command": "a", "outcome": "b"})
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_file()) == ["r.json"]
    with pytest.raises(ReportError, match="No such file"):
        write_report(tmp_path / "nowhere" / "r.html", {"command": "a", "outcome": "b"})


def test_nothing_is_saved_where_the_target_keeps_copies(
    database: Path, tmp_path: Path, postgres_dsn: str
) -> None:
    copies = transfer.migrate(database, f"sqlite:///{tmp_path}/t.db")
    once = transfer.migrate(database, postgres_dsn)
    assert copies.totals == once.totals
    assert copies.bytes_saved == json.loads(copies.to_json())["totals"]["bytes_saved"] == 0
    assert once.bytes_saved == once.totals.bytes_referenced - once.totals.bytes > 0


def test_a_move_tells_what_it_noticed(tmp_path: Path, postgres_dsn: str) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        make.put(saver, "a", {"c": [1]}, v=4, parent="gone")
    report = transfer.migrate(path, postgres_dsn)
    assert [(finding.kind, finding.count) for finding in report.findings] == [("parent-missing", 1)]

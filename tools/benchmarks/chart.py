"""The rates as bars, in one SVG file that needs nothing else."""

from __future__ import annotations

from html import escape

from tools.benchmarks.contenders import BARE, NO_LOCK, OFFICIAL, OURS, SHARED
from tools.benchmarks.report import COMPARED, number
from tools.benchmarks.transfers import PGLOADER, TWO
from tools.benchmarks.works import Outcome

COLOURS = {
    OURS: "#2b7a4b",
    OFFICIAL: "#b4552d",
    NO_LOCK: "#d9a441",
    BARE: "#8a8f98",
    PGLOADER: "#5b6fb5",
    TWO: "#7fb069",
    SHARED: "#5b6270",
}
NAMES, BARS, BAR = 170, 520, 16


def svg(outcomes: list[Outcome]) -> str:
    """One group of bars for each work; a group has its own scale, because only ratios are comparable."""
    parts: list[str] = []
    y = 34
    for outcome in outcomes:
        for figure in COMPARED[outcome.work.kind]:
            group, y = _group(outcome, figure, y)
            parts += group
    width = NAMES + BARS + 150
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}" '
        'font-family="sans-serif" font-size="12">'
        f'<rect width="{width}" height="{y}" fill="white"/>'
    )
    return "\n".join([head, *parts, "</svg>", ""])


def _group(outcome: Outcome, figure: str, y: int) -> tuple[list[str], int]:
    found = {s.contender: value for s in outcome.series if (value := s.median(figure)) is not None}
    if not found:
        return [], y
    better = "more is better" if figure.endswith("/s") else "less is better"
    title = escape(f"{outcome.work.name}: {figure} ({better})")
    parts = [f'<text x="8" y="{y}" font-weight="bold">{title}</text>']
    y += 8
    for name, value in found.items():
        spread = next(s for s in outcome.series if s.contender == name).summary()[figure]
        scale = BARS / max(found.values())
        low, high = NAMES + spread["min"] * scale, NAMES + min(spread["max"] * scale, BARS + 20)
        middle = y + BAR / 2
        parts += [
            f'<text x="{NAMES - 6}" y="{y + BAR - 4}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{NAMES}" y="{y + 1}" width="{value * scale:.1f}" height="{BAR - 2}" '
            f'fill="{COLOURS[name]}"/>',
            f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="black" stroke-width="1"/>',
            f'<text x="{max(high, NAMES + value * scale) + 6:.1f}" y="{y + BAR - 4}">{number(value)}</text>',
        ]
        y += BAR
    return parts, y + 26

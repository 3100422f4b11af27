"""What the savers are meant to reach, and whether a run shows it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tools.benchmarks.contenders import BARE, NO_LOCK, OFFICIAL, OURS
from tools.benchmarks.transfers import PGLOADER, TWO
from tools.benchmarks.works import FAR, HUGE, MEDIUM, MEMORY, NEAR, SMALL, Outcome, Work

OPERATIONS = ("save p50 ms", "save writes p50 ms", "load p50 ms")


@dataclass(frozen=True)
class Verdict:
    """One goal beside what was measured."""

    work: str
    against: str
    goal: str
    found: str
    met: bool | None
    """``None`` where the run did not measure it."""


def higher_is_better(figure: str) -> bool:
    """Rates are; times and memory are not."""
    return figure.endswith("/s")


def ratio(outcome: Outcome, rival: str, figure: str, whose: str = OURS) -> float | None:
    """How many times better ours is."""
    ours, theirs = outcome.of(whose), outcome.of(rival)
    mine = ours.median(figure) if ours else None
    other = theirs.median(figure) if theirs else None
    if not mine or not other:
        return None
    return mine / other if higher_is_better(figure) else other / mine


def judge(outcomes: list[Outcome]) -> list[Verdict]:
    """Every goal."""
    hundred = {"kind": "steps", "colour": "async", "workflows": 100, "state": SMALL}
    postgres = {**hundred, "backend": "postgres"}
    rate = "steps/s"
    verdicts = [
        *_at_least(outcomes, {**postgres, "link": NEAR}, OFFICIAL, [rate], 4.0),
        *_at_least(outcomes, {**postgres, "link": FAR}, OFFICIAL, [rate], 12.0),
        *_at_least(outcomes, {**postgres, "link": NEAR}, NO_LOCK, [rate], 1.5),
        *_at_least(outcomes, {**postgres, "link": FAR}, NO_LOCK, [rate], 1.5),
        *_at_least(outcomes, {**hundred, "backend": "sqlite"}, OFFICIAL, [rate], 7.0),
    ]
    alone = {"kind": "steps", "workflows": 1, "state": SMALL}
    verdicts += _at_least(outcomes, alone, OFFICIAL, [rate], 1.3)
    verdicts += _at_least(outcomes, alone, OFFICIAL, OPERATIONS, 1.0)
    medium = {"kind": "steps", "workflows": 100, "state": MEDIUM}
    verdicts += _at_least(outcomes, medium, OFFICIAL, [rate], 3.0)
    long = {"kind": "history", "checkpoints": 1000}
    verdicts += _at_least(outcomes, long, OFFICIAL, ["list ms"], 3.0)
    verdicts += _bounded_list(outcomes, long)
    huge = {"kind": "large", "state": HUGE}
    verdicts += _at_least(outcomes, huge, OFFICIAL, ["save ms", "load ms"], 1.0)
    verdicts += _at_most(outcomes, huge, "save peak MB", 3 * HUGE / 1e6)
    verdicts += _at_most(outcomes, huge, "load peak MB", 3 * HUGE / 1e6)
    verdicts += _at_least(outcomes, {"kind": "steps"}, BARE, [rate], 0.5)
    verdicts += _at_least(outcomes, {"kind": "large"}, BARE, ["save ms", "load ms"], 0.5)
    verdicts += _at_least(outcomes, {"kind": "history"}, BARE, ["list ms"], 0.5)
    verdicts += _at_least(outcomes, {"kind": "store"}, OFFICIAL, ["put/s", "get/s", "search/s"], 1.0)
    verdicts += _transfers(outcomes)
    for link in (NEAR, "file"):
        verdicts += _at_most(outcomes, {**hundred, "link": link}, "save p95 ms", 50.0)
        verdicts += _at_most(outcomes, {**hundred, "link": link}, "load p95 ms", 100.0)
    return [*verdicts, _no_errors(outcomes)]


def _transfers(outcomes: list[Outcome]) -> list[Verdict]:
    moved: dict[str, object] = {"kind": "transfer"}
    near, far = {**moved, "link": NEAR}, {**moved, "link": FAR}
    whole = ["whole s"]
    return [
        *_at_least(outcomes, near, OFFICIAL, whole, 15.0),
        *_at_least(outcomes, far, OFFICIAL, whole, 75.0),
        *_at_least(outcomes, near, PGLOADER, whole, 4.0),
        *_at_most_times(outcomes, near, BARE, whole, 1.3),
        *_at_most_times(outcomes, near, BARE, whole, 1.0, ours=TWO),
        *_verified_in_time(outcomes, moved),
        *_at_most(outcomes, {"kind": MEMORY}, "peak MB", 150.0),
    ]


def _at_most_times(
    outcomes: list[Outcome],
    like: dict[str, object],
    rival: str,
    figures: Iterable[str],
    goal: float,
    ours: str = OURS,
) -> list[Verdict]:
    """How much longer ours takes than somebody who cannot be beaten by one connection."""
    said = f"{ours}: at most {goal:g}x its time"
    verdicts = []
    for outcome in _chosen(outcomes, like):
        for figure in figures:
            found = ratio(outcome, rival, figure, ours)
            shown = "no figure" if found is None else f"{1 / found:.2f}x"
            met = found is not None and found >= 1 / goal
            verdicts.append(Verdict(f"{outcome.work.name}: {figure}", rival, said, shown, met))
    return verdicts or _missing(like, rival, said)


def _verified_in_time(outcomes: list[Outcome], like: dict[str, object]) -> list[Verdict]:
    """Comparing both sides takes no longer than the copy did."""
    verdicts = []
    for outcome in _chosen(outcomes, like):
        ours = outcome.of(OURS)
        copied = ours.median("whole s") if ours else None
        if copied is not None:
            limited = _at_most(outcomes, _exactly(outcome.work), "verify s", copied)
            verdicts += [replace(one, goal="the copy's time") for one in limited]
    return verdicts


def _chosen(outcomes: list[Outcome], like: dict[str, object]) -> list[Outcome]:
    return [o for o in outcomes if all(getattr(o.work, key) == value for key, value in like.items())]


def _missing(like: dict[str, object], against: str, goal: str) -> list[Verdict]:
    return [Verdict(", ".join(f"{k} {v}" for k, v in like.items()), against, goal, "not measured", None)]


def _at_least(
    outcomes: list[Outcome], like: dict[str, object], rival: str, figures: Iterable[str], goal: float
) -> list[Verdict]:
    verdicts = []
    for outcome in _chosen(outcomes, like):
        if outcome.of(rival) is None:
            continue
        for figure in figures:
            found = ratio(outcome, rival, figure)
            shown = "no figure" if found is None else f"{found:.2f}x"
            met = found is not None and found >= goal
            verdicts.append(Verdict(f"{outcome.work.name}: {figure}", rival, f"{goal:g}x", shown, met))
    return verdicts or _missing(like, rival, f"{goal:g}x")


def _at_most(outcomes: list[Outcome], like: dict[str, object], figure: str, limit: float) -> list[Verdict]:
    verdicts = []
    name, unit = figure.rsplit(" ", 1)
    goal = f"at most {limit:g} {unit}"
    for outcome in _chosen(outcomes, like):
        ours = outcome.of(OURS)
        found = ours.median(figure) if ours else None
        shown = "no figure" if found is None else f"{found:.1f} {unit}"
        met = found is not None and found <= limit
        verdicts.append(Verdict(f"{outcome.work.name}: {name}", "-", goal, shown, met))
    return verdicts or _missing(like, "-", f"{name} {goal}")


def _bounded_list(outcomes: list[Outcome], like: dict[str, object]) -> list[Verdict]:
    """A list that streams needs far less memory than what it yields: less than a quarter of it."""
    verdicts = []
    for work in (outcome.work for outcome in _chosen(outcomes, like)):
        verdicts += _at_most(outcomes, _exactly(work), "list peak MB", work.state * work.checkpoints / 4e6)
    return verdicts or _missing(like, "-", "bounded memory")


def _exactly(work: Work) -> dict[str, object]:
    return dict(vars(work))


def _no_errors(outcomes: list[Outcome]) -> Verdict:
    count = sum(len(ours.errors) for outcome in outcomes if (ours := outcome.of(OURS)))
    return Verdict("all of them: errors and wrong states of ours", "-", "none", str(count), count == 0)

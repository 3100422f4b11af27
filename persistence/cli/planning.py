"""``--dry-run`` of ``migrate``, ``export`` and ``import``: what would happen, in text or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persistence.cli.console import emit, rows
from persistence.cli.reporting import running

if TYPE_CHECKING:
    from persistence.transfer import Finding, Options, Plan
    from persistence.transfer.sides import Side

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Read everything, write nothing, and say what would happen. Exit code 6 if it would stop.",
    ),
]
AgainstTarget = Annotated[
    bool,
    typer.Option(
        "--against-target",
        help="With --dry-run: also write into TARGET, in one transaction that is rolled back."
        " TARGET must have its tables.",
    ),
]


def planned(
    command: str,
    source: Side,
    target: Side,
    options: Options,
    report: Path | None,
    *,
    archive: Path | None = None,
    against_target: bool = False,
) -> int:
    """Say what the command would do."""
    from persistence import transfer

    with running(f"{command} --dry-run", report, source=source, target=target) as run:
        plan = transfer.plan(
            source,
            target,
            progress=run.show,
            options=options,
            archive=archive,
            against_target=against_target,
        )
        run.ended("would move" if plan.would_move else "would stop", plan.to_json())
    emit(json.loads(plan.to_json()), [rows(_summary(plan)), *found(plan.findings)])
    return plan.exit_code


def check_flags(*, dry_run: bool, against_target: bool) -> None:
    """``--against-target`` says how to do a dry run, so it must be one."""
    if against_target and not dry_run:
        raise typer.BadParameter("it belongs to --dry-run", param_hint="--against-target")


def found(findings: Iterable[Finding]) -> Iterator[str]:
    """What was found, a few lines for each kind."""
    for finding in findings:
        first = [("" if number else "first", text) for number, text in enumerate(finding.examples)]
        advice = [("do", finding.advice)] if finding.advice else []
        yield "\n" + rows([(finding.severity, f"{finding.count:,} x {finding.what}"), *first, *advice])


def _summary(plan: Plan) -> Iterator[tuple[str, object]]:
    from persistence.transfer.report import amount

    totals, estimate = plan.totals, plan.estimate
    size = f"{amount(totals.bytes)}, {amount(totals.bytes_saved)} less than with copies"
    if plan.target_bytes > totals.bytes:
        size = f"{amount(plan.target_bytes)} with copies, {amount(totals.bytes)} to move"
    yield "source", plan.source
    yield "target", plan.target
    yield "threads", f"{totals.threads:,}"
    yield "checkpoints", f"{totals.checkpoints:,}"
    yield "pending writes", f"{totals.writes:,}"
    yield "channel values", f"{totals.values:,} stored, {totals.values_referenced:,} referenced"
    if plan.store.items:
        yield "store", f"{plan.store.items:,} items, {plan.store.vectors:,} vectors"
    yield "size in the target", size
    if (largest := plan.sizes.largest_checkpoint) is not None:
        yield "largest checkpoint", f"{amount(largest.bytes)}, in thread {largest.thread_id!r}"
    writing = f"{amount(estimate.write_bytes_per_second)}/s {'measured' if estimate.measured else 'assumed'}"
    yield (
        "estimated time",
        f"{estimate.seconds:,.1f} s: reading {amount(estimate.read_bytes_per_second)}/s measured,"
        f" writing {writing}",
    )
    rehearsed = ", as the target itself says" if plan.rehearsed else ""
    yield "result", f"would move{rehearsed}" if plan.would_move else f"would stop{rehearsed}"
    yield "", "nothing was written"

"""The tables on the screen at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bench.cases import CASES, Case
from bench.results import Row
from bench.summary import pairs, summaries


def _speed(ratio: float) -> str:
    """A ratio, in red where ours is slower."""
    return f"[{'green' if ratio >= 1 else 'red'}]{ratio:.2f}×[/]"


def _milliseconds(value: float) -> str:
    return f"{value:.4g}"


def show_cases(console: Console, cases: Sequence[Case]) -> None:
    """What a run would measure."""
    table = Table(title=f"{len(cases)} of {len(CASES)} cases")
    for name in ("case", "group", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("I", "H", "B", "T", "training GFLOP"):
        table.add_column(name, justify="right")
    table.add_column("quick")
    for case in cases:
        sizes = (str(size) for size in (case.input_size, case.hidden_size, case.batch, case.steps))
        gflop = f"{case.flops('training') / 1e9:.3g}"
        table.add_row(case.name, case.group, case.dtype, *sizes, gflop, "yes" if case.quick else "")
    console.print(table)


def show_rows(console: Console, rows: Sequence[Row]) -> None:
    """Every case, then the geometric means by group."""
    table = Table(
        title=f"{rows[0].device}, {rows[0].threads} threads, torch {rows[0].torch}",
        caption="medians; share: of the machine's FMA peak; speed: torch's time over ours",
    )
    table.add_column("case", no_wrap=True)
    table.add_column("mode")
    table.add_column("backend")
    for name in ("ours ms", "torch ms", "ours share", "torch share", "speed", "pairwise", "error"):
        table.add_column(name, justify="right")
    for ours, peer in pairs(rows):
        assert ours.ratio is not None and ours.pair_ratio is not None and ours.max_error is not None
        table.add_row(
            ours.case,
            ours.mode,
            f"{ours.backend} / {peer.backend}",
            _milliseconds(ours.p50_ms),
            _milliseconds(peer.p50_ms),
            f"{ours.peak_share:.0%}",
            f"{peer.peak_share:.0%}",
            _speed(ours.ratio),
            _speed(ours.pair_ratio),
            f"{ours.max_error:.1e}",
        )
    console.print(table)

    table = Table(title="geometric means by group")
    for name in ("group", "mode"):
        table.add_column(name, no_wrap=True)
    for name in ("cases", "speed", "lowest", "highest", "ours share", "torch share", "memory"):
        table.add_column(name, justify="right")
    for line in summaries(rows):
        table.add_row(
            line.group,
            line.mode,
            str(line.cases),
            _speed(line.ratio),
            _speed(line.lowest),
            _speed(line.highest),
            f"{line.ours_share:.0%}",
            f"{line.peer_share:.0%}",
            "" if line.memory_ratio is None else f"{line.memory_ratio:.2f}",
        )
    console.print(table)

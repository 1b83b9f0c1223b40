"""The tables on the screen at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bench import cudnn, gpu_cases, machine
from bench.cases import Case
from bench.results import Row
from bench.summary import LONG, Summary, by_algorithm, has_onnxruntime, pairs, summaries


def _speed(ratio: float) -> str:
    """A ratio, in red where ours is slower."""
    return f"[{'green' if ratio >= 1 else 'red'}]{ratio:.2f}×[/]"


def _maybe(ratio: float | None) -> str:
    """The same; nothing where there is none."""
    return "" if ratio is None else _speed(ratio)


def _milliseconds(value: float) -> str:
    return f"{value:.4g}"


def percent(share: float | None) -> str:
    """A share of the peak; nothing where the peak was not measured."""
    return "" if share is None else f"{share:.0%}"


def counted(row: Row) -> str:
    """What the row's device has, in words."""
    return machine.counted(row.threads, "cuda" if row.on_gpu else "cpu")


def show_cases(console: Console, cases: Sequence[Case], of: int) -> None:
    """What a run would measure, out of so many."""
    table = Table(title=f"{len(cases)} of {of} cases")
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


def show_gpu_cases(console: Console, cases: Sequence[Case], of: int) -> None:
    """What a run on a GPU would measure, out of so many, and what each case is predicted to cost."""
    table = Table(title=f"{len(cases)} of {of} cases")
    for name in ("case", "group"):
        table.add_column(name, no_wrap=True)
    for name in ("seconds", "GiB at most"):
        table.add_column(name, justify="right")
    table.add_column("torch, in training on an H100 or H200", no_wrap=True)
    table.add_column("quick")
    effort = (gpu_cases.QUICK_PAIRS, gpu_cases.QUICK_S)
    for case in cases:
        seconds = f"{gpu_cases.predicted_s(case, case.modes, *effort):.1f}"
        memory = f"{gpu_cases.memory_bytes(case) / 2**30:.1f}"
        takes = f"cuDNN {cudnn.label(case, 'training')}"
        table.add_row(case.name, case.group, seconds, memory, takes, "yes" if case.quick else "")
    console.print(table)
    minutes = gpu_cases.predicted_total_s(cases, *effort) / 60
    console.print(f"predicted: {minutes:.1f} minutes with the repetitions of --quick, compilation included")


def show_rows(console: Console, rows: Sequence[Row]) -> None:
    """Every case, then the geometric means by group."""
    first = rows[0]
    beside = ["vs onnxruntime"] if has_onnxruntime(rows) else []  # a column only where it has something to show
    table = Table(
        title=f"{first.device}, {counted(first)}, torch {first.torch}",
        caption="medians; share: of the machine's FMA peak; speed: torch's time over ours"
        + ("" if first.on_gpu else ", behind an operation of torch's, and alone")
        + ("; vs onnxruntime: its time over ours, both alone" if beside else ""),
    )
    table.add_column("case", no_wrap=True)
    table.add_column("mode")
    table.add_column("backend")
    for name in ("ours ms", "torch ms", "ours share", "torch share", "speed", "pairwise", "alone", *beside, "error"):
        table.add_column(name, justify="right")
    for ours, peer in pairs(rows):
        assert ours.ratio is not None and ours.pair_ratio is not None and ours.max_error is not None
        table.add_row(
            ours.case,
            ours.mode,
            f"{ours.runs} / {peer.runs}",
            _milliseconds(ours.p50_ms),
            _milliseconds(peer.p50_ms),
            percent(ours.peak_share),
            percent(peer.peak_share),
            _speed(ours.ratio),
            _speed(ours.pair_ratio),
            _maybe(ours.alone_ratio),
            *[_maybe(ours.onnxruntime_ratio) for _ in beside],
            f"{ours.max_error:.1e}",
        )
    console.print(table)

    table = Table(title="geometric means by group")
    for name in ("group", "mode"):
        table.add_column(name, no_wrap=True)
    for name in ("cases", "speed", "lowest", "highest", "alone", *beside, "ours share", "torch share", "memory"):
        table.add_column(name, justify="right")
    for line in summaries(rows):
        table.add_row(
            line.group,
            line.mode,
            str(line.cases),
            _speed(line.ratio),
            _speed(line.lowest),
            _speed(line.highest),
            _maybe(line.alone),
            *[_maybe(line.onnxruntime) for _ in beside],
            percent(line.ours_share),
            percent(line.peer_share),
            "" if line.memory_ratio is None else f"{line.memory_ratio:.2f}",
        )
    console.print(table)
    if first.on_gpu:
        _show_algorithms(console, rows)


KEY_FIGURES = "key figures: "  # begins the line that says in short what a command has found


def key_figures(rows: Sequence[Row]) -> str:
    """The geometric means of training by torch's algorithm, in one line."""
    parts = [
        f"{line.group} {line.ratio:.2f}× of {line.cases} (lowest {line.lowest:.2f}×)"
        for line, _ in by_algorithm(rows)
        if line.mode == "training"
    ]
    return KEY_FIGURES + ("training against " + ", ".join(parts) if parts else "none")


def _show_algorithms(console: Console, rows: Sequence[Row]) -> None:
    """The geometric means by the path that torch took."""
    table = Table(title="geometric means by torch's algorithm")
    for name in ("torch ran", "mode"):
        table.add_column(name, no_wrap=True)
    for name in ("cases", "speed", "lowest", f"of T ≥ {LONG}", "speed", "lowest"):
        table.add_column(name, justify="right")

    def cells(line: Summary | None) -> tuple[str, str, str]:
        return ("0", "", "") if line is None else (str(line.cases), _speed(line.ratio), _speed(line.lowest))

    for line, long in by_algorithm(rows):
        table.add_row(line.group, line.mode, *cells(line), *cells(long))
    console.print(table)

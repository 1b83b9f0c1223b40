"""What a run shows on the screen: the cases before it, a line a row, and the tables at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench import costs, cudnn, machine
from bench.cases import Case
from bench.rows import COST, Row
from bench.summary import LONG, Summary, by_algorithm, entries, has_onnxruntime, summaries

TIMES = ("_us", "_ms")  # how the names of details that are times end
KEY_FIGURES = "key figures: "  # begins the line that says in short what a command has found


def speed(ratio: float | None) -> str:
    """A ratio, in red where ours is slower; nothing where there is none."""
    return "" if ratio is None else f"[{'green' if ratio >= 1 else 'red'}]{ratio:.2f}×[/]"


def percent(share: float | None) -> str:
    """A share of the peak; nothing where the peak was not measured."""
    return "" if share is None else f"{share:.0%}"


def counted(row: Row) -> str:
    """What the row's device has, in words."""
    return machine.counted(row.threads, "cuda" if row.on_gpu else "cpu")


def promised(row: Row) -> str:
    """A ratio, coloured where something is promised, with a word where that is broken."""
    assert row.pair_ratio is not None
    text = f"{row.pair_ratio:.3f}" if row.kind == COST else f"{row.pair_ratio:.2f}×"
    if row.limit is None:
        return text
    if not row.broken:
        return f"[green]{text}[/]"
    return f"[red]{text} {'over' if row.kind == COST else 'under'} {row.limit:g}[/]"


def grid(title: str, left: Sequence[str], right: Sequence[str], caption: str = "", simple: bool = False) -> Table:
    """An empty table: columns of words, then of figures."""
    table = Table(title=title, caption=caption or None, **({"box": SIMPLE_HEAD} if simple else {}))  # type: ignore[arg-type]
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right")
    return table


def show_cases(console: Console, cases: Sequence[Case], of: int, seconds: Callable[[Case], float], quick: bool) -> None:
    """What a run would measure, out of so many; on a GPU what each case is predicted to cost."""
    title = f"{len(cases)} of {of} cases"
    if cases[0].device == "cuda":
        takes = "torch, in training on an H100 or H200"
        table = grid(title, ("case", "group", takes), ("seconds", "GiB at most", "quick"))
    else:
        table = grid(title, ("case", "group", "dtype"), ("I", "H", "B", "T", "training GFLOP", "quick"))
    for case in cases:
        if case.device == "cuda":
            memory = f"{costs.memory_bytes(case) / 2**30:.1f}"
            cells = (f"cuDNN {cudnn.label(case, 'training')}", f"{seconds(case):.1f}", memory)
        else:
            sizes = (str(size) for size in (case.input_size, case.hidden_size, case.batch, case.steps))
            cells = (case.dtype, *sizes, f"{case.flops('training') / 1e9:.3g}")
        table.add_row(case.name, case.group, *cells, "yes" if case.quick else "")
    console.print(table)
    if cases[0].device == "cuda":
        minutes = costs.total_s(cases, seconds) / 60
        with_ = "the repetitions of --quick" if quick else "those of a full run"
        console.print(f"predicted: {minutes:.1f} minutes with {with_}, compilation included")


def duration(ms: float) -> str:
    """A time in words."""
    return f"{ms:.4g} ms" if ms >= 0.1 else f"{ms * 1e3:.3g} µs"


def mebibytes(mib: float) -> str:
    """A size in words."""
    return f"{mib / 1024:.3g} GiB" if mib >= 1024 else f"{mib:.3g} MiB"


def line(row: Row) -> str:
    """A row in one line."""
    what = ", ".join(filter(None, (row.case, row.mode, row.variant, row.peer and f"against {row.peer}")))
    found = [duration(row.p50_ms), row.peer_p50_ms and duration(row.peer_p50_ms)]
    found += [promised(row) if row.pair_ratio else row.peer_p50_ms and f"{row.speed:.2f}×"]
    found += [
        f"{name[:-3]} {float(value):.4g} {name[-2:]}" for name, value in row.details.items() if name[-3:] in TIMES
    ]
    found += [row.memory_mib and f"memory {mebibytes(row.memory_mib)}"]
    found += [row.peer_memory_mib and f"peer_memory {mebibytes(row.peer_memory_mib)}"]
    found += [f"{name[:-6]} fails: {why}" for name, why in row.details.items() if name.endswith("_fails")]
    found += ["" if row.peer or row.max_error is None else f"error {row.max_error:.1e}"]
    return f"{what}: {', '.join(filter(None, found))} ({' / '.join(filter(None, (row.backend, row.peer_backend)))})"


def show_pairs(console: Console, rows: Sequence[Row]) -> None:
    """Every case beside torch, then the geometric means by group."""
    first, every = rows[0], entries(rows)
    beside = ["vs onnxruntime"] if has_onnxruntime(every) else []  # a column only where it has something to show
    table = grid(
        f"{first.device}, {counted(first)}, torch {first.torch}",
        ("case", "mode", "backend"),
        ("ours ms", "torch ms", "ours share", "torch share", "speed", "pairwise", "alone", *beside, "error"),
        "medians; share: of the peak of the instruction that our kernels multiply with; speed: torch's time over ours"
        + ("" if first.on_gpu else ", behind an operation of torch's, and alone")
        + ("; vs onnxruntime: its time over ours, both alone" if beside else ""),
    )
    for each in every:
        row = each.main
        table.add_row(
            row.case,
            row.mode,
            f"{row.runs} / {row.peer_backend.split(' (')[0]}",
            f"{row.p50_ms:.4g}",
            f"{row.peer_p50_ms:.4g}",
            percent(row.peak_share),
            percent(row.peer_peak_share),
            speed(row.speed),
            speed(row.pair_ratio),
            speed(each.alone and each.alone.speed),
            *[speed(each.onnxruntime and each.onnxruntime.speed) for _ in beside],
            "" if row.max_error is None else f"{row.max_error:.1e}",
        )
    console.print(table)

    figures = ("cases", "speed", "lowest", "highest", "alone", *beside, "ours share", "torch share", "memory")
    table = grid("geometric means by group", ("group", "mode"), figures)
    for group in summaries(rows):
        table.add_row(
            group.group,
            group.mode,
            str(group.cases),
            *map(speed, (group.ratio, group.lowest, group.highest, group.alone)),
            *[speed(group.onnxruntime) for _ in beside],
            percent(group.ours_share),
            percent(group.peer_share),
            "" if group.memory_ratio is None else f"{group.memory_ratio:.2f}",
        )
    console.print(table)
    if first.on_gpu:
        _show_algorithms(console, rows)


def _show_algorithms(console: Console, rows: Sequence[Row]) -> None:
    """The geometric means by the path that torch took."""
    figures = ("cases", "speed", "lowest", f"of T ≥ {LONG}", "speed", "lowest")
    table = grid("geometric means by torch's algorithm", ("torch ran", "mode"), figures)

    def cells(found: Summary | None) -> tuple[str, str, str]:
        return ("0", "", "") if found is None else (str(found.cases), speed(found.ratio), speed(found.lowest))

    for found, long in by_algorithm(rows):
        table.add_row(found.group, found.mode, *cells(found), *cells(long))
    console.print(table)


def key_figures(rows: Sequence[Row]) -> str:
    """The geometric means of training by torch's algorithm, in one line."""
    parts = [
        f"{found.group} {found.ratio:.2f}× of {found.cases} (lowest {found.lowest:.2f}×)"
        for found, _ in by_algorithm(rows)
        if found.mode == "training"
    ]
    return "training against " + ", ".join(parts) if parts else "none"


def show_promised(console: Console, rows: Sequence[Row]) -> None:
    """Ratios of pairs, with what is promised of them: costs as 1.010, speeds as 3.40×; broken promises in red."""
    first = rows[0]
    table = grid(
        f"{first.device}, {counted(first)}, torch {first.torch}",
        ("case", "variant", "mode", "against"),
        ("ms", "peer ms", "ratio", "20 %", "80 %"),
        "medians; ratio of pairs: a step's time over the peer's, or (×) the peer's time over ours",
        simple=True,
    )
    group = first.group
    for row in rows:
        if row.group != group:
            table.add_section()
        group = row.group
        low, high = (f"{value:.3g}" if value else "" for value in (row.pair_ratio_p20, row.pair_ratio_p80))
        table.add_row(
            row.case, row.variant, row.mode, row.peer,
            f"{row.p50_ms:.4g}", f"{row.peer_p50_ms:.4g}", promised(row), low, high,
        )  # fmt: skip
    console.print(table)


def show_long(console: Console, rows: Sequence[Row]) -> None:
    """Time a step and peak memory of ours and of the peer, which may have failed."""
    first = rows[0]
    table = grid(
        f"{first.device}, {counted(first)}, torch {first.torch}",
        ("case", "mode", "variant"),
        ("µs a step", "torch's", "speed", "memory", "torch's", "rounds", "error"),
        "medians; speed: torch's time over ours; memory: what one training step adds to a process at its peak",
        simple=True,
    )
    for row in rows:
        fails = "" if row.peer_p50_ms else "out of memory"
        us = (row.p50_ms, row.peer_p50_ms)
        table.add_row(
            row.case,
            row.mode,
            row.variant,
            *(f"{ms * 1e3 / row.steps:.4g}" if ms else fails for ms in us),
            speed(row.speed if row.peer_p50_ms else None),
            *("" if mib is None else mebibytes(mib) for mib in (row.memory_mib, row.peer_memory_mib)),
            str(row.pairs),
            "" if row.max_error is None else f"{row.max_error:.1e}",
        )
    console.print(table)

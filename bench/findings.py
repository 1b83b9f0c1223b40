"""What the report says of rows, before it is Markdown or HTML: sentences and tables.

Both have ``**bold**`` and `` `code` ``, as Markdown has them, and no other markup.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bench.cases import GROUPS, MODES
from bench.rows import Row
from bench.summary import (
    LONG,
    Entry,
    Summary,
    by_algorithm,
    entries,
    has_float32,
    has_onnxruntime,
    summaries,
    summarise,
)
from bench.tables import counted, percent


class Table(NamedTuple):
    """The first column, or as many as it says, are of words; the others are of figures."""

    columns: Sequence[str]
    lines: Sequence[Sequence[object]]
    words: int = 1


OVERVIEW = (
    "Times as fast as `torch.nn.LSTM`: the geometric mean (lowest–highest), and how many of the measurements are below "
    "one."
)
SPEED = (
    "Speed is the time of `torch.nn.LSTM` over that of `lstmcore.LSTM`: the geometric mean of the group, then its "
    "lowest and highest case."
)


def _speed(line: Summary | None) -> str:
    """The geometric mean with its range."""
    if line is None:
        return ""
    return f"**{line.ratio:.2f}×**" + (f" ({line.lowest:.2f}–{line.highest:.2f})" if line.cases > 1 else "")


def _times(ratio: float | None) -> str:
    """A ratio; nothing where it was not measured."""
    return "" if ratio is None else f"{ratio:.2f}×"


def _with_alone(line: Summary | None) -> str:
    """Speed with its range, and alone where that was measured too."""
    return _speed(line) + (f"; alone {_times(line.alone)}" if line and line.alone else "")


def _shares(line: Summary | None) -> str:
    """Ours and torch's share of the peak."""
    return f"{percent(line.ours_share)} / {percent(line.peer_share)}" if line else ""


def _gains(training: Summary | None, inference: Summary | None) -> str:
    """Ours in float32 over ours in bfloat16, in both modes; nothing where neither was measured."""
    ratios = [_times(line.float32 if line else None) for line in (training, inference)]
    return " / ".join(ratio or "-" for ratio in ratios) if any(ratios) else ""


def groups(rows: Sequence[Row], speeds_only: bool) -> Table:
    """The table by group: speeds in both modes; unless it is of speeds only, what else was measured.

    On a GPU there is no measured peak to take shares of.
    """
    by_group: dict[str, dict[str, Summary]] = {}
    for line in summaries(rows):
        by_group.setdefault(line.group, {})[line.mode] = line
    beside = ["vs onnxruntime"] if has_onnxruntime(entries(rows)) else []
    gain = [] if speeds_only or not has_float32(entries(rows)) else ["vs our float32"]

    def cells(training: Summary | None, inference: Summary | None) -> Sequence[str]:
        if speeds_only:
            return _speed(training), _speed(inference)
        memory = _times(training.memory_ratio if training else None)
        if rows[0].on_gpu:
            return _with_alone(training), memory, _speed(inference)
        return _with_alone(training), _shares(training), memory, _with_alone(inference), _shares(inference)

    share = [] if rows[0].on_gpu else ["share of peak"]
    full = ["training: speed", *share, "peak memory", "inference: speed", *share]
    lines = []
    for group, modes in by_group.items():
        training, inference = modes.get("training"), modes.get("inference")
        line = training or inference
        assert line is not None
        onnxruntime = [_times(inference.onnxruntime if inference else None) for _ in beside]
        name = group if speeds_only else f"{group}: {line.title}"
        float32 = [_gains(training, inference) for _ in gain]
        lines.append((name, line.cases, *cells(training, inference), *onnxruntime, *float32))
    return Table(["group", "cases", *(["training", "inference"] if speeds_only else full), *beside, *gain], lines)


def algorithms(rows: Sequence[Row]) -> Table:
    """The table by the algorithm that torch took on a GPU."""
    by_path: dict[str, dict[str, tuple[Summary, Summary | None]]] = {}
    for line, long in by_algorithm(rows):
        by_path.setdefault(line.group, {})[line.mode] = (line, long)
    lines = [
        (path, *(_speed(line) for mode in ("training", "inference") for line in modes.get(mode, (None, None))))
        for path, modes in by_path.items()
    ]
    return Table(["torch ran", "training", f"of T ≥ {LONG:,}", "inference", f"of T ≥ {LONG:,}"], lines)


def span(values: Sequence[str]) -> str:
    """All the different values, for rows that were not measured in one go."""
    return ", ".join(dict.fromkeys(values))


def settings(every: Sequence[Entry]) -> str:
    """In what setting a CPU's rows were taken."""
    if every[0].main.on_gpu:
        return ""
    behind = {each.main.experiment for each in every}
    if behind == {"speed"}:
        return "Each call was timed alone, the threads of torch asleep. "
    text = 'The call stands behind an operation of torch\'s, as in a model; "alone" it follows a pause. '
    return text + (
        "" if behind == {"after-torch"} else "(Rows without a figure alone were taken in that setting only.) "
    )


def measured(every: Sequence[Entry]) -> str:
    """When, at which commit and with what."""
    mains = [each.main for each in every]
    versions = [("torch", span([row.torch for row in mains]))]
    if mains[0].on_gpu:
        versions += [("Triton", span([row.triton for row in mains])), ("cuDNN", span([row.cudnn for row in mains]))]
    else:
        versions += [("numba", span([row.numba for row in mains]))]
    if has_onnxruntime(every):
        versions += [("onnxruntime", span([each.onnxruntime.onnxruntime for each in every if each.onnxruntime]))]
    named = [f"{name} {version}" for name, version in versions]
    return (
        f"Measured {span(sorted(row.date for row in mains))} at commit {span([row.commit for row in mains])} with "
        f"{', '.join(named[:-1])} and {named[-1]}. "
    )


def slower(every: Sequence[Entry]) -> Iterator[str]:
    """The cases that ours loses, to either peer."""
    mains = [each.main for each in every]
    lost = [f"{row.case} ({row.mode}, {row.runs}: {row.speed:.2f}×)" for row in mains if row.speed < 1]
    yield (
        f"Cases where ours is slower than torch: {', '.join(lost) if lost else 'none'} "
        f"(of {len(mains)} measured, counting the modes "
        f"{' and '.join(mode for mode in MODES if any(row.mode == mode for row in mains))} each)."
    )
    if not has_onnxruntime(every):
        return
    beside = [each.onnxruntime for each in every if each.onnxruntime]
    lost = [f"{row.case} ({row.runs}: {row.speed:.2f}×)" for row in beside if row.speed < 1]
    yield (
        f"Cases where ours is slower than onnxruntime: {', '.join(lost) if lost else 'none'} "
        f"(of {len(beside)} measured, in inference)."
    )


def onnxruntime(every: Sequence[Entry]) -> str:
    """What the column of onnxruntime says, where there is one."""
    if not has_onnxruntime(every):
        return ""
    return (
        'The column "vs onnxruntime" is the time of onnxruntime\'s LSTM over ours in inference, the geometric mean: '
        "its threads spin between calls, so it was timed in a block of its own, and against ours alone. "
    )


def float32(every: Sequence[Entry]) -> str:
    """What the column of our own float32 says, where there is one."""
    if not has_float32(every):
        return ""
    return (
        'The column "vs our float32" is the time of our kernels in float32 over their time in bfloat16, training / '
        "inference, the geometric mean: the same shapes by turns, behind an operation of torch's, our kernels also "
        "where the default leaves bfloat16 to torch. "
    )


def title(row: Row) -> str:
    """The device of a row, and how much of it."""
    return f"{row.device}, {counted(row)}"


def said(rows: Sequence[Row], speeds_only: bool) -> str:
    """What stands above the table by group: when and how the rows were taken, and what its columns are."""
    every = entries(rows)
    text = f"{measured(every)}{SPEED} {'' if speeds_only else settings(every)}{onnxruntime(every)}"
    text += "" if speeds_only else float32(every)
    peaks = {each.main.dtype: each.main.peak_gflops for each in every if each.main.peak_gflops is not None}
    if peaks and not speeds_only:
        share = ", ".join(f"{value:.0f} GF/s in {dtype}" for dtype, value in peaks.items())
        text += (
            "Share of peak is ours / torch's, of the measured peak of the instruction that our kernels multiply with "
            f"(torch's may be a faster one): {share}. "
        )
    if not speeds_only:
        text += "Peak memory is ours over torch's, of one training step, where it was measured."
    return text.rstrip()


def small(rows: Sequence[Row]) -> bool:
    """Whether these are of one thread of a CPU."""
    return rows[0].threads == 1 and not rows[0].on_gpu


def overview(files: Sequence[Sequence[Row]]) -> Table:
    """One line a device and kind of call; of each device the file with most cases, for the page has the others."""
    fullest: dict[str, Sequence[Row]] = dict.fromkeys((rows[0].device for rows in files), ())
    for rows in sorted(files, key=lambda rows: (len(entries(rows)), rows[0].threads)):
        fullest[rows[0].device] = rows
    lines = []
    for rows in fullest.values():
        for kind in dict.fromkeys(group.kind for group in GROUPS.values() if group.kind):
            if chosen := [each for each in entries(rows) if GROUPS[each.main.group].kind == kind]:
                modes = [[each for each in chosen if each.main.mode == mode] for mode in ("training", "inference")]
                cells = [_speed(summarise(kind, kind, "", some) if some else None) for some in modes]
                lost = f"{sum(each.main.speed < 1 for each in chosen)} of {len(chosen)}"
                cases = len({each.main.case for each in chosen})
                lines.append((f"{title(rows[0])}: {kind}", cases, *cells, lost))
    return Table(["machine and calls", "cases", "training", "inference", "slower"], lines)

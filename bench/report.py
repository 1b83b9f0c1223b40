"""``python -m bench report``: the README's figures and the plots, from the committed rows and from nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import gpu_plots, plots, results
from bench.cases import MODES
from bench.results import Row
from bench.summary import LONG, Summary, by_algorithm, has_onnxruntime, summaries
from bench.table import counted, percent

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NO_ROWS = "_No results yet: run `make bench-full`, then `python -m bench report`._"
SPEED = (
    "Speed is the time of `torch.nn.LSTM` over that of `lstmcore.LSTM`: the geometric mean of the group, then its "
    "lowest and highest case."
)
PLOTS = {
    "speed": (plots.speed_by_shape, "Speed ratio by hidden size and batch"),
    "steps": (plots.time_per_step, "Time per step as the sequence grows"),
    "peak": (plots.peak_share, "Share of the FMA peak by shape"),
    "gpu-speed": (gpu_plots.speed_by_shape, "Speed ratio by hidden size and batch"),
    "gpu-width": (gpu_plots.time_by_width, "Time per step by hidden size"),
}


def draw_all(rows: Sequence[Row], stem: Path) -> list[tuple[Path, str]]:
    """Draws every figure that the rows allow next to their file; returns the files and what each shows."""
    drawn = []
    for name, (draw, caption) in PLOTS.items():
        path = stem.with_name(f"{stem.name}-{name}.png")
        if draw(rows, path):
            drawn.append((path, caption))
    return drawn


def _speed(line: Summary | None) -> str:
    """The geometric mean with its range."""
    if line is None:
        return ""
    return f"**{line.ratio:.2f}×**" + (f" ({line.lowest:.2f}–{line.highest:.2f})" if line.cases > 1 else "")


def _times(ratio: float | None) -> str:
    """A ratio; nothing where it was not measured."""
    return "" if ratio is None else f"{ratio:.2f}×"


def _cells(line: Summary | None) -> tuple[str, str, str]:
    """Speed with its range, and alone where that was measured too; ours and torch's share of the peak; memory."""
    if line is None:
        return "", "", ""
    alone, memory = _times(line.alone), _times(line.memory_ratio)
    speed = _speed(line) + (f"; alone {alone}" if alone else "")
    return speed, f"{percent(line.ours_share)} / {percent(line.peer_share)}", memory


def _by_group(rows: Sequence[Row]) -> dict[str, dict[str, Summary]]:
    """Each group's modes."""
    by_group: dict[str, dict[str, Summary]] = {}
    for line in summaries(rows):
        by_group.setdefault(line.group, {})[line.mode] = line
    return by_group


def _beside(rows: Sequence[Row], modes: dict[str, Summary]) -> list[str]:
    """The cell of onnxruntime, if there is such a column; only inference has one."""
    if not has_onnxruntime(rows):
        return []
    return [_times(modes["inference"].onnxruntime if "inference" in modes else None)]


def _head(rows: Sequence[Row], *columns: str) -> Iterator[str]:
    """The head of a table by group."""
    names = ["group", "cases", *columns, *(["vs onnxruntime"] if has_onnxruntime(rows) else [])]
    yield f"| {' | '.join(names)} |"
    yield f"|---|{'--:|' * (len(names) - 1)}"


def _table(rows: Sequence[Row]) -> Iterator[str]:
    """One line a group: what it is, and both modes."""
    yield from _head(
        rows, "training: speed", "share of FMA peak", "peak memory", "inference: speed", "share of FMA peak"
    )
    for group, modes in _by_group(rows).items():
        any_line = next(iter(modes.values()))
        *inference, _ = _cells(modes.get("inference"))
        cells = (*_cells(modes.get("training")), *inference, *_beside(rows, modes))
        yield f"| {group}: {any_line.title} | {any_line.cases} | {' | '.join(cells)} |"


def _small_table(rows: Sequence[Row]) -> Iterator[str]:
    """One line a group, speeds only."""
    yield from _head(rows, "training", "inference")
    for group, modes in _by_group(rows).items():
        cells = [_speed(modes.get("training")), _speed(modes.get("inference")), *_beside(rows, modes)]
        yield f"| {group} | {next(iter(modes.values())).cases} | {' | '.join(cells)} |"


def _gpu_tables(rows: Sequence[Row]) -> Iterator[str]:
    """One line a group, then one for each algorithm that torch took; there is no measured peak to take shares of."""
    yield "| group | cases | training: speed | peak memory | inference: speed |"
    yield "|---|--:|--:|--:|--:|"
    for group, modes in _by_group(rows).items():
        any_line = next(iter(modes.values()))
        training, _, memory = _cells(modes.get("training"))
        inference = _speed(modes.get("inference"))
        yield f"| {group}: {any_line.title} | {any_line.cases} | {training} | {memory} | {inference} |"
    yield ""
    yield f"| torch ran | training | of T ≥ {LONG:,} | inference | of T ≥ {LONG:,} |"
    yield "|---|--:|--:|--:|--:|"
    by_path: dict[str, dict[str, tuple[Summary, Summary | None]]] = {}
    for line, long in by_algorithm(rows):
        by_path.setdefault(line.group, {})[line.mode] = (line, long)
    for path, lines in by_path.items():
        cells = [_speed(line) for mode in ("training", "inference") for line in lines.get(mode, (None, None))]
        yield f"| {path} | {' | '.join(cells)} |"


def _span(values: Sequence[str]) -> str:
    """All the different values, for rows that were not measured in one go."""
    return ", ".join(dict.fromkeys(values))


def _settings(rows: Sequence[Row]) -> str:
    """In what setting a CPU's rows were taken."""
    behind = {row.setting for row in rows}
    if rows[0].on_gpu:
        return ""
    if behind == {"alone"}:
        return "Each call was timed alone, the threads of torch asleep. "
    text = 'The call stands behind an operation of torch\'s, as in a model; "alone" it follows a pause. '
    return text + ("" if behind == {"behind"} else "(Rows without a figure alone were taken in that setting only.) ")


def _measured(rows: Sequence[Row]) -> str:
    """When, at which commit and with what."""
    versions = [("torch", _span([row.torch for row in rows]))]
    if rows[0].on_gpu:
        versions += [
            ("Triton", _span([row.triton for row in rows])),
            ("cuDNN", _span([row.cudnn or "" for row in rows])),
        ]
    else:
        versions += [("numba", _span([row.numba for row in rows]))]
    if has_onnxruntime(rows):
        versions += [("onnxruntime", _span([row.onnxruntime for row in rows if row.onnxruntime_ms is not None]))]
    named = [f"{name} {version}" for name, version in versions]
    return (
        f"Measured {_span(sorted(row.date for row in rows))} at commit {_span([row.commit for row in rows])} with "
        f"{', '.join(named[:-1])} and {named[-1]}. "
    )


def _slower(rows: Sequence[Row]) -> Iterator[str]:
    """The cases that ours loses, to either peer."""
    measured = [row for row in rows if row.ratio is not None]
    lost = [f"{row.case} ({row.mode}, {row.runs}: {row.ratio:.2f}×)" for row in measured if row.ratio < 1]
    yield (
        f"Cases where ours is slower than torch: {', '.join(lost) if lost else 'none'} "
        f"(of {len(measured)} measured, counting the modes "
        f"{' and '.join(mode for mode in MODES if any(row.mode == mode for row in rows))} each)."
    )
    if not has_onnxruntime(rows):
        return
    beside = [(row, row.onnxruntime_ratio) for row in rows if row.onnxruntime_ratio is not None]
    lost = [f"{row.case} ({row.runs}: {ratio:.2f}×)" for row, ratio in beside if ratio < 1]
    yield ""
    yield (
        f"Cases where ours is slower than onnxruntime: {', '.join(lost) if lost else 'none'} "
        f"(of {len(beside)} measured, in inference)."
    )


def _onnxruntime(rows: Sequence[Row]) -> str:
    """What the column of onnxruntime says, where there is one."""
    if not has_onnxruntime(rows):
        return ""
    return (
        "The last column is the time of onnxruntime's LSTM over ours in inference, the geometric mean: its threads "
        "spin between calls, so it was timed in a block of its own, and against ours alone. "
    )


def small_section(rows: Sequence[Row]) -> str:
    """The Markdown of a CPU's rows with one thread: speeds only, for what else there is to say stands above."""
    lines = [
        f"### {rows[0].device}, {counted(rows[0])}",
        "",
        f"{_measured(rows)}{SPEED} {_onnxruntime(rows)}".rstrip(),
        "",
        *_small_table(rows),
        "",
        *_slower(rows),
    ]
    return "\n".join(lines)


def section(rows: Sequence[Row], images: Sequence[tuple[str, str]]) -> str:
    """The Markdown of one device; ``images`` are links and captions."""
    first = rows[0]
    peak = {row.dtype: row.peak_gflops for row in rows if row.peak_gflops is not None}
    lines = [
        f"### {first.device}, {counted(first)}",
        "",
        f"{_measured(rows)}{SPEED} "
        + _settings(rows)
        + _onnxruntime(rows)
        + (
            "Share of FMA peak is ours / torch's, of "
            + ", ".join(f"{value:.0f} GF/s in {dtype}" for dtype, value in peak.items())
            + ". "
            if peak
            else ""
        )
        + "Peak memory is ours over torch's, of one training step, where it was measured.",
        "",
        *(_gpu_tables(rows) if first.on_gpu else _table(rows)),
        "",
        *_slower(rows),
    ]
    for link, caption in images:
        lines += ["", f"![{caption}: {first.device}]({link})"]
    return "\n".join(lines)


def replace_region(text: str, generated: str) -> str:
    """``text`` with what lies between the markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"expected one {BEGIN} and, after it, one {END}, got {text.count(BEGIN)} and {text.count(END)}"
        )
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{generated}\n{END}{rest.split(END)[1]}"


def draw_folder(folder: Path) -> int:
    """Draws the plots beside the results files of a folder, which may hold other files; how many there were."""
    paths = sorted(folder.glob("*-[0-9]*.csv"))  # a results file ends in how many units its device has
    for path in paths:
        for image, _ in draw_all(results.read(path), path.with_suffix("")):
            print(image)
    return len(paths)


def _with_one_thread(path: Path) -> bool:
    """Whether a results file is of one thread of a CPU."""
    return path.stem.endswith("-1t")


def _place(path: Path) -> tuple[str, bool, str]:
    """Where a file stands among others: by device, one thread last."""
    return path.stem.rpartition("-")[0], _with_one_thread(path), path.stem


def update(folder: Path = results.RESULTS, readme: Path = README) -> None:
    """Draws the plots beside every results file and rewrites the README's generated region."""
    sections = []
    for path in sorted(folder.glob("*.csv"), key=_place):
        if not (rows := results.read(path)):
            continue
        if _with_one_thread(path):
            sections.append(small_section(rows))
            print(f"{path}: {len(rows)} rows, in a small table")
            continue
        images = [
            (Path(os.path.relpath(image, readme.parent)).as_posix(), caption)
            for image, caption in draw_all(rows, path.with_suffix(""))
        ]
        sections.append(section(rows, images))
        print(f"{path}: {len(rows)} rows, {len(images)} plots")
    generated = "\n\n".join(sections) or NO_ROWS
    readme.write_text(replace_region(readme.read_text(encoding="utf-8"), generated), encoding="utf-8")
    print(f"{readme}: rewritten between its markers")

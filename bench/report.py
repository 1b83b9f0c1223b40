"""``python -m bench report``: every published figure and plot, from the committed rows and from nothing else.

Between its markers, README.md gets a short table, docs/benchmarks.md one of all groups for each results file, with the
plots in docs/assets/bench.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import plots, rows
from bench.cases import GROUPS, MODES
from bench.rows import RESULTS, Row
from bench.summary import LONG, Entry, Summary, by_algorithm, entries, has_onnxruntime, summaries, summarise
from bench.tables import counted, percent

ROOT = Path(__file__).parents[1]
README, PAGE, IMAGES = ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "assets" / "bench"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NO_ROWS = "_No results yet: run `make bench-full`, then `python -m bench report`._"
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
    if not has_onnxruntime(entries(rows)):
        return []
    return [_times(modes["inference"].onnxruntime if "inference" in modes else None)]


def _head(rows: Sequence[Row], *columns: str) -> Iterator[str]:
    """The head of a table by group."""
    names = ["group", "cases", *columns, *(["vs onnxruntime"] if has_onnxruntime(entries(rows)) else [])]
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


def _settings(every: Sequence[Entry]) -> str:
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


def _measured(every: Sequence[Entry]) -> str:
    """When, at which commit and with what."""
    mains = [each.main for each in every]
    versions = [("torch", _span([row.torch for row in mains]))]
    if mains[0].on_gpu:
        versions += [("Triton", _span([row.triton for row in mains])), ("cuDNN", _span([row.cudnn for row in mains]))]
    else:
        versions += [("numba", _span([row.numba for row in mains]))]
    if has_onnxruntime(every):
        versions += [("onnxruntime", _span([each.onnxruntime.onnxruntime for each in every if each.onnxruntime]))]
    named = [f"{name} {version}" for name, version in versions]
    return (
        f"Measured {_span(sorted(row.date for row in mains))} at commit {_span([row.commit for row in mains])} with "
        f"{', '.join(named[:-1])} and {named[-1]}. "
    )


def _slower(every: Sequence[Entry]) -> Iterator[str]:
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
    yield ""
    yield (
        f"Cases where ours is slower than onnxruntime: {', '.join(lost) if lost else 'none'} "
        f"(of {len(beside)} measured, in inference)."
    )


def _onnxruntime(every: Sequence[Entry]) -> str:
    """What the column of onnxruntime says, where there is one."""
    if not has_onnxruntime(every):
        return ""
    return (
        "The last column is the time of onnxruntime's LSTM over ours in inference, the geometric mean: its threads "
        "spin between calls, so it was timed in a block of its own, and against ours alone. "
    )


def small_section(rows: Sequence[Row]) -> str:
    """The Markdown of a CPU's rows with one thread: speeds only, for what else there is to say stands above."""
    every = entries(rows)
    lines = [
        f"### {rows[0].device}, {counted(rows[0])}",
        "",
        f"{_measured(every)}{SPEED} {_onnxruntime(every)}".rstrip(),
        "",
        *_small_table(rows),
        "",
        *_slower(every),
    ]
    return "\n".join(lines)


def section(rows: Sequence[Row], images: Sequence[tuple[str, str]]) -> str:
    """The Markdown of one device; ``images`` are links and captions."""
    first, every = rows[0], entries(rows)
    peaks = {each.main.dtype: each.main.peak_gflops for each in every if each.main.peak_gflops is not None}
    share = ", ".join(f"{value:.0f} GF/s in {dtype}" for dtype, value in peaks.items())
    lines = [
        f"### {first.device}, {counted(first)}",
        "",
        f"{_measured(every)}{SPEED} {_settings(every)}{_onnxruntime(every)}"
        + (f"Share of FMA peak is ours / torch's, of {share}. " if share else "")
        + "Peak memory is ours over torch's, of one training step, where it was measured.",
        "",
        *(_gpu_tables(rows) if first.on_gpu else _table(rows)),
        "",
        *_slower(every),
    ]
    for link, caption in images:
        lines += ["", f"![{caption}: {first.device}]({link})"]
    return "\n".join(lines)


def short_table(files: Sequence[Sequence[Row]], link: str) -> Iterator[str]:
    """One line a device and kind of call, from the file of each device with most cases; the page has the others."""
    fullest: dict[str, Sequence[Row]] = {}
    for one in sorted(files, key=lambda one: (len(entries(one)), one[0].threads)):
        fullest[one[0].device] = one
    yield "| machine | calls | cases | training | inference | slower |"
    yield "|---|---|--:|--:|--:|--:|"
    for one in (fullest[device] for device in dict.fromkeys(one[0].device for one in files)):
        every = entries(one)
        for kind in dict.fromkeys(group.kind for group in GROUPS.values() if group.kind):
            chosen = [each for each in every if GROUPS[each.main.group].kind == kind]
            if not chosen:
                continue
            modes = {mode: [each for each in chosen if each.main.mode == mode] for mode in ("training", "inference")}
            cells = [_speed(summarise(kind, kind, mode, some) if some else None) for mode, some in modes.items()]
            lost = sum(each.main.speed < 1 for each in chosen)
            cases = len({each.main.case for each in chosen})
            machine = f"{one[0].device}, {counted(one[0])}"
            yield f"| {machine} | {kind} | {cases} | {' | '.join(cells)} | {lost} of {len(chosen)} |"
    yield ""
    yield (
        f"Times as fast as `torch.nn.LSTM`: the geometric mean (lowest–highest), and how many of the measurements are "
        f"below one. [All groups, machines and numbers of threads, with plots and versions]({link})."
    )


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
        if published := _published(path):
            for image, _ in plots.draw_all(published, folder, path.stem):
                print(image)
    return len(paths)


def _published(path: Path) -> list[Row]:
    """The rows of a file that the report is about."""
    return [row for row in rows.read(path) if row.experiment in ("speed", "after-torch")]


def _with_one_thread(path: Path) -> bool:
    """Whether a results file is of one thread of a CPU."""
    return path.stem.endswith("-1t")


def _place(path: Path) -> tuple[str, bool, str]:
    """Where a file stands among others: by device, one thread last."""
    return path.stem.rpartition("-")[0], _with_one_thread(path), path.stem


def _relative(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page.parent)).as_posix()


def update(folder: Path = RESULTS, readme: Path = README, page: Path = PAGE, images: Path = IMAGES) -> None:
    """Draws the plots of every results file, and rewrites the generated regions of the README and of the page."""
    sections, files = [], []
    for path in sorted(folder.glob("*.csv"), key=_place):
        if not (published := _published(path)):
            continue
        files.append(published)
        if _with_one_thread(path):
            sections.append(small_section(published))
            print(f"{path}: {len(published)} rows, in a small table")
            continue
        drawn = plots.draw_all(published, images, path.stem)
        sections.append(section(published, [(_relative(image, page), caption) for image, caption in drawn]))
        print(f"{path}: {len(published)} rows, {len(drawn)} plots")
    short = "\n".join(short_table(files, _relative(page, readme))) if files else NO_ROWS
    for target, generated in ((readme, short), (page, "\n\n".join(sections) or NO_ROWS)):
        target.write_text(replace_region(target.read_text(encoding="utf-8"), generated), encoding="utf-8")
        print(f"{target}: rewritten between its markers")

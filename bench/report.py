"""``python -m bench report``: every published figure and plot, from the committed rows and from nothing else.

Between its markers, README.md gets a short table, docs/benchmarks.md one of all groups for each results file, with the
plots in docs/assets/bench.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bench import plots
from bench.cases import GROUPS, MODES
from bench.measure import NOTHING
from bench.rows import RESULTS, Row, read
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


def _with_alone(line: Summary | None) -> str:
    """Speed with its range, and alone where that was measured too."""
    return _speed(line) + (f"; alone {_times(line.alone)}" if line and line.alone else "")


def _shares(line: Summary | None) -> str:
    """Ours and torch's share of the peak."""
    return f"{percent(line.ours_share)} / {percent(line.peer_share)}" if line else ""


def _table(columns: Sequence[str], lines: Iterable[Sequence[object]]) -> Iterator[str]:
    """A table in Markdown, its first column of words."""
    yield f"| {' | '.join(columns)} |"
    yield f"|---|{'--:|' * (len(columns) - 1)}"
    for line in lines:
        yield f"| {' | '.join(map(str, line))} |"


def _groups(rows: Sequence[Row], small: bool) -> Iterator[str]:
    """The table by group: speeds in both modes; unless it is small, what else was measured.

    On a GPU there is no measured peak to take shares of.
    """
    by_group: dict[str, dict[str, Summary]] = {}
    for line in summaries(rows):
        by_group.setdefault(line.group, {})[line.mode] = line
    beside = ["vs onnxruntime"] if has_onnxruntime(entries(rows)) else []

    def cells(training: Summary | None, inference: Summary | None) -> Sequence[str]:
        if small:
            return _speed(training), _speed(inference)
        memory = _times(training.memory_ratio if training else None)
        if rows[0].on_gpu:
            return _with_alone(training), memory, _speed(inference)
        return _with_alone(training), _shares(training), memory, _with_alone(inference), _shares(inference)

    share = [] if rows[0].on_gpu else ["share of FMA peak"]
    full = ["training: speed", *share, "peak memory", "inference: speed", *share]
    lines = []
    for group, modes in by_group.items():
        training, inference = modes.get("training"), modes.get("inference")
        line = training or inference
        assert line is not None
        onnxruntime = [_times(inference.onnxruntime if inference else None) for _ in beside]
        name = group if small else f"{group}: {line.title}"
        lines.append((name, line.cases, *cells(training, inference), *onnxruntime))
    yield from _table(["group", "cases", *(["training", "inference"] if small else full), *beside], lines)


def _algorithms(rows: Sequence[Row]) -> Iterator[str]:
    """The table by the algorithm that torch took on a GPU."""
    by_path: dict[str, dict[str, tuple[Summary, Summary | None]]] = {}
    for line, long in by_algorithm(rows):
        by_path.setdefault(line.group, {})[line.mode] = (line, long)
    lines = [
        (path, *(_speed(line) for mode in ("training", "inference") for line in modes.get(mode, (None, None))))
        for path, modes in by_path.items()
    ]
    yield from _table(["torch ran", "training", f"of T ≥ {LONG:,}", "inference", f"of T ≥ {LONG:,}"], lines)


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


def section(rows: Sequence[Row], images: Sequence[tuple[str, str]]) -> str:
    """The Markdown of one device; ``images`` are links and captions.

    Of one thread of a CPU speeds only, for what else there is to say stands above.
    """
    first, every, small = rows[0], entries(rows), _small(rows)
    said = f"{_measured(every)}{SPEED} {'' if small else _settings(every)}{_onnxruntime(every)}"
    peaks = {each.main.dtype: each.main.peak_gflops for each in every if each.main.peak_gflops is not None}
    if peaks and not small:
        share = ", ".join(f"{value:.0f} GF/s in {dtype}" for dtype, value in peaks.items())
        said += f"Share of FMA peak is ours / torch's, of {share}. "
    if not small:
        said += "Peak memory is ours over torch's, of one training step, where it was measured."
    lines = [f"### {first.device}, {counted(first)}", "", said.rstrip(), "", *_groups(rows, small)]
    if first.on_gpu:
        lines += ["", *_algorithms(rows)]
    lines += ["", *_slower(every)]
    for link, caption in images:
        lines += ["", f"![{caption}: {first.device}]({link})"]
    return "\n".join(lines)


def _small(rows: Sequence[Row]) -> bool:
    """Whether these are of one thread of a CPU."""
    return rows[0].threads == 1 and not rows[0].on_gpu


def short_table(files: Sequence[Sequence[Row]], link: str) -> Iterator[str]:
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
                lines.append((f"{rows[0].device}, {counted(rows[0])}: {kind}", cases, *cells, lost))
    yield from _table(["machine and calls", "cases", "training", "inference", "slower"], lines)
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


def run(out: Path | None) -> int:
    """``python -m bench report``: everything; or only the plots of the rows in a folder, which may hold other files."""
    if out is None:
        update()
        return 0
    paths = sorted(out.glob("*-[0-9]*.csv"))  # a results file ends in how many units its device has
    for path in paths:
        if published := _published(path):
            for image, _ in plots.draw_all(published, out, path.stem):
                print(image)
    if not paths:
        print(f"there are no results in {out}")
    return 0 if paths else NOTHING


def _published(path: Path) -> list[Row]:
    """The rows of a file that the report is about."""
    return [row for row in read(path) if row.experiment in ("speed", "after-torch")]


def _relative(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page.parent)).as_posix()


def update(folder: Path = RESULTS, readme: Path = README, page: Path = PAGE, images: Path = IMAGES) -> None:
    """Draws the plots of every results file, and rewrites the generated regions of the README and of the page."""
    files = [(path.stem, published) for path in sorted(folder.glob("*.csv")) if (published := _published(path))]
    files.sort(key=lambda file: (file[0].rpartition("-")[0], _small(file[1])))  # by device, one thread last
    sections = []
    for name, published in files:
        drawn = [] if _small(published) else plots.draw_all(published, images, name)
        sections.append(section(published, [(_relative(image, page), caption) for image, caption in drawn]))
        print(f"{name}: {len(published)} rows, {len(drawn)} plots")
    short = "\n".join(short_table([rows for _, rows in files], _relative(page, readme))) if files else NO_ROWS
    for target, generated in ((readme, short), (page, "\n\n".join(sections) or NO_ROWS)):
        target.write_text(replace_region(target.read_text(encoding="utf-8"), generated), encoding="utf-8")
        print(f"{target}: rewritten between its markers")

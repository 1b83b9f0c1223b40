"""``python -m bench report``: the README's figures and the plots, from the committed rows and from nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import plots, results
from bench.cases import MODES
from bench.results import Row
from bench.summary import Summary, summaries

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NO_ROWS = "_No results yet: run `make bench-full`, then `python -m bench report`._"


def _cells(line: Summary | None) -> tuple[str, str, str]:
    """Speed with its range, ours and torch's share of the peak, and memory, of one mode."""
    if line is None:
        return "", "", ""
    speed = f"**{line.ratio:.2f}×**"
    if line.cases > 1:
        speed += f" ({line.lowest:.2f}–{line.highest:.2f})"
    memory = "" if line.memory_ratio is None else f"{line.memory_ratio:.2f}×"
    return speed, f"{line.ours_share:.0%} / {line.peer_share:.0%}", memory


def _table(rows: Sequence[Row]) -> Iterator[str]:
    """One line a group: what it is, and both modes."""
    by_group: dict[str, dict[str, Summary]] = {}
    for line in summaries(rows):
        by_group.setdefault(line.group, {})[line.mode] = line
    yield "| group | cases | training: speed | share of FMA peak | peak memory | inference: speed | share of FMA peak |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for group, modes in by_group.items():
        any_line = next(iter(modes.values()))
        training, training_share, memory = _cells(modes.get("training"))
        inference, inference_share, _ = _cells(modes.get("inference"))
        cells = (training, training_share, memory, inference, inference_share)
        yield f"| {group}: {any_line.title} | {any_line.cases} | {' | '.join(cells)} |"


def _span(values: Sequence[str]) -> str:
    """All the different values, for rows that were not measured in one go."""
    return ", ".join(dict.fromkeys(values))


def section(rows: Sequence[Row], images: Sequence[tuple[str, str]]) -> str:
    """The Markdown of one device; ``images`` are links and captions."""
    first = rows[0]
    threads = f"{first.threads} thread{'s' if first.threads > 1 else ''}"
    peak = {row.dtype: row.peak_gflops for row in rows}
    slower = [
        f"{row.case} ({row.mode}, {row.backend}: {row.ratio:.2f}×)"
        for row in rows
        if row.ratio is not None and row.ratio < 1
    ]
    lines = [
        f"### {first.device}, {threads}",
        "",
        f"Measured {_span(sorted(row.date for row in rows))} at commit {_span([row.commit for row in rows])} with "
        f"torch {_span([row.torch for row in rows])} and numba {_span([row.numba for row in rows])}. Speed is the "
        "time of `torch.nn.LSTM` over that of `lstmcore.LSTM`: the geometric mean of the group, then its lowest and "
        "highest case. Share of FMA peak is ours / torch's, of "
        + ", ".join(f"{value:.0f} GF/s in {dtype}" for dtype, value in peak.items())
        + ". Peak memory is ours over torch's, of one training step, where it was measured.",
        "",
        *_table(rows),
        "",
        f"Cases where ours is slower than torch: {', '.join(slower) if slower else 'none'} "
        f"(of {sum(row.ratio is not None for row in rows)} measured, counting the modes "
        f"{' and '.join(mode for mode in MODES if any(row.mode == mode for row in rows))} each).",
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


def update(folder: Path = results.RESULTS, readme: Path = README) -> None:
    """Draws the plots beside every results file and rewrites the README's generated region."""
    sections = []
    for path in sorted(folder.glob("*.csv")):
        if not (rows := results.read(path)):
            continue
        images = [
            (Path(os.path.relpath(image, readme.parent)).as_posix(), caption)
            for image, caption in plots.draw_all(rows, path.with_suffix(""))
        ]
        sections.append(section(rows, images))
        print(f"{path}: {len(rows)} rows, {len(images)} plots")
    generated = "\n\n".join(sections) or NO_ROWS
    readme.write_text(replace_region(readme.read_text(encoding="utf-8"), generated), encoding="utf-8")
    print(f"{readme}: rewritten between its markers")

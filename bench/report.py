"""``python -m bench report``: every published figure and plot, from the committed rows and from nothing else.

Between its markers, README.md gets a short table, docs/benchmarks.md one of all groups for each results file, with the
plots in docs/assets/bench; docs/libraries.md gets one of the libraries, docs/numerics.md one of the errors in 16 bits.
All benchmarks and more are one page for a browser, build/report.html.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from bench import findings, page, plots, rounding
from bench.findings import Table
from bench.libraries import table as libraries
from bench.machine import counted
from bench.measure import NOTHING
from bench.rows import RESULTS, Row, read
from bench.summary import PUBLISHED, entries

ROOT = Path(__file__).parents[1]
LIBRARIES, NUMERICS = ROOT / "docs" / "libraries.md", ROOT / "docs" / "numerics.md"
README, PAGE, IMAGES = ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "assets" / "bench"
HTML = ROOT / "build" / "report.html"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NO_ROWS = "_No results yet: run `make bench-full`, then `python -m bench report`._"
NO_LIBRARIES = "_No results yet: run `make bench-libraries`, then `python -m bench report`._"
NO_ROUNDING = "_No results yet: run `python -m bench rounding`, then `python -m bench report`._"


def markdown(table: Table) -> Iterator[str]:
    """A table, line by line."""
    yield f"| {' | '.join(table.columns)} |"
    yield f"|{'---|' * table.words}{'--:|' * (len(table.columns) - table.words)}"
    for line in table.lines:
        yield f"| {' | '.join(map(str, line))} |"


def section(rows: Sequence[Row], images: Sequence[tuple[str, str]]) -> str:
    """The Markdown of one device; ``images`` are links and captions.

    Of one thread of a CPU speeds only, for what else there is to say stands above.
    """
    first, few = rows[0], findings.small(rows)
    lines = [f"### {findings.title(first)}", "", findings.said(rows, few), ""]
    lines += markdown(findings.groups(rows, few))
    if first.on_gpu:
        lines += ["", *markdown(findings.algorithms(rows))]
    lines += ["", "\n\n".join(findings.slower(entries(rows)))]
    for link, caption in images:
        lines += ["", f"![{caption}: {first.device}]({link})"]
    return "\n".join(lines)


def short_table(files: Sequence[Sequence[Row]], link: str) -> Iterator[str]:
    """The README's part."""
    yield from markdown(findings.overview(files))
    yield ""
    yield f"{findings.OVERVIEW} [All groups, machines and numbers of threads, with plots and versions]({link})."


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
        update_libraries()
        update_rounding()
        HTML.parent.mkdir(parents=True, exist_ok=True)
        HTML.write_text(web_page(), encoding="utf-8")
        print(f"{HTML}: written")
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
    """The rows of a file that the tables are about."""
    return [row for row in read(path) if row.experiment in PUBLISHED]


def _relative(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page.parent)).as_posix()


def ordered(folder: Path = RESULTS) -> dict[str, list[Row]]:
    """All rows of all files, by their names: by device, one thread last."""
    files = {path.stem: found for path in sorted(folder.glob("*.csv")) if (found := read(path))}
    return dict(sorted(files.items(), key=lambda file: (file[0].rpartition("-")[0], findings.small(file[1]))))


def web_page(folder: Path = RESULTS) -> str:
    """The page for a browser."""
    return page.page(ordered(folder))


def update(folder: Path = RESULTS, readme: Path = README, tables: Path = PAGE, images: Path = IMAGES) -> None:
    """Draws the plots of every results file, and rewrites the generated regions of the README and of the page."""
    files = {name: _published(folder / f"{name}.csv") for name in ordered(folder)}
    files = {name: published for name, published in files.items() if published}
    sections = []
    for name, published in files.items():
        drawn = [] if findings.small(published) else plots.draw_all(published, images, name)
        sections.append(section(published, [(_relative(image, tables), caption) for image, caption in drawn]))
        print(f"{name}: {len(published)} rows, {len(drawn)} plots")
    short = "\n".join(short_table(list(files.values()), _relative(tables, readme))) if files else NO_ROWS
    for target, generated in ((readme, short), (tables, "\n\n".join(sections) or NO_ROWS)):
        target.write_text(replace_region(target.read_text(encoding="utf-8"), generated), encoding="utf-8")
        print(f"{target}: rewritten between its markers")


def update_libraries(folder: Path = libraries.FOLDER, target: Path = LIBRARIES) -> None:
    """Rewrites the generated region of the page about libraries."""
    _update_page(libraries, folder, target, NO_LIBRARIES)


def update_rounding(folder: Path = rounding.FOLDER, target: Path = NUMERICS) -> None:
    """Rewrites the generated region of the page about numerics: the errors in 16 bits."""
    _update_page(rounding, folder, target, NO_ROUNDING)


def _update_page(rows: ModuleType, folder: Path, target: Path, nothing: str) -> None:
    """A table for each machine, of rows that have columns of their own."""
    sections = []
    for path in sorted(folder.glob("*.csv")):
        found = rows.read(path)
        about = f"{found[0].device}, {counted(found[0].threads)}, torch {found[0].torch}"
        sections.append("\n".join([f"{about}:", "", *markdown(Table(rows.COLUMNS, rows.lines(found), rows.WORDS))]))
    generated = "\n\n".join(sections) or nothing
    target.write_text(replace_region(target.read_text(encoding="utf-8"), generated), encoding="utf-8")
    print(f"{target}: rewritten between its markers")

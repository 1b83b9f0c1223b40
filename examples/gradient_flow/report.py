"""What the demonstration has found, as tables in the console and in files, and as pictures."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from lstmcore.flow import plots
from lstmcore.flow.export import writing
from lstmcore.flow.measure import measure
from lstmcore.flow.record import Record
from lstmcore.flow.summary import number, summarize

from .tasks import Task
from .training import LAG, LEARNED, MEAN, TEST, Run, left

LAGS = (10, 100, 200, 1000)
UNTRAINED = ("task", "steps", "model", "lag 10", "lag 100", "lag 200", "lag 1000", "first step", "a step keeps")
TRAINED = (
    *("task", "length", "chance-level loss", "model", "loss", "right", "learned", "left before", "left after"),
    *("iterations", "seconds", "remark"),
)


def untrained_table(passes: dict[str, dict[str, Record]]) -> list[tuple[str, ...]]:
    """The lines below UNTRAINED."""
    return [
        (
            *(task, str(record.steps), name),
            *(_ratio(left(record, lag)) if lag < record.steps else "–" for lag in LAGS),
            _ratio(left(record, record.steps)),
            f"{measure(record).rate:.3g}",
        )
        for task, records in passes.items()
        for name, record in records.items()
    ]


def table(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """The lines below TRAINED."""
    return [
        (
            *(run.task.name, str(run.task.length), f"{run.task.chance:.4f}", run.name, f"{run.loss:.4f}"),
            *(f"{run.accuracy:.0%}", "yes" if run.learned else "no", _ratio(run.before), _ratio(run.after)),
            *(str(run.iterations), f"{run.seconds:.1f}", run.remark),
        )
        for run in runs
    ]


def _ratio(value: float) -> str:
    return "–" if math.isnan(value) else number(value)


def console_tables(title: str, header: Sequence[str], lines: Sequence[Sequence[str]], caption: str) -> Iterator[Table]:
    """For the console: a table for each task, whose columns before the model's go into its title."""
    first = header.index("model")
    for heading in dict.fromkeys(tuple(line[:first]) for line in lines):
        here = [line for line in lines if tuple(line[:first]) == heading]
        named = zip(header, heading, strict=False)
        what = ", ".join(cell if name == "task" else f"{name} {cell}" for name, cell in named)
        shown = Table(title=f"{title}: {what}", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
        columns = [column for column in range(first, len(header)) if any(line[column] for line in here)]
        for column in columns:
            left_hand = header[column] in ("model", "remark")
            shown.add_column(header[column], justify="left" if left_hand else "right", no_wrap=column == first)
        for line in here:
            shown.add_row(*(line[column] for column in columns))
        yield shown


def _markdown(title: str, header: Sequence[str], lines: Sequence[Sequence[str]], caption: str) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join([f"## {title}", "", *("| " + " | ".join(row) + " |" for row in rows), "", caption, ""])


class Report:
    """What has been found so far, and the folder that it is written to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.passes: dict[str, dict[str, Record]] = {}  # by task and model
        self.runs: list[Run] = []

    def tables(self) -> list[tuple[str, Sequence[str], list[tuple[str, ...]], str]]:
        found: list[tuple[str, Sequence[str], list[tuple[str, ...]], str]] = []
        if self.passes:
            caption = (
                "What is left of the gradient at lag 1, at the cell state, in a plain RNN at the hidden state; 0 is"
                " less than 1e-150."
            )
            found.append(("Before training", UNTRAINED, untrained_table(self.passes), caption))
        if self.runs:
            caption = (
                "Chance-level loss: that of the best answer that ignores the input. Learned: a loss below"
                f" {LEARNED:g} of it, on {TEST} new sequences. Left: of the gradient at lag 1, at lag {LAG} or at the"
                " first step of a shorter sequence, before and after training."
            )
            found.append(("Training", TRAINED, table(self.runs), caption))
        return found

    def write(self) -> None:
        """The tables, as text and as CSV, and the summaries of the trainings."""
        with writing(self.folder / "table.md"):
            text = "\n".join(_markdown(*each) for each in self.tables())
            (self.folder / "table.md").write_text(text, encoding="utf-8")
        for name, (_, header, lines, _) in zip(("untrained", "table"), self.tables(), strict=False):
            with (self.folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows([header, *lines])
        blocks = []
        for run in self.runs:
            title = f"{run.name}: {run.task.name}, length {run.task.length}, {run.iterations} iterations of training"
            blocks.append(f"{title}\n{'=' * len(title)}\n{summarize(run.records)}\n")
        if blocks:
            (self.folder / "summaries.txt").write_text("\n".join(blocks), encoding="utf-8")

    def draw_untrained(self) -> None:
        for task, records in self.passes.items():
            steps = next(iter(records.values())).steps
            self._save(_compared(records), f"untrained-{task}", f"{task} problem, {steps} steps, before training")

    def draw(self, task: Task) -> None:
        """The pictures of all trainings on ``task``."""
        runs = [run for run in self.runs if run.task == task]
        if not runs:
            return
        name, title = f"{task.name}-{task.length}", f"{task.name} problem, length {task.length}"
        self._save(losses(runs), f"{name}-losses", title)
        before, after = ({run.name: run.records[place] for run in runs} for place in (0, -1))
        self._save(_compared(before), f"{name}-before", f"{title}, before training")
        self._save(_compared(after), f"{name}-after", f"{title}, after training")
        together = [replace(record, module=run.name) for run in runs for record in run.records]  # a panel each
        self._save(plots.heatmap(together), f"{name}-training", title)
        if any(record.gates is not None for record in together):
            self._save(plots.gate_histograms(together), f"{name}-gates", title)
            self._save(plots.horizons(together), f"{name}-horizons", title)

    def _save(self, figure: Figure, name: str, title: str) -> None:
        figure.suptitle(f"{title[0].upper()}{title[1:]}\n{figure.get_suptitle()}".strip(), fontsize=11)
        plots.save(figure, self.folder, name)


def _compared(records: dict[str, Record]) -> Figure:
    return plots.compare_by_lag({name: [record] for name, record in records.items()})


@plots.styled
def losses(runs: Sequence[Run]) -> Figure:
    """The loss of every model over the training, as a share of the chance-level loss."""
    task = runs[0].task
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.subplots()
    for run, colour in zip(runs, plots.CYCLE, strict=False):
        values = torch.tensor([math.nan] * (MEAN - 1) + run.losses, dtype=torch.float64) / task.chance
        middle = values.unfold(0, MEAN, 1).nanmedian(-1).values  # of the MEAN iterations up to this one
        label = f"{run.name}: {'learned' if run.learned else 'not learned'}, {run.accuracy:.0%} right"
        axes.plot(middle, color=colour, label=label, linewidth=1.6)
    axes.axhline(1, color="black", linestyle="--", linewidth=1, label=f"chance-level loss ({task.chance:.3g})")
    axes.axhline(LEARNED, color=plots.GREY, linestyle=":", linewidth=1.2, label="learned: below this")
    axes.set_yscale("log")
    axes.set_ylim(top=3)
    axes.grid(alpha=0.3)
    axes.set(xlabel="training iteration", ylabel=f"loss over chance (median of {MEAN} iterations)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def verdicts(runs: Sequence[Run]) -> str:
    """A sentence for each task: who has learned it."""
    lines = []
    for task in dict.fromkeys(run.task for run in runs):
        of_task = [run for run in runs if run.task == task]
        able = [run.name for run in of_task if run.learned]
        unable = [run.name for run in of_task if not run.learned]
        line = f"{task.name}, length {task.length}: learned by {'; '.join(able) or 'none'}"
        lines.append(line + (f" (not by {'; '.join(unable)})" if unable else ""))
    return "\n".join(lines)

"""The run: every model untrained, then every model on every task, within a budget of time."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn

from common import Interrupt, fast_arithmetic

from .report import Report, console_tables, verdicts
from .tasks import Adding, Copy, Task
from .training import MEAN, MODELS, SETTINGS, Run, Settings, train, untrained

QUICK = 10  # iterations of each training with --quick
PICTURES = 25.0  # seconds of the budget that are kept for drawing
INTERRUPTED = 130  # the exit status after Ctrl-C: 128 + SIGINT, as a shell has it
WORD, SYMBOLS = 2, 4  # S and K of the copy problem: few, for the sake of time


class Progress:
    """A bar for each thing that is done; a line for each that is finished where the output is no terminal."""

    def __init__(self, console: Console) -> None:
        texts = ("{task.description}", "{task.completed}/{task.total}", "{task.fields[told]}")
        first, *others = (TextColumn(text) for text in texts)
        bar = BarColumn(bar_width=12)
        self.console = console
        self.bars = rich.progress.Progress(
            first, bar, *others, TimeElapsedColumn(), console=console, disable=not console.is_terminal
        )

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def start(self, title: str, total: int) -> TaskID:
        return self.bars.add_task(title, total=total, told="")

    def tell(self, bar: TaskID, completed: int, told: str = "") -> None:
        self.bars.update(bar, completed=completed, told=told)

    def finish(self, bar: TaskID, completed: int, told: str = "") -> None:
        """Fills the bar, as nothing more is to come."""
        if self.console.is_terminal:
            self.bars.update(bar, total=max(1, completed), completed=max(1, completed), told=told)
            self.bars.stop_task(bar)
        else:
            title = next(task.description for task in self.bars.tasks if task.id == bar)
            self.console.print(f"{title}: {completed} {told}".rstrip(), highlight=False, soft_wrap=True)


def demo(options: argparse.Namespace) -> int:
    """Measures, trains, reports; returns the exit status: 0, or 130 after Ctrl-C."""
    end = time.monotonic() + 60 * options.minutes
    console = Console()
    report = Report(Path(options.out))
    settings = {
        name: replace(
            each,
            hidden_size=options.hidden_size or each.hidden_size,
            iterations=min(options.iterations or each.iterations, QUICK if options.quick else sys.maxsize),
        )
        for name, each in SETTINGS.items()
    }
    tasks: list[Task] = [Adding(length) for length in options.adding]
    tasks += [Copy(delay, WORD, SYMBOLS) for delay in options.copy]
    with Interrupt() as interrupt, fast_arithmetic():
        report.write()  # a folder that cannot be written to is known now, not after minutes
        with Progress(console) as progress:
            measure_untrained(options.steps, settings, options.seed, report, progress, interrupt)
            train_all(tasks, settings, options.seed, end - PICTURES, report, progress, interrupt)
    for each in report.tables():
        console.print("", *console_tables(*each), each[-1], sep="\n", highlight=False)
    console.print("", verdicts(report.runs), sep="\n", highlight=False, soft_wrap=True)
    what = "stopped by Ctrl-C; what was done is in" if interrupt.wanted else "pictures and tables:"
    console.print(f"{what} {report.folder}", soft_wrap=True)
    return INTERRUPTED if interrupt.wanted else 0


def measure_untrained(
    steps: int, settings: dict[str, Settings], seed: int, report: Report, progress: Progress, interrupt: Interrupt
) -> None:
    """One pass of every model over ``steps`` steps of both problems."""
    tasks = (Adding(max(2, steps)), Copy(max(1, steps - 2 * WORD), WORD, SYMBOLS))
    bar = progress.start(f"untrained, {steps} steps", len(tasks) * len(MODELS))
    done = 0
    progress.tell(bar, done, "(compiles, the first time)")
    for task in tasks:
        for name in MODELS:
            if interrupt.wanted:
                break
            record = untrained(name, task, settings[task.name].hidden_size, seed)
            report.passes.setdefault(task.name, {})[name] = record
            done += 1
            progress.tell(bar, done)
    progress.finish(bar, done, "backward passes")
    report.write()
    report.draw_untrained()


def train_all(
    tasks: Sequence[Task],
    settings: dict[str, Settings],
    seed: int,
    deadline: float,
    report: Report,
    progress: Progress,
    interrupt: Interrupt,
) -> None:
    """Every model on every task; whatever is left of the time, each of those that are left gets the same share of."""
    waiting = len(tasks) * len(MODELS)
    for task in tasks:
        for name in MODELS:
            if interrupt.wanted:
                break
            run, how, now = Run(name, task), settings[task.name], time.monotonic()
            bar = progress.start(f"{task.name} {task.length}: {name}", how.iterations)

            def tell(run: Run, bar: TaskID = bar) -> None:
                loss = statistics.fmean(run.losses[-MEAN:]) / run.task.chance
                progress.tell(bar, run.iterations, f"{loss:.3f} of chance")

            train(run, how, seed, now + max(0.0, deadline - now) / waiting, lambda: interrupt.wanted, tell)
            waiting -= 1
            report.runs.append(run)
            verdict = run.remark or ("learned" if run.learned else "not learned")
            progress.finish(bar, run.iterations, f"iterations, {verdict}, {run.loss / task.chance:.3f} of chance")
            report.write()
        report.draw(task)

"""A run of experiments over cases: saves after each, goes on after a failure, ends in time, and sums up."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import costs, machine, onnx_peer, rows, tables
from bench.cases import Case
from bench.measure import Experiment, Task, forget, peak_gflops
from bench.memory import OutOfMemory
from bench.providers import precision
from bench.rows import Row
from bench.verify import Mismatch

REFUSED = "cannot run this call"  # how lstmcore says that a named backend does not cover a case
# The exit status when a kernel has broken CUDA's context, after which a process can compute nothing more on the GPU;
# and the line that names the case, so that another process can go on after it.
LOST, LOST_AT = 3, "the GPU was lost at case "


def screen() -> Console:
    """The console; wide enough for the tables where the output is a file or a pipe, which have no width."""
    return Console() if sys.stdout.isatty() else Console(width=165)


def release() -> bool:
    """Gives the GPU's memory back after a case; whether the GPU still answers."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:  # torch.AcceleratorError too
        return False
    return True


def _reason(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


@dataclass
class Session:
    """One run: the experiments, each with what is wanted of it, and what has come of them."""

    work: Sequence[tuple[Experiment, Task]]
    path: Path | None = None  # of the rows
    limit_s: float | None = None  # no case is started that would end later
    commit: str | None = None  # what is measured, where git cannot tell
    console: Console = field(default_factory=screen)
    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    kernels: set[object] = field(default_factory=set)  # of a GPU, that have been compiled
    started: float = field(default_factory=time.monotonic)
    device: str = "cpu"

    def run(self, cases: Sequence[Case]) -> int:
        """Measures the cases of one device; returns the exit status.  A case that raises is reported, the next is run.

        ValueError where the file of rows has other columns, before anything is measured.
        """
        if self.path is not None:
            rows.read(self.path)
        self.begin(cases)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        status = 0
        try:
            with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console) as progress:
                bar = progress.add_task("", total=len(cases))
                for case in cases:
                    progress.update(bar, description=case.name)
                    if (why := self.why_not(case)) is not None:
                        self.left_out.append(f"{case.name}: {why}")
                    elif not self.measure(case):
                        status = LOST
                        break
                    progress.advance(bar)
        except KeyboardInterrupt:
            self.console.print("[yellow]interrupted:[/] what follows is what has been measured so far")
            status = 130
        self.sum_up()
        return status or (1 if self.wrong or self.failed else 0)

    def begin(self, cases: Sequence[Case]) -> None:
        """Says what machine this is, and does what comes before the first case."""
        device = self.device = cases[0].device
        name = f"{machine.device_name(device)}, {machine.counted(machine.units(device), device)}"
        name += f", torch {torch.__version__}"
        self.console.print(f"{name}, cuDNN {machine.cudnn()}" if device == "cuda" else name)
        names = {experiment.name for experiment, _ in self.work}
        if device == "cpu" and names & {"speed", "after-torch"}:
            dtypes = dict.fromkeys(case.dtype for case in cases)
            peaks = [f"{dtype} {peak_gflops(dtype, torch.get_num_threads()):.0f} GF/s" for dtype in dtypes]
            self.console.print(f"peak of multiplication: {', '.join(peaks)}")
        asked = [(case, mode) for experiment, task in self.work for case in cases for mode in task.modes(case)]
        wanted = "speed" in names and any(onnx_peer.covers(*each) for each in asked)
        if wanted and (why := onnx_peer.missing()) is not None:
            self.console.print(escape(why), soft_wrap=True)
        for experiment, _ in self.work:
            if experiment.prepare is not None:
                self.console.print(experiment.prepare(self.limit_s or float("inf")))

    def why_not(self, case: Case) -> str | None:
        """Why a case is left out, or None."""
        needed = 0.0
        if case.device == "cuda":
            needed += sum(experiment.seconds(case, task.effort) for experiment, task in self.work)
            if (why := costs.too_large(case, machine.gpu().total_memory)) is not None:
                return why
            ready = costs.compiled(case) in self.kernels or all(each.prepare is not None for each, _ in self.work)
            needed += 0 if ready else costs.COMPILE_S
        if self.limit_s is not None and time.monotonic() - self.started + needed > self.limit_s:
            return f"the {self.limit_s:.0f} seconds of this run were used up"
        self.kernels.add(costs.compiled(case))
        return None

    def measure(self, case: Case) -> bool:
        """Puts the experiments to a case; whether the device still answers."""
        new: list[Row] = []
        try:
            with precision(case):
                for experiment, task in self.work:
                    for row in experiment.measure(case, task):
                        new.append(row if self.commit is None else replace(row, commit=self.commit))
                        self.told(experiment, new[-1])
        except Mismatch as mismatch:
            self.wrong.append(str(mismatch))
            self.console.print(f"[red]wrong result, no figure:[/] {escape(str(mismatch))}")
        except Exception as error:  # whatever it is, the other cases have figures to give
            if REFUSED in str(error) or isinstance(error, OutOfMemory):
                self.left_out.append(f"{case.name}: {error}")
            else:
                self.failed.append(f"{case.name}: {_reason(error)}")
                self.console.print(f"[red]failed, no figure:[/] {escape(self.failed[-1])}")
        finally:
            self.save(new)
            forget()
        if case.device == "cuda" and not release():
            self.console.print(f"[red]{LOST_AT}{case.name}[/]")
            return False
        return True

    def told(self, experiment: Experiment, row: Row) -> None:
        """Says what a row has found, as soon as it has: a run may be cut off before its tables."""
        if row.on_gpu or experiment.show is not tables.show_pairs:  # which shows many in few lines
            self.console.print(tables.line(row), soft_wrap=True)

    def save(self, new: Iterable[Row]) -> None:
        new = list(new)
        self.rows += new
        if new and self.path is not None:
            whole = [experiment.name for experiment, _ in self.work if experiment.whole]
            rows.write(self.path, rows.merge(rows.read(self.path), new, whole=whole))

    def sum_up(self) -> None:
        """The tables, and what has no figure and why."""
        for show in dict.fromkeys(experiment.show for experiment, _ in self.work):
            names = [experiment.name for experiment, _ in self.work if experiment.show == show]
            if show is not None and (chosen := [row for row in self.rows if row.experiment in names]):
                show(self.console, chosen)
        if self.rows and self.path is not None:
            self.console.print(f"rows: {self.path}")
        for title, lines in (("wrong result", self.wrong), ("failed", self.failed), ("not measured", self.left_out)):
            for line in lines:
                self.console.print(f"[red]{title}:[/] {escape(line)}")
        saved = self.rows if self.path is None else rows.read(self.path)
        for experiment, _ in self.work:
            if experiment.key_figures is not None and self.device == "cuda":
                own = [row for row in saved if row.experiment == experiment.name]
                self.console.print(tables.KEY_FIGURES + experiment.key_figures(own), soft_wrap=True)

"""``python -m lstmcore flow``: what becomes of a gradient in a plain RNN and in an LSTM, and what each can learn.

First one backward pass of every untrained model over a long sequence; then all of them are trained on the adding
problem and on the copy problem, and watched.  Pictures and tables go into a folder.

T steps, B rows of the batch, H hidden units.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lstmcore.flow import plots
from lstmcore.flow.export import writing
from lstmcore.flow.interrupt import Interrupt
from lstmcore.flow.record import Record
from lstmcore.flow.recorder import record_gradient_flow
from lstmcore.flow.summary import measure, number, summarize
from lstmcore.flow.tasks import Adding, Copy, Model, Task
from lstmcore.init import chrono_, forget_bias_
from lstmcore.module import LSTM
from lstmcore.rnn import RNN

try:
    import rich.progress
    from matplotlib.figure import Figure
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as error:
    raise ImportError(f"the demonstration needs rich and matplotlib: pip install rich matplotlib ({error})") from error

LAG = 200  # what is left of the gradient is given for this lag, over lag 1
LEARNED = 0.3  # of the chance-level loss: whoever is below has learned more than a guess can explain
SOLVED = 0.05  # of it, over the last MEAN iterations: the training need not go on
MEAN = 25
QUICK = 10  # iterations of each training with --quick
TEST = 256  # fresh sequences that a trained model is judged by
RECORDS = 30  # backward passes that are recorded of a training
PICTURES = 25.0  # seconds of the budget that are kept for drawing
INTERRUPTED = 130  # the exit status after Ctrl-C: 128 + SIGINT, as a shell has it


def _rnn(nonlinearity: str) -> Callable[[int, int, int], nn.RNNBase]:
    return lambda inputs, hidden_size, lag: RNN(inputs, hidden_size, nonlinearity=nonlinearity)


def _chrono(inputs: int, hidden_size: int, lag: int) -> nn.RNNBase:
    # from a generator of its own: what is drawn next, the readout, stays the same as in the other models
    return chrono_(LSTM(inputs, hidden_size), max(3, lag), torch.Generator().manual_seed(torch.initial_seed()))


# From the features of the input, H and the longest lag.  The LSTMs differ in their biases alone.
MODELS: dict[str, Callable[[int, int, int], nn.RNNBase]] = {
    "sigmoid RNN": _rnn("sigmoid"),
    "tanh RNN": _rnn("tanh"),
    "LSTM, default": lambda inputs, hidden_size, lag: LSTM(inputs, hidden_size),
    "LSTM, bias 1": lambda inputs, hidden_size, lag: forget_bias_(LSTM(inputs, hidden_size)),
    "LSTM, chrono": _chrono,
}


@dataclass(frozen=True)
class Settings:
    """How a task is trained, the same for every model."""

    optimizer: Callable[..., torch.optim.Optimizer]
    learning_rate: float
    options: dict[str, object]
    clip: float
    hidden_size: int
    iterations: int
    batch: int = 32


# The gradients of these losses are large while a model finds the constant answer, and tiny from then on, when it has to
# find the memory: an optimizer that remembers the large ones for a thousand iterations spends them standing still.
SETTINGS = {
    "adding": Settings(torch.optim.Adam, 2e-2, {"betas": (0.9, 0.99)}, clip=0.1, hidden_size=32, iterations=800),
    "copy": Settings(torch.optim.RMSprop, 1e-2, {}, clip=0.02, hidden_size=64, iterations=1000),
}
WORD, SYMBOLS = 2, 4  # S and K of the copy problem: few, for the sake of time


@dataclass
class Run:
    """One model on one task, and what came of it."""

    name: str
    task: Task
    loss: float = math.nan
    accuracy: float = math.nan
    iterations: int = 0
    seconds: float = 0.0
    records: list[Record] = field(default_factory=list)  # the first of the untrained, the last of the trained model
    losses: list[float] = field(default_factory=list)
    remark: str = ""  # why it ended early

    @property
    def learned(self) -> bool:
        return self.loss < LEARNED * self.task.chance

    @property
    def before(self) -> float:
        return left(self.records[0]) if self.records else math.nan

    @property
    def after(self) -> float:
        return left(self.records[-1]) if self.records else math.nan


@contextmanager
def fast_arithmetic() -> Iterator[None]:
    """One thread, without denormal numbers: a vanishing gradient meets them, and a CPU is many times slower with them.

    torch leaves them out in the calling thread only; and a second one gains nothing where products are this small.
    """
    threads = torch.get_num_threads()
    flushed = not torch.tensor(torch.finfo(torch.float32).tiny).mul(0.5).item()  # torch has no other way to ask
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)
        torch.set_num_threads(threads)


def curve(record: Record) -> Tensor:
    """(T,): the mean norm by lag, of dL/dc_t, in a plain RNN of dL/dh_t."""
    return (record.h if record.c is None else record.c).mean_by_lag


def left(record: Record, lag: int = LAG) -> float:
    """How much of the gradient at lag 1 is left at ``lag``, in a shorter sequence at its first step."""
    norms = curve(record)
    return float(norms[min(lag, len(norms) - 1)] / norms[min(1, len(norms) - 1)])


def build(name: str, task: Task, hidden_size: int, seed: int) -> Model:
    """The model ``name`` for ``task``, drawn from ``seed``."""
    torch.manual_seed(seed)
    return Model(MODELS[name](task.inputs, hidden_size, task.lag + 1), task.outputs, task.at_end)


def probe(model: Model, task: Task, batch: tuple[Tensor, Tensor], iteration: int = 0) -> Record:
    """One recorded backward pass, from the answers that need memory: from others, gradient enters at every step."""
    input, target = batch
    with record_gradient_flow(model) as flow:
        task.memory_loss(model(input), target).backward()
    model.zero_grad()
    return replace(flow.records[0], iteration=iteration)


def untrained(name: str, task: Task, hidden_size: int, seed: int, batch: int = 8) -> Record:
    """A pass of an untrained model, in float64: in float32 the gradient of a plain RNN is soon exactly 0."""
    model = build(name, task, hidden_size, seed).double()
    input, target = task.draw(batch, torch.Generator().manual_seed(seed))
    return probe(model, task, (input.double(), target.double() if target.is_floating_point() else target))


def train(
    run: Run,
    settings: Settings,
    seed: int,
    deadline: float = math.inf,
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[Run], None] = lambda run: None,
) -> None:
    """Trains ``run``'s model until it has solved the task, or for all of its iterations, and fills in ``run``."""
    task, start, solved = run.task, time.monotonic(), False
    model = build(run.name, task, settings.hidden_size, seed)
    optimizer = settings.optimizer(model.parameters(), lr=settings.learning_rate, **settings.options)
    generator = torch.Generator().manual_seed(seed)  # every model sees the same batches
    watched = task.draw(settings.batch, generator)
    every = max(1, settings.iterations // RECORDS)
    while run.iterations < settings.iterations and not solved:
        if run.iterations % every == 0:
            run.records.append(probe(model, task, watched, run.iterations))
        input, target = task.draw(settings.batch, generator)
        loss = task.loss(model(input), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        run.losses.append(loss.item())
        run.iterations += 1
        solved = len(run.losses) >= MEAN and statistics.fmean(run.losses[-MEAN:]) < SOLVED * task.chance
        tell(run)
        if stop() or time.monotonic() > deadline:
            run.remark = "interrupted" if stop() else "out of time"
            break
    run.records.append(probe(model, task, watched, run.iterations))
    with torch.no_grad():
        input, target = task.draw(TEST, generator)
        answer = model(input)
        run.loss, run.accuracy = task.loss(answer, target).item(), task.accuracy(answer, target)
    run.seconds = time.monotonic() - start


# ------------------------------------------------------------------------------------------------------------ report

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


def _shown(title: str, header: Sequence[str], lines: Sequence[Sequence[str]], caption: str) -> Iterator[Table]:
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


# -------------------------------------------------------------------------------------------------------------- main


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


def demo(arguments: argparse.Namespace) -> int:
    """Measures, trains, reports; returns the exit status: 0, or 130 after Ctrl-C."""
    end = time.monotonic() + 60 * arguments.minutes
    console = Console()
    report = Report(Path(arguments.out))
    settings = {
        name: replace(
            each,
            hidden_size=arguments.hidden_size or each.hidden_size,
            iterations=min(arguments.iterations or each.iterations, QUICK if arguments.quick else sys.maxsize),
        )
        for name, each in SETTINGS.items()
    }
    tasks: list[Task] = [Adding(length) for length in arguments.adding]
    tasks += [Copy(delay, WORD, SYMBOLS) for delay in arguments.copy]
    with Interrupt() as interrupt, fast_arithmetic():
        report.write()  # a folder that cannot be written to is known now, not after minutes
        with Progress(console) as progress:
            measure_untrained(arguments.steps, settings, arguments.seed, report, progress, interrupt)
            train_all(tasks, settings, arguments.seed, end - PICTURES, report, progress, interrupt)
    for each in report.tables():
        console.print("", *_shown(*each), each[-1], sep="\n", highlight=False)
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

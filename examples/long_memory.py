"""A memory longer than the default LSTM has: where it fails, what the recorded gradient says, and what cures it.

    python examples/long_memory.py            # two or three minutes on two cores
    python examples/long_memory.py --quick    # a look at every part, in seconds; learns nothing

1. The task: a symbol, then 999 steps of noise, then the question which symbol it was.  The default LSTM guesses until
   the end, and the summary of the recorded gradient says why: nothing of it comes back to the first step.
2. The summary's first advice is followed, one line of code, and the same training succeeds.
3. Real text, the source code of Python's standard library: a character model trained with the recording on, then the
   question how far back its answer for a single character looks.

The pictures go to ``out/long_memory``, a folder for each part.

Legend: T steps, B batch, H hidden units, K symbols.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from torch.nn import functional as F

import lstmcore
from char_lm import CharModel, Corpus, read_files
from common import CannotRun, Interrupt, fast_arithmetic, positive, reported
from gradient_flow.tasks import Model, Recall
from lstmcore.flow import plots
from lstmcore.flow.recorder import GradientFlow

SOLVED = 0.99  # of the answers are right, over the last MEAN iterations: no need to go on
MEAN = 20
TEXT_BATCH = 16
TEST = 512  # fresh sequences that a trained model is judged by


@dataclass
class Outcome:
    """What came of a training on the recall task."""

    name: str
    flow: GradientFlow
    accuracy: float = math.nan  # on fresh sequences
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)  # of the batches trained on, each new


def progress(console: Console, title: str) -> Progress:
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"))
    return Progress(*columns, TimeElapsedColumn(), console=console)


def learn(
    name: str,
    task: Recall,
    options: argparse.Namespace,
    console: Console,
    interrupt: Interrupt,
    initialise: Callable[[nn.RNNBase], object] = lambda lstm: None,
) -> Outcome:
    """Trains an LSTM on ``task``, all of it recorded now and then; ``initialise`` is all that may differ."""
    torch.manual_seed(options.seed)
    model = Model(lstmcore.LSTM(task.inputs, options.hidden_size), task.outputs)
    initialise(model.recurrent)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    generator = torch.Generator().manual_seed(options.seed)
    every = max(1, options.iterations // 25)
    with lstmcore.record_gradient_flow(model, every) as flow, progress(console, name) as bar:
        outcome = Outcome(name, flow)
        shown = bar.add_task("", total=options.iterations, told="")
        for _ in range(options.iterations):
            input, target = task.draw(options.batch, generator)
            answer = model(input)
            loss = task.loss(answer, target)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            outcome.losses.append(loss.item())
            outcome.accuracies.append(task.accuracy(answer, target))
            recent = outcome.accuracies[-MEAN:]
            right = sum(recent) / len(recent)
            bar.update(shown, advance=1, told=f"loss {loss.item() / task.chance:.2f} of chance, {right:.0%} right")
            if interrupt.wanted or (len(recent) == MEAN and right > SOLVED):
                break
    with torch.no_grad():
        input, target = task.draw(TEST, generator)
        outcome.accuracy = task.accuracy(model(input), target)
    return outcome


def report(outcome: Outcome, task: Recall, folder: Path, console: Console) -> None:
    """The summary in words, and the pictures."""
    loss = sum(outcome.losses[-MEAN:]) / len(outcome.losses[-MEAN:])
    console.print(
        f"{outcome.name}: after {len(outcome.losses)} iterations loss {loss:.3f}, at chance level {task.chance:.3f}; "
        f"{outcome.accuracy:.1%} of {TEST} new sequences right, by guessing {1 / task.symbols:.1%}"
    )
    tell(outcome.flow, console)
    outcome.flow.plot(folder)


def tell(flow: GradientFlow, console: Console) -> None:
    """What was recorded, in words."""
    console.print(f"\n{flow.summary()}\n", markup=False, highlight=False, soft_wrap=True)


@plots.styled
def draw(outcomes: Sequence[Outcome], task: Recall) -> Figure:
    """The loss and the share of right answers of each training."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for outcome, colour in zip(outcomes, plots.CYCLE, strict=False):
        losses.plot(outcome.losses, color=colour, label=outcome.name, linewidth=1.2)
        values = torch.tensor(outcome.accuracies, dtype=torch.float64)
        if len(values) >= MEAN:
            values = values.unfold(0, MEAN, 1).mean(-1)
        first = len(outcome.accuracies) - len(values)
        accuracies.plot(range(first, first + len(values)), values, color=colour, label=outcome.name)
    losses.axhline(task.chance, color="black", linestyle="--", linewidth=1, label=f"chance: ln {task.symbols}")
    accuracies.axhline(1 / task.symbols, color="black", linestyle="--", linewidth=1, label=f"chance: 1/{task.symbols}")
    losses.set(title="loss", xlabel="training iteration", ylabel="nats", ylim=(0, 1.5 * task.chance))
    accuracies.set(title=f"right answers, mean of {MEAN} iterations", xlabel="training iteration", ylim=(0, 1.03))
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(f"Naming the first of {task.steps:,} symbols", fontsize=11)
    return figure


def read(corpus: Corpus, options: argparse.Namespace, console: Console, interrupt: Interrupt) -> None:
    """Part 3: a character model on real text, recorded, then one answer alone."""
    steps = options.text_steps
    torch.manual_seed(options.seed)
    model = CharModel(lstmcore.LSTM, len(corpus.characters), 32, options.text_hidden_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
    state = None
    every = max(1, options.text_iterations // 20)
    with lstmcore.record_gradient_flow(model, every) as flow, progress(console, "text") as bar:
        shown = bar.add_task("", total=options.text_iterations, told="")
        for iteration in range(options.text_iterations):
            first = iteration * steps % (len(corpus.train) - steps)
            window = corpus.train[first : first + steps + 1]  # (T + 1, B): each character predicts its successor
            scores, (h, c) = model(window[:-1], state)
            loss = F.cross_entropy(scores.flatten(0, 1), window[1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            state = (h.detach(), c.detach())
            bar.update(shown, advance=1, told=f"loss {loss.item():.2f} nats a character")
            if interrupt.wanted:
                break
    console.print("a loss at every character:")
    tell(flow, console)
    flow.plot(options.out / "3-text")

    with lstmcore.record_gradient_flow(model) as alone:
        window = corpus.validation[: steps + 1]
        scores, _ = model(window[:-1], None)
        F.cross_entropy(scores[-1], window[-1]).backward()
    console.print("the same model, the loss of the last character alone:")
    tell(alone, console)
    alone.plot(options.out / "3-text-last-character")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Shows a task that the default LSTM fails at, why, and the cure; then the gradient flow of a model "
        "of real text. Ctrl-C keeps what is done.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=positive, default=1000, help="T: from the symbol to the question")
    parser.add_argument("--symbols", type=positive, default=8, help="K: symbols to tell apart")
    parser.add_argument("--iterations", type=positive, default=700, help="of each training on the task, at most")
    parser.add_argument("--batch", type=positive, default=32, help="B")
    parser.add_argument("--hidden-size", type=positive, default=64, help="H")
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--text", type=Path, help="a text file (UTF-8) instead of the standard library's sources")
    parser.add_argument("--text-steps", type=positive, default=512, help="T of the text")
    parser.add_argument("--text-hidden-size", type=positive, default=128, help="H of the model of text")
    parser.add_argument("--text-iterations", type=positive, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/long_memory"), help="folder of the pictures")
    parser.add_argument("--quick", action="store_true", help="a few iterations of everything, to see that it works")
    return parser


@reported
def main(arguments: Sequence[str] | None = None) -> int:
    """Fails, explains, cures, reads; returns the exit status."""
    options = parser().parse_args(arguments)
    if options.steps < 3:
        raise CannotRun(f"there is no lag to remember over in {options.steps} steps; pass --steps 3 or more")
    if options.quick:
        options.steps, options.iterations = min(options.steps, 200), min(options.iterations, 10)
        options.text_steps, options.text_iterations = min(options.text_steps, 128), min(options.text_iterations, 5)
    return show(options)


def show(options: argparse.Namespace) -> int:
    """All three parts; raises CannotRun without a text, OSError where the pictures cannot be written."""
    console, start = Console(), time.monotonic()
    # The text is read before minutes are spent on the rest.
    corpus = Corpus.of("".join(read_files(options.text)), TEXT_BATCH, options.text_steps)
    task = Recall(options.steps, options.symbols)

    def cure(lstm: nn.RNNBase) -> None:
        lstmcore.init.chrono_(lstm, max_lag=task.steps)

    with Interrupt() as interrupt, fast_arithmetic():
        console.rule("1. a lag that the default LSTM cannot learn")
        outcomes = [learn("LSTM, default", task, options, console, interrupt)]
        report(outcomes[0], task, options.out / "1-default", console)

        if not interrupt.wanted:
            console.rule("2. the cure that the summary advises")
            console.print(f"lstmcore.init.chrono_(model.recurrent, max_lag={task.steps})", highlight=False)
            outcomes.append(learn("LSTM, chrono", task, options, console, interrupt, cure))
            report(outcomes[1], task, options.out / "2-chrono", console)
        plots.save(draw(outcomes, task), options.out, "learning")
        started = {outcome.name: outcome.flow.select(iteration=0) for outcome in outcomes}
        plots.save(plots.compare_by_lag(started), options.out, "before-training")

        if not interrupt.wanted:
            console.rule("3. real text")
            read(corpus, options, console, interrupt)
    console.print(f"pictures in {options.out}; {time.monotonic() - start:.0f} s", soft_wrap=True)
    return 130 if interrupt.wanted else 0


if __name__ == "__main__":
    sys.exit(main())

"""A character language model on real text, trained with lstmcore.LSTM and with torch.nn.LSTM from the same seed.

    python examples/char_lm.py             # trains both, a minute or two on two cores
    python examples/char_lm.py --resume    # goes on from the checkpoint, as if it had never stopped

The text is the source code of Python's standard library, which every machine that runs this has; ``--text`` takes
another.  The two models start from the same weights, read the same characters and take turns, one step each, so that
their loss curves and their speed can be compared: the losses differ by rounding alone.

Training is truncated backpropagation through time with a state that is carried on: the text is cut into B streams, each
step reads the next T characters of every stream, and h and c enter it as the step before left them (detached).  So the
model sees a context far beyond T, every character is used once a pass, and the position in the streams, together with
the state, is all that a checkpoint has to know about the data.

Legend: T steps, B batch (streams), V vocabulary.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import sysconfig
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn import functional as F

import lstmcore
from common import Interrupt, positive

OURS, PEER = "lstmcore.LSTM", "torch.nn.LSTM"
COLOURS = {OURS: "#0b6e99", PEER: "#d1782a"}
VOCABULARY = 128  # V: the most frequent characters; all others share the last place
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
HELD_OUT = 0.05  # share of the text, at its end, that is never trained on
State = tuple[Tensor, Tensor]


class TextError(Exception):
    """The text cannot be used; the message says why and what would help."""


# ---------------------------------------------------------------------------------------------------------------- text


def read_text(path: Path | None) -> str:
    """The text of a file, or by default the standard library's top-level modules in alphabetical order."""
    if path is None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(folder.glob("*.py"))
        if not files:
            raise TextError(f"no *.py files in {folder}, where Python's standard library should be; pass --text FILE")
    else:
        files = [path]
    parts = []
    for file in files:
        try:
            parts.append(file.read_text(encoding="utf-8", errors="replace"))
        except OSError as error:
            raise TextError(f"cannot read {file}: {error.strerror}; pass a readable file with --text FILE") from error
    return "".join(parts)


@dataclass(frozen=True)
class Corpus:
    """Text as numbers: characters to train on, in B streams, and characters held out."""

    characters: str  # the vocabulary; index by number
    train: Tensor  # (S, B), S characters a stream
    held_out: Tensor  # (S', B)

    @staticmethod
    def of(text: str, batch: int, steps: int) -> Corpus:
        """Raises TextError where the text is too short for one window of training and one of validation."""
        needed = math.ceil(batch * (steps + 1) / HELD_OUT)
        if len(text) < needed:
            raise TextError(
                f"the text is too small: {len(text):,} characters, but {batch} streams of {steps} steps, with "
                f"{HELD_OUT:.0%} held out, need {needed:,}; lower --batch or --steps-per-window, or pass more --text"
            )
        common = [character for character, _ in Counter(text).most_common(VOCABULARY - 1)]
        characters = "".join(sorted(common)) + UNKNOWN
        number = {character: index for index, character in enumerate(characters)}
        data = torch.tensor([number.get(character, len(characters) - 1) for character in text])

        def streams(part: Tensor) -> Tensor:
            length = len(part) // batch
            return part[: length * batch].view(batch, length).t().contiguous()

        split = int(len(data) * (1 - HELD_OUT))
        return Corpus(characters, streams(data[:split]), streams(data[split:]))


# --------------------------------------------------------------------------------------------------------------- model


class CharModel(nn.Module):
    """Embedding, LSTM, linear: from characters to scores for the next one."""

    def __init__(
        self, lstm: Callable[[int, int], nn.RNNBase], vocabulary: int, embedding_size: int, hidden_size: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding_size)
        self.lstm = lstm(embedding_size, hidden_size)
        self.linear = nn.Linear(hidden_size, vocabulary)

    def forward(self, characters: Tensor, state: State | None) -> tuple[Tensor, State]:
        """(T, B) characters to (T, B, V) scores, and the state to go on from."""
        output, state = self.lstm(self.embedding(characters), state)
        return self.linear(output), state


@dataclass
class Trainee:
    """One of the two models, with all that training changes."""

    name: str
    model: CharModel
    optimizer: torch.optim.Optimizer
    state: State | None = None
    losses: list[float] = field(default_factory=list)  # nats a character, one a step
    seconds: list[float] = field(default_factory=list)  # one a step

    @staticmethod
    def new(name: str, options: argparse.Namespace, vocabulary: int) -> Trainee:
        """From the seed: both LSTMs draw the same weights from it, for they draw in the same order."""
        torch.manual_seed(options.seed)
        lstm: Callable[[int, int], nn.RNNBase] = lstmcore.LSTM if name == OURS else nn.LSTM
        model = CharModel(lstm, vocabulary, options.embedding_size, options.hidden_size)
        return Trainee(name, model, torch.optim.Adam(model.parameters(), lr=options.learning_rate))

    def step(self, window: Tensor, clip: float) -> None:
        """One step of training on (T + 1, B) characters: each of the first T predicts its successor."""
        start = time.perf_counter()
        scores, (h, c) = self.model(window[:-1], self.state)
        loss = F.cross_entropy(scores.flatten(0, 1), window[1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.state = (h.detach(), c.detach())
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": self.state,
            "losses": self.losses,
            "seconds": self.seconds,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state, self.losses, self.seconds = saved["state"], saved["losses"], saved["seconds"]


@torch.no_grad()
def validate(model: CharModel, held_out: Tensor, steps: int, windows: int) -> float:
    """Nats a character on text that was not trained on, read in order with the state carried on."""
    total, count, state = 0.0, 0, None
    for start in range(0, min(windows * steps, len(held_out) - 1), steps):
        window = held_out[start : start + steps + 1]
        scores, state = model(window[:-1], state)
        total += F.cross_entropy(scores.flatten(0, 1), window[1:].flatten(), reduction="sum").item()
        count += window[1:].numel()
    return total / count


@torch.no_grad()
def generate(model: CharModel, characters: str, prompt: str, length: int, temperature: float, seed: int) -> str:
    """``prompt`` and what the model writes after it, one character a call, with the state carried on."""
    generator = torch.Generator().manual_seed(seed)  # its own, so that sampling leaves the training's stream alone
    text = prompt
    following = torch.tensor([[max(0, characters.find(character))] for character in prompt])  # (T, 1)
    state = None
    for _ in range(length):
        scores, state = model(following, state)
        probabilities = torch.softmax(scores[-1, 0] / temperature, 0)
        following = torch.multinomial(probabilities, 1, generator=generator)[None]
        text += characters[int(following)]
    return text


# ---------------------------------------------------------------------------------------------------------- checkpoint

# What has to be the same for a checkpoint to be continued; --iterations may grow.
FIXED = ("text_checksum", "seed", "batch", "steps_per_window", "embedding_size", "hidden_size", "learning_rate", "clip")


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in FIXED}


def save(path: Path, options: argparse.Namespace, trainees: Sequence[Trainee]) -> None:
    """Writes everything that the next step depends on; in one move, so an interruption never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    checkpoint = {
        "settings": settings(options),
        "rng": torch.get_rng_state(),
        "trainees": {trainee.name: trainee.state_dict() for trainee in trainees},
    }
    torch.save(checkpoint, unfinished)
    unfinished.replace(path)


def resume(path: Path, options: argparse.Namespace, trainees: Sequence[Trainee]) -> None:
    """Puts the trainees back to where ``save`` found them; ValueError where there is none, or of another training."""
    if not path.exists():
        raise ValueError(f"there is no checkpoint at {path}; run without --resume first")
    checkpoint = torch.load(path, weights_only=True)
    if checkpoint["settings"] != settings(options):
        differing = [name for name, value in settings(options).items() if checkpoint["settings"].get(name) != value]
        raise ValueError(
            f"{path} was trained with other settings: "
            + ", ".join(
                f"{name} {checkpoint['settings'].get(name)} (now {getattr(options, name)})" for name in differing
            )
        )
    for trainee in trainees:
        trainee.load_state_dict(checkpoint["trainees"][trainee.name])
    torch.set_rng_state(checkpoint["rng"])


# ------------------------------------------------------------------------------------------------------------ training


def window_of(corpus: Corpus, iteration: int, steps: int) -> tuple[Tensor, bool]:
    """The (T + 1, B) characters of an iteration, and whether the streams start over with it."""
    windows = (len(corpus.train) - 1) // steps
    index = iteration % windows
    return corpus.train[index * steps : (index + 1) * steps + 1], index == 0


def train(corpus: Corpus, trainees: Sequence[Trainee], options: argparse.Namespace, console: Console) -> bool:
    """Trains both in turns up to ``options.iterations``; returns False when interrupted.  Saves in either case."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    first = len(trainees[0].losses)
    with (
        Interrupt() as interrupt,
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar,
    ):
        task = bar.add_task("", total=options.iterations, completed=first, loss="")
        for iteration in range(first, options.iterations):
            window, start_over = window_of(corpus, iteration, options.steps_per_window)
            # Who goes first alternates, so that neither always runs on the caches that the other has left.
            for trainee in trainees if iteration % 2 == 0 else trainees[::-1]:
                if start_over:
                    trainee.state = None
                trainee.step(window, options.clip)
            bar.update(task, advance=1, loss=f"loss {trainees[0].losses[-1]:.3f}")
            if interrupt.wanted:
                break
            if (iteration + 1) % options.save_every == 0:
                save(options.checkpoint, options, trainees)
    save(options.checkpoint, options, trainees)
    return len(trainees[0].losses) >= options.iterations


# -------------------------------------------------------------------------------------------------------------- report


def speed(trainee: Trainee, characters: int) -> float:
    """Characters a second at the median step: the first one compiles, and must not count."""
    return characters / torch.tensor(trainee.seconds, dtype=torch.float64).median().item()


def largest_difference(trainees: Sequence[Trainee]) -> float:
    ours, peer = trainees
    return max(abs(a - b) for a, b in zip(ours.losses, peer.losses, strict=True))


def show(console: Console, trainees: Sequence[Trainee], validation: dict[str, float], characters: int) -> None:
    """The final table."""
    table = Table(title="character language model")
    for name in ("", *(trainee.name for trainee in trainees)):
        table.add_column(name, justify="right" if name else "left")
    lines = {
        "training steps": [f"{len(trainee.losses)}" for trainee in trainees],
        "first loss, nats per character": [f"{trainee.losses[0]:.4f}" for trainee in trainees],
        "last loss": [f"{trainee.losses[-1]:.4f}" for trainee in trainees],
        "validation loss (held-out text)": [f"{validation[trainee.name]:.4f}" for trainee in trainees],
        "validation bits per character": [f"{validation[trainee.name] / math.log(2):.3f}" for trainee in trainees],
        "characters per second (median step)": [f"{speed(trainee, characters):,.0f}" for trainee in trainees],
        "first step, seconds": [f"{trainee.seconds[0]:.2f}" for trainee in trainees],
    }
    for name, cells in lines.items():
        table.add_row(name, *cells)
    console.print(table)
    ours, peer = trainees
    ratio = speed(ours, characters) / speed(peer, characters)
    console.print(f"speedup of the whole training step: [bold]{ratio:.2f}×[/]")
    console.print(f"largest difference between the two loss curves: {largest_difference(trainees):.2g}")


def draw(trainees: Sequence[Trainee], characters: int, path: Path) -> None:
    """Both loss curves, how far they are apart, and the throughput."""
    matplotlib.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(13, 4), dpi=130, layout="constrained")
    losses, difference, throughput = figure.subplots(1, 3, width_ratios=(2, 1.5, 1))
    ours, peer = trainees
    steps = range(1, len(ours.losses) + 1)
    losses.plot(steps, peer.losses, color=COLOURS[PEER], linewidth=5, alpha=0.55, label=PEER)
    losses.plot(steps, ours.losses, color=COLOURS[OURS], linewidth=1.5, label=OURS)
    losses.set(title="training loss: the curves overlap", xlabel="step", ylabel="nats per character")
    losses.grid(alpha=0.3)
    losses.legend(frameon=False)

    # A difference of exactly zero has no place on a logarithmic axis: it is left out.
    apart = [abs(a - b) or math.nan for a, b in zip(ours.losses, peer.losses, strict=True)]
    difference.plot(steps, apart, color="#444444", linewidth=1, marker=".", markersize=3)
    if any(value == value for value in apart):
        difference.set_yscale("log")
    difference.set(title="difference of the losses", xlabel="step", ylabel="|difference|, nats per character")
    difference.grid(alpha=0.3)

    speeds = [speed(trainee, characters) / 1e3 for trainee in trainees]
    bars = throughput.bar([trainee.name for trainee in trainees], speeds, color=[COLOURS[t.name] for t in trainees])
    throughput.bar_label(bars, [f"{value:.1f}k" for value in speeds], padding=3)
    throughput.set(title=f"throughput: {speeds[0] / speeds[1]:.2f}×", ylabel="thousand characters per second")
    throughput.set_ylim(0, max(speeds) * 1.15)
    throughput.tick_params(axis="x", length=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


# ---------------------------------------------------------------------------------------------------------------- main


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Trains a character language model on Python's standard library, with lstmcore.LSTM and with "
        "torch.nn.LSTM from the same seed, and compares losses and speed. Ctrl-C saves a checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--text", type=Path, help="a text file (UTF-8) instead of the standard library's sources")
    parser.add_argument("--iterations", type=positive, default=120, help="training steps of each model, in total")
    parser.add_argument("--steps-per-window", type=positive, default=1024, help="T: steps that gradients go back")
    parser.add_argument("--batch", type=positive, default=16, help="B: streams of text read side by side")
    parser.add_argument("--hidden-size", type=positive, default=256)
    parser.add_argument("--embedding-size", type=positive, default=64)
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradients")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the plot and the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--save-every", type=positive, default=25, help="steps between checkpoints")
    parser.add_argument("--sample", type=int, default=300, help="characters that the trained model writes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, compares, reports; returns the exit status."""
    options = parser().parse_args(arguments)
    options.checkpoint = options.out / "char_lm.pt"
    console = Console()
    try:
        text = read_text(options.text)
        corpus = Corpus.of(text, options.batch, options.steps_per_window)
    except TextError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.text_checksum = zlib.crc32(text.encode())
    console.print(
        f"{corpus.train.numel():,} characters to train on, {corpus.held_out.numel():,} held out, "
        f"vocabulary {len(corpus.characters)}; {torch.get_num_threads()} threads"
    )

    trainees = [Trainee.new(name, options, len(corpus.characters)) for name in (OURS, PEER)]
    for (name, mine), theirs in zip(trainees[0].model.named_parameters(), trainees[1].model.parameters(), strict=True):
        if not torch.equal(mine, theirs):
            raise AssertionError(f"expected the same initial {name} from the same seed, got different ones")
    if options.resume:
        try:
            resume(options.checkpoint, options, trainees)
        except ValueError as error:
            print(f"error: cannot resume: {error}", file=sys.stderr)
            return 2
        console.print(f"resumed after step {len(trainees[0].losses)} from {options.checkpoint}")

    finished = train(corpus, trainees, options, console)
    if not finished:
        console.print(f"stopped after step {len(trainees[0].losses)}; go on with --resume ({options.checkpoint})")
        return 130

    validation = {
        trainee.name: validate(trainee.model, corpus.held_out, options.steps_per_window, windows=8)
        for trainee in trainees
    }
    characters = options.batch * options.steps_per_window
    show(console, trainees, validation, characters)
    if options.sample > 0:
        sample = generate(trainees[0].model, corpus.characters, "def ", options.sample, 0.7, options.seed)
        console.print(Panel(Text(sample), title="written by the model with lstmcore.LSTM"))
    plot = options.out / "char_lm.png"
    draw(trainees, characters, plot)
    console.print(f"plot: {plot}; checkpoint: {options.checkpoint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A character language model on real text, trained with lstmcore.LSTM and with torch.nn.LSTM from the same seed.

    python examples/char_lm.py             # trains both, a minute or two on two cores
    python examples/char_lm.py --resume    # goes on from the checkpoint, as if it had never stopped

The text is the source code of Python's standard library, which every machine that runs this has; ``--text`` takes
another.  The two models start from the same weights, read the same characters and take turns, one step each, so that
their loss curves and their speed can be compared: the losses differ by rounding alone.  Text that neither has seen
says what was learned, in bits per character, beside what tables of counts (n-grams) of the same characters make of it,
and compressors.

Training is truncated backpropagation through time with a state that is carried on: the text is cut into B streams, each
step reads the next T characters of every stream, and h and c enter it as the step before left them (detached).  So the
model sees a context far beyond T, every character is used once a pass, and the position in the streams, together with
the state, is all that a checkpoint has to know about the data.  The learning rate rises at first and falls later, as
the number of the step alone says, so that a training can be made longer at any time.  Now and then the models are
validated; the weights that did best are kept, and are those that are tested in the end.

Legend: T steps, B batch (streams), V vocabulary.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import math
import sys
import sysconfig
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lstmcore
from common import CannotRun, Checkpoint, above_zero, add_options, brought_by, positive, reported
from loop import repeat
from ngrams import NGrams

with brought_by("examples"):
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from lstmcore.flow import plots

OURS, PEER = "lstmcore.LSTM", "torch.nn.LSTM"
COLOURS = {OURS: "#0b6e99", PEER: "#d1782a"}
VOCABULARY = 128  # V: the most frequent characters; all others share the last place
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
HELD_OUT = 0.025  # shares of the text, at its end, that are never trained on: one for validation, one for the test
NGRAMS = (2, 3, 5)  # characters that the tables of counts look at, the predicted one included
WARM_UP = 80  # steps in which the learning rate rises
State = tuple[Tensor, Tensor]


# ---------------------------------------------------------------------------------------------------------------- text


def read_files(path: Path | None) -> list[str]:
    """The text of a file, or by default those of the standard library's top-level modules in alphabetical order."""
    if path is None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(folder.glob("*.py"))
        if not files:
            raise CannotRun(f"no *.py files in {folder}, where Python's standard library should be; pass --text FILE")
    else:
        files = [path]
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8", errors="replace"))
        except OSError as error:
            raise CannotRun(f"cannot read {file}: {error.strerror}; pass a readable file with --text FILE") from error
    return texts


def vocabulary_of(text: str) -> str:
    """Its most frequent characters, then one for all others; a character's number is its place."""
    common = [character for character, _ in Counter(text).most_common(VOCABULARY - 1)]
    return "".join(sorted(common)) + UNKNOWN


def numbers_of(text: str, vocabulary: str) -> Tensor:
    """(N,) int64."""
    number = {character: index for index, character in enumerate(vocabulary)}
    return torch.tensor([number.get(character, len(vocabulary) - 1) for character in text])


def streams(sequence: Tensor, batch: int) -> Tensor:
    """(N,) to (N // B, B): B streams side by side, each a run of neighbours."""
    length = len(sequence) // batch
    return sequence[: length * batch].view(batch, length).t().contiguous()


def in_order(streams: Tensor) -> np.ndarray:
    """(S, B) to (S * B,): one stream after the other."""
    return streams.t().flatten().cpu().numpy()


@dataclass(frozen=True)
class Corpus:
    """Text as numbers, in B streams: to train on, to validate with, and to test with."""

    characters: str  # the vocabulary; index by number
    train: Tensor  # (S, B), S characters a stream
    validation: Tensor  # (S', B)
    test: Tensor  # (S', B)

    @staticmethod
    def of(text: str, batch: int, steps: int) -> Corpus:
        """Raises CannotRun where the text is too short for one window of training, of validation and of test."""
        needed = math.ceil(batch * (steps + 1) / HELD_OUT) + batch
        if len(text) < needed:
            raise CannotRun(
                f"the text is too small: {len(text):,} characters, but {batch} streams of {steps} steps, with twice "
                f"{HELD_OUT:.1%} held out, need {needed:,}; lower --batch or --steps-per-window, or pass more --text"
            )
        characters = vocabulary_of(text)
        data = numbers_of(text, characters)
        held_out = int(len(data) * HELD_OUT)
        parts = data.split([len(data) - 2 * held_out, held_out, held_out])
        return Corpus(characters, *(streams(part, batch) for part in parts))

    def to(self, device: torch.device) -> Corpus:
        return Corpus(self.characters, *(part.to(device) for part in (self.train, self.validation, self.test)))


# --------------------------------------------------------------------------------------------------------------- model


class CharModel(nn.Module):
    """Embedding, LSTM, linear: from characters to scores, for the next character unless ``kinds`` says otherwise."""

    def __init__(
        self,
        lstm: Callable[[int, int], nn.RNNBase],
        vocabulary: int,
        embedding_size: int,
        hidden_size: int,
        kinds: int | None = None,
        amp: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.amp = amp  # automatic mixed precision: what products round to; the parameters stay float32
        self.embedding = nn.Embedding(vocabulary, embedding_size)
        self.lstm = lstm(embedding_size, hidden_size)
        self.linear = nn.Linear(hidden_size, kinds or vocabulary)

    def forward(self, characters: Tensor, state: State | None) -> tuple[Tensor, State]:
        """(T, B) characters to (T, B, V) scores, and the state to go on from."""
        with torch.autocast(characters.device.type, self.amp, enabled=self.amp is not None):
            output, state = self.lstm(self.embedding(characters), state)
            return self.linear(output).float(), state


@dataclass
class Trainee:
    """One of the two models, with all that training changes."""

    name: str
    model: CharModel
    optimizer: torch.optim.Optimizer
    state: State | None = None
    losses: list[float] = field(default_factory=list)  # nats a character, one a step
    seconds: list[float] = field(default_factory=list)  # one a step
    validations: list[tuple[int, float]] = field(default_factory=list)  # steps done, nats a character
    best: dict[str, Tensor] = field(default_factory=dict)  # the weights of the best of them

    @staticmethod
    def new(name: str, options: argparse.Namespace, vocabulary: int) -> Trainee:
        """From the seed: both LSTMs draw the same weights from it, for they draw in the same order."""
        torch.manual_seed(options.seed)
        lstm: Callable[[int, int], nn.RNNBase] = lstmcore.LSTM if name == OURS else nn.LSTM
        amp = getattr(torch, options.amp) if options.amp else None
        model = CharModel(lstm, vocabulary, options.embedding_size, options.hidden_size, amp=amp).to(options.device)
        return Trainee(name, model, torch.optim.Adam(model.parameters(), lr=options.learning_rate))

    def step(self, window: Tensor, options: argparse.Namespace) -> None:
        """One step of training on (T + 1, B) characters: each of the first T predicts its successor."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * schedule(len(self.losses))
        scores, (h, c) = self.model(window[:-1], self.state)
        loss = F.cross_entropy(scores.flatten(0, 1), window[1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self.optimizer.step()
        self.state = (h.detach(), c.detach())
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    def validate(self, corpus: Corpus, options: argparse.Namespace) -> None:
        """Keeps the weights if none before were better."""
        loss = evaluate(self.model, corpus.validation, options.steps_per_window, windows=16)
        if not self.validations or loss < min(earlier for _, earlier in self.validations):
            self.best = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.validations.append((len(self.losses), loss))

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": self.state,
            "losses": self.losses,
            "seconds": self.seconds,
            "validations": self.validations,
            "best": self.best,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state = saved["state"] and tuple(each.to(self.model.linear.weight.device) for each in saved["state"])
        self.losses, self.seconds = saved["losses"], saved["seconds"]
        self.validations, self.best = saved["validations"], saved["best"]


def schedule(step: int) -> float:
    """The share of the learning rate at a step: it rises to all of it, then falls with the square root of the steps."""
    return min((step + 1) / WARM_UP, (WARM_UP / (step + 1)) ** 0.5)


@torch.no_grad()
def evaluate(model: CharModel, text: Tensor, steps: int, windows: int | None = None) -> float:
    """Nats a character on (S, B) text, or so many windows of it, read in order with the state carried on."""
    total, count, state = 0.0, 0, None
    for start in range(0, len(text) - 1 if windows is None else min(windows * steps, len(text) - 1), steps):
        window = text[start : start + steps + 1]
        scores, state = model(window[:-1], state)
        total += F.cross_entropy(scores.flatten(0, 1), window[1:].flatten(), reduction="sum").item()
        count += window[1:].numel()
    return total / count


@torch.no_grad()
def generate(model: CharModel, characters: str, prompt: str, length: int, temperature: float, seed: int) -> str:
    """``prompt`` and what the model writes after it, one character a call, with the state carried on."""
    generator = torch.Generator().manual_seed(seed)  # its own, so that sampling leaves the training's stream alone
    text, device = prompt, model.linear.weight.device
    following = torch.tensor([[max(0, characters.find(character))] for character in prompt], device=device)  # (T, 1)
    state = None
    for _ in range(length):
        scores, state = model(following, state)
        probabilities = torch.softmax(scores[-1, 0].cpu() / temperature, 0)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        text += characters[int(drawn)]
        following = drawn[None].to(device)
    return text


# ------------------------------------------------------------------------------------------------------------ training


def window_of(corpus: Corpus, iteration: int, steps: int) -> tuple[Tensor, bool]:
    """The (T + 1, B) characters of an iteration, and whether the streams start over with it."""
    windows = (len(corpus.train) - 1) // steps
    index = iteration % windows
    return corpus.train[index * steps : (index + 1) * steps + 1], index == 0


# What has to be the same for a checkpoint to be continued; --iterations may grow.
SETTINGS = (
    "text_checksum", "seed", "batch", "steps_per_window", "embedding_size", "hidden_size", "learning_rate", "clip",
    "validate_every", "amp",
)  # fmt: skip


def train(
    corpus: Corpus, trainees: Sequence[Trainee], checkpoint: Checkpoint, options: argparse.Namespace, console: Console
) -> bool:
    """Trains both in turns up to ``options.iterations``; returns False when interrupted.  Saves in either case."""

    def iterate(iteration: int) -> str:
        window, start_over = window_of(corpus, iteration, options.steps_per_window)
        # Who goes first alternates, so that neither always runs on the caches that the other has left.
        for trainee in trainees if iteration % 2 == 0 else trainees[::-1]:
            if start_over:
                trainee.state = None
            trainee.step(window, options)
            if (iteration + 1) % options.validate_every == 0:
                trainee.validate(corpus, options)
        return f"loss {trainees[0].losses[-1]:.3f}"

    def state() -> dict[str, Any]:
        return {trainee.name: trainee.state_dict() for trainee in trainees}

    return repeat(iterate, len(trainees[0].losses), checkpoint, state, options, console)


# ----------------------------------------------------------------------------------------------------------- baselines


def baselines(corpus: Corpus, steps: int) -> dict[str, float]:
    """Bits per character of the test by what needs no gradient: counts of the ``steps`` a stream that were read."""
    read, test = in_order(corpus.train[: steps + 1]), in_order(corpus.test)
    found = {}
    for size in (size for size in NGRAMS if size < len(read)):
        table = NGrams(read[:-1], read[1:], len(corpus.characters), len(corpus.characters), size - 1)
        found[f"{size}-gram of the characters read"] = float(-np.log2(table.chance(test[:-1], test[1:])).mean())
    text = "".join(corpus.characters[number] for number in test).encode()
    found["gzip -9 of the test alone"] = 8 * len(gzip.compress(text, 9)) / len(test)
    found["xz -9 of the test alone"] = 8 * len(lzma.compress(text, preset=9)) / len(test)
    return found


# -------------------------------------------------------------------------------------------------------------- report


def speed(trainee: Trainee, characters: int) -> float:
    """Characters a second at the median step: the first one compiles, and must not count."""
    return characters / torch.tensor(trainee.seconds, dtype=torch.float64).median().item()


def largest_difference(trainees: Sequence[Trainee]) -> float:
    ours, peer = trainees
    return max(abs(a - b) for a, b in zip(ours.losses, peer.losses, strict=True))


def show(console: Console, trainees: Sequence[Trainee], tested: dict[str, float], characters: int) -> None:
    """The final table."""
    table = Table(title="character language model")
    for name in ("", *(trainee.name for trainee in trainees)):
        table.add_column(name, justify="right" if name else "left")
    lines = {
        "training steps": [f"{len(trainee.losses)}" for trainee in trainees],
        "first loss, nats per character": [f"{trainee.losses[0]:.4f}" for trainee in trainees],
        "last loss": [f"{trainee.losses[-1]:.4f}" for trainee in trainees],
        "best validation loss": [f"{min(loss for _, loss in trainee.validations):.4f}" for trainee in trainees],
        "bits per character of the test": [f"{tested[trainee.name]:.3f}" for trainee in trainees],
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


def show_learning(console: Console, tested: dict[str, float], others: dict[str, float]) -> None:
    """Whether it learned: bits per character of text that nobody has seen, the best first."""
    table = Table(title="the test: fewer bits are better")
    table.add_column("")
    table.add_column("bits per character", justify="right")
    for name, bits in sorted((tested | others).items(), key=lambda each: each[1]):
        table.add_row(name, f"{bits:.3f}", style="bold" if name in tested else "")
    console.print(table)


@plots.styled
def draw(trainees: Sequence[Trainee], characters: int, others: dict[str, float]) -> Figure:
    """Both loss curves beside tables of counts, how far they are apart, and the throughput."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    losses, difference, throughput = figure.subplots(1, 3, width_ratios=(2, 1.5, 1))
    ours, peer = trainees
    steps = range(1, len(ours.losses) + 1)
    losses.plot(steps, peer.losses, color=COLOURS[PEER], linewidth=5, alpha=0.55, label=PEER)
    losses.plot(steps, ours.losses, color=COLOURS[OURS], linewidth=1.5, label=OURS)
    losses.plot(*zip(*ours.validations, strict=True), "o", color="black", markersize=4, label=f"{OURS}, validation")
    for (name, bits), line in zip(others.items(), (":", "--", "-."), strict=False):
        label = f"{name.split()[0]}, test"
        losses.axhline(bits * math.log(2), color=plots.GREY, linestyle=line, linewidth=1, label=label)
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
    return figure


# ---------------------------------------------------------------------------------------------------------------- main


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Trains a character language model on Python's standard library, with lstmcore.LSTM and with "
        "torch.nn.LSTM from the same seed, and compares losses and speed. Ctrl-C saves a checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--text", type=Path, help="a text file (UTF-8) instead of the standard library's sources")
    parser.add_argument("--iterations", type=positive, default=480, help="training steps of each model, in total")
    parser.add_argument("--steps-per-window", type=positive, default=256, help="T: steps that gradients go back")
    parser.add_argument("--batch", type=positive, default=16, help="B: streams of text read side by side")
    parser.add_argument("--hidden-size", type=positive, default=256)
    parser.add_argument("--embedding-size", type=positive, default=64)
    parser.add_argument("--learning-rate", type=above_zero(float), default=1e-2, help="the highest")
    parser.add_argument("--clip", type=above_zero(float), default=1.0, help="largest norm of the gradients")
    parser.add_argument("--amp", choices=["bfloat16"], help="automatic mixed precision")
    parser.add_argument("--validate-every", type=positive, default=80, help="steps between validations")
    parser.add_argument("--sample", type=int, default=300, help="characters that the trained model writes")
    add_options(parser, out="out", save_every=100)
    return parser


@reported
def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, compares, reports; returns the exit status."""
    options = parser().parse_args(arguments)
    console = Console()
    text = "".join(read_files(options.text))
    corpus = Corpus.of(text, options.batch, options.steps_per_window).to(options.device)
    options.text_checksum = zlib.crc32(text.encode())
    console.print(
        f"{corpus.train.numel():,} characters to train on, {corpus.test.numel():,} to validate with, as many to test, "
        f"vocabulary {len(corpus.characters)}; {options.device}, {torch.get_num_threads()} threads",
        soft_wrap=True,
    )
    trainees = [Trainee.new(name, options, len(corpus.characters)) for name in (OURS, PEER)]
    for (name, mine), theirs in zip(trainees[0].model.named_parameters(), trainees[1].model.parameters(), strict=True):
        if not torch.equal(mine, theirs):
            raise AssertionError(f"expected the same initial {name} from the same seed, got different ones")
    settings = {"example": "char_lm"} | {name: getattr(options, name) for name in SETTINGS}
    checkpoint = Checkpoint(options.out / "char_lm.pt", settings)
    if options.resume:
        saved = checkpoint.load()
        for trainee in trainees:
            trainee.load_state_dict(saved[trainee.name])
        console.print(f"resumed after iteration {len(trainees[0].losses)} from {checkpoint.path}", soft_wrap=True)

    if not train(corpus, trainees, checkpoint, options, console):
        return 130
    report(corpus, trainees, options, console)
    console.print(f"plot: {options.out / 'char_lm.png'}; checkpoint: {checkpoint.path}", soft_wrap=True)
    return 0


def report(corpus: Corpus, trainees: Sequence[Trainee], options: argparse.Namespace, console: Console) -> None:
    """Tests the best weights of both, and shows everything."""
    tested = {}
    for trainee in trainees:
        if not trainee.validations or trainee.validations[-1][0] < len(trainee.losses):
            trainee.validate(corpus, options)
        trainee.model.load_state_dict(trainee.best)
        tested[trainee.name] = evaluate(trainee.model, corpus.test, options.steps_per_window) / math.log(2)
    characters = options.batch * options.steps_per_window
    show(console, trainees, tested, characters)
    others = baselines(corpus, len(trainees[0].losses) * options.steps_per_window)
    show_learning(console, tested, others)
    if options.sample > 0:
        sample = generate(trainees[0].model, corpus.characters, "def ", options.sample, 0.7, options.seed)
        console.print(Panel(Text(sample), title="written by the model with lstmcore.LSTM"))
    plots.save(draw(trainees, characters, others), options.out, "char_lm")


if __name__ == "__main__":
    sys.exit(main())

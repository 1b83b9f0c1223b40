"""Which package of Python's standard library does a passage of source code come from?  Answered by lstmcore.LSTM.

    python examples/text_classification.py             # two or three minutes on two cores
    python examples/text_classification.py --resume    # goes on from the checkpoint, as if it had never stopped

Every machine that runs this has the text.  It is cut into passages of a few lines, of 100 to 600 characters, and these
into words, parts of words (``readLine`` is two) and signs.  Whole files are held out, some to choose the weights that
are kept, others for the test: passages of one file resemble each other, and must not lie on both sides.

A batch is padded to its longest passage and goes through the LSTM with ``lengths=``, in both directions: rows cost what
their own steps cost, nothing of the padding counts, and no packing is needed.  Every token then votes for a package, by
what it is and by what the LSTM read around it; a passage's votes are added.

The baseline is a bag of words: naive Bayes over the same tokens of the same files, present or absent, its smoothing
chosen on the validation files.  For this question it is a strong one, since one rare name often gives the answer.  The
last row adds the two models' log-probabilities, with a weight from the validation files: it shows what the LSTM knows
that the words alone do not tell.

Legend: T tokens of the longest passage, B batch, V vocabulary, K packages.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import rnn

import lstmcore
from common import CannotRun, Checkpoint, add_options, brought_by, positive, reported
from learner import SETTINGS, Learner, add_training_options, compare_steps, measured

with brought_by("examples"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from rich.console import Console
    from rich.table import Table

    from lstmcore.flow import plots

PACKAGES = (
    "asyncio", "email", "http", "importlib", "logging", "multiprocessing", "tkinter", "unittest", "urllib", "xml",
)  # fmt: skip
TESTS = {"test", "tests", "idle_test"}  # folders that not every installation has
HELD_OUT = {"test": 0.25, "validation": 0.15}  # of the characters of a package, at most, in whole files
SHORTEST, LONGEST = 100, 500  # characters of a passage, before its last line is completed
TOKEN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d|[^\w\s]|\n *")
PADDING, UNKNOWN = 0, 1
CROP = (20, 200)  # tokens of what is trained on
SMOOTHING = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
WEIGHTS = [number / 100 for number in range(0, 105, 5)]  # of the bag of words in the sum
LSTM, BAG, MAJORITY, BOTH = "lstmcore.LSTM", "bag of words", "largest package", "LSTM + bag of words"


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Part:
    """Passages as numbers of tokens, and the package that each comes from."""

    tokens: list[Tensor]
    labels: Tensor  # (M,)


@dataclass(frozen=True)
class Corpus:
    packages: list[str]
    vocabulary: int  # V
    files: Part  # what is trained on, whole
    train: Part  # the same in passages
    validation: Part
    test: Part
    checksum: int

    @staticmethod
    def read(folder: Path) -> Corpus:
        """Raises CannotRun where too few of the packages are there."""
        split: dict[str, list[tuple[str, int]]] = {"train": [], "validation": [], "test": []}
        packages: list[str] = []
        for name in PACKAGES:
            parts = split_files(read_package(folder / name))
            if parts["train"] and parts["test"]:
                for part, texts in parts.items():
                    split[part] += [(text, len(packages)) for text in texts]
                packages.append(name)
        if len(packages) < 2 or not split["validation"]:
            raise CannotRun(
                f"expected at least two of the packages {', '.join(PACKAGES)} with sources in {folder}, "
                f"got {', '.join(packages) or 'none'}; install Python with its standard library"
            )
        cutter = random.Random(0)
        passages = {
            part: [(passage, label) for text, label in texts for passage in cut(text, cutter)]
            for part, texts in split.items()
        }
        counts = Counter(token for text, _ in split["train"] for token in TOKEN.findall(text))
        number = {
            token: index for index, token in enumerate(sorted(t for t, n in counts.items() if n > 1), UNKNOWN + 1)
        }

        def encoded(texts: Sequence[tuple[str, int]]) -> Part:
            tokens = [torch.tensor([number.get(token, UNKNOWN) for token in TOKEN.findall(text)]) for text, _ in texts]
            kept = [index for index, each in enumerate(tokens) if len(each)]
            return Part([tokens[index] for index in kept], torch.tensor([texts[index][1] for index in kept]))

        whole = "".join(text for texts in split.values() for text, _ in texts)
        encoded_passages = {part: encoded(each) for part, each in passages.items()}
        files = encoded(split["train"])
        return Corpus(packages, len(number) + 2, files, **encoded_passages, checksum=zlib.crc32(whole.encode()))


def read_package(folder: Path) -> list[str]:
    files = sorted(file for file in folder.rglob("*.py") if not TESTS & {*file.relative_to(folder).parts})
    return [text for file in files if (text := file.read_text(encoding="utf-8", errors="replace")).strip()]


def split_files(texts: list[str]) -> dict[str, list[str]]:
    """Files of a package for each part: in an order by chance, whatever --seed is, and as many as fit."""
    texts = random.Random(0).sample(texts, len(texts))
    room = {part: share * sum(map(len, texts)) for part, share in HELD_OUT.items()}
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for text in texts:
        part = next((part for part in room if len(text) <= room[part]), "train")
        parts[part].append(text)
        if part in room:
            room[part] -= len(text)
    return parts


def cut(text: str, cutter: random.Random) -> list[str]:
    """Passages of whole lines, one after the other."""
    passages, start = [], 0
    while start < len(text):
        end = text.find("\n", start + cutter.randint(SHORTEST, LONGEST)) + 1 or len(text)
        passages.append(text[start:end])
        start = end
    return passages


# ------------------------------------------------------------------------------------------------------------ baseline


class Bag:
    """Naive Bayes: how likely each token is in each package, its presence alone, and how common the packages are."""

    def __init__(self, train: Part, vocabulary: int, packages: int, smoothing: float) -> None:
        found = torch.zeros(packages, vocabulary).index_add_(0, train.labels, presence(train.tokens, vocabulary))
        found = found[:, UNKNOWN:] + smoothing
        self.likely = F.pad((found / found.sum(1, keepdim=True)).log(), (UNKNOWN, 0))  # (K, V)
        self.common = (torch.bincount(train.labels, minlength=packages) + smoothing).log()

    def __call__(self, part: Part) -> Tensor:
        """(M, K): the logarithm of the probability of each package."""
        scores = presence(part.tokens, self.likely.shape[1]) @ self.likely.T + self.common
        return scores.log_softmax(1)

    @staticmethod
    def best(corpus: Corpus) -> Bag:
        """With the smoothing that is right most often on the validation files."""
        sizes = (corpus.vocabulary, len(corpus.packages))
        bags = [Bag(corpus.train, *sizes, smoothing) for smoothing in SMOOTHING]
        return max(bags, key=lambda bag: accuracy(bag(corpus.validation), corpus.validation))


def presence(tokens: Sequence[Tensor], vocabulary: int) -> Tensor:
    """(M, V): 1 where a passage holds a token."""
    found = torch.zeros(len(tokens), vocabulary)
    for row, each in zip(found, tokens, strict=True):
        row[each] = 1
    return found


def accuracy(scores: Tensor, part: Part) -> float:
    return (scores.argmax(1) == part.labels).float().mean().item()


# --------------------------------------------------------------------------------------------------------------- model


class Classifier(nn.Module):
    """Every token votes, by itself and by what the LSTM read before and after it."""

    def __init__(self, lstm: Callable[..., nn.RNNBase], sizes: Sequence[int], options: argparse.Namespace) -> None:
        super().__init__()
        vocabulary, packages = sizes
        self.embedding = nn.Embedding(vocabulary, options.embedding_size, padding_idx=PADDING)
        self.lstm = lstm(options.embedding_size, options.hidden_size, bidirectional=True)
        self.hidden = nn.Linear(options.embedding_size + 2 * options.hidden_size, 128)
        self.vote = nn.Linear(128, packages)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(T, B) tokens, padded, to (B, K) scores."""
        mask = torch.arange(len(tokens), device=tokens.device)[:, None] < lengths  # (T, B)
        if self.training:  # a token that is not there cannot be relied on
            hidden = torch.rand(tokens.shape).to(tokens.device) < self.dropout.p
            tokens = tokens.masked_fill(hidden & mask, UNKNOWN)
        embedded = self.embedding(tokens)
        around = self.read(self.dropout(embedded), lengths)
        votes = self.vote(self.dropout(torch.tanh(self.hidden(self.dropout(torch.cat([embedded, around], -1))))))
        return (votes * mask[..., None]).sum(0) / lengths[:, None].sqrt()

    def read(self, input: Tensor, lengths: Tensor) -> Tensor:
        """(T, B, 2H): what the LSTM makes of it; torch's takes a padded batch packed only."""
        if isinstance(self.lstm, lstmcore.LSTM):
            return self.lstm(input, lengths=lengths)[0]
        packed = rnn.pack_padded_sequence(input, lengths.cpu(), enforce_sorted=False)
        return rnn.pad_packed_sequence(self.lstm(packed)[0], total_length=len(input))[0]


def padded(tokens: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(each) for each in tokens])
    return rnn.pad_sequence(list(tokens), padding_value=PADDING).to(device), lengths.to(device)


def loss_of(files: Part, options: argparse.Namespace) -> Callable[[nn.Module], Tensor]:
    """Of passages drawn anew at each call, from anywhere in the files; longer ones are drawn more often."""
    sizes = torch.tensor([len(each) for each in files.tokens], dtype=torch.float64)

    def loss(model: nn.Module) -> Tensor:
        drawn = torch.multinomial(sizes, options.batch, replacement=True)
        lengths = torch.randint(CROP[0], CROP[1] + 1, (options.batch,)).tolist()
        starts = torch.rand(options.batch).tolist()
        crops = []
        for file, length, start in zip(drawn.tolist(), lengths, starts, strict=True):
            tokens = files.tokens[file]
            first = int(start * max(1, len(tokens) - length))
            crops.append(tokens[first : first + length])
        scores = model(*padded(crops, options.device))
        return F.cross_entropy(scores, files.labels[drawn].to(options.device))

    return loss


def answer(model: nn.Module, part: Part, device: torch.device) -> Tensor:
    """(M, K): the logarithm of the probability of each package, on the CPU."""
    batches = [model(*padded(part.tokens[first : first + 256], device)) for first in range(0, len(part.tokens), 256)]
    return torch.cat(batches).log_softmax(1).cpu()


# -------------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Tested:
    """The test's log-probabilities by model, and the weight of the bag of words in the sum."""

    part: Part
    packages: list[str]
    scores: dict[str, Tensor]  # (M, K) each
    weight: float

    def accuracy(self, name: str) -> float:
        return accuracy(self.scores[name], self.part)

    def confusion(self, name: str) -> Tensor:
        """(K, K): of the passages of each package, a row, the share that is said to come from each."""
        size = len(self.packages)
        pairs = self.part.labels * size + self.scores[name].argmax(1)
        counts = torch.bincount(pairs, minlength=size * size).view(size, size).double()
        return counts / counts.sum(1, keepdim=True).clamp(min=1)


def test(model: nn.Module, corpus: Corpus, device: torch.device) -> Tested:
    bag = Bag.best(corpus)
    answers: dict[str, Tensor] = {}

    def keep(model: nn.Module) -> float:
        answers.update(validation=answer(model, corpus.validation, device), test=answer(model, corpus.test, device))
        return 0.0

    measured(model, keep)
    theirs = {"validation": bag(corpus.validation), "test": bag(corpus.test)}

    def added(part: str, weight: float) -> Tensor:
        return (1 - weight) * answers[part] + weight * theirs[part]

    weight = max(WEIGHTS, key=lambda weight: accuracy(added("validation", weight), corpus.validation))
    largest = torch.bincount(corpus.train.labels, minlength=len(corpus.packages)).log()
    majority = largest.expand(len(corpus.test.labels), -1)
    scores = {MAJORITY: majority, BAG: theirs["test"], LSTM: answers["test"], BOTH: added("test", weight)}
    return Tested(corpus.test, corpus.packages, scores, weight)


def show(console: Console, tested: Tested, seconds: tuple[float, float]) -> None:
    table = Table(title="test, on files held out")
    table.add_column("", no_wrap=True)
    table.add_column("right", justify="right")
    for name in tested.scores:
        table.add_row(name, f"{tested.accuracy(name):.1%}", style="bold" if name == LSTM else "")
    console.print(table)
    mine, theirs, both = (tested.accuracy(name) for name in (LSTM, BAG, BOTH))
    console.print(
        f"right answers, in points of percent beside the bag of words: the LSTM {100 * (mine - theirs):+.1f}, both "
        f"together {100 * (both - theirs):+.1f} (weight of the bag {tested.weight:.2f})",
        highlight=False,
        soft_wrap=True,
    )
    ours, peer = seconds
    console.print(
        f"forward and backward of one batch: {ours * 1e3:.0f} ms, with torch.nn.LSTM, packed, {peer * 1e3:.0f} ms: "
        f"[bold]{peer / ours:.2f}×[/]",
        soft_wrap=True,
    )


@plots.styled
def draw(tested: Tested) -> Figure:
    """Who is taken for whom, by the LSTM and by the bag of words."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), (LSTM, BAG), strict=True):
        image = draw_confusion(axes, tested, name)
    figure.axes[0].set_ylabel("package that the passage comes from")
    figure.colorbar(image, ax=figure.axes, label="share of the package's passages", shrink=0.8)
    figure.suptitle(
        f"{len(tested.part.labels):,} passages of files held out, {len(tested.packages)} packages; "
        f"the largest alone: {tested.accuracy(MAJORITY):.1%}",
        fontsize=11,
    )
    return figure


def draw_confusion(axes: Axes, tested: Tested, name: str) -> AxesImage:
    shares, size = tested.confusion(name), len(tested.packages)
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    for row in range(size):
        for column in range(size):
            share = float(shares[row, column])
            if share >= 0.005:
                colour = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{share * 100:.0f}", ha="center", va="center", color=colour, fontsize=8.5)
    counts = torch.bincount(tested.part.labels, minlength=size).tolist()
    axes.set_xticks(range(size), tested.packages, rotation=45, ha="right")
    axes.set_yticks(
        range(size), [f"{package} ({count})" for package, count in zip(tested.packages, counts, strict=True)]
    )
    axes.set(title=f"{name}: {tested.accuracy(name):.1%} right (cells in percent)", xlabel="package that is answered")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


# ---------------------------------------------------------------------------------------------------------------- main


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Tells packages of the standard library apart by a few lines, with lstmcore.LSTM, and compares "
        "with a bag of words. Ctrl-C saves a checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--sources", type=Path, help="a folder of packages instead of the standard library's")
    parser.add_argument("--embedding-size", type=positive, default=64)
    parser.add_argument("--dropout", type=share, default=0.3, help="share of tokens and values left out in training")
    add_training_options(parser, iterations=1200, batch=64, hidden_size=96, learning_rate=5e-3, validate_every=100)
    add_options(parser, out="out/text_classification", save_every=100)
    return parser


def share(text: str) -> float:
    """For argparse: a number from 0 up to, and not including, 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 up to 1, got {text}")
    return value


@reported
def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, compares, reports; returns the exit status."""
    options = parser().parse_args(arguments)
    console = Console()
    corpus = Corpus.read(options.sources or Path(sysconfig.get_paths()["stdlib"]))
    console.print(
        f"{len(corpus.packages)} packages ({', '.join(corpus.packages)}): "
        f"{len(corpus.train.tokens):,} passages to train on, {len(corpus.validation.tokens):,} to validate with, "
        f"{len(corpus.test.tokens):,} to test; vocabulary {corpus.vocabulary:,}; "
        f"{options.device}, {torch.get_num_threads()} threads",
        soft_wrap=True,
        highlight=False,
    )
    torch.manual_seed(options.seed)
    sizes = (corpus.vocabulary, len(corpus.packages))
    model = Classifier(lstmcore.LSTM, sizes, options).to(options.device)
    learner = Learner(model, torch.optim.AdamW(model.parameters(), weight_decay=0.01))
    settings = {name: getattr(options, name) for name in (*SETTINGS, "embedding_size", "dropout")}
    settings |= {"example": "text_classification", "text_checksum": corpus.checksum}
    checkpoint = Checkpoint(options.out / "text_classification.pt", settings)
    if options.resume:
        learner.load_state_dict(checkpoint.load())
        console.print(f"resumed after step {len(learner.losses)} from {checkpoint.path}", soft_wrap=True)

    def error(model: nn.Module) -> float:
        return 1 - accuracy(answer(model, corpus.validation, options.device), corpus.validation)

    loss = loss_of(corpus.files, options)
    if not learner.train(loss, error, checkpoint, options, console):
        return 130
    learner.take_best()
    tested = test(model, corpus, options.device)
    peer = Classifier(nn.LSTM, sizes, options).to(options.device)
    peer.load_state_dict(model.state_dict())
    show(console, tested, compare_steps(model, peer, loss))
    plots.save(draw(tested), options.out, "text_classification")
    console.print(f"plot: {options.out / 'text_classification.png'}; checkpoint: {checkpoint.path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

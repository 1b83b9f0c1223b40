"""A syntax highlighter that reads one key at a time: lstmcore.Stream, what it gets right, and how long a key takes.

    python examples/streaming.py             # under a minute
    python examples/streaming.py --resume    # goes on from the checkpoint, as if it had never stopped

While somebody types Python, the model says of each character, as it comes, whether it is code, a comment or a string.
What is inside of a docstring looks like any other text: the quotes that opened it may be hundreds of characters back,
so an answer needs a memory.  The text is the source code of Python's standard library, the right answers are those of
its own module ``tokenize``, and the baseline is a table of counts: the most frequent answer after the same last
characters, learned from the same text.

1. Training, on long windows of many streams side by side, with the state carried on: an ordinary ``lstmcore.LSTM``.
2. Typing: text that was not trained on, one character a call through ``lstmcore.Stream``.  The outputs are compared
   with those of one long run of the module.
3. Latency: the step of the LSTM alone, each after the one before, beside what torch and onnxruntime have for it.

Legend: T steps, B batch (streams of text), V vocabulary, H hidden, N characters typed.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import logging
import sys
import time
import tokenize
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lstmcore
from char_lm import CharModel, in_order, numbers_of, read_files, streams, vocabulary_of
from common import CannotRun, Checkpoint, above_zero, add_options, brought_by, fast_arithmetic, positive, reported
from loop import repeat
from ngrams import NGrams

with brought_by("examples"):
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from lstmcore.flow import plots

KINDS = ("code", "comment", "string")
CODE, COMMENT, STRING = range(3)
STYLES = ("default", "green", "magenta")  # in the terminal
LOOK_BACK = 5  # characters that the table of counts sees
HELD_OUT = 0.05  # share of the text, at its end, that is never trained on
CHECKED = 200  # steps in which the outputs of all that are timed are compared
UNCOUNTED = 500  # steps before the ones that are timed
QUANTILES = (0.5, 0.9, 0.99, 0.999)


# ---------------------------------------------------------------------------------------------------------------- text


def kinds_of(source: str) -> np.ndarray:
    """(N,) of 0 to 2: what each character of a Python program belongs to.

    Raises:
        SyntaxError, tokenize.TokenError: it is none.
    """
    file = io.StringIO(source, newline="")
    starts = np.cumsum([0, *map(len, file)])
    file.seek(0)
    kinds = np.full(len(source), CODE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # programs of other versions have escapes that are deprecated now
        for token in tokenize.generate_tokens(file.readline):
            # A string is one token, or, since Python 3.12, an f-string several: FSTRING_START, ...
            string = tokenize.tok_name[token.type].split("_")[0].endswith("STRING")
            if string or token.type == tokenize.COMMENT:
                first, last = (starts[row - 1] + column for row, column in (token.start, token.end))
                kinds[first:last] = STRING if string else COMMENT
    return kinds


def read_programs(path: Path | None, characters: int) -> tuple[str, np.ndarray]:
    """So many characters of source code, and the kind of each: a file, or as much of the standard library as it takes.

    Raises:
        CannotRun: the file is no Python program.
    """
    texts, kinds, length = [], [], 0
    for source in read_files(path):
        try:
            kinds.append(kinds_of(source))
        except (SyntaxError, tokenize.TokenError) as error:
            if path is None:
                continue  # of another version of Python than it is part of: a test's data
            raise CannotRun(f"{path} is no Python program: {error}; pass one with --text FILE") from error
        texts.append(source)
        length += len(source)
        if length >= characters:
            break
    return "".join(texts)[:characters], np.concatenate(kinds)[:characters] if kinds else np.zeros(0, int)


@dataclass(frozen=True)
class Programs:
    """Source code as numbers, with the kind of each character: to train on in B streams, and to type."""

    vocabulary: str
    train: Tensor  # (S, B)
    train_kinds: Tensor  # (S, B)
    typed: Tensor  # (N,)
    typed_kinds: Tensor  # (N,)

    @staticmethod
    def of(text: str, kinds: np.ndarray, options: argparse.Namespace) -> Programs:
        """Raises CannotRun where the text is too short."""
        held_out = max(int(len(text) * HELD_OUT), CHECKED + LOOK_BACK)
        needed = options.batch * options.steps + held_out
        if len(text) < needed:
            raise CannotRun(
                f"the text is too small: {len(text):,} characters, but {options.batch} streams of {options.steps} "
                f"steps and {held_out:,} to type need {needed:,}; lower --batch or --steps, or pass more --text"
            )
        vocabulary = vocabulary_of(text)
        characters, split = numbers_of(text, vocabulary), len(text) - held_out
        kinds = torch.from_numpy(kinds)
        return Programs(
            vocabulary,
            streams(characters[:split], options.batch).to(options.device),
            streams(kinds[:split], options.batch).to(options.device),
            characters[split:][: options.type],
            kinds[split:][: options.type],
        )


# ------------------------------------------------------------------------------------------------------------ training


@dataclass
class Training:
    """The model, with all that training changes."""

    model: CharModel
    optimizer: torch.optim.Optimizer
    state: tuple[Tensor, Tensor] | None = None
    losses: list[float] = field(default_factory=list)  # nats a character, one a step

    @staticmethod
    def new(options: argparse.Namespace, vocabulary: int) -> Training:
        torch.manual_seed(options.seed)
        model = CharModel(lstmcore.LSTM, vocabulary, options.embedding_size, options.hidden_size, len(KINDS))
        model.to(options.device)
        return Training(model, torch.optim.Adam(model.parameters(), lr=options.learning_rate))

    def step(self, programs: Programs, options: argparse.Namespace) -> None:
        """On the next window of all streams, which start over when they are through."""
        windows = len(programs.train) // options.steps
        index = len(self.losses) % windows
        window = slice(index * options.steps, (index + 1) * options.steps)
        scores, (h, c) = self.model(programs.train[window], self.state if index else None)
        loss = F.cross_entropy(scores.flatten(0, 1), programs.train_kinds[window].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self.optimizer.step()
        self.state = h.detach(), c.detach()
        self.losses.append(loss.item())

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": self.state,
            "losses": self.losses,
        }

    def load_state_dict(self, saved: dict[str, Any], device: torch.device) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state = saved["state"] and tuple(each.to(device) for each in saved["state"])
        self.losses = saved["losses"]


# What has to be the same for a checkpoint to be continued; --iterations may grow.
SETTINGS = (
    "text_checksum", "seed", "batch", "steps", "embedding_size", "hidden_size", "learning_rate", "clip",
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- typing


class Highlighter:
    """The trained model, one key at a time."""

    def __init__(self, model: CharModel) -> None:
        self._stream = lstmcore.Stream(model.lstm)
        self._embedding = model.embedding.weight.detach().cpu().numpy()  # (V, E)
        self._weight = model.linear.weight.detach().cpu().numpy()  # (3, H)
        self._bias = model.linear.bias.detach().cpu().numpy()

    def key(self, character: int) -> int:
        """The number of a character to its kind."""
        self.output = self._stream.step(self._embedding[character])  # a buffer: the next step overwrites it
        return int((self._weight @ self.output + self._bias).argmax())


@dataclass(frozen=True)
class Typed:
    """What the highlighter made of a text."""

    kinds: np.ndarray  # (N,)
    seconds: np.ndarray  # (N,), a key: embedding, LSTM and linear
    difference: float  # largest, of the outputs from those of one long run


def type_out(model: CharModel, characters: Tensor) -> Typed:
    """All of (N,) characters, one a call, and one long run to compare with."""
    highlighter, kinds, seconds, outputs = Highlighter(model), [], [], []
    for character in characters.tolist():
        start = time.perf_counter()
        kinds.append(highlighter.key(character))
        seconds.append(time.perf_counter() - start)
        outputs.append(highlighter.output.copy())
    with torch.no_grad():
        expected, _ = model.lstm(model.embedding(characters.to(model.linear.weight.device)))
    difference = np.abs(np.stack(outputs) - expected.cpu().numpy()).max()
    return Typed(np.array(kinds), np.array(seconds), float(difference))


def accuracies(programs: Programs, typed: Typed, steps: int) -> dict[str, float]:
    """The share of right answers of the model, of the table of counts, and of the most frequent answer alone."""
    # The table has learned from the text that the model has read, and is asked about the same characters.
    read, kinds = in_order(programs.train[:steps]), in_order(programs.train_kinds[:steps])
    table = NGrams(read, kinds, len(programs.vocabulary), len(KINDS), LOOK_BACK)
    truth = programs.typed_kinds.numpy()[LOOK_BACK:]
    return {
        "lstmcore.LSTM": float((typed.kinds[LOOK_BACK:] == truth).mean()),
        f"counts, last {LOOK_BACK} characters": float((table.likeliest(programs.typed.numpy()) == truth).mean()),
        f"always {KINDS[np.bincount(kinds).argmax()]}": float((truth == np.bincount(kinds).argmax()).mean()),
    }


# ------------------------------------------------------------------------------------------------------------- latency

Step = Callable[[Any], Any]  # the output of an input, of the same kind; keeps the state


def torchs_lstm(lstm: nn.LSTM) -> Step:
    state: Any = None

    def step(x: Tensor) -> Tensor:
        nonlocal state
        with torch.inference_mode():
            output, state = lstm(x[None], state)
        return output[0]

    return step


def torchs_cell(lstm: nn.LSTM) -> Step:
    cell = nn.LSTMCell(lstm.input_size, lstm.hidden_size).to(lstm.weight_ih_l0.device)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
    state: Any = None

    def step(x: Tensor) -> Tensor:
        nonlocal state
        with torch.inference_mode():
            state = cell(x, state)
        return state[0]

    return step


def onnxruntimes(lstm: lstmcore.LSTM) -> Step:
    """One thread, as the others have."""
    import onnxruntime

    state = np.zeros((1, 1, lstm.hidden_size), np.float32)
    example = (torch.zeros(1, 1, lstm.input_size), (torch.from_numpy(state), torch.from_numpy(state)))
    file = io.BytesIO()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that are not there, and not needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.onnx.export(lstm.eval(), example, dynamo=True, verbose=False).save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    name, *states = (each.name for each in session.get_inputs())
    feed = dict.fromkeys(states, state)

    def step(x: np.ndarray) -> np.ndarray:
        output, *after = session.run(None, {name: x[None], **feed})
        feed.update(zip(states, after, strict=True))
        return output[0]

    return step


def contestants(model: CharModel, console: Console) -> dict[str, tuple[str, Step]]:
    """By name: what it takes, "arrays" or "tensors", and its step.  Says what is left out, and why."""
    device = model.linear.weight.device
    lstm = nn.LSTM(model.lstm.input_size, model.lstm.hidden_size).to(device).requires_grad_(False)
    lstm.load_state_dict(model.lstm.state_dict())
    found: dict[str, tuple[str, Step]] = {
        "lstmcore.Stream, arrays": ("arrays", lstmcore.Stream(model.lstm, batch=1).step),
        "lstmcore.Stream, tensors": ("tensors", lstmcore.Stream(model.lstm, batch=1).step),
        "torch.nn.LSTMCell": ("tensors", torchs_cell(lstm)),
        "torch.nn.LSTM": ("tensors", torchs_lstm(lstm)),
    }
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if device.type != "cpu":
        console.print("onnxruntime is left out: its step runs on the CPU, the others on " + str(device))
    elif missing:
        console.print(f"onnxruntime is left out: pip install {' '.join(missing)}")
    else:
        found["onnxruntime"] = "arrays", onnxruntimes(model.lstm)
    return found


def latencies(model: CharModel, characters: Tensor, steps: int, console: Console) -> dict[str, np.ndarray]:
    """Seconds of each of ``steps`` steps, by who took them, after a check of the outputs.

    Raises:
        AssertionError: outputs are not those of the model's own LSTM.
    """
    device = model.linear.weight.device
    with torch.no_grad():
        x = model.embedding(characters[: 10 * CHECKED].to(device))[:, None]  # (N, 1, E)
        expected = model.lstm(x[:CHECKED])[0].cpu().numpy()
    inputs = {"tensors": list(x), "arrays": list(x.cpu().numpy())}
    found = {}
    for name, (kind, step) in contestants(model, console).items():
        mine = inputs[kind]
        for index in range(CHECKED):
            output = step(mine[index])
            output = output if kind == "arrays" else output.cpu().numpy()
            if not np.abs(output - expected[index]).max() < 1e-4:
                raise AssertionError(f"{name}: another output than the module's at step {index}")
        seconds = np.empty(steps)
        for index in range(-min(UNCOUNTED, steps), steps):
            given = mine[index % len(mine)]
            start = time.perf_counter()
            step(given)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[index] = time.perf_counter() - start  # one that does not count is overwritten later
        found[name] = seconds
    return found


# -------------------------------------------------------------------------------------------------------------- report


def show(console: Console, programs: Programs, typed: Typed, right: dict[str, float], model: CharModel) -> None:
    """What the model made of the text, and how much of it is right."""
    first = next((at for at, kind in enumerate(programs.typed_kinds.tolist()) if kind == STRING), 0)
    text = Text()
    for number, kind in zip(
        programs.typed.tolist()[first : first + 700], typed.kinds[first : first + 700], strict=True
    ):
        text.append(programs.vocabulary[number], style=STYLES[kind])
    legend = ", ".join(f"{name} [{style}]■[/]" for name, style in zip(KINDS, STYLES, strict=True))
    console.print(Panel(text, title=f"as it was typed: {legend}"))
    table = Table(title=f"the kind of a character, of {len(typed.kinds):,} that were typed")
    table.add_column("")
    table.add_column("right", justify="right")
    for name, share in right.items():
        table.add_row(name, f"{share:.2%}")
    console.print(table)
    told = "to the bit" if typed.difference == 0 else f"to {typed.difference:.1g}"
    console.print(f"outputs one by one are those of one long run {told} ({lstmcore.Stream(model.lstm).backend})")


def show_latencies(console: Console, seconds: dict[str, np.ndarray]) -> None:
    table = Table(title="microseconds a step, each after the one before")
    table.add_column("")
    for share in QUANTILES:
        table.add_column(f"p{share * 100:g}", justify="right")
    for name, each in seconds.items():
        table.add_row(name, *(f"{value * 1e6:.1f}" for value in np.quantile(each, QUANTILES)))
    console.print(table)


@plots.styled
def draw(right: dict[str, float], seconds: dict[str, np.ndarray], options: argparse.Namespace) -> Figure:
    """The distribution of the latencies, to its end, and what was right."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    tails, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    for (name, each), colour in zip(seconds.items(), plots.CYCLE, strict=False):
        slower = 1 - np.arange(len(each)) / len(each)  # the share of the steps that take at least as long
        label = f"{name}: {np.median(each) * 1e6:.1f} µs"
        tails.plot(np.sort(each) * 1e6, slower, color=colour, label=label, drawstyle="steps-post")
    tails.set(xscale="log", yscale="log", xlabel="microseconds a step", ylim=(1 / len(each), 1.1))
    tails.set(ylabel="share of the steps that take longer")
    tails.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share * 100:g} %"))
    tails.xaxis.set_major_formatter(FuncFormatter(lambda microseconds, _: f"{microseconds:g}"))
    tails.grid(alpha=0.3)
    tails.legend(frameon=False, title="median", loc="upper right")
    tails.set_title(f"latency of {len(each):,} steps, H = {options.hidden_size}, one row")

    names = [name.replace(", ", ",\n") for name in right]
    drawn = bars.barh(names, [share * 100 for share in right.values()], color=[plots.BLUE, plots.GREY, plots.GREY])
    bars.bar_label(drawn, [f"{share:.1%}" for share in right.values()], padding=3)
    bars.invert_yaxis()
    bars.set_xticks(range(0, 101, 20))
    bars.set(xlim=(0, 120), xlabel="characters whose kind is right, %", title="code, comment or string?")
    return figure


# ---------------------------------------------------------------------------------------------------------------- main


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Learns to tell code, comments and strings apart while Python is typed, then reads one key at a "
        "time with lstmcore.Stream and measures how long a step takes. Ctrl-C saves a checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--text", type=Path, help="a Python program (UTF-8) instead of the standard library")
    parser.add_argument("--characters", type=positive, default=2_000_000, help="of the text, at most")
    parser.add_argument("--iterations", type=positive, default=300, help="training steps in total")
    parser.add_argument("--steps", type=positive, default=256, help="T: steps that gradients go back")
    parser.add_argument("--batch", type=positive, default=32, help="B: streams of text read side by side")
    parser.add_argument("--hidden-size", type=positive, default=128)
    parser.add_argument("--embedding-size", type=positive, default=32)
    parser.add_argument("--learning-rate", type=above_zero(float), default=5e-3)
    parser.add_argument("--clip", type=above_zero(float), default=1.0, help="largest norm of the gradients")
    parser.add_argument("--type", type=positive, default=50_000, help="N: characters that are typed, at most")
    parser.add_argument("--timed", type=positive, default=10_000, help="steps whose latency is measured")
    add_options(parser, out="out/streaming", save_every=50)
    return parser


@reported
def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, types, times; returns the exit status."""
    options = parser().parse_args(arguments)
    if options.type < CHECKED + LOOK_BACK:
        raise CannotRun(
            f"{options.type} characters to type are too few to compare; pass --type {CHECKED + LOOK_BACK} or more"
        )
    console, start = Console(), time.monotonic()
    text, kinds = read_programs(options.text, options.characters)
    programs = Programs.of(text, kinds, options)
    options.text_checksum = zlib.crc32(text.encode())
    console.print(
        f"{programs.train.numel():,} characters to train on, {len(programs.typed):,} to type, vocabulary "
        f"{len(programs.vocabulary)}; {options.device}, {torch.get_num_threads()} threads",
        soft_wrap=True,
    )
    training = Training.new(options, len(programs.vocabulary))
    settings = {"example": "streaming"} | {name: getattr(options, name) for name in SETTINGS}
    checkpoint = Checkpoint(options.out / "streaming.pt", settings)
    if options.resume:
        training.load_state_dict(checkpoint.load(), options.device)
        console.print(f"resumed after iteration {len(training.losses)} from {checkpoint.path}", soft_wrap=True)

    def iterate(_: int) -> str:
        training.step(programs, options)
        return f"loss {training.losses[-1]:.3f}"

    if not repeat(iterate, len(training.losses), checkpoint, training.state_dict, options, console):
        return 130
    with fast_arithmetic():  # one thread: a step is too small to be divided, and an even latency counts here
        typed = type_out(training.model, programs.typed)
        right = accuracies(programs, typed, len(training.losses) * options.steps)
        show(console, programs, typed, right, training.model)
        seconds = latencies(training.model, programs.typed, options.timed, console)
    show_latencies(console, {**seconds, "a whole key of the highlighter": typed.seconds})
    plots.save(draw(right, seconds, options), options.out, "streaming")
    told = f"picture: {options.out / 'streaming.png'}; checkpoint: {checkpoint.path}"
    console.print(f"{told}; {time.monotonic() - start:.0f} s", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A training that has all that a long one needs, to copy from: on one process or several, stopped and gone on with.

    python examples/train.py                                           # half a minute on two cores
    torchrun --nproc-per-node 2 examples/train.py                      # the same training, shared by two processes
    torchrun --nproc-per-node 2 examples/train.py --parallel fsdp2     # which share the parameters, too
    python examples/train.py --resume                                  # goes on from the checkpoint, bit for bit

An LSTM learns to highlight syntax (``highlight.py``): functions of Python's standard library, of various lengths, come
packed from worker processes, and are trained on in chunks, with the state carried from one to the next: truncated
back-propagation through time.  Every chunk is a step of the optimizer.

Whatever ends it between two steps, Ctrl-C, SIGTERM as of a cluster's scheduler, a crash after the last checkpoint: with
``--resume`` losses and parameters are those of a training that was never stopped, to the bit.  For that a checkpoint
has the parameters, the optimizer, the scale of the loss, the random number generators and the carried states of every
process, and where the data was: the epoch, the batch, the chunk.

Legend: B functions of a batch, N characters of a chunk, K kinds, H hidden.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader

import lstmcore
from common import CannotRun, Checkpoint, Interrupt, add_options, brought_by, positive, reported
from highlight import CHARACTERS, KINDS, Batches, Functions, Pack, baselines, standard_library

with brought_by("train"):
    import matplotlib
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table

State = tuple[Tensor, Tensor]
AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}
COLOURS = ("#222222", "#7a7a7a", "#0b6e99")  # of the kinds
WRONG = "#ffb3a7"
WHOLE = states_of.StateDictOptions(full_state_dict=True, cpu_offload=True)  # however it is shared out
PATIENCE = 5.0  # seconds; a signal sooner after the first is the same one, passed on


# --------------------------------------------------------------------------------------------------------------- world


@dataclass(frozen=True)
class World:
    """The processes of this training, and the one that this is."""

    rank: int
    size: int
    device: torch.device

    def total(self, *values: float) -> list[float]:
        """The sums over all processes: each gets the same."""
        summed = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(summed)  # of tensors on the CPU, so by gloo
        return summed.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, on the first; an empty list on the others."""
        gathered: list[Any] = [None] * self.size if self.rank == 0 else []
        if self.size > 1:
            dist.gather_object(value, gathered or None)
        return gathered if self.size > 1 else [value]


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The world that torchrun tells this process of, or one of this process alone."""
    if not dist.is_torchelastic_launched():
        yield World(0, 1, device)
        return
    local, on_this_machine = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device.type == "cuda":
        if on_this_machine > torch.cuda.device_count():
            raise CannotRun(
                f"{on_this_machine} processes, but {torch.cuda.device_count()} CUDA devices on this machine: "
                "start one process for each, with torchrun --nproc-per-node"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------------------- model


class Highlighter(nn.Module):
    """Embedding, LSTM, linear: from characters to scores for what each is."""

    def __init__(self, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, 32)
        self.dropout = nn.Dropout(dropout)
        self.lstm = lstmcore.LSTM(32, hidden_size)
        self.linear = nn.Linear(hidden_size, len(KINDS))

    def forward(self, characters: PackedSequence, hx: State | None = None) -> tuple[Tensor, State]:
        """Packed characters (N,) to scores (N, K), and the state to go on from."""
        embedded = self.dropout(self.embedding(characters.data.long()))  # (N, 32)
        output, state = self.lstm(PackedSequence(embedded, *characters[1:]), hx)
        return self.linear(output.data), state


def distributed(model: Highlighter, options: argparse.Namespace, world: World) -> nn.Module:
    """What runs the model and makes one gradient of those of all processes; ``model`` itself where there is one."""
    if options.compile:
        model.compile()
    if options.parallel == "fsdp2":
        return fully_shard(model, mesh=init_device_mesh(world.device.type, (world.size,)))
    return DistributedDataParallel(model) if options.parallel == "ddp" else model


@contextlib.contextmanager
def sharing(wrapped: nn.Module, now: bool) -> Iterator[None]:
    """Gradients of a pass inside are averaged over the processes if ``now``, otherwise with those of a later one."""
    if isinstance(wrapped, DistributedDataParallel) and not now:
        with wrapped.no_sync():
            yield
        return
    if hasattr(wrapped, "set_requires_gradient_sync"):
        wrapped.set_requires_gradient_sync(now)
    yield


# ------------------------------------------------------------------------------------------------------------ training


def after(packed: PackedSequence, steps: int) -> PackedSequence:
    """What is left of packed sequences that all are longer than ``steps``."""
    data, sizes, *indices = packed
    return PackedSequence(data[int(sizes[:steps].sum()) :], sizes[steps:], *indices)


@dataclass
class Position:
    """Where the data is: the epoch, the batch of it, and how many chunks of that have been trained on."""

    epoch: int = 0
    batch: int = 0
    chunk: int = 0


@dataclass
class Run:
    """The functions that run side by side, of this process, in chunks: a batch, or a part of one with --accumulate."""

    chunks: lstmcore.truncation.Truncated
    kinds: PackedSequence


class Trainer:
    """All that training changes, and one step of it."""

    def __init__(self, options: argparse.Namespace, world: World, functions: Functions) -> None:
        self.options, self.world, self.functions = options, world, functions
        torch.manual_seed(options.seed)  # the same weights everywhere
        self.model = Highlighter(options.hidden_size, options.dropout).to(world.device)
        self.wrapped = distributed(self.model, options, world)
        torch.manual_seed(options.seed + world.rank)  # and masks of dropout that differ
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=options.learning_rate)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=options.amp == "float16")
        self.batches = Batches(functions.lengths, options.batch, options.steps, options.seed, world.rank, world.size)
        self.position = Position()
        self.losses: list[float] = []  # nats a character, one a step
        self._runs: list[Run] = []
        self._states: list[State | None] = [None] * options.accumulate  # to begin with, where a batch is gone on with
        self.chunks = self._chunks()

    def _chunks(self) -> Iterator[int]:
        """For ever: has a chunk of every run ready, and yields how many characters these have in all processes."""
        options, position = self.options, self.position
        loader = DataLoader(
            self.functions,
            batch_sampler=self.batches,
            collate_fn=Pack(options.accumulate),
            num_workers=options.workers,
            persistent_workers=options.workers > 0,
            worker_init_fn=leave_signals_alone,
            pin_memory=self.world.device.type == "cuda",
            generator=torch.Generator(),  # its own: without one, every epoch draws from what dropout draws from
        )
        while True:
            whole = self.batches.start(position.epoch, position.batch)
            for batch, parts in zip(whole, loader, strict=True):
                lengths = self.functions.lengths[batch]
                chunks = -(-int(lengths.max()) // options.steps)
                if position.chunk < chunks:  # else it was stopped behind the last one
                    self._runs = [self._run(*part, state) for part, state in zip(parts, self._states, strict=True)]
                for chunk in range(position.chunk, chunks):
                    yield int((lengths - chunk * options.steps).clamp(0, options.steps).sum())
                position.batch, position.chunk = position.batch + 1, 0
                self._states = [None] * options.accumulate
            position.epoch, position.batch = position.epoch + 1, 0

    def _run(self, characters: PackedSequence, kinds: PackedSequence, state: State | None) -> Run:
        done = self.position.chunk * self.options.steps
        characters, kinds = (after(each, done).to(self.world.device, non_blocking=True) for each in (characters, kinds))
        if state is not None:
            state = state[0].to(self.world.device), state[1].to(self.world.device)
        return Run(lstmcore.truncated(self.wrapped, characters, steps=self.options.steps, hx=state), kinds)

    def step(self, interrupt: Interrupt) -> tuple[float, float, bool]:
        """One step of the optimizer, on a chunk of every run.

        Returns: the loss in nats a character and the norm of the gradients, of all processes together, and whether any
        of them was asked to stop.
        """
        characters = next(self.chunks)
        loss = 0.0
        for run in self._runs:
            with sharing(self.wrapped, now=run is self._runs[-1]):
                loss += self._backward(run, characters)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.position.chunk += 1
        # Stopped by one process alone, the others would wait for it: so all have to know before the next step.
        loss, stop = self.world.total(loss, float(interrupt.wanted))
        self.losses.append(loss)
        return loss, (norm.full_tensor() if isinstance(norm, DTensor) else norm).item(), stop > 0

    def _backward(self, run: Run, characters: int) -> float:
        """Adds the gradient of one chunk; returns its part of the loss.

        The loss is a mean over the characters of all processes and runs, whose numbers differ: a mean of means would
        give those of short functions more weight.
        """
        chunk = next(run.chunks)
        amp = AMP.get(self.options.amp)
        with torch.autocast(self.world.device.type, amp, enabled=amp is not None):
            scores, _ = chunk.run()
        kinds = chunk.of(run.kinds).data.long()
        loss = F.cross_entropy(scores.float(), kinds, reduction="sum") / characters
        self.scaler.scale(loss * self.world.size).backward()  # the gradient is a mean over the processes
        return loss.item()

    # What a checkpoint has: of the model as if there were one process, and from each process what it alone knows.

    def state_dict(self) -> dict[str, Any]:
        """Collective: every process calls it, the first gets all of it."""
        states = [run.chunks.state for run in self._runs]
        own = {"states": [(h.cpu(), c.cpu()) for h, c in states], "rng": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            own["cuda_rng"] = torch.cuda.get_rng_state(self.world.device)
        return {
            "model": states_of.get_model_state_dict(self.model, options=WHOLE),
            "optimizer": states_of.get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE),
            "scaler": self.scaler.state_dict(),
            "position": vars(self.position),
            "losses": self.losses,
            "processes": self.world.gather(own),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        states_of.set_model_state_dict(self.model, saved["model"], options=WHOLE)
        states_of.set_optimizer_state_dict(self.model, self.optimizer, saved["optimizer"], options=WHOLE)
        self.scaler.load_state_dict(saved["scaler"])
        vars(self.position).update(saved["position"])
        self.losses = saved["losses"]
        own = saved["processes"][self.world.rank]
        self._states = own["states"]
        torch.set_rng_state(own["rng"])
        if "cuda_rng" in own:
            torch.cuda.set_rng_state(own["cuda_rng"], self.world.device)


def leave_signals_alone(worker: int) -> None:
    """For a loader's worker: a signal to all processes of a group stops the training, which needs it to the last step.

    That the loader is let go in the end is what ends it then: Python would send it a signal.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Board:
    """TensorBoard, on the first process, if it was asked for: losses, norms, and the gradient flow now and then."""

    def __init__(self, trainer: Trainer) -> None:
        options, self._trainer = trainer.options, trainer
        self._writer: Any = None
        if options.tensorboard is None:
            return
        with brought_by("train"):  # on every process: else the others would wait for the one that has ended
            from torch.utils.tensorboard import SummaryWriter
        if trainer.world.rank == 0:  # what came after the checkpoint is left out
            self._writer = SummaryWriter(str(options.tensorboard), purge_step=len(trainer.losses))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Backward passes inside of it are recorded, every so many steps."""
        if self._writer is None:
            yield
            return
        options = self._trainer.options
        with (
            contextlib.closing(self._writer),
            lstmcore.record_gradient_flow(
                self._trainer.model,
                every=options.flow_every * options.accumulate,  # passes
                scaler=self._trainer.scaler if options.amp == "float16" else None,
                log=lambda numbers, _: self.write(numbers, len(self._trainer.losses)),
            ),
        ):
            yield

    def write(self, numbers: dict[str, float], step: int) -> None:
        if self._writer is not None:
            for tag, value in numbers.items():
                self._writer.add_scalar(tag, value, step)


def train(trainer: Trainer, checkpoint: Checkpoint, console: Console) -> bool:
    """Trains up to ``options.iterations``; returns False when it was stopped.  Saves in either case."""
    options, first = trainer.options, len(trainer.losses)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    board = Board(trainer)
    stop = False
    with (
        Interrupt(signal.SIGINT, signal.SIGTERM, patience=PATIENCE if trainer.world.size > 1 else 0.0) as interrupt,
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar,
        board.recording(),
    ):
        task = bar.add_task("", total=options.iterations, completed=first, loss="")
        for iteration in range(first, options.iterations):
            start = time.perf_counter()
            loss, norm, stop = trainer.step(interrupt)
            board.write({"loss": loss, "gradient/norm": norm, "seconds": time.perf_counter() - start}, iteration)
            bar.update(task, advance=1, loss=f"loss {loss:.3f}")
            if stop:
                break
            if (iteration + 1) % options.save_every == 0:
                save(trainer, checkpoint)
        save(trainer, checkpoint)
    return len(trainer.losses) >= options.iterations


def save(trainer: Trainer, checkpoint: Checkpoint) -> None:
    state = trainer.state_dict()
    if trainer.world.rank == 0:
        checkpoint.save(state)


# -------------------------------------------------------------------------------------------------------------- report


@torch.no_grad()
def confusion(trainer: Trainer, functions: Functions) -> Tensor:
    """(K, K) characters of each kind, by what they were taken for.  Collective: parameters may be shared out."""
    counts = torch.zeros(len(KINDS) ** 2, dtype=torch.int64)
    trainer.model.eval()
    for first in range(0, len(functions), 64):
        some = [functions[index] for index in range(first, min(first + 64, len(functions)))]
        ((characters, kinds),) = Pack()(some)
        scores, _ = trainer.model(characters.to(trainer.world.device))
        pairs = kinds.data.long() * len(KINDS) + scores.argmax(-1).cpu()
        counts += pairs.bincount(minlength=len(counts))
    trainer.model.train()
    return counts.view(len(KINDS), len(KINDS))


def show(console: Console, counts: Tensor, others: dict[str, float]) -> float:
    """Prints how many held-out characters are right; returns the share of the model's."""
    right = (counts.diagonal().sum() / counts.sum()).item()
    table = Table(title=f"kinds of {counts.sum():,} held-out characters, of other files than those trained on")
    table.add_column("by")
    table.add_column("right", justify="right")
    for name, share in {**others, "the model": right}.items():
        table.add_row(name, f"{share:.1%}")
    for index, of_kind in enumerate(counts):
        if of_kind.sum():
            table.add_row(f"   of {KINDS[index]}", f"{(of_kind[index] / of_kind.sum()).item():.1%}", style="dim")
    console.print(table)
    return right


def draw(losses: Sequence[float], shares: dict[str, float], example: tuple[str, Tensor, Tensor], path: Path) -> None:
    """The loss, the shares of right answers, and a held-out function as the model highlights it."""
    matplotlib.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(13, 5), dpi=130, layout="constrained")
    loss, bars, page = figure.subplots(1, 3, width_ratios=(1.2, 1, 2))
    loss.plot(range(1, len(losses) + 1), losses, color=COLOURS[2], linewidth=0.6, alpha=0.35)
    smooth = min(50, len(losses))
    means = torch.tensor(losses, dtype=torch.float64).unfold(0, smooth, 1).mean(-1)
    loss.plot(range(smooth, len(losses) + 1), means, color=COLOURS[2], label=f"mean of {smooth} steps")
    loss.set(title="training loss", xlabel="step", ylabel="nats a character", yscale="log")
    loss.grid(alpha=0.3)
    loss.legend(frameon=False)

    names = [name.replace(" of the", "\nof the") for name in shares]
    drawn = bars.bar(names, list(shares.values()), color=["#bbbbbb"] * (len(shares) - 1) + [COLOURS[2]])
    bars.bar_label(drawn, [f"{share:.1%}" for share in shares.values()], padding=3)
    bars.set(title="held-out characters right", ylim=(0, 1.08))
    bars.tick_params(axis="x", length=0, labelsize=8)

    source, found, kinds = example
    row, column = 0, 0
    for character, got, expected in zip(source, found.tolist(), kinds.tolist(), strict=False):
        if got != expected:
            page.barh(row, 1, left=column - 0.5, height=1, color=WRONG)
        if not character.isspace():
            page.text(column, row, character, color=COLOURS[got], family="monospace", size=7, ha="center", va="center")
        row, column = (row + 1, 0) if character == "\n" else (row, column + 1)
    page.set(xlim=(-1, 80), ylim=(row + 0.5, -1), title="a held-out function as the model reads it; wrong: marked")
    page.axis("off")
    for kind, colour in zip(KINDS, COLOURS, strict=True):
        page.plot([], [], "s", color=colour, label=kind)
    page.legend(frameon=False, loc="upper right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def an_example(functions: Functions) -> int:
    """A held-out function that fits the picture and has something of every kind, by its index."""
    for index, source in enumerate(functions.sources):
        lines = source.splitlines()
        fits = 12 <= len(lines) <= 26 and max(map(len, lines)) < 80 and len(source) <= functions.longest
        if fits and len(functions[index][1].unique()) == len(KINDS):
            return index
    return 0


# ---------------------------------------------------------------------------------------------------------------- main

# What has to be the same for a checkpoint to be continued to the bit; --iterations may grow, --workers change nothing.
FIXED = (
    *("seed", "batch", "steps", "longest", "hidden_size", "dropout", "learning_rate", "clip", "accumulate"),
    *("amp", "compile", "parallel"),
)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Trains an LSTM to highlight the syntax of Python, alone or under torchrun. "
        "Ctrl-C and SIGTERM save a checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_options(parser, out="out/train", save_every=200)
    parser.add_argument("--iterations", type=positive, default=1000, help="steps of the optimizer, in total")
    parser.add_argument("--batch", type=positive, default=32, help="B: functions side by side, in all processes")
    parser.add_argument("--steps", type=positive, default=256, help="of a chunk: how far gradients go back")
    parser.add_argument("--longest", type=positive, default=1024, help="characters of a function; the rest is cut off")
    parser.add_argument("--files", type=positive, help="read the first so many files of the library; None: all")
    parser.add_argument("--hidden-size", type=positive, default=96, help="H")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the embedding")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradients")
    parser.add_argument("--accumulate", type=positive, default=1, help="parts of a batch that run one after the other")
    parser.add_argument("--amp", choices=list(AMP), help="automatic mixed precision; float16 with a scaled loss")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), help="of several processes; None under torchrun: ddp")
    parser.add_argument("--workers", type=int, default=1, help="processes that load data, for each that trains")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="write losses and the gradient flow there")
    parser.add_argument("--flow-every", type=positive, default=50, help="steps between recordings of the gradient flow")
    return parser


def settled(options: argparse.Namespace, world: World) -> None:
    """Completes the options for this world; raises CannotRun where they do not fit it or each other."""
    launched = dist.is_torchelastic_launched()
    if options.parallel and not launched:
        raise CannotRun(
            f"--parallel {options.parallel} needs processes: torchrun --nproc-per-node 2 {' '.join(sys.argv)}"
        )
    options.parallel = options.parallel or ("ddp" if launched else None)
    parts = world.size * options.accumulate
    if options.batch % parts:
        raise CannotRun(
            f"--batch {options.batch} cannot be divided among {world.size} processes × {options.accumulate} parts of "
            f"--accumulate: pass a multiple of {parts}"
        )
    if options.parallel == "fsdp2" and options.amp == "float16":
        raise CannotRun(
            "--amp float16 has a scaled loss, of which each process would see its part alone under fsdp2: "
            "pass --amp bfloat16"
        )


@reported
def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, compares, reports; returns the exit status."""
    options = parser().parse_args(arguments)
    with joined(options.device) as world:
        settled(options, world)
        return run(options, world)


def run(options: argparse.Namespace, world: World) -> int:
    console = Console(quiet=world.rank > 0)
    functions, held_out = standard_library(options.longest, options.files)
    trainer = Trainer(options, world, functions)
    settings = {"example": "train", "world_size": world.size, "device": world.device.type}
    settings |= {name: getattr(options, name) for name in FIXED} | {"functions": functions.checksum}
    checkpoint = Checkpoint(options.out / "checkpoint.pt", settings)
    console.print(
        f"{len(functions):,} functions to train on, {len(held_out):,} held out; {world.size} process"
        f"{'es' * (world.size > 1)}{f' by {options.parallel}' if options.parallel else ''}, "
        f"{torch.get_num_threads()} threads each"
    )
    if options.resume:
        trainer.load_state_dict(checkpoint.load())
        console.print(f"resumed after step {len(trainer.losses)} from {checkpoint.path}")
    with contextlib.closing(trainer.chunks):
        finished = train(trainer, checkpoint, console)
    if not finished:
        console.print(f"stopped after step {len(trainer.losses)}; go on with --resume ({checkpoint.path})")
        return 130

    counts = confusion(trainer, held_out)
    index = an_example(held_out)
    with torch.no_grad():
        trainer.model.eval()
        scores, _ = trainer.model(Pack()([held_out[index]])[0][0].to(world.device))
    if world.rank == 0:
        others = baselines(functions, held_out)
        right = show(console, counts, others)
        picture = options.out / "train.png"
        example = (held_out.sources[index], scores.argmax(-1).cpu(), held_out[index][1])
        draw(trainer.losses, {**others, "the model": right}, example, picture)
        console.print(f"picture: {picture}; checkpoint: {checkpoint.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

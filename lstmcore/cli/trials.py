"""What ``tune`` times, and how: ours and torch's by turns, checked first, behind an operation of torch's.

T steps, B rows, H hidden units, which is also the number of features of the input.
"""

from __future__ import annotations

import functools
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstmcore
from lstmcore import backends
from lstmcore.backends.timings import MODES, Class, Timing
from lstmcore.cli.options import DTYPES
from lstmcore.cli.parity import Comparison, compare
from lstmcore.kernels.contract import Layer

SEED = 0  # of the orders: of the trials, and of who goes first in a round
CHECKED_STEPS = 5  # T of the comparison with float64, which runs on the CPU
PEER = next(name for name, each in backends.REGISTRY.items() if each.whole)


class Grid(NamedTuple):
    """The sizes that are timed on a kind of device, (H, B)."""

    dense: tuple[tuple[int, int], ...]
    others: tuple[tuple[int, int], ...]  # ragged, and with a projection to half as many features
    quick: tuple[tuple[int, int], ...]  # those of a quick run, of all three
    arithmetics: tuple[str, ...]  # unless asked for
    short: int  # T
    longest: int  # T


def _grid(hiddens: Sequence[int], batches: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((hidden, batch) for hidden in hiddens for batch in batches)


GRIDS = {
    "cpu": Grid(
        _grid((16, 64, 128, 256, 512), (1, 8, 32)), _grid((64, 256), (32,)), _grid((64, 256), (8, 32)),
        ("float32", "bfloat16"), 4, 256,
    ),
    "cuda": Grid(
        _grid((128, 256, 512, 1024), (1, 16, 64, 256)), _grid((128, 512, 1024), (16, 64)), _grid((128, 512), (16, 64)),
        ("bfloat16", "tf32", "float16"), 16, 1024,
    ),
}  # fmt: skip


class Trial(NamedTuple):
    """One shape of a class, to be timed."""

    cls: Class
    hidden: int
    batch: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.cls.arithmetic == "tf32" else DTYPES[self.cls.arithmetic]

    @property
    def proj_size(self) -> int:
        return self.hidden // 2 if self.cls.kind == "projection" else 0

    @property
    def training(self) -> bool:
        return self.cls.mode == "training"

    def layer(self, device: torch.device, steps: int) -> Layer:
        """The layer that a call of so many steps has."""
        ragged = self.cls.kind == "ragged"
        return Layer(
            device, self.dtype, steps, self.batch, self.hidden, self.hidden, self.proj_size, ragged=ragged,
            training=self.training,
        )  # fmt: skip

    def comparison(self) -> Comparison:
        """The case of the check that has the same kernels."""
        module = {"input_size": self.hidden, "hidden_size": self.hidden, "proj_size": self.proj_size}
        form = "packed" if self.cls.kind == "ragged" else "padded"
        dtype = str(self.dtype).removeprefix("torch.")
        return Comparison(str(self), module, CHECKED_STEPS, self.batch, form, dtype, self.training)

    def __str__(self) -> str:
        return f"{self.cls}, H {self.hidden}, B {self.batch}"


def trials(kind: str, arithmetics: Sequence[str], quick: bool) -> list[Trial]:
    """What there is to time on a kind of device, in an order that is drawn, so that a part of it is a fair sample."""
    grid = GRIDS[kind]
    found = [
        Trial(Class(of, arithmetic, mode), *sizes)
        for of, every in (("dense", grid.dense), ("ragged", grid.others), ("projection", grid.others))
        for arithmetic in arithmetics
        for mode in MODES
        for sizes in every
        if not quick or sizes in grid.quick
    ]
    random.Random(SEED).shuffle(found)
    return found


# Clocks


class Clock(NamedTuple):
    """What it takes to read the time of a device's work off the host's clock."""

    now: Callable[[], float]
    before: Callable[[], object]  # runs before each sample
    finish: Callable[[], object]  # all that was asked for is done
    sample_s: float  # a sample repeats calls for so long; 0: one call


@functools.cache
def _operands() -> tuple[Tensor, Tensor]:
    return torch.randn(256, 1024), torch.randn(1024, 1024)


def _operation() -> None:
    """What stands before the call in a model: a product by all of torch's threads, which spin afterwards."""
    with torch.no_grad():
        torch.nn.functional.linear(*_operands())


def _nothing() -> None:
    pass


def clock_of(device: torch.device) -> Clock:
    """Calls on a GPU are queued one after the other, as in a program, and waited for together."""
    if device.type == "cuda":
        wait = functools.partial(torch.cuda.synchronize, device)
        return Clock(time.perf_counter, wait, wait, 0.01)
    return Clock(time.perf_counter, _operation, _nothing, 0.0)


class Effort(NamedTuple):
    """How long a pair of calls is timed."""

    rounds: int  # at least, unless they take four times as long as they should
    seconds: float

    def enough(self, rounds: int, seconds: float) -> bool:
        if rounds >= 101 or seconds < self.seconds:
            return rounds >= 101
        return rounds >= (self.rounds if seconds < 4 * self.seconds else 3)


EFFORT, QUICK = Effort(7, 0.25), Effort(5, 0.1)


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def by_turns(calls: Sequence[Callable[[], object]], clock: Clock, effort: Effort) -> list[list[float]]:
    """Seconds a call of each, one entry a round; they run by turns, and who goes first is drawn.

    Each has run twice before its first sample: nothing here is the time of a compiler.
    """
    draw = random.Random(SEED)
    quickest = [math.inf for _ in calls]
    for at, call in enumerate(calls):
        for _ in range(2):
            clock.finish()
            start = clock.now()
            call()
            clock.finish()
            quickest[at] = min(quickest[at], clock.now() - start)
    repeats = max(1, math.ceil(clock.sample_s / max(*quickest, 1e-9)))
    found: list[list[float]] = [[] for _ in calls]
    with _no_collection():
        started = clock.now()
        while not effort.enough(len(found[0]), clock.now() - started):
            for at in draw.sample(range(len(calls)), len(calls)):
                clock.before()
                start = clock.now()
                for _ in range(repeats):
                    calls[at]()
                clock.finish()
                found[at].append((clock.now() - start) / repeats)
    return found


# Calls


@contextmanager
def precision(arithmetic: str) -> Iterator[None]:
    """Products of float32 on a GPU as the class wants them; ours and cuDNN's follow the same setting."""
    settings: Any = torch.backends.cudnn.rnn
    before = settings.fp32_precision
    settings.fp32_precision = {"tf32": "tf32", "float32": "ieee"}.get(arithmetic, before)
    try:
        yield
    finally:
        settings.fp32_precision = before


def _input(trial: Trial, device: torch.device, steps: int) -> tuple[Tensor | PackedSequence, Tensor]:
    """An input, and the tensor of its values; ragged rows end between half of the steps and all of them."""
    padded = torch.randn(steps, trial.batch, trial.hidden, device=device, dtype=trial.dtype)
    if trial.cls.kind != "ragged":
        return padded.requires_grad_(trial.training), padded
    lengths = [max(1, steps - steps * row // (2 * trial.batch)) for row in range(trial.batch)]
    packed = pack_padded_sequence(padded, torch.tensor(lengths))
    data = packed.data.detach().requires_grad_(trial.training)
    return packed._replace(data=data), data


def _call(trial: Trial, backend: str, device: torch.device, steps: int) -> Callable[[], object]:
    """A call of a module, in training with the gradients of the input and of every parameter."""
    torch.manual_seed(SEED)
    sizes = trial.hidden, trial.hidden
    module = lstmcore.LSTM(*sizes, proj_size=trial.proj_size, dtype=trial.dtype, device=device, backend=backend)
    input, data = _input(trial, device, steps)
    leaves = [data, *module.parameters()]

    def values() -> Tensor:
        output = module(input)[0]
        return output.data if isinstance(output, PackedSequence) else output

    def inference() -> Tensor:
        with torch.no_grad():
            return values()

    if not trial.training:
        module.eval()
        return inference
    grad = torch.ones_like(inference())
    return lambda: torch.autograd.grad(values(), leaves, grad)


def pair(trial: Trial, fused: str, device: torch.device, steps: int) -> list[Callable[[], object]]:
    """The call by our kernels, and by torch's LSTM."""
    return [_call(trial, backend, device, steps) for backend in (fused, PEER)]


def _long(grid: Grid, at_short: Sequence[Sequence[float]]) -> int:
    """T of the long sequences: what takes both sides 60 ms together, as far as the short ones can tell."""
    step = sum(map(median, at_short)) / grid.short
    return min(max(round(0.06 / max(step, 1e-9)), 4 * grid.short), grid.longest)


def noise(ours: Sequence[float], peer: Sequence[float]) -> float:
    """Half the width of a notch of the ratios' box plot, relative to their median: see McGill, Tukey, Larsen (1978)."""
    ratios = [theirs / own for own, theirs in zip(ours, peer, strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    return 1.57 * (high - low) / math.sqrt(len(ratios)) / middle


def _digits(value: float) -> float:
    """As many of them as mean something."""
    return float(f"{value:.4g}")


def run(trial: Trial, fused: str, device: torch.device, effort: Effort) -> Timing:
    """Checks and times one shape.  Raises RuntimeError where our kernels do not run it."""
    grid, clock = GRIDS[device.type], clock_of(device)
    with precision(trial.cls.arithmetic):
        lines = compare([trial.comparison()], str(device), fused)
        short = by_turns(pair(trial, fused, device, grid.short), clock, effort)
        steps = _long(grid, short)
        long = by_turns(pair(trial, fused, device, steps), clock, effort)
    ours_short, ours_long, torch_short, torch_long = (
        _digits(max(1000 * median(each), 1e-6)) for each in (short[0], long[0], short[1], long[1])
    )
    return Timing(
        *trial.cls,
        hidden=trial.hidden,
        batch=trial.batch,
        short=grid.short,
        long=steps,
        ours_short_ms=ours_short,
        ours_long_ms=ours_long,
        torch_short_ms=torch_short,
        torch_long_ms=torch_long,
        noise=_digits(max(noise(*short), noise(*long))),
        right=all(line.good for line in lines),
        date=datetime.now(timezone.utc).date().isoformat(),
        seed=SEED,
    )

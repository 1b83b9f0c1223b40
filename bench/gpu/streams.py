"""Two CUDA streams at once: layers of different designs, and a layer beside a large product of cuBLAS.

The programs of a split design wait for each other, so all of them have to be on the device at the same time: two such
layers on two streams, or one that finds the device full of another library's kernels, are where that may go wrong.
Each pair is run on one stream first; then both at once, by turns in either order, with results that have to be the
same.  Beside that stands what it is worth: the time of both at once, and of one after the other.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

import lstmcore
from bench import timing
from bench.gpu import launches
from bench.gpu.compile import MOST_S, spread
from bench.tables import KEY_FIGURES

DTYPE = torch.bfloat16
STEPS = 1024
ROUNDS = 8  # of both at once, every other time in the other order
SAMPLES = 5  # of each time
# Of a result on another stream, where cuBLAS may add in another order: relative to the norm of the tensor.
BOUND = 8 * torch.finfo(DTYPE).eps
SMALL_STEPS, SMALL_BATCH, SMALL_PRODUCT = 2, 3, 64  # where nothing is timed, on Triton's interpreter
ORDER = (0, 1)

Work = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Training:
    """A forward and a backward of a layer."""

    hidden: int
    batch: int
    small: int  # H where nothing is timed: of the same design

    def __str__(self) -> str:
        return f"H {self.hidden}, B {self.batch}"

    def build(self, device: str, steps: int = STEPS) -> Work:
        hidden, batch = (self.hidden, self.batch) if device == "cuda" else (self.small, SMALL_BATCH)
        like = {"device": device, "dtype": DTYPE}
        module = lstmcore.LSTM(hidden, hidden, backend="triton", **like)
        x = torch.randn(steps, batch, hidden, **like, requires_grad=True)
        grad = torch.randn(steps, batch, hidden, **like)
        leaves = (x, *module.parameters())

        def train() -> Sequence[Tensor]:
            output = module(x)[0]
            return output.detach(), *torch.autograd.grad(output, leaves, grad)

        return train


@dataclass(frozen=True)
class Product:
    """Large products of cuBLAS, one after the other: each takes every multiprocessor."""

    size: int
    times: int

    def __str__(self) -> str:
        return f"{self.times} products of {self.size} x {self.size}"

    def build(self, device: str, steps: int = STEPS) -> Work:
        size = self.size if device == "cuda" else SMALL_PRODUCT
        a, b = (torch.randn(size, size, device=device, dtype=DTYPE) for _ in range(2))

        def multiply() -> Sequence[Tensor]:
            for _ in range(self.times):
                c = a @ b
            return (c,)

        return multiply


@dataclass(frozen=True)
class Pair:
    """What runs on two streams at once."""

    name: str
    first: Training
    second: Training | Product


PAIRS = (
    Pair("split and split, too many programs for the device", Training(1024, 16, 144), Training(512, 16, 136)),
    Pair("split and split, side by side", Training(512, 16, 136), Training(256, 16, 132)),
    Pair("split and resident", Training(1024, 16, 144), Training(128, 64, 32)),
    Pair("split and products of cuBLAS", Training(1024, 16, 144), Product(8192, 4)),
)


@dataclass(frozen=True)
class Place:
    """Where pairs run: a GPU with two streams, or a CPU, where one comes after the other."""

    device: str
    steps: int
    rounds: int
    lanes: tuple[AbstractContextManager[object], ...]
    settle: Callable[[], object]  # waits until all is done; RuntimeError where a kernel gave up

    @classmethod
    def gpu(cls) -> Place:
        lanes = tuple(torch.cuda.stream(torch.cuda.Stream()) for _ in ORDER)
        return cls("cuda", STEPS, ROUNDS, lanes, launches.settle)

    @classmethod
    def dry(cls) -> Place:
        return cls("cpu", SMALL_STEPS, 1, (nullcontext(), nullcontext()), lambda: None)

    def at_once(self, works: Sequence[Work], order: Sequence[int] = ORDER) -> list[Sequence[Tensor]]:
        """Each on its stream, and what they returned, in the order of ``works``."""
        results: dict[int, Sequence[Tensor]] = {}
        for index in order:
            with self.lanes[index]:
                results[index] = works[index]()
        self.settle()
        return [results[index] for index in ORDER]


def largest_error(got: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]) -> float:
    """The largest difference of a tensor, relative to its norm; NaN where there is one."""
    pairs = [pair for one, other in zip(got, expected, strict=True) for pair in zip(one, other, strict=True)]
    return max(
        (float((one.float() - other.float()).norm() / other.float().norm()) for one, other in pairs),
        key=lambda off: (off != off, off),
    )


def check(place: Place, works: Sequence[Work]) -> float:
    """The largest difference between both at once and one after the other; ArithmeticError if it is beyond BOUND."""
    expected = [work() for work in works]
    place.settle()
    worst = 0.0
    for round_ in range(place.rounds):
        off = largest_error(place.at_once(works, ORDER[::-1] if round_ % 2 == 0 else ORDER), expected)
        if not off <= BOUND:
            raise ArithmeticError(f"results differ by {off:.1e} in round {round_}, more than {BOUND:.1e}")
        worst = max(worst, off)
    return worst


def times(place: Place, works: Sequence[Work]) -> tuple[float, float]:
    """Median milliseconds of both at once, and of one after the other."""

    def apart() -> None:
        for work in works:
            work()

    calls = (lambda: place.at_once(works), apart)
    clock = timing.CLOCKS[place.device]
    both = timing.turns(calls, min_rounds=SAMPLES, budget_s=0.0, clock=clock, probed=False)
    at_once, after = (statistics.median(each) * 1e3 for each in both)
    return at_once, after


def compile_share(worker: int, workers: int) -> None:
    """Every ``workers``-th layer, for the cache on disk."""
    layers = {each for pair in PAIRS for each in (pair.first, pair.second) if isinstance(each, Training)}
    for each in sorted(layers, key=str)[worker::workers]:
        each.build("cuda", SMALL_STEPS)()
    torch.cuda.synchronize()


def run(limit_s: float = 120.0, dry_run: bool = False) -> int:
    """``python -m bench streams``: 1 if a result is wrong.

    ``dry_run``: small sizes on the CPU, by Triton's interpreter, one after the other, and not timed.
    """
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    ends = time.monotonic() + limit_s
    place = Place.dry() if dry_run else Place.gpu()
    if not dry_run:
        print(spread(compile_share, min(MOST_S, limit_s / 2)), flush=True)
    right, ratios, left_out = 0, [], 0
    for pair in PAIRS:
        if time.monotonic() > ends:
            left_out += 1
            print(f"{pair.name}: not run, the {limit_s:.0f} seconds are used up")
            continue
        torch.manual_seed(0)
        try:
            works = [each.build(place.device, place.steps) for each in (pair.first, pair.second)]
            said = f"right, within {check(place, works):.1e}"
            right += 1
        except (ArithmeticError, RuntimeError) as error:
            print(f"{pair.name} ({pair.first}; {pair.second}): WRONG: {error}", flush=True)
            continue
        if not dry_run:
            at_once, after = times(place, works)
            ratios.append(f"{at_once / after:.2f}")
            said += f"; {at_once:.2f} ms at once, {after:.2f} one after the other"
        print(f"{pair.name} ({pair.first}; {pair.second}): {said}", flush=True)
    took = f"; at once they took {', '.join(ratios)} of one after the other" if ratios else ""
    print(f"{KEY_FIGURES}{right} of {len(PAIRS) - left_out} pairs are right on two streams{took}")
    return 0 if right == len(PAIRS) - left_out else 1

"""The interleaved timer: ours and the peer take turns in one process, so both meet the same clock and neighbours.

On a CPU a call is timed in two settings.  Behind an operation of torch's, as in any model: the threads of torch's
OpenMP runtime still spin then, waiting for more.  And alone, after a pause that has let them go to sleep.
"""

from __future__ import annotations

import functools
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# A sample lasts at least this long: calls that are shorter are repeated within it.
SAMPLE_S = 0.01
# After a parallel region the threads of an OpenMP runtime keep spinning for a few milliseconds.
PAUSE_S = 0.005
MAX_PAIRS = 101


@dataclass(frozen=True)
class Effort:
    """How long a row may take."""

    min_pairs: int
    budget_s: float
    memory: bool = False  # whether to measure that too, on cases that are tagged for it

    @property
    def less(self) -> Effort:
        """For a second figure."""
        return Effort(self.min_pairs // 2 + 1, self.budget_s / 3)


@dataclass(frozen=True)
class Samples:
    """Seconds a call, one entry a pair: entry k of both was measured back to back."""

    ours: tuple[float, ...]
    peer: tuple[float, ...]


def percentile(values: tuple[float, ...], share: float) -> float:
    """The value below which ``share`` of the values lie, interpolated."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@contextmanager
def _no_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class Clock:
    """What it takes to read the time of a device's work off the host's clock."""

    settle: Callable[[], object]  # runs before the clock starts: whatever went before is over
    finish: Callable[[], object]  # runs before the clock is read: all the work that was asked for is done


def _sleep() -> None:
    time.sleep(PAUSE_S)


def _nothing() -> None:
    pass


# Calls on a GPU only queue work.  A sample queues all its calls and then waits once, so short calls overlap the host's
# part with the device's, as they do in a program, and a single long one is timed from its launch to its end.
CLOCKS = {"cpu": Clock(_sleep, _nothing), "cuda": Clock(torch.cuda.synchronize, torch.cuda.synchronize)}


def _seconds(call: Callable[[], object], calls: int, clock: Clock) -> float:
    """Seconds for so many calls, including those it takes to free what they return."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    clock.finish()
    return time.perf_counter() - start


def probe(call: Callable[[], object], clock: Clock) -> float:
    """Seconds that a call takes, roughly: the best of three where they are short, since one may meet a busy machine."""
    clock.finish()
    first = _seconds(call, 1, clock)
    return first if first > 5 * SAMPLE_S else min(first, _seconds(call, 1, clock), _seconds(call, 1, clock))


@functools.cache
def _operands() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(256, 1024), torch.randn(1024, 1024)


def operation() -> None:
    """What stands before the call in a model: a Linear that torch shares out among all its threads."""
    with torch.no_grad():
        torch.nn.functional.linear(*_operands())


def sample(call: Callable[[], object], calls: int, clock: Clock, before: Callable[[], object] | None) -> float:
    """Seconds a call, from one sample; each call behind one of ``before``, whose time does not count."""
    if before is not None:
        seconds = 0.0
        for _ in range(calls):
            before()
            seconds += _seconds(call, 1, clock)
        return seconds / calls
    clock.settle()
    if calls > 1:
        call()  # wakes the threads, which a loop over short calls does once and not at each
        clock.finish()
    return _seconds(call, calls, clock) / calls


def _wanted(done: int, at_least: int, started: float, budget_s: float) -> bool:
    """Whether to go on: until there are enough and the time is used up, or too many to learn from another."""
    return done < at_least or (done < MAX_PAIRS and time.perf_counter() - started < budget_s)


def turns(
    calls: Sequence[Callable[[], object]],
    *,
    min_rounds: int,
    budget_s: float,
    clock: Clock = CLOCKS["cpu"],
    before: Callable[[], object] | None = None,
    probed: bool = True,
) -> tuple[tuple[float, ...], ...]:
    """Seconds a call of each, which run by turns, at least ``min_rounds`` times, and on until ``budget_s`` is used up.

    Who goes first is drawn.  All have to have run before: nothing here is a warm-up of compilers or caches.  Without
    ``probed`` each sample is one call, and nothing is run to find out how many it should be.
    """
    draw = random.Random(0)
    with _no_gc():
        started = time.perf_counter()
        repeats = max(1, math.ceil(SAMPLE_S / max(probe(call, clock) for call in calls))) if probed else 1
        times: tuple[list[float], ...] = tuple([] for _ in calls)
        while _wanted(len(times[0]), min_rounds, started, budget_s):
            for call, record in draw.sample(list(zip(calls, times, strict=True)), len(calls)):
                record.append(sample(call, repeats, clock, before))
    return tuple(map(tuple, times))


def interleave(
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    min_pairs: int,
    budget_s: float,
    clock: Clock = CLOCKS["cpu"],
    before: Callable[[], object] | None = None,
) -> Samples:
    """The two by turns, at least ``min_pairs`` times: see :func:`turns`."""
    return Samples(*turns((ours, peer), min_rounds=min_pairs, budget_s=budget_s, clock=clock, before=before))


def repeat(
    call: Callable[[], object], *, min_samples: int, budget_s: float, clock: Clock = CLOCKS["cpu"]
) -> tuple[float, ...]:
    """Seconds a call, for one that must not take turns with others; each sample after a pause, as theirs alone."""
    with _no_gc():
        started = time.perf_counter()
        calls = max(1, math.ceil(SAMPLE_S / probe(call, clock)))
        times: list[float] = []
        while _wanted(len(times), min_samples, started, budget_s):
            times.append(sample(call, calls, clock, None))
    return tuple(times)

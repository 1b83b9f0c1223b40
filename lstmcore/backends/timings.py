"""What was timed of classes of shape, and what follows from it for a call: pure arithmetic.

A class of shape is a kind, an arithmetic and a mode.  In each, both sides are timed for some hidden sizes and batches
(I = H, one direction), at a short and at a long sequence: the time of a call is an overhead and so much per step, and
so two times say from how many steps on one is faster than the other.  A layer is judged by the shape that is nearest to
it, on logarithmic scales.

T steps, B rows, I input, H hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from lstmcore.kernels.contract import Layer

KINDS = ("dense", "ragged", "projection")
ARITHMETICS = ("float32", "tf32", "float64", "bfloat16", "float16")  # float32: without TF32
MODES = ("inference", "training")
REACH = 4.0  # a shape judges those whose H and B are at most so many times as large or as small


class Verdict(NamedTuple):
    """Whether ours was faster than torch's, and how that is known (in a yes without ": ", which begins a design)."""

    faster: bool
    why: str = ""


class Class(NamedTuple):
    """A class of shape, without its sizes."""

    kind: str
    arithmetic: str
    mode: str

    @staticmethod
    def of(layer: Layer, strict: bool) -> Class:
        """The class of a layer; ``strict``: float32 on a GPU without TF32."""
        kind = "ragged" if layer.ragged else "projection" if layer.proj_size else "dense"
        arithmetic = str(layer.dtype).removeprefix("torch.")
        if layer.dtype is torch.float32 and layer.device.type == "cuda" and not strict:
            arithmetic = "tf32"
        return Class(kind, arithmetic, MODES[layer.training])

    def __str__(self) -> str:
        return " ".join(self)


class Line(NamedTuple):
    """Milliseconds of a call as a straight line over its steps."""

    overhead: float
    step: float

    @staticmethod
    def through(short: int, short_ms: float, long: int, long_ms: float) -> Line:
        """The line through two times; an entry that noise would make negative is zero, and the long time is kept."""
        step = max(long_ms - short_ms, 0.0) / (long - short)
        overhead = long_ms - step * long
        return Line(overhead, step) if overhead >= 0 else Line(0.0, long_ms / long)

    def at(self, steps: int) -> float:
        return self.overhead + self.step * steps


class Span(NamedTuple):
    """From how many steps to how many."""

    first: int
    last: float  # inf: any number

    @staticmethod
    def ahead(ours: Line, peer: Line) -> Span | None:
        """Where ours takes no longer than the peer; None: nowhere."""
        gain, cost = peer.step - ours.step, ours.overhead - peer.overhead
        if gain == 0:
            return Span(1, math.inf) if cost <= 0 else None
        crossing = cost / gain
        if gain > 0:
            if crossing <= 1:
                return Span(1, math.inf)
            return Span(math.ceil(crossing), math.inf) if math.isfinite(crossing) else None
        if crossing < 1:
            return None
        return Span(1, math.floor(crossing) if math.isfinite(crossing) else math.inf)

    def __contains__(self, steps: object) -> bool:
        return isinstance(steps, int) and self.first <= steps <= self.last

    def __str__(self) -> str:
        if math.isinf(self.last):
            return "for any number of steps" if self.first == 1 else f"from {self.first} steps on"
        return f"up to {self.last} steps"


class Timing(NamedTuple):
    """One shape of a class, timed at two numbers of steps; milliseconds of a call."""

    kind: str
    arithmetic: str
    mode: str
    hidden: int  # H
    batch: int  # B
    short: int  # T
    long: int  # T
    ours_short_ms: float
    ours_long_ms: float
    torch_short_ms: float
    torch_long_ms: float
    noise: float  # of the ratio, the larger of two: half the width of a notch of its box plot, relative
    right: bool  # outputs and gradients agreed with torch's before anything was timed
    date: str  # YYYY-MM-DD
    seed: int  # of the order in which classes and sides took turns

    @property
    def cls(self) -> Class:
        return Class(self.kind, self.arithmetic, self.mode)

    @property
    def ours(self) -> Line:
        return Line.through(self.short, self.ours_short_ms, self.long, self.ours_long_ms)

    @property
    def torchs(self) -> Line:
        return Line.through(self.short, self.torch_short_ms, self.long, self.torch_long_ms)

    @property
    def span(self) -> Span | None:
        """The numbers of steps for which ours is taken; None: for none."""
        return Span.ahead(self.ours, self.torchs) if self.right else None

    def ratio(self, steps: int) -> float:
        """How many times as fast as torch's ours is."""
        ours = self.ours.at(steps)
        return self.torchs.at(steps) / ours if ours else math.inf

    def verdict(self, steps: int, source: str) -> Verdict:
        """For a call of so many steps; ``source``: "tuned here", say."""
        sizes = f"{self.cls} of H {self.hidden}, B {self.batch}"
        if not self.right:
            return Verdict(
                False, f"its results were wrong when {source} on {self.date} ({sizes}); run python -m lstmcore check"
            )
        ratio, span = f"{self.ratio(steps):.2f}x", self.span
        noise = f"within {100 * self.noise:.0f} %"
        if span is not None and steps in span:
            return Verdict(
                True, f"{source} on {self.date}, {ratio} as fast as torch's {noise} ({sizes}, faster {span})"
            )
        where = "for no number of steps" if span is None else span
        return Verdict(
            False, f"torch's was faster when {source} on {self.date}: ours {ratio} {noise} ({sizes}, faster {where})"
        )


def nearest(timings: Iterable[Timing], cls: Class, hidden: int, batch: int) -> Timing | str:
    """The timing that judges such a layer, or a sentence that says why there is none."""
    of_class = [each for each in timings if each.cls == cls]
    if not of_class:
        return f"no {cls} was timed"
    for letter, size, most in (
        ("H", hidden, max(each.hidden for each in of_class)),
        ("B", batch, max(each.batch for each in of_class)),
    ):
        if size > most:
            return f"{letter} {size} is beyond the largest that was timed of {cls}, {most}"

    def octaves(each: Timing) -> tuple[float, float]:
        return abs(math.log2(max(hidden, 1) / each.hidden)), abs(math.log2(max(batch, 1) / each.batch))

    near = [each for each in of_class if max(octaves(each)) <= math.log2(REACH)]
    if not near:
        return f"no {cls} was timed near H {hidden}, B {batch}"
    return min(near, key=lambda each: (math.hypot(*octaves(each)), each.hidden, each.batch))

"""Whether a pipeline that was moved over computes what it did before: outputs, losses and every gradient of its steps.

Rounding grows over optimizer steps, by as much as model and optimizer let it, so no fixed bound fits all libraries.
The yardstick is torch itself: runs from weights that were rounded differently (``pipeline.Nudge``) say how well each
figure is known in float32.  In float64 there is room enough for a bound that holds for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.libraries.pipeline import Pipeline, Trace, run

NUDGES = 3  # runs of torch's from weights that were rounded differently
# A nudge rounds the weights once; a run rounds every sum of every step.  Ours may differ from torch's by so many times
# what three nudges did at most, and by a few roundings of the largest entry where a nudge did less by luck.
FACTOR, FLOOR_EPS = 4.0, 16.0
# In float64, relative to the largest entry of a tensor: a million times what one rounding does, and a thousandth of
# what float32 tells apart.  What differs by so little differs by rounding, and not by a formula.
FLOAT64 = 1e-10
# What rounding leaves of a gradient that is zero, a sum of thousands of terms that cancel: in eps of the largest
# gradient of the run.
ZERO_EPS = 1000.0


class Mismatch(AssertionError):
    """Two runs do not agree, or are not what they should be runs of."""


@dataclass(frozen=True)
class Verdict:
    """How well a pipeline agrees."""

    steps: int  # of the optimizers
    gradients: int  # tensors, at each step, at most
    share: float  # of the difference that is allowed in float32, the largest that was met
    float64: float | None  # the largest difference in float64, relative to the largest entry of a tensor

    @property
    def told(self) -> str:
        """What was checked, in words."""
        exact = "" if self.float64 is None else f"; in float64 to {self.float64:.0e}"
        return f"outputs, losses and {self.gradients} gradients of {self.steps} steps{exact}"


def figures(trace: Trace) -> Iterator[tuple[str, Tensor]]:
    """All that is compared, each with its name."""
    for when, output in zip(("before", "after"), trace.outputs, strict=True):
        yield f"outputs {when} training", output
    for index, loss in enumerate(trace.losses):
        yield f"loss {index}", torch.tensor(loss, dtype=torch.float64)
    for step, gradients in enumerate(trace.gradients):
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                yield f"gradient of parameter {index} at step {step}", gradient


def pairs(peer: Trace, other: Trace) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The figures of both; Mismatch where one has what the other has not, or of another shape, or not finite."""
    left, right = dict(figures(peer)), dict(figures(other))
    if left.keys() != right.keys():
        raise Mismatch(f"only one of two runs has: {', '.join(sorted(left.keys() ^ right.keys()))}")
    for name, expected in left.items():
        got = right[name]
        if got.shape != expected.shape:
            raise Mismatch(f"{name}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}")
        if not (expected.isfinite().all() and got.isfinite().all()):
            raise Mismatch(f"{name}: not finite")
        yield name, expected.double(), got.double()


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item() if a.numel() else 0.0


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def ran_as_told(peer: Trace, ours: Trace) -> None:
    """Mismatch unless torch ran the one and our kernels the other, and both trained."""
    if not (peer.gradients and peer.losses):
        raise Mismatch(f"nothing was trained: {len(peer.gradients)} optimizer steps, {len(peer.losses)} losses")
    if not peer.stock or peer.kernels:
        raise Mismatch(f"torch's run called its LSTM {peer.stock} times and our kernels {peer.kernels} times")
    if ours.stock or not ours.kernels:
        raise Mismatch(
            f"the run moved over called our kernels {ours.kernels} times and torch's LSTM {ours.stock} times"
        )


def within_noise(peer: Trace, ours: Trace, nudged: Sequence[Trace]) -> float:
    """The largest share of the allowed difference; Mismatch where one is above it."""
    noise: dict[str, float] = {}
    for trace in nudged:
        for name, expected, got in pairs(peer, trace):
            noise[name] = max(noise.get(name, 0.0), difference(expected, got))
    worst, eps = 0.0, torch.finfo(torch.float32).eps
    for name, expected, got in pairs(peer, ours):
        off, allowed = difference(expected, got), FACTOR * noise[name] + FLOOR_EPS * eps * largest(expected)
        if off > allowed:
            raise Mismatch(f"{name} {tuple(got.shape)}: off by {off:.3g}, allowed {allowed:.3g}")
        worst = max(worst, off / allowed if allowed else 0.0)
    return worst


def within_float64(peer: Trace, ours: Trace) -> float:
    """The largest difference relative to the largest entry of its tensor; Mismatch where one is too large.

    A gradient that is zero but for rounding, as that of a bias before a batch norm, has no such entry: ``ZERO_EPS``.
    """
    worst, eps = 0.0, torch.finfo(torch.float64).eps
    rounding = ZERO_EPS * eps * max(largest(each) for step in peer.gradients for each in step if each is not None)
    for name, expected, got in pairs(peer, ours):
        off, scale = difference(expected, got), largest(expected) + rounding / FLOAT64
        if off > FLOAT64 * scale:
            raise Mismatch(
                f"{name} {tuple(got.shape)} in float64: off by {off:.3g}, the largest entry is {largest(expected):.3g}"
            )
        worst = max(worst, off / scale if scale else 0.0)
    return worst


def check(pipeline: Pipeline) -> Verdict:
    """Runs a pipeline both ways, and torch's once more for each nudge; Mismatch where they do not agree."""
    peer, ours = run(pipeline, moved=False), run(pipeline, moved=True)
    ran_as_told(peer, ours)
    share = within_noise(peer, ours, [run(pipeline, moved=False, nudge=number) for number in range(NUDGES)])
    exact = None
    if pipeline.float64:
        both = [run(pipeline, moved=moved, dtype=torch.float64) for moved in (False, True)]
        ran_as_told(*both)
        exact = within_float64(*both)
    most = max(sum(each is not None for each in gradients) for gradients in peer.gradients)
    return Verdict(len(peer.gradients), most, share, exact)

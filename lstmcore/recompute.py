"""How much of forward is kept for backward: everything, or the states between segments of steps.

Recomputing gates segment by segment (Chen et al. 2016, "Training deep nets with sublinear memory cost") costs one more
forward.  With segments of S steps a layer keeps (h, c) at T / S borders, and the gates and cells of S steps while
backward is in that segment: least with S of about the square root of T.

T time, B batch, H hidden, P projection (H without one), L layers, D directions, S steps of a segment.
"""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from lstmcore.kernels.contract import GATES, Layer, state_dtype

AUTO = "auto"
LONGEST = 1 << 40  # steps of a segment, where more are asked for: no sequence has as many
IN_GRAPH = 256  # steps of a segment for "auto" in a compiled graph, which always recomputes
WHOLE = 16  # units of a vector at most: kernels keep whole ones
WORTH_A_SEGMENT = 4_000_000  # multiply-adds of a segment, so that starting it costs little
SHARE = 0.25  # of the memory that is available: what "auto" lets a call keep
UNASKED = 64 << 20  # bytes that it lets a call keep without asking how much memory there is
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


class Recompute(NamedTuple):
    """What a caller asks for."""

    segment: int | Literal["auto"] | None = None  # S; None: everything is kept
    budget: int | None = None  # bytes; None: a quarter of the memory that is available


_EVERYTHING = Recompute()


def asked(recompute: Any, memory_budget: Any) -> Recompute:
    """The arguments ``recompute`` and ``memory_budget``; TypeError or ValueError unless they are valid."""
    if recompute is None and memory_budget is None:
        return _EVERYTHING
    for name, value in (("recompute", recompute), ("memory_budget", memory_budget)):
        if value is None or (name == "recompute" and value == AUTO):
            continue
        what = "None, 'auto' or a number of steps" if name == "recompute" else "None or a number of bytes"
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} should be {what}, got: {value!r}")
        if value < 1:
            raise ValueError(f"{name} should be {what}, at least 1, got: {value!r}")
    if memory_budget is not None and recompute != AUTO:
        raise ValueError(f"memory_budget goes with recompute='auto', got recompute={recompute!r}")
    segment = recompute if recompute == AUTO else min(int(recompute), LONGEST)
    return Recompute(segment, None if memory_budget is None else int(memory_budget))


def segment(asked: Recompute, layer: Layer, num_layers: int) -> int:
    """S for a call of a stack that begins with ``layer``, and is trained; 0 if everything is kept.

    Raises RuntimeError if the caller's budget is too small for any segment.
    """
    if asked.segment is None:
        return 0
    if asked.segment != AUTO:
        return asked.segment  # type: ignore[return-value]
    if torch.compiler.is_compiling():  # steps and rows may be symbols: one answer for all of them
        return IN_GRAPH
    sizes = _Sizes.of(layer, num_layers)
    whole = sizes.step * layer.steps * num_layers
    if asked.budget is None and whole <= UNASKED:
        return 0
    budget = asked.budget if asked.budget is not None else int(SHARE * available(layer.device))
    if whole <= budget:
        return 0
    found = sizes.segment(budget)
    if asked.budget is not None and sizes.kept(found) > asked.budget:
        raise RuntimeError(
            f"memory_budget of {asked.budget} bytes is too small: with recomputing, {num_layers} layers of "
            f"{layer.steps} steps, {layer.batch} rows and {layer.hidden_size} units need {sizes.kept(found)} (segments "
            f"of {found} steps), without {whole}. Allow more, or call the module on fewer rows or steps at a time"
        )
    return found


class _Sizes(NamedTuple):
    """Bytes of a stack, at most."""

    steps: int  # T
    layers: int  # L
    step: int  # the gates and cells of a step of one layer
    border: int  # the states between two steps of one layer
    least: int  # steps that are worth a segment

    @staticmethod
    def of(layer: Layer, num_layers: int) -> _Sizes:
        state, rows = state_dtype(layer.dtype).itemsize, layer.batch * layer.directions
        products = rows * layer.gates * (layer.input_size + layer.width)
        hidden, width = (-(-units // WHOLE) * WHOLE for units in (layer.hidden_size, layer.width))
        return _Sizes(
            layer.steps, num_layers, rows * hidden * (GATES * layer.dtype.itemsize + state),
            rows * (width + hidden) * state, -(-WORTH_A_SEGMENT // max(1, products)),
        )  # fmt: skip

    def kept(self, segment: int) -> int:
        """At most at any time: the borders of all layers, and one segment of one of them."""
        return self.layers * -(-self.steps // segment) * self.border + min(segment + 1, self.steps) * self.step

    def segment(self, budget: int) -> int:
        """S: where memory is least, or longer if that is within the budget, and segments so short are not worth it."""
        least = max(1, math.isqrt(self.layers * self.steps * self.border // max(1, self.step)))
        worth = min(self.least, self.steps)
        return max(least, worth) if self.kept(max(least, worth)) <= budget else least


def available(device: torch.device) -> int:
    """Bytes of memory that this process could still take, as the system or the driver reports."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_of_system(), _of_cgroup())


def _of_system() -> int:
    with suppress(OSError, ValueError):
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    import os

    with suppress(AttributeError, ValueError, OSError):  # neither Linux nor any Unix: a guess
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 << 30


def _of_cgroup() -> int:
    """What is left of a container's limit; a lot if there is none."""
    with suppress(OSError, ValueError):
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        return max(0, limit - used + min(used, _of_files()))
    return sys.maxsize


def _of_files() -> int:
    """Bytes that count as used by a container, but hold files that the system drops before it refuses memory."""
    with suppress(OSError, ValueError):
        for line in (_CGROUP / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                return int(line.split()[1])
    return 0

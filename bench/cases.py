"""The registry of named cases: what is measured, in which modes, and how many operations it takes.

Legend: T steps, B batch, I input, H hidden, P projection (H where there is none), D directions, N rows over all steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

MODES = ("inference", "training")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Case:
    """One shape of LSTM and of input; everything that is run on it is drawn from its name."""

    name: str
    group: str
    input_size: int
    hidden_size: int
    batch: int
    steps: int
    num_layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    dtype: str = "float32"
    mean_length: float = 1.0  # below one: packed input, whose lengths spread evenly around this share of ``steps``
    modes: tuple[str, ...] = MODES
    device: str = "cpu"
    loss: str = "all"  # of all outputs and final states; "last": of each row's last output alone
    strict: bool = False  # float32 products in float32, where a GPU would otherwise round their operands to TF32
    quick: bool = False
    memory: bool = False  # the full run also measures the peak memory of a training step

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def ragged(self) -> bool:
        return self.mean_length < 1.0

    @property
    def tf32(self) -> bool:
        """Whether products may round their operands to TF32: torch's default for recurrent layers on a GPU."""
        return self.device == "cuda" and self.dtype == "float32" and not self.strict

    def lengths(self) -> list[int]:
        """The length of each row; the longest is ``steps``, and a ragged batch is not sorted."""
        if not self.ragged:
            return [self.steps] * self.batch
        shortest = max(2 * self.mean_length - 1, 0) * self.steps
        spread = [
            max(1, round(shortest + (self.steps - shortest) * (row + 1) / self.batch)) for row in range(self.batch)
        ]
        return spread[1::2] + spread[0::2]

    def flops(self, mode: str) -> int:
        """Multiplications and additions of the matrix products; a backward pass has two for each of the forward's.

        Only rows that are alive count: a packed batch is credited with no work for padding.
        """
        width = self.proj_size or self.hidden_size  # P
        per_row = 0
        for layer in range(self.num_layers):
            features = self.input_size if layer == 0 else self.directions * width
            per_row += self.directions * 2 * 4 * self.hidden_size * (features + width)
            if self.proj_size:
                per_row += self.directions * 2 * self.hidden_size * self.proj_size
        return per_row * sum(self.lengths()) * (3 if mode == "training" else 1)


# The steps a case may have.  It gets the most of these whose training pass stays within the limit given to ``_fit``, so
# that the repetitions of one row take torch about ten seconds at most; the name of the case tells how many it got.
STEPS = (1000, 500, 250, 100, 50)


def _fit(case: Case, limit_gflop: float) -> Case:
    """``case`` with as many steps as the limit allows, and their number in its name."""
    for steps in STEPS:
        candidate = replace(case, steps=steps, name=f"{case.name}-t{steps}")
        if candidate.flops("training") <= limit_gflop * 1e9:
            break
    return candidate  # the largest shapes exceed it even with the fewest


# What torch gets done in about a second or two on two cores.  Its fused CPU path takes float32 and bfloat16; packed
# input, projections, float64 and float16 go through a slow loop over the steps.
FUSED_GFLOP = 103
LOOP_GFLOP = 11

QUICK = {
    "dense-h16-b32",
    "dense-h64-b8",
    "dense-h128-b1",
    "dense-h128-b32",
    "dense-h256-b8",
    "dense-h512-b8",
    "i1-h64-b32",
    "i1-h128-b32",
    "steps-t100",
    "steps-t4096",
    "bidirectional-h128-b32",
    "layers4-h64-b8",
    "packed-h128-b32",
    "proj-h128-p64-b32",
    "float64-h128-b32",
    "bfloat16-h128-b32",
    "last-h128-b32",
    "short-h64-b32-t30",
    "short-h128-b16-t100",
    "call-h16-b1-t1",
}

MEMORY = {
    "dense-h64-b8",
    "dense-h128-b32",
    "dense-h256-b32",
    "dense-h512-b32",
    "dense-h1024-b64",
    "i1-h128-b32",
    "steps-t16384",
    "bidirectional-h128-b32",
    "layers4-h128-b32",
    "packed-h128-b32",
    "proj-h128-p64-b32",
    "float64-h128-b32",
    "bfloat16-h128-b32",
}


SHORT = (  # T, B, I, H
    (16, 128, 64, 64),
    (20, 24, 80, 80),
    (30, 32, 32, 64),
    (30, 64, 64, 128),
    (50, 16, 16, 32),
    (70, 16, 128, 128),
    (100, 16, 128, 128),
    (100, 1, 64, 256),
)


def _cases() -> Iterator[Case]:
    for hidden in (16, 64, 128, 256, 512, 1024):
        for batch in (1, 8, 32, 64):
            shape = f"h{hidden}-b{batch}"
            yield _fit(Case(f"dense-{shape}", "dense", hidden, hidden, batch, 0), FUSED_GFLOP)
            yield _fit(Case(f"i1-{shape}", "dense-i1", 1, hidden, batch, 0), FUSED_GFLOP)
    for steps in (100, 256, 512, 1024, 2048, 4096, 8192, 16384):
        yield Case(f"steps-t{steps}", "steps", 128, 128, 16, steps)
    # Bidirectional cases are held against the unidirectional ones of the same shape, so they keep those shapes.
    for hidden, batch in ((64, 8), (128, 32), (256, 32), (512, 32)):
        case = Case(f"bidirectional-h{hidden}-b{batch}", "bidirectional", hidden, hidden, batch, 0, bidirectional=True)
        yield _fit(case, FUSED_GFLOP)
    for hidden, batch in ((64, 8), (128, 32), (256, 32)):
        case = Case(f"layers4-h{hidden}-b{batch}", "layers4", hidden, hidden, batch, 0, num_layers=4)
        yield _fit(case, FUSED_GFLOP)
    for hidden, batch in ((64, 8), (128, 32), (256, 32), (512, 32)):
        case = Case(f"packed-h{hidden}-b{batch}", "packed", hidden, hidden, batch, 0, mean_length=0.5)
        yield _fit(case, LOOP_GFLOP)
    for hidden, proj, batch in ((128, 64, 32), (512, 128, 32)):
        case = Case(f"proj-h{hidden}-p{proj}-b{batch}", "proj", hidden, hidden, batch, 0, proj_size=proj)
        yield _fit(case, LOOP_GFLOP)
    for dtype, limit in (("float64", LOOP_GFLOP), ("bfloat16", FUSED_GFLOP), ("float16", LOOP_GFLOP)):
        for hidden, batch in ((64, 8), (128, 32), (256, 32), (512, 32)):
            yield _fit(Case(f"{dtype}-h{hidden}-b{batch}", dtype, hidden, hidden, batch, 0, dtype=dtype), limit)
    # As a classifier trains: the gradient comes from the last step, and vanishes on its way back.
    for hidden, batch in ((32, 32), (128, 32), (256, 8)):
        name = f"last-h{hidden}-b{batch}-t1000"
        yield Case(name, "last", hidden, hidden, batch, 1000, modes=("training",), loss="last")
    # What libraries feed their models: windows of a series, sentences, rollouts.
    for steps, batch, inputs, hidden in SHORT:
        yield Case(f"short-h{hidden}-b{batch}-t{steps}", "short", inputs, hidden, batch, steps)
    # One step of one row: what a call costs before any arithmetic.
    yield Case("call-h16-b1-t1", "call", 16, 16, 1, 1)


def _shape(name: str) -> str:
    """A case's name without the number of steps that it got."""
    return name if name.startswith(("steps-", "short-", "call-")) else name.rpartition("-t")[0]


CASES = {
    case.name: replace(case, quick=_shape(case.name) in QUICK, memory=_shape(case.name) in MEMORY) for case in _cases()
}
if unknown := (QUICK | MEMORY) - {_shape(name) for name in CASES}:
    raise ValueError(f"expected the names of cases without their steps, got {sorted(unknown)}")

GROUPS = {
    "dense": "one layer, one direction, I = H, float32",
    "dense-i1": "the same with I = 1",
    "steps": "H 128, B 16, from 100 to 16,384 steps",
    "bidirectional": "both directions",
    "layers4": "4 layers",
    "packed": "packed, ragged: half of the steps alive",
    "proj": "with a projection",
    "float64": "float64",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "last": "a loss of the last step alone: the gradient vanishes on its way",
    "short": "16 to 100 steps, as libraries feed their models",
    "call": "one step of one row: the overhead of a call",
}
# Means that are taken over several groups, because a user does not choose between them.
UNIONS: dict[str, tuple[str, ...]] = {"dense, all": ("dense", "dense-i1")}


def select(
    group: str | None = None,
    pattern: str | None = None,
    quick: bool = False,
    registry: Mapping[str, Case] = CASES,
) -> list[Case]:
    """The cases of a group, whose names match a shell pattern (or contain it), of the quick subset."""
    return [
        case
        for case in registry.values()
        if (group is None or case.group == group)
        and (pattern is None or fnmatchcase(case.name, pattern) or pattern in case.name)
        and (not quick or case.quick)
    ]

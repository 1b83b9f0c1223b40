"""The registry of named cases: what is measured, by which experiments, and how many operations it takes.

A new case is a line here: every experiment, the pytest-benchmark entries and the report take theirs from this file.

Legend: T steps, B batch, I input, H hidden, P projection (H where there is none), D directions, N rows over all steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

import torch

MODES = ("inference", "training")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    tags: frozenset[str] = frozenset()  # of ``TAGS``

    @property
    def quick(self) -> bool:
        return "quick" in self.tags

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

GRID = tuple(product((16, 64, 128, 256, 512, 1024), (1, 8, 32, 64)))  # H, B
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

LONG = {  # by (H, B): T, the last of the first beyond what torch can train on in 24 GB
    (256, 16): (1024, 4096, 16_384, 131_072),
    (64, 1): (1024, 16_384, 65_536, 262_144, 1_000_000),
}

HIDDEN = (64, 128, 256, 512, 768, 1024, 2048)  # of the cases on a GPU, as the next two
BATCHES = (1, 16, 64, 128, 256)
STEPS_ON_GPU = (256, 1024, 4096, 16384)

# In the order in which they are run: where a time limit cuts the list, what matters most has been measured.
GPU_QUICK = (
    "cuda-bfloat16-h1024-b16-t1024", "cuda-bfloat16-h512-b16-t1024", "cuda-bfloat16-h128-b16-t1024",
    "cuda-float16-h768-b16-t1024", "cuda-bfloat16-h64-b16-t1024", "cuda-bfloat16-h256-b64-t1024",
    "cuda-bfloat16-h1024-b64-t1024", "cuda-packed-bfloat16-h512-b16-t1024", "cuda-float32-h512-b16-t1024",
    "cuda-bidirectional-bfloat16-h512-b16-t1024", "cuda-float16-h128-b64-t1024", "cuda-float16-h1024-b64-t1024",
    "cuda-bfloat16-h2048-b16-t1024", "cuda-bfloat16-h1024-b1-t1024", "cuda-bfloat16-h1024-b256-t1024",
    "cuda-bfloat16-h512-b64-t1024", "cuda-bfloat16-h128-b256-t1024", "cuda-bfloat16-h768-b64-t1024",
    "cuda-bfloat16-h256-b1-t1024", "cuda-bfloat16-h512-b16-t4096", "cuda-bfloat16-h128-b16-t16384",
    "cuda-bfloat16-h128-b64-t256", "cuda-bfloat16-h1024-b16-t256", "cuda-float16-h64-b16-t1024",
    "cuda-float16-h512-b64-t1024", "cuda-float16-h512-b256-t1024", "cuda-float16-h1024-b1-t1024",
    "cuda-float32-h128-b16-t1024", "cuda-float32-h1024-b64-t1024", "cuda-strict-float32-h512-b16-t1024",
    "cuda-layers2-bfloat16-h512-b16-t1024", "cuda-layers4-bfloat16-h128-b16-t1024",
    "cuda-odd-bfloat16-h513-b17-t1024", "cuda-odd-float16-h129-b17-t1024", "cuda-proj-bfloat16-h512-p128-b16-t1024",
)  # fmt: skip
# What is special about a case, by its name (in full, or without the number of steps that it got).
TAGS: dict[str, tuple[str, ...]] = {
    "quick": (  # in the quick subset
        "dense-h16-b32", "dense-h64-b8", "dense-h128-b1", "dense-h128-b32", "dense-h256-b8", "dense-h512-b8",
        "i1-h64-b32", "i1-h128-b32", "steps-t100", "steps-t4096", "bidirectional-h128-b32", "layers4-h64-b8",
        "packed-h128-b32", "proj-h128-p64-b32", "float64-h128-b32", "bfloat16-h128-b32",
        "bfloat16-short-h64-b32-t30", "last-h128-b32", "short-h64-b32-t30", "short-h128-b16-t100", "call-h16-b1-t1",
        "reset-h64-b32", "reset-h16-b8", "lengths-h64-b32", "lengths-h16-b8", "cells-h16-b8", "rollout-h256-i64-b8",
        "long-h256-b16-t1024", "long-h64-b1-t16384",
        *GPU_QUICK,
    ),
    "memory": (  # the full run also measures the peak memory of a training step; on a GPU, of every case
        "dense-h64-b8", "dense-h128-b32", "dense-h256-b32", "dense-h512-b32", "dense-h1024-b64", "i1-h128-b32",
        "steps-t16384", "bidirectional-h128-b32", "layers4-h128-b32", "packed-h128-b32", "proj-h128-p64-b32",
        "float64-h128-b32", "bfloat16-h128-b32",
    ),
    "flow": (  # what recording the gradient flow costs is measured on
        "dense-h16-b1", "dense-h16-b8", "dense-h16-b32", "dense-h64-b8", "dense-h64-b32",
        "dense-h128-b32", "dense-h256-b32", "dense-h512-b8", "dense-h1024-b8",
        "cuda-bfloat16-h1024-b16-t1024", "cuda-bfloat16-h128-b16-t1024", "cuda-packed-bfloat16-h512-b16-t1024",
        "cuda-float32-h512-b16-t1024",
    ),
    # In torch's packed training every step's slice has a gradient as large as the gates of all steps, so that the time
    # grows with the square of T.  Of these shapes one call takes between two and thirty seconds.
    "slow": (
        "lengths-h256-b32", "lengths-h64-b32", "rollout-h256-i64-b32", "rollout-h256-i64-b128",
        "rollout-h256-i256-b128",
    ),
    # Two commits are compared on these: a call of one step, short, dense, packed.
    "compare": ("call-h16-b1-t1", "short-h64-b32-t30", "dense-h64-b8", "packed-h64-b8"),
}  # fmt: skip


def _cpu_cases() -> Iterator[Case]:
    def square(
        group: str, shapes: Iterable[tuple[int, int]], limit: float = FUSED_GFLOP, **rest: Any
    ) -> Iterator[Case]:
        for hidden, batch in shapes:
            yield _fit(Case(f"{group}-h{hidden}-b{batch}", group, hidden, hidden, batch, 0, **rest), limit)

    def projected(group: str, hidden: int, proj: int, **rest: Any) -> Case:
        name = f"{group}-h{hidden}-p{proj}-b32"
        return _fit(Case(name, group, hidden, hidden, 32, 0, proj_size=proj, **rest), LOOP_GFLOP)

    def short(group: str, shapes: Iterable[tuple[int, int, int, int]], **rest: Any) -> Iterator[Case]:
        for steps, batch, inputs, hidden in shapes:
            yield Case(f"{group}-h{hidden}-b{batch}-t{steps}", group, inputs, hidden, batch, steps, **rest)

    for hidden, batch in GRID:
        yield from square("dense", [(hidden, batch)])
        yield _fit(Case(f"i1-h{hidden}-b{batch}", "dense-i1", 1, hidden, batch, 0), FUSED_GFLOP)
    for steps in (100, 256, 512, 1024, 2048, 4096, 8192, 16384):
        yield Case(f"steps-t{steps}", "steps", 128, 128, 16, steps)
    # Bidirectional cases are held against the unidirectional ones of the same shape, so they keep those shapes.
    shapes = ((64, 8), (128, 32), (256, 32), (512, 32))
    yield from square("bidirectional", shapes, bidirectional=True)
    yield from square("layers4", shapes[:3], num_layers=4)
    yield from square("packed", shapes, LOOP_GFLOP, mean_length=0.5)
    yield from (projected("proj", hidden, proj) for hidden, proj in ((128, 64), (512, 128)))
    yield from square("float64", shapes, LOOP_GFLOP, dtype="float64")
    # The shapes of float32, with as many steps: ours in bfloat16 is held against ours in float32 as well.
    half: dict[str, Any] = {"dtype": "bfloat16"}
    yield from square("bfloat16", GRID, **half)
    yield from square("bfloat16-layers4", shapes[1:2], num_layers=4, **half)
    yield from square("bfloat16-packed", shapes[1:3], LOOP_GFLOP, mean_length=0.5, **half)
    yield projected("bfloat16-proj", 128, 64, **half)
    yield from short("bfloat16-short", SHORT, **half)
    half = {"dtype": "float16"}
    yield from square("float16", shapes, LOOP_GFLOP, **half)
    yield from square("float16-packed", shapes[1:2], LOOP_GFLOP, mean_length=0.5, **half)
    yield from short("float16-short", (SHORT[2], SHORT[6]), **half)
    # As a classifier trains: the gradient comes from the last step, and vanishes on its way back.
    for hidden, batch in ((32, 32), (128, 32), (256, 8)):
        name = f"last-h{hidden}-b{batch}-t1000"
        yield Case(name, "last", hidden, hidden, batch, 1000, modes=("training",), loss="last")
    # What libraries feed their models: windows of a series, sentences, rollouts.
    yield from short("short", SHORT)
    # One step of one row: what a call costs before any arithmetic.
    yield Case("call-h16-b1-t1", "call", 16, 16, 1, 1)


def _gpu_cases() -> Iterator[Case]:
    memory = frozenset({"memory"})

    def every(
        group: str,
        dtypes: Iterable[str],
        shapes: Iterable[tuple[int, int]],
        steps: Iterable[int] = (1024,),
        kind: str = "",
        **rest: Any,
    ) -> Iterator[Case]:
        """``kind``: what the name says beyond the dtype, where that is not the whole group."""
        for dtype, (hidden, batch), length in product(dtypes, shapes, steps):
            middle = f"{kind}-{dtype}" if kind else dtype
            proj = f"-p{rest['proj_size']}" if "proj_size" in rest else ""
            name = f"cuda-{middle}-h{hidden}{proj}-b{batch}-t{length}"
            yield Case(name, group, hidden, hidden, batch, length, dtype=dtype, device="cuda", tags=memory, **rest)

    half, both = ("bfloat16", "float16"), (1024, 4096)
    some = tuple(product((128, 512, 1024), (16, 64)))  # H, B
    for dtype in (*half, "float32"):
        yield from every(f"cuda-{dtype}", [dtype], product(HIDDEN, BATCHES), STEPS_ON_GPU)
    yield from every("cuda-strict", ["float32"], some, kind="strict", strict=True)
    more = product((64, 128, 256, 512, 1024), (16, 64))
    yield from every("cuda-bidirectional", half, tuple(more), both, "bidirectional", bidirectional=True)
    for layers in (2, 4):
        yield from every("cuda-layers", half, some, kind=f"layers{layers}", num_layers=layers)
    yield from every("cuda-packed", (*half, "float32"), some, both, "packed", mean_length=0.5)
    odd = ((65, 3), (129, 17), (200, 33), (513, 17), (1000, 50))
    yield from every("cuda-odd", (*half, "float32"), odd, kind="odd")
    for dtype, (hidden, proj) in product(("bfloat16", "float32"), ((512, 128), (1024, 256))):
        yield from every("cuda-proj", [dtype], [(hidden, 16)], kind="proj", proj_size=proj)


def _other_cases() -> Iterator[Case]:
    """Those of the experiments that have cases of their own."""
    for group, shapes in (  # H, B, T
        ("reset", ((128, 32, 1000), (256, 32, 500), (64, 32, 1000), (512, 8, 500), (16, 8, 1000))),
        ("lengths", ((128, 32, 250), (256, 32, 500), (64, 32, 1000), (16, 8, 1000))),
        ("cells", ((128, 32, 1000), (256, 32, 500), (16, 8, 1000))),
    ):
        for hidden, batch, steps in shapes:
            yield Case(f"{group}-h{hidden}-b{batch}-t{steps}", group, hidden, hidden, batch, steps)
    for features, batch in ((64, 128), (256, 128), (64, 32), (64, 8)):
        name = f"rollout-h256-i{features}-b{batch}-t128"
        yield Case(name, "rollout", features, 256, batch, 128, modes=("training",))
    for (hidden, batch), lengths in LONG.items():
        for steps in lengths:
            yield Case(f"long-h{hidden}-b{batch}-t{steps}", "long", hidden, hidden, batch, steps)
    for hidden, batch in ((64, 1), (128, 1), (16, 6), (64, 4), (128, 6), (64, 8)):
        yield Case(f"stack-h{hidden}-b{batch}", "stack", hidden, hidden, batch, 1000, num_layers=4)
    for features, hidden, batch, layers in (
        (64, 128, 1, 1),
        (16, 16, 1, 1),
        (256, 256, 16, 1),
        (512, 512, 1, 1),
        (64, 128, 1, 2),
    ):
        name = f"stream-h{hidden}-i{features}-b{batch}" + f"-layers{layers}" * (layers > 1)
        yield Case(name, "stream", features, hidden, batch, 10_000, num_layers=layers, modes=("inference",))
    # How far 16 bits are off, in both types: one step and a thousand, one row and 32, and each kind of layer.
    for hidden, batch, steps, kind, rest in (
        (16, 1, 1, "", {}),
        (512, 32, 1, "", {}),
        (64, 8, 10, "", {}),
        (64, 32, 30, "", {}),
        (256, 1, 100, "", {}),
        (512, 32, 100, "", {}),
        (128, 1, 1000, "", {}),
        (64, 8, 1000, "", {}),
        (16, 32, 1000, "", {}),
        (128, 32, 100, "packed-", {"mean_length": 0.5}),
        (128, 8, 100, "bidirectional-", {"bidirectional": True}),
        (128, 16, 100, "proj-", {"proj_size": 64}),
        (128, 16, 100, "layers2-", {"num_layers": 2}),
        (128, 16, 20, "last-", {"loss": "last"}),  # with more steps it vanishes below what float16 has
    ):
        name = f"rounding-{kind}h{hidden}-b{batch}-t{steps}"
        given: dict[str, Any] = {"dtype": "bfloat16", "modes": ("training",)} | rest
        yield Case(name, "rounding", hidden, hidden, batch, steps, **given)
    on_gpu: dict[str, Any] = {"dtype": "bfloat16", "device": "cuda"}
    for batch, hidden in product((16, 64, 1), HIDDEN):  # what matters most comes first: a time limit may cut the end
        yield Case(f"step-h{hidden}-b{batch}", "step", hidden, hidden, batch, 1024, **on_gpu)
    for hidden, batch in (
        (128, 16), (512, 16), (1024, 16), (1024, 256), (512, 256), (1024, 64), (512, 64), (256, 16), (768, 16),
    ):  # fmt: skip
        yield Case(f"design-h{hidden}-b{batch}", "design", hidden, hidden, batch, 1024, modes=("training",), **on_gpu)
    for units in (2, 8, 32, 128):  # of a block of threads, in eight rows: 32 to 2,048 bytes that it hands over
        yield Case(f"handoff-h{units}-b8", "handoff", units, units, 8, 4096, modes=(), **on_gpu)
    # Sizes that no tile divides, so that every mask is used: one block of threads has all of R, then several share it.
    wide, ragged = {"dtype": "float32"}, {"mean_length": 0.5}
    for name, sizes, rest in (  # I, H, B, T
        ("h40", (24, 40, 5, 6), {}),
        ("h72-bidirectional", (16, 72, 19, 4), {"dtype": "float16", "bidirectional": True}),
        ("h100-packed", (16, 100, 6, 5), wide | ragged),
        ("h320", (32, 320, 5, 4), {}),
        ("h264-packed", (16, 264, 18, 4), {"dtype": "float16"} | ragged),
        ("h288-strict", (16, 288, 3, 3), wide | {"strict": True}),
    ):
        yield Case(f"smoke-{name}", "smoke", *sizes, **on_gpu | rest)


@dataclass(frozen=True)
class Group:
    """Cases that are summed up together."""

    title: str
    device: str = "cpu"
    experiment: str = "speed"  # which measures them; those of "speed" are also for the experiments in ``OF_SPEED``
    kind: str = ""  # of call, in the README's summary; empty where that leaves the group out


DENSE, PACKED, SHORT_CALLS = "dense, float32", "packed", "short"
HALF, PACKED_HALF, SHORT_HALF = "dense, 16-bit", "packed, 16-bit", "short, 16-bit"
GROUPS = {
    "dense": Group("one layer, one direction, I = H, float32", kind=DENSE),
    "dense-i1": Group("the same with I = 1", kind=DENSE),
    "steps": Group("H 128, B 16, from 100 to 16,384 steps", kind=DENSE),
    "bidirectional": Group("both directions", kind=DENSE),
    "layers4": Group("4 layers", kind=DENSE),
    "packed": Group("packed, ragged: half of the steps alive", kind=PACKED),
    "proj": Group("with a projection"),
    "float64": Group("float64"),
    "bfloat16": Group("one layer, one direction, I = H, bfloat16", kind=HALF),
    "bfloat16-layers4": Group("4 layers", kind=HALF),
    "bfloat16-packed": Group("packed, ragged: half of the steps alive", kind=PACKED_HALF),
    "bfloat16-proj": Group("with a projection"),
    "bfloat16-short": Group("16 to 100 steps, as libraries feed their models", kind=SHORT_HALF),
    "float16": Group("one layer, one direction, I = H, float16", kind=HALF),
    "float16-packed": Group("packed, ragged: half of the steps alive", kind=PACKED_HALF),
    "float16-short": Group("30 and 100 steps", kind=SHORT_HALF),
    "last": Group("a loss of the last step alone: the gradient vanishes on its way", kind=DENSE),
    "short": Group("16 to 100 steps, as libraries feed their models", kind=SHORT_CALLS),
    "call": Group("one step of one row: the overhead of a call", kind=SHORT_CALLS),
    "cuda-bfloat16": Group("one layer, one direction, I = H, bfloat16", "cuda", kind=HALF),
    "cuda-float16": Group("the same in float16", "cuda", kind=HALF),
    "cuda-float32": Group("the same in float32, products in TF32", "cuda", kind=DENSE),
    "cuda-strict": Group("the same in float32 throughout", "cuda", kind=DENSE),
    "cuda-bidirectional": Group("both directions", "cuda", kind=HALF),
    "cuda-layers": Group("2 and 4 layers", "cuda", kind=HALF),
    "cuda-packed": Group("packed, ragged: half of the steps alive", "cuda", kind=PACKED),
    "cuda-odd": Group("sizes that no tile divides", "cuda"),
    "cuda-proj": Group("with a projection", "cuda"),
    "reset": Group("a mask of resets, against none", experiment="control"),
    "lengths": Group("lengths, against dense calls of as many steps and against packing", experiment="control"),
    "cells": Group("cells that are returned, against none", experiment="control"),
    "rollout": Group("training on a rollout with resets, against torch.nn", experiment="control"),
    "long": Group("from 1,024 steps to a million", experiment="long"),
    "stack": Group("4 layers of a few rows, against one layer", experiment="layers"),
    "rounding": Group("errors in 16 bits against float64, beside torch's", experiment="rounding"),
    "stream": Group("single steps, each after the one before", experiment="stream"),
    "step": Group("the time of one step, bfloat16", "cuda", "steps"),
    "design": Group("one step by each design of the tiling, bfloat16", "cuda", "designs"),
    "handoff": Group("what blocks of threads hand over in a step", "cuda", "handoff"),
    "smoke": Group("each design once, as small as it gets", "cuda", "smoke"),
}
OF_SPEED = ("after-torch", "bfloat16-gain", "flow")  # have all or some cases of "speed"
# Means that are taken over several groups, because a user does not choose between them.
UNIONS: dict[str, tuple[str, ...]] = {"dense, all": ("dense", "dense-i1")}


def _shape(name: str) -> str:
    """A case's name without the number of steps that it got."""
    return name if name.startswith(("steps-", "short-", "call-")) else name.rpartition("-t")[0]


def _registry() -> dict[str, Case]:
    """All cases with their tags; of a GPU's, the quick ones come first, in their order."""
    found: dict[str, Case] = {}
    missing = {tag: set(names) for tag, names in TAGS.items()}
    for case in (*_cpu_cases(), *_gpu_cases(), *_other_cases()):
        names = {case.name, _shape(case.name)}
        if case.name in found or case.group not in GROUPS or GROUPS[case.group].device != case.device:
            raise ValueError(f"expected a new name and a group of its device, got {case}")
        tags = {tag for tag, tagged in TAGS.items() if names & set(tagged)}
        found[case.name] = replace(case, tags=case.tags | tags)
        for unseen in missing.values():
            unseen -= names
    if unknown := {tag: names for tag, names in missing.items() if names}:
        raise ValueError(f"expected the names of cases, got {unknown}")
    return {name: found[name] for name in GPU_QUICK} | found


CASES = _registry()


def select(
    experiment: str = "speed",
    device: str = "cpu",
    group: str | None = None,
    pattern: str | None = None,
    quick: bool = False,
) -> list[Case]:
    """The cases of an experiment: of a group, whose names match a shell pattern (or contain it), of the quick subset.

    "flow" has those tagged for it, or with a pattern any of "speed"; "bfloat16-gain" those in bfloat16.
    """
    source = "speed" if experiment in OF_SPEED else experiment
    return [
        case
        for case in CASES.values()
        if (GROUPS[case.group].experiment, case.device) == (source, device)
        and (group is None or case.group == group)
        and (pattern is None or fnmatchcase(case.name, pattern) or pattern in case.name)
        and (not quick or case.quick)
        and (experiment != "flow" or pattern is not None or "flow" in case.tags)
        and (experiment != "bfloat16-gain" or case.dtype == "bfloat16")
    ]

"""The registry of named cases on a GPU, what each is expected to cost, and how much memory it needs.

The full product is far more than fits into a short visit to a GPU, so every case has a predicted time: ``quick`` is the
subset that covers every design and every algorithm of cuDNN within minutes, and a run with a time limit stops before
the first case that would not fit.  The predictions plan; they are not results, and nothing is published from them.

Legend: T steps, B batch, I input, H hidden, P projection (H where there is none), D directions, L layers, N rows over
all steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from bench.cases import Case
from bench.cudnn import PERSIST_STATIC, SMALL_H, STANDARD, algorithm
from bench.timing import SAMPLE_S
from bench.verify import oracle_fits

HIDDEN = (64, 128, 256, 512, 768, 1024, 2048)
BATCHES = (1, 16, 64, 128, 256)
STEPS = (256, 1024, 4096, 16384)

GPU_GROUPS = {
    "cuda-bfloat16": "one layer, one direction, I = H, bfloat16",
    "cuda-float16": "the same in float16",
    "cuda-float32": "the same in float32, products in TF32",
    "cuda-strict": "the same in float32 throughout",
    "cuda-bidirectional": "both directions",
    "cuda-layers": "2 and 4 layers",
    "cuda-packed": "packed, ragged: half of the steps alive",
    "cuda-odd": "sizes that no tile divides",
    "cuda-proj": "with a projection",
}

# In the order in which they are run: where a time limit cuts the list, what matters most has been measured.
QUICK = (
    "cuda-bfloat16-h1024-b16-t1024",
    "cuda-bfloat16-h512-b16-t1024",
    "cuda-bfloat16-h128-b16-t1024",
    "cuda-float16-h768-b16-t1024",
    "cuda-bfloat16-h64-b16-t1024",
    "cuda-bfloat16-h256-b64-t1024",
    "cuda-bfloat16-h1024-b64-t1024",
    "cuda-packed-bfloat16-h512-b16-t1024",
    "cuda-float32-h512-b16-t1024",
    "cuda-bidirectional-bfloat16-h512-b16-t1024",
    "cuda-float16-h128-b64-t1024",
    "cuda-float16-h1024-b64-t1024",
    "cuda-bfloat16-h2048-b16-t1024",
    "cuda-bfloat16-h1024-b1-t1024",
    "cuda-bfloat16-h1024-b256-t1024",
    "cuda-bfloat16-h512-b64-t1024",
    "cuda-bfloat16-h128-b256-t1024",
    "cuda-bfloat16-h768-b64-t1024",
    "cuda-bfloat16-h256-b1-t1024",
    "cuda-bfloat16-h512-b16-t4096",
    "cuda-bfloat16-h128-b16-t16384",
    "cuda-bfloat16-h128-b64-t256",
    "cuda-bfloat16-h1024-b16-t256",
    "cuda-float16-h64-b16-t1024",
    "cuda-float16-h512-b64-t1024",
    "cuda-float16-h512-b256-t1024",
    "cuda-float16-h1024-b1-t1024",
    "cuda-float32-h128-b16-t1024",
    "cuda-float32-h1024-b64-t1024",
    "cuda-strict-float32-h512-b16-t1024",
    "cuda-layers2-bfloat16-h512-b16-t1024",
    "cuda-layers4-bfloat16-h128-b16-t1024",
    "cuda-odd-bfloat16-h513-b17-t1024",
    "cuda-odd-float16-h129-b17-t1024",
    "cuda-proj-bfloat16-h512-p128-b16-t1024",
)


def _cases() -> Iterator[Case]:
    def case(group: str, hidden: int, batch: int, steps: int, dtype: str, kind: str = "", **rest: object) -> Case:
        """``kind``: what the name says beyond the dtype, where that is not the whole group."""
        middle = f"{kind}-{dtype}" if kind else dtype
        proj = f"-p{rest['proj_size']}" if "proj_size" in rest else ""
        name = f"cuda-{middle}-h{hidden}{proj}-b{batch}-t{steps}"
        return Case(name, group, hidden, hidden, batch, steps, dtype=dtype, device="cuda", memory=True, **rest)  # type: ignore[arg-type]

    for dtype in ("bfloat16", "float16", "float32"):
        for hidden in HIDDEN:
            for batch in BATCHES:
                for steps in STEPS:
                    yield case(f"cuda-{dtype}", hidden, batch, steps, dtype)
    for hidden in (128, 512, 1024):
        for batch in (16, 64):
            yield case("cuda-strict", hidden, batch, 1024, "float32", "strict", strict=True)
    for dtype in ("bfloat16", "float16"):
        for hidden in (64, 128, 256, 512, 1024):
            for batch in (16, 64):
                for steps in (1024, 4096):
                    yield case("cuda-bidirectional", hidden, batch, steps, dtype, "bidirectional", bidirectional=True)
    for layers in (2, 4):
        for dtype in ("bfloat16", "float16"):
            for hidden in (128, 512, 1024):
                for batch in (16, 64):
                    yield case("cuda-layers", hidden, batch, 1024, dtype, f"layers{layers}", num_layers=layers)
    for dtype in ("bfloat16", "float16", "float32"):
        for hidden in (128, 512, 1024):
            for batch in (16, 64):
                for steps in (1024, 4096):
                    yield case("cuda-packed", hidden, batch, steps, dtype, "packed", mean_length=0.5)
    for dtype in ("bfloat16", "float16", "float32"):
        for hidden, batch in ((65, 3), (129, 17), (200, 33), (513, 17), (1000, 50)):
            yield case("cuda-odd", hidden, batch, 1024, dtype, "odd")
    for dtype in ("bfloat16", "float32"):
        for hidden, proj in ((512, 128), (1024, 256)):
            yield case("cuda-proj", hidden, 16, 1024, dtype, "proj", proj_size=proj)


def _registry() -> dict[str, Case]:
    """All cases; the quick ones come first, in their order."""
    cases = {case.name: case for case in _cases()}
    if unknown := set(QUICK) - set(cases):
        raise ValueError(f"expected names of cases, got {sorted(unknown)}")
    quick = {name: replace(cases[name], quick=True) for name in QUICK}
    return quick | {name: case for name, case in cases.items() if name not in quick}


GPU_CASES = _registry()

# What a short visit spends on a case: pairs of samples at least, and seconds a mode.
QUICK_PAIRS, QUICK_S = 7, 0.3

# --- time ---------------------------------------------------------------------------------------------------------

# Microseconds that torch's LSTM takes for a step of one layer and direction, (forward, backward), while its products
# are small: the persistent algorithms keep one kernel running, STANDARD launches several for each step.  Packed input
# is reported to take about a hundred times as long as padded.
STEP_US = {PERSIST_STATIC: (2.0, 4.0), SMALL_H: (1.5, 3.0), STANDARD: (10.0, 15.0)}
PACKED_STEP_US = (150.0, 300.0)
# TFLOP/s that large steps and the products outside of the recurrence reach; about a third of the peak.
TFLOPS = {"bfloat16": 250.0, "float16": 250.0, "float32": 120.0, "strict": 20.0, "float64": 10.0}
ORACLE_STEP_US = 60.0  # float64, forward and backward
COMPILE_S = 4.0  # the first case of a dtype and a size: the kernels of inference, training and backward
SETUP_S = 0.5  # drawing the data, building the modules, asking what runs


def call_s(case: Case, mode: str) -> float:
    """Seconds that one call of torch's LSTM is expected to take; ours is planned with the same."""
    passes = (False, True) if mode == "training" else (False,)
    step_us = sum(
        PACKED_STEP_US[backward] if case.ragged else STEP_US[algorithm(case, backward=backward)][backward]
        for backward in passes
    )
    rate = TFLOPS["strict" if case.strict else case.dtype] * 1e12
    return case.steps * case.num_layers * case.directions * step_us * 1e-6 + case.flops(mode) / rate


def predicted_s(case: Case, modes: Iterable[str], min_pairs: int, budget_s: float) -> float:
    """Seconds that measuring a case is expected to take, but for compiling its kernels."""
    total = SETUP_S
    for mode in modes:
        call = call_s(case, mode)
        timed = max(2 * min_pairs * max(call, 2 * SAMPLE_S), budget_s)
        total += timed + 6 * call  # the check, the probes and the peak memory
    if oracle_fits(case):
        total += case.steps * case.num_layers * case.directions * ORACLE_STEP_US * 1e-6
        total += case.flops("training") / (TFLOPS["float64"] * 1e12)
    return total


def compiled(case: Case) -> tuple[object, ...]:
    """What kernels are compiled for: cases that agree in this share them; B and T are no part of it."""
    sizes = (case.hidden_size, case.proj_size, case.directions)
    return case.dtype, case.strict, case.ragged, *sizes


def predicted_total_s(cases: Iterable[Case], min_pairs: int, budget_s: float) -> float:
    """Seconds that a run over the cases is expected to take, compilation included."""
    cases = list(cases)
    run = sum(predicted_s(case, case.modes, min_pairs, budget_s) for case in cases)
    return run + COMPILE_S * len({compiled(case) for case in cases})


# --- memory -------------------------------------------------------------------------------------------------------

MEMORY_SHARE = 0.8  # of the device's memory: allocators lose some, and others may use the device


def memory_bytes(case: Case) -> int:
    """An upper estimate of what measuring a case holds at once.

    The problem and a copy of its input for each side; the outputs and gradients of both while they are compared; and
    for one training step what is kept for its backward, which is about 4H gates, H cells, 4H input products and 4H
    gradients for each row, layer and direction, half as much again for workspaces.  Where float64 is the reference,
    its own.
    """
    width = case.directions * (case.proj_size or case.hidden_size)
    rows = sum(case.lengths())
    padded = case.steps * case.batch
    kept = 20 * case.hidden_size * case.num_layers * case.directions
    size = case.torch_dtype.itemsize
    weights = 4 * case.hidden_size * (case.input_size + width) * case.num_layers * case.directions
    total = size * (padded * 5 * case.input_size + rows * (5 * width + kept) + 12 * weights)
    if oracle_fits(case):
        total += torch.float64.itemsize * (padded * 2 * case.input_size + rows * (3 * width + kept) + 4 * weights)
    return total


def too_large(case: Case, device_bytes: int) -> str | None:
    """Why a case is left out on a device with so much memory, or None."""
    limit = MEMORY_SHARE * device_bytes
    if (needed := memory_bytes(case)) <= limit:
        return None
    return (
        f"it needs about {needed / 2**30:.0f} GiB, more than {MEMORY_SHARE:.0%} of the device's "
        f"{device_bytes / 2**30:.0f} GiB"
    )

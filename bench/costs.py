"""What a case is expected to cost on a GPU: seconds and memory.

The full product of cases is far more than fits into a short visit to a GPU: ``quick`` is the subset that covers every
design and every algorithm of cuDNN within minutes, and a run with a time limit stops before the first case that would
not fit.  The predictions plan; they are not results, and nothing is published from them.

Legend: T steps, B batch, I input, H hidden, P projection (H where there is none), D directions, L layers, N rows over
all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bench.cases import Case
from bench.cudnn import PERSIST_STATIC, SMALL_H, STANDARD, algorithm
from bench.timing import SAMPLE_S, Effort
from bench.verify import oracle_fits

QUICK = Effort(7, 0.3, memory=True)  # what a short visit spends on a mode of a case

# --- time ---------------------------------------------------------------------------------------------------------

# Microseconds that torch's LSTM took for a step of one layer and direction, (forward, backward), while its products
# are small: medians of the rows of an H200 (bench/results/nvidia-h200-132sm.csv: inference, and what training takes on
# top; of PERSIST_STATIC the one with B 16, of packed input the only one).  The persistent algorithms keep one kernel
# running; STANDARD launches several for each step, and its times are those of the host that launches them.
STEP_US = {PERSIST_STATIC: (2.1, 4.6), SMALL_H: (1.6, 2.4), STANDARD: (18.1, 21.8)}
PACKED_STEP_US = (14.5, 31.4)
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


def predicted_s(case: Case, effort: Effort) -> float:
    """Seconds that measuring a case is expected to take, but for compiling its kernels."""
    total = SETUP_S
    for mode in case.modes:
        call = call_s(case, mode)
        timed = max(2 * effort.min_pairs * max(call, 2 * SAMPLE_S), effort.budget_s)
        total += timed + 6 * call  # the check, the probes and the peak memory
    if oracle_fits(case):
        total += case.steps * case.num_layers * case.directions * ORACLE_STEP_US * 1e-6
        total += case.flops("training") / (TFLOPS["float64"] * 1e12)
    return total


def compiled(case: Case) -> tuple[object, ...]:
    """What kernels are compiled for: cases that agree in this share them; B and T are no part of it."""
    sizes = (case.hidden_size, case.proj_size, case.directions)
    return case.dtype, case.strict, case.ragged, *sizes


def total_s(cases: Sequence[Case], seconds: Callable[[Case], float]) -> float:
    """Seconds that a run over the cases is expected to take, so many for each, compilation included."""
    return sum(map(seconds, cases)) + COMPILE_S * len({compiled(case) for case in cases})


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

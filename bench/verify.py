"""Outputs and gradients of the two providers are checked on the very data that is then timed: no check, no figure.

Errors are relative to the largest entry of the expected tensor.  Against float64 the bound is calibrated: twice what
``torch.nn.LSTM`` itself is off by in the same dtype, plus a floor of a few roundings.  Where float64, which torch runs
as a slow loop that keeps every step, would take too long, ours is compared with torch in the same dtype under a fixed
bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.cases import Case
from bench.providers import OUTPUTS, Problem, Runner, arguments, draw

FACTOR = 2.0
FLOOR_EPS = {torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}  # in units of the dtype's epsilon
# TF32 rounds the operands of products to the ten bits that float16 has.  Torch may use it or not, by its algorithm; so
# where it is allowed, it sets the floor and the bound.
TF32_AS = torch.float16

# Three times torch's own largest error over the cases that are checked against float64 (twice for ours, once for
# torch's), with a margin of about five, since errors grow with the number of steps and of rows that are summed.
SAME_DTYPE_BOUND = {torch.float32: 5e-5, torch.bfloat16: 5e-2, torch.float16: 5e-2}
# Float64 cases are their own oracle: only the order of the sums differs.
FLOAT64_BOUND = 1e-12

# Of a training pass in float64: about three seconds of torch's on a CPU, one on a GPU.
ORACLE_GFLOP = {"cpu": 60, "cuda": 10_000}
ORACLE_CELLS = 100_000_000  # steps times rows times units: what is kept for their backward is about 16 GB


class Mismatch(Exception):
    """A provider's result is wrong, so it gets no figure."""


@dataclass(frozen=True)
class Verdict:
    """How far ours is off at most in a mode, and against what that was measured."""

    max_error: float
    reference: str  # "float64" or "torch <dtype>"


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected entry; infinite where a shape differs or a NaN appears.

    A tensor all of whose entries are below the smallest normal number of the dtype (of float32 for 16-bit ones) is as
    good as zero: the gradient of h_0 where it has vanished.
    """
    if got.shape != expected.shape:
        return float("inf")
    smallest = torch.finfo(torch.promote_types(got.dtype, torch.float32)).tiny
    scale = expected.abs().max().clamp_min(smallest)
    return ((got.to(expected.dtype) - expected).abs().max() / scale).nan_to_num(nan=float("inf")).item()


def oracle_fits(case: Case) -> bool:
    """Whether float64 is the reference: unless it is the case's own dtype, or would take too long."""
    cells = sum(case.lengths()) * case.hidden_size * case.num_layers * case.directions
    quick = case.flops("training") <= ORACLE_GFLOP[case.device] * 1e9
    return case.torch_dtype != torch.float64 and quick and cells <= ORACLE_CELLS


def _floor(case: Case) -> float:
    """The error that is granted whatever torch's is."""
    dtype = TF32_AS if case.tf32 else case.torch_dtype
    # Operands may be truncated to TF32, where float16 is rounded: twice the error.
    return FLOOR_EPS[dtype] * torch.finfo(dtype).eps * (2 if case.tf32 else 1)


def _oracle_dtype(case: Case) -> torch.dtype | None:
    """The dtype of the reference: float64, float32 for cases in 16 bits that would take too long in it, or None.

    (With AMX, torch 2.13 gives a wrong gradient of the input in bfloat16 at H = I = 1024: off by 1.2 of its norm.)
    """
    if oracle_fits(case):
        return torch.float64
    return torch.float32 if case.device == "cpu" and case.torch_dtype.itemsize == 2 else None


def _oracle(case: Case, modes: Iterable[str]) -> dict[str, tuple[Tensor, ...]] | None:
    """What ``torch.nn.LSTM`` in the reference's dtype returns for the case, or None where there is no such dtype."""
    dtype = _oracle_dtype(case)
    if dtype is None:
        return None
    runner = Runner(nn.LSTM(**arguments(case), device=case.device, dtype=dtype), draw(case, dtype=dtype))
    # Both modes return the same outputs, in the same order.
    results = runner.training() if "training" in modes else runner.inference()
    return {mode: results if mode == "training" else results[: len(OUTPUTS)] for mode in modes}


def compare(
    what: str,
    names: Sequence[str],
    got: Sequence[Tensor],
    expected: Sequence[Tensor],
    bounds: Iterable[float],
    against: str,
) -> float:
    """The largest of all errors; raises Mismatch, which names the first result whose bound is broken."""
    if len(got) != len(names):
        raise Mismatch(f"{what}: expected {len(names)} results, got {len(got)}")
    errors = [relative_error(mine, theirs) for mine, theirs in zip(got, expected, strict=True)]
    for name, error, bound in zip(names, errors, bounds, strict=True):
        if not error <= bound:
            raise Mismatch(
                f"{what}, {name}: expected an error of at most {bound:.2e} against {against}, got {error:.2e}"
            )
    return max(errors)


def check_outputs(case: Case, name: str, got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Compares another peer's outputs with torch's in the same dtype; raises Mismatch where they are too far off."""
    compare(
        f"{case.name}, {name}", OUTPUTS, got, expected, [SAME_DTYPE_BOUND[case.torch_dtype]] * len(OUTPUTS), "torch"
    )


def check(problem: Problem, ours: Runner, peer: Runner, modes: Iterable[str]) -> dict[str, Verdict]:
    """Runs each mode once on both and compares everything they return; raises Mismatch where a bound is broken."""
    case, dtype = problem.case, problem.case.torch_dtype
    modes = tuple(modes)
    oracle = _oracle(case, modes)
    verdicts = {}
    for mode in modes:
        names = OUTPUTS + (ours.gradient_names if mode == "training" else ())
        got, theirs = getattr(ours, mode)(), getattr(peer, mode)()
        if oracle is not None:
            wide = str(_oracle_dtype(case)).removeprefix("torch.")
            expected, reference, against = oracle[mode], wide, f"{wide} torch"
            pairs = zip(theirs, expected, strict=True)
            bounds = [FACTOR * relative_error(each, exact) + _floor(case) for each, exact in pairs]
            if wide == "float32":  # where torch's own result is wrong, ours must not be
                bounds = [min(bound, SAME_DTYPE_BOUND[dtype]) for bound in bounds]
        else:
            expected, reference, against = theirs, f"torch {case.dtype}", f"torch in {case.dtype}"
            bound = FLOAT64_BOUND if dtype == torch.float64 else SAME_DTYPE_BOUND[TF32_AS if case.tf32 else dtype]
            bounds = [bound] * len(names)
        verdicts[mode] = Verdict(compare(f"{case.name}, {mode}", names, got, expected, bounds, against), reference)
    return verdicts

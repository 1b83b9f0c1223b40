"""Every tolerance of the suite, each with its reason.

Errors are measured against float64 ``torch.nn.LSTM`` as the largest absolute difference in a tensor.  The rule for
results of the library: no more than ``FACTOR`` times the error of ``torch.nn.LSTM`` in the same dtype on the same data.
A floor is added, because torch's error may be zero by luck, or by construction (float64).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0

# The size of one term of the sums in a gradient, where what comes in is of order one: dz holds a factor s(1 - s), at
# most a quarter.  A tensor of a handful of entries may cancel to less, and rounding follows its terms, not their sum.
TERM = 0.25


@dataclass(frozen=True)
class Tolerance:
    """An absolute bound of ``floor_eps * eps(dtype) * max(term, largest entry of the oracle's tensor)``."""

    floor_eps: float
    reason: str


FLOORS = {
    torch.float32: Tolerance(
        8.0,
        "a few roundings of values of order one in each of tanh, sigmoid and the dot products; torch's error is "
        "smaller than this only in tensors of a handful of entries, by luck",
    ),
    torch.float64: Tolerance(
        8.0,
        "as float32.  The oracle is this very computation, so torch's error is taken from float32 times the ratio of "
        "the two epsilons, and counted once more for the error of the oracle itself",
    ),
    torch.bfloat16: Tolerance(
        1.0,
        "state and sums are float32, so what is left is two roundings to bfloat16 of half an eps each: that of the "
        "result and that of the h that entered the recurrence",
    ),
    torch.float16: Tolerance(1.0, "as bfloat16"),
}

TF32 = Tolerance(
    2.0,
    "in units of float16's eps, which has TF32's ten bits.  Tensor cores drop the other bits of both operands: each "
    "product comes out smaller by up to an eps, half of that on average and always to the same side.  Worked out in "
    "float64 with operands cut like that, gradients of 100 steps are off by up to 1.2 eps.  Torch's own error may be "
    "far smaller: some of cuDNN's algorithms do not use TF32 where they may",
)

# Contract tests run in float64 on both sides: a hundred eps of the largest entry is far below any mistake in a formula
# or an index, and above the reordering of sums of at most a few hundred terms.
ORDER_OF_SUMS = 1e-13

# The same in float32, for the paths that a kernel has in float32 only.
ORDER_OF_SUMS_F32 = 2e-5

# Two runs of one computation whose products a library makes: MKL, OpenBLAS (with which NumPy multiplies, and so does
# Triton's interpreter), oneDNN, cuBLAS.  They round by processor, by number of threads and by where a row lies, so only
# what our own arithmetic computes can be held to the bit.  In 16 bits such a rounding may tip that of a result, and of
# the h that enters the next steps.
LIBRARY = {
    torch.float64: ORDER_OF_SUMS,
    torch.float32: ORDER_OF_SUMS_F32,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
}

# Recorded norms of gradients, relative to each norm itself, however small: what the project promises.  In float32 the
# roundings of every step on the way back are in it, so it is stated for hundreds of steps, not for thousands.
NORMS = {torch.float64: 1e-10, torch.float32: 1e-4}

# torch.autograd.gradcheck in float64: central differences with step 1e-6 have an error of about 1e-10 of the second
# derivative's scale and 1e-16 / 1e-6 from rounding.
GRADCHECK = {"eps": 1e-6, "atol": 1e-6, "rtol": 1e-5}


def error(got: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; infinite where the shapes differ or something is not finite."""
    if got.shape != expected.shape:
        return float("inf")
    if got.numel() == 0:
        return 0.0
    return (got - expected).abs().max().nan_to_num(nan=float("inf")).item()


def assert_library(got: Tensor, expected: Tensor, name: str = "", dtype: torch.dtype | None = None) -> None:
    """The two, computed in ``dtype`` (None: theirs), are equal up to what ``LIBRARY`` allows."""
    allowed = LIBRARY[dtype or expected.dtype] * (max(1.0, expected.abs().max().item()) if expected.numel() else 1.0)
    off = error(got.double(), expected.double())
    assert off <= allowed, f"{name} {tuple(got.shape)}, expected {tuple(expected.shape)}: off by {off}"


def assert_same(got: Tensor, expected: Tensor, backend: str, name: str = "", dtype: torch.dtype | None = None) -> None:
    """Two runs by ``backend`` gave the same: to the bit where all arithmetic is our own, which is that of "numba"."""
    if backend == "numba" or not expected.is_floating_point():
        assert got.dtype == expected.dtype, name
        assert torch.equal(got, expected), name
    else:
        assert_library(got, expected, name, dtype)


def term_of(name: str, inputs: float, steps: int, rows: int) -> float:
    """The size that the rounding of a result follows, at least, where torch's happens to be smaller.

    Roundings of a sum add up like the steps of a random walk: over all steps and rows in the gradient of a parameter,
    over the steps on the way back in that of an input or a state.  A term of dW_ih is dz x; and where large ``inputs``
    saturate the gates, dz is what is left of 1 - s, whose rounding is that of s, however little is left.
    """
    if not name.startswith("grad of "):
        return TERM
    added = steps if name.removeprefix("grad of ") in ("input", "h_0", "c_0") else steps * rows
    return TERM * max(1.0, inputs) * added**0.5


def bound(
    dtype: torch.dtype, oracle: Tensor, peer_error: float, tf32: bool = False, term: float = TERM, rounding: float = 0.0
) -> float:
    """The largest error a result may have, where torch's own has ``peer_error``.

    ``term``: see :func:`term_of`.  ``rounding``: what rounding the data does to the exact result (``oracle.py``), which
    no computation in this dtype can be better than; torch's is, on a few numbers, by luck.
    """
    largest = max(term, oracle.abs().max().item()) if oracle.numel() else term
    floor, eps = (TF32, torch.finfo(torch.float16).eps) if tf32 else (FLOORS[dtype], torch.finfo(dtype).eps)
    return FACTOR * (peer_error + rounding) + floor.floor_eps * eps * largest

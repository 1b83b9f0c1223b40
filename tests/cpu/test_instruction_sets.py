"""The block shapes of other instruction sets, computed here: LLVM splits or narrows vectors that this CPU has not.

What differs is every size that the kernels are built around: lanes, panels, rows of a block, tails.  That the code
would be fast there is not shown by this; that it is right is.
"""

import pytest
import torch
from lstmcore.kernels.cpu import problem, tiling

from ..support.cases import BY_NAME
from ..support.oracle import assert_parity


@pytest.fixture(params=["avx2", "neon", "generic"])  # AVX-512's estimate of a reciprocal is its own instruction
def isa(request, monkeypatch, fresh_plans):
    monkeypatch.setattr(tiling, "cpu_isa", lambda: request.param)
    return request.param


@pytest.mark.slow
def test_parity(isa):
    lanes = tiling.block_shape(isa, torch.float32).lanes
    assert problem.kernels_of(torch.float32).block.lanes == lanes
    for name in ("h17", "packed_everything", "proj_bidirectional"):
        assert_parity(BY_NAME[name], torch.float32, "numba")

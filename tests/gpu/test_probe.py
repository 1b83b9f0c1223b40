"""The hand-off alone, as far as Triton's interpreter goes: one program, which waits for nobody."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need Triton, which is not installed")

from lstmcore.kernels.gpu.probe import handoff_kernel

STEPS, ROWS = 5, 8


def test_each_step_writes_one_more_than_the_step_before():
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU, and the benchmark checks what they hand over")
    words, width = 3 * 4, 16  # a row that no power of two covers exactly; one program writes its first slice
    y = torch.full((STEPS, ROWS, words), -1, dtype=torch.int32)
    y[:, :, 4:] = 0  # as if others had written theirs
    status = torch.zeros(1, dtype=torch.int32)
    handoff_kernel[(1,)](y, status, STEPS, 3, ROWS, words, width, 4)
    assert status.item() == 0
    assert torch.equal(y[:, :, :4], torch.arange(STEPS, dtype=torch.int32)[:, None, None].expand(-1, ROWS, 4))
    y[1:, :, 4:] = -1  # and as if they never had
    handoff_kernel[(1,)](y, status, STEPS, 3, ROWS, words, width, 4)
    assert status.item() == 1, "it gives up, and says so"

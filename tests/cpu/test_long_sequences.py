"""Sequences as long as memory allows: a million steps, and tensors of more entries than 32 bits can count.

T time, B batch, I input, H hidden.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lstmcore
from lstmcore.recompute import available

from ..support.modules import kept

pytestmark = pytest.mark.slow
MANY = 2e-5  # of sums over a million steps in float32, in another order than torch's: 0.8e-5 was seen


def test_a_million_steps_train():
    """Against torch's LSTM, whose gradients go through as many steps."""
    T, I, H = 1_000_000, 2, 8
    torch.manual_seed(3)
    ours, theirs = lstmcore.LSTM(I, H, recompute="auto", memory_budget=4 << 20), nn.LSTM(I, H)
    ours.load_state_dict(theirs.state_dict())
    x, grad = torch.randn(T, 1, I), torch.randn(T, 1, H) / T**0.5
    output, size = kept(ours, x)
    assert 0 < size < 1 << 20  # and 190 MiB without
    results = []
    for module, y in ((ours, output), (theirs, theirs(x)[0])):
        results.append([y, *torch.autograd.grad(y, list(module.parameters()), grad)])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).abs().max() <= MANY * max(1.0, expected.abs().max().item())


def test_more_entries_than_32_bits_count():
    """Output and gates both, in inference and in training; a few rows alone are the oracle for theirs."""
    T, B, H, few = 131_072, 1025, 16, 3
    assert T * B * H > 2**31
    needed = 2 * T * B * H + (1 << 30)
    if available(torch.device("cpu")) < 2 * needed:
        pytest.skip(f"needs {2 * needed >> 30} GiB of memory, of which half would stay free")
    torch.manual_seed(4)
    module = lstmcore.LSTM(1, H, dtype=torch.bfloat16, backend="numba", recompute=256)
    row = torch.randn(T, 1, 1, dtype=torch.bfloat16)
    grad = torch.randn(T, 1, H, dtype=torch.bfloat16) / 256
    alone = module(row.expand(T, few, 1))[0]
    expected = torch.autograd.grad(alone, list(module.parameters()), grad.expand(T, few, H))
    output = module(row.expand(T, B, 1))[0]
    assert output.numel() > 2**31
    for at in (0, B // 2, B - 1):
        assert torch.equal(output[:, at], alone[:, 0])
    for got, one in zip(
        torch.autograd.grad(output, list(module.parameters()), grad.expand(T, B, H)), expected, strict=True
    ):
        scaled = one.double() * B / few
        assert (got - scaled).abs().max() <= 0.01 * scaled.abs().max()  # both rounded to bfloat16

"""Device functions of the Triton kernels by themselves, interpreted: the marks of the channel, and the activations."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need Triton, which is not installed")

import triton
import triton.language as tl
from lstmcore.kernels.gpu.device import missing_in, sigmoid, tanh, to_bits

N = 4096
DTYPES = {
    torch.float32: (tl.float32, tl.int32, torch.int32),
    torch.bfloat16: (tl.bfloat16, tl.int16, torch.int16),
    torch.float16: (tl.float16, tl.int16, torch.int16),
}


@triton.jit
def to_bits_kernel(x, bits, N: tl.constexpr, DTYPE: tl.constexpr, BITS: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(bits + i, to_bits(tl.load(x + i), DTYPE, BITS))


@triton.jit
def missing_kernel(words, found, N: tl.constexpr, PACK: tl.constexpr):
    """Each program looks at N words, as a thread block does."""
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(found + tl.program_id(0), missing_in(tl.load(words + i), PACK))


@triton.jit
def activations_kernel(x, s, t, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(s + i, sigmoid(tl.load(x + i), tl.float32))
    tl.store(t + i, tanh(tl.load(x + i), tl.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_value_is_the_mark_of_what_is_missing(triton_kernels, dtype):
    """All other bits pass; the NaN of all ones becomes another NaN, whatever it was computed from."""
    name, bits, integer = DTYPES[dtype]
    x = torch.randn(N, dtype=dtype)
    x[0] = 0.0
    x.view(integer)[1:5] = torch.tensor([-1, -2, 1, torch.iinfo(integer).max], dtype=integer)
    x[5:7] = torch.tensor([torch.inf, -torch.inf])
    got = torch.zeros(N, dtype=integer)
    to_bits_kernel[(1,)](x, got, N=N, DTYPE=name, BITS=bits)
    assert not (got == -1).any()
    expected = x.view(integer).clone()
    assert expected[1] == -1
    expected[1] = got[1]
    assert got.view(dtype)[1].isnan()
    assert torch.equal(got, expected)


def test_a_missing_half_is_found(triton_kernels):
    """Two 16-bit values in a word: found where one of them is all ones, and nowhere else."""
    halves = [0, 1, 2, -1, -2, 0x7FFF, -0x8000, -0x7FFF, 0x00FF, -0x100, 0x5555]
    pairs = torch.tensor(list(itertools.product(halves, repeat=2)), dtype=torch.int16)
    found = torch.zeros(len(pairs), dtype=torch.int32)
    missing_kernel[(len(pairs),)](pairs.contiguous().view(torch.int32).flatten(), found, N=1, PACK=2)
    assert torch.equal(found != 0, (pairs == -1).any(1))


@pytest.mark.parametrize("pack", [1, 2])
def test_one_missing_value_of_many_is_found(triton_kernels, pack):
    words = torch.randint(0, 2**30, (8, 64), dtype=torch.int32)
    words[:, ::3] *= -1  # the sign is that of a value
    words.view(torch.int16)[words.view(torch.int16) == -1] = 0
    for program in range(1, 8):
        words.view(torch.int32 if pack == 1 else torch.int16)[program, 8 * program] = -1
    found = torch.zeros(8, dtype=torch.int32)
    missing_kernel[(8,)](words, found, N=64, PACK=pack)
    assert (found != 0).tolist() == [False] + [True] * 7


def test_activations(triton_kernels):
    """To a few roundings of float32 on both sides of where tanh changes its formula, and saturated without NaN."""
    x = torch.cat([torch.linspace(-12, 12, N // 2), torch.randn(N // 2 - 8) * 0.4])
    x = torch.cat([x, torch.tensor([0.0, 0.35, -0.35, 1e4, -1e4, torch.inf, -torch.inf, torch.nan])])
    s, t = torch.empty(N), torch.empty(N)
    activations_kernel[(1,)](x, s, t, N=N)
    for got, function in ((s, torch.sigmoid), (t, torch.tanh)):
        expected = function(x.double())
        assert torch.equal(got.isnan(), expected.isnan())
        off = (got.double() - expected)[:-1].abs()
        assert (off <= 4 * torch.finfo(torch.float32).eps * expected[:-1].abs().clamp_min(1e-3)).all()

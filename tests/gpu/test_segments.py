"""Segments in the Triton backend, interpreted: the results of a backward that kept everything, by less memory.

T time, B batch, H hidden, P projection (H where there is none), D directions, S steps of a segment.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lstmcore.kernels.contract import Rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lstmcore

from ..support import contract, gpu_designs
from ..support import contract_checks as checks
from ..support.contract import Setup, call_backward, call_forward, named, pose, solve
from ..support.gpu_lengths import Changed, on_device, roomy
from ..support.interpreted import DENSE, PACKED, SMALL
from ..support.tolerances import ORDER_OF_SUMS_F32, assert_library

pytestmark = pytest.mark.slow

# Segments that divide T and that do not; rows that begin and end in each of them, and after all of them; all of it
# backwards.
LENGTHS = replace(SMALL, name="lengths", T=4, lengths=(2, 0, 4, 1, 4), reset=0.4)
SHORT = replace(LENGTHS, name="short", lengths=(2, 0, 1, 1, 2), P=0, batch_first=True, strided=True)
UNSORTED = replace(PACKED, T=4, lengths=(2, 4, 4, 1), reset=0.4)
PLAIN = replace(DENSE, name="plain", T=4, B=3, D=2, reset=0.4)


def two(setup: Setup) -> Setup:
    return replace(setup, segment=2)


@pytest.mark.parametrize("setup", [LENGTHS, UNSORTED, PLAIN], ids=str)
def test_as_without(triton_kernels, monkeypatch, setup):
    gpu_designs.use(monkeypatch, "resident")
    checks.check_segments(triton_kernels, setup, ORDER_OF_SUMS_F32)


@pytest.mark.parametrize("setup", [LENGTHS, SHORT, UNSORTED], ids=str)
def test_against_oracle(triton_kernels, design, setup):
    """Every gradient, cells and norms."""
    checks.check_against_oracle(triton_kernels, two(setup), torch.float32)


@pytest.mark.parametrize(
    ("setup", "dtype"),
    [(LENGTHS, torch.float16), (UNSORTED, torch.bfloat16), (replace(PLAIN, H=16), torch.bfloat16)],
    ids=["lengths-float16", "packed-bfloat16", "h16-bfloat16"],
)
def test_16_bits_keep_the_state_in_float32(triton_kernels, design, setup, dtype):
    checks.check_16_bits_keep_the_state_in_float32(triton_kernels, two(setup), dtype)


def test_cells_and_their_gradients_cross_borders_in_float32(triton_kernels, monkeypatch):
    """Of cells that only add what bfloat16 would lose beside a large c_0; and so on the way back."""
    gpu_designs.use(monkeypatch, "resident")
    p = pose(Setup("adding", T=8, B=2, H=3, dtype=torch.bfloat16, segment=1))
    for w in p.given_weights[0][:4]:
        w.zero_()
    gates = p.given_weights[0].bias_ih.view(4, 3)
    gates[0], gates[1], gates[2] = 40.0, 40.0, 0.0625  # i and f are 1, and g is a quarter of the spacing at 32
    for name, value in {
        "c_0": 32.0,
        "grad_output": 0.0,
        "grad_h_n": 0.0,
        "grad_c_n": 32.0,
        "grad_cells": 0.0625,
    }.items():
        p.given[name].fill_(value)
    forward = call_forward(triton_kernels, p)
    gradients = call_backward(triton_kernels, p, forward)
    added = torch.tensor(0.0625).tanh() * torch.arange(1, 9)
    torch.testing.assert_close(forward.cells[:, 0, 0], 32 + added, rtol=1e-6, atol=0)
    assert (gradients.c_0 == 32.5).all()


def test_everything_else_that_is_promised(triton_kernels, monkeypatch, request):
    gpu_designs.use(monkeypatch, "resident")
    setup = two(LENGTHS)
    checks.check_shapes_layouts_and_padding(triton_kernels, setup)
    checks.check_nan_in_padding_stays_there(triton_kernels, setup)
    checks.check_inference_saves_nothing_and_gives_the_same_bits(triton_kernels, setup)
    checks.check_backward_twice_and_inputs_untouched(triton_kernels, setup)
    checks.check_missing_gradients_are_zeros(triton_kernels, setup, "grad_c_n")
    checks.check_keeps_no_reference(triton_kernels, setup)
    checks.check_garbage_in_fresh_memory(triton_kernels, setup, torch.float32, request)


@pytest.mark.parametrize("off", [("input", "h_0"), ("c_0", "weights", "norms")], ids=str)
def test_needs(triton_kernels, monkeypatch, off):
    gpu_designs.use(monkeypatch, "resident")
    checks.check_needs(triton_kernels, two(LENGTHS), off)


@pytest.mark.parametrize("setup", [LENGTHS, UNSORTED, PLAIN], ids=str)
def test_gate_statistics(triton_kernels, monkeypatch, setup):
    gpu_designs.use(monkeypatch, "resident")
    checks.check_gates(triton_kernels, two(setup), 3, ORDER_OF_SUMS_F32)


@pytest.mark.parametrize("setup", [LENGTHS, SHORT], ids=str)
@pytest.mark.parametrize("change", [on_device, roomy], ids=["device", "roomy"])
def test_lengths_on_the_device(triton_kernels, monkeypatch, setup, change):
    gpu_designs.use(monkeypatch, "resident")
    there = Changed(triton_kernels, change)
    checks.check_against_oracle(there, two(setup), torch.float32)
    checks.check_gates(there, two(setup), 3, ORDER_OF_SUMS_F32)


def test_lengths_on_the_device_in_the_split_design(triton_kernels, monkeypatch):
    gpu_designs.use(monkeypatch, share=gpu_designs.Share(units=8, warps=2, chunk=64))
    checks.check_against_oracle(Changed(triton_kernels), two(LENGTHS), torch.float32)


@pytest.mark.parametrize("value", [5, -1])
def test_lengths_out_of_range(triton_kernels, monkeypatch, value):
    """All of such a row is NaN, in every segment, resets or not; the others are right, and a later call tells, once."""
    gpu_designs.use(monkeypatch, "resident")
    p, row = pose(two(LENGTHS)), 1
    p.given["reset"][1:, row] = True
    expected = solve(Changed(triton_kernels), p)

    def change(rows: Rows) -> Rows:
        rows = on_device(rows)
        rows.lengths[row] = value
        return rows

    wrong = Changed(triton_kernels, change)
    forward = call_forward(wrong, p)
    triton_kernels.status._reported[p.call.layer.device] = 1  # as if the host had not seen it yet
    got = named(p, forward, call_backward(wrong, p, forward))
    others = [0, 2, 3, 4]
    for name in ("output", "h_n", "c_n", "cells", "grad input", "grad c_0"):
        assert got[name][:, row].isnan().all(), name
        assert_library(got[name][:, others], expected[name][:, others], name)
    triton_kernels.status._reported.clear()
    with pytest.raises(ValueError, match="lengths should be from 0 to T"):
        call_forward(triton_kernels, p)
    contract.assert_same(triton_kernels, solve(Changed(triton_kernels), p), expected)


def test_through_the_module(triton_kernels, monkeypatch):
    """A stack: lengths, resets, cells; and the recorded flow."""
    gpu_designs.use(monkeypatch, "resident")
    x, lengths, reset = torch.randn(4, 3, 3), [4, 0, 3], torch.rand(4, 3) < 0.4
    results = []
    for recompute in (None, 3):
        torch.manual_seed(0)
        module = lstmcore.LSTM(3, 9, 2, bidirectional=True, proj_size=4, backend="triton", recompute=recompute)
        leaf = x.clone().requires_grad_()
        with lstmcore.record_gradient_flow(module, rows=True) as flow:
            output, (h_n, c_n), cells = module(leaf, lengths=lengths, reset=reset, return_cells=True)
            loss = output.square().sum() + h_n.sum() + c_n.sum() + cells.square().sum()
            grads = torch.autograd.grad(loss, [leaf, *module.parameters()])
        recorded = [each for record in flow.records for each in (record.h.rows, record.c.rows, record.gates.mean)]
        results.append([output, h_n, c_n, cells, *grads, *(each.nan_to_num() for each in recorded)])
    for index, (got, expected) in enumerate(zip(*results, strict=True)):
        assert_library(got, expected, str(index), torch.float32)


def test_explained(triton_kernels):
    module = lstmcore.LSTM(3, 9, bidirectional=True, backend="triton", recompute=3)
    assert "by segments of 3 steps that backward computes again" in str(lstmcore.explain(module, torch.randn(8, 2, 3)))
    with torch.no_grad():
        assert "segments" not in str(lstmcore.explain(module, torch.randn(8, 2, 3)))


class Largest(TorchDispatchMode):
    """Notes the largest storage that any operation touches."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("change", [lambda rows: rows, on_device], ids=["host", "device"])
def test_nothing_has_the_gates_or_cells_of_all_steps(triton_kernels, monkeypatch, change):
    """Nothing is larger than what is given and returned, and an index of the tokens; no kernel is launched."""
    monkeypatch.setattr(triton_kernels.launch.Recurrence, "launch", lambda *args, **options: None)
    setup = Setup("long", T=256, B=4, I=2, H=9, P=3, D=2, lengths=(256, 3, 100, 5), cells=False, dtype=torch.float32)
    largest = {}
    for segment in (0, 16):
        p = pose(replace(setup, segment=segment))
        there = Changed(triton_kernels, change)
        with Largest() as seen:
            call_backward(there, p, call_forward(there, p), norms=False)
        largest[segment] = seen.bytes
    tokens = 256 * 4 if change is on_device else 256 + 3 + 100 + 5
    assert largest[0] >= 2 * tokens * 4 * 9 * 4
    assert largest[16] <= max(256 * 4 * 2 * 3 * 4, 256 * 4 * 8)

"""What the contract promises, one check a promise: ``kernels`` is the module of a backend, or stands in for one.

T time, B batch, D directions, H hidden.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import torch
from lstmcore.kernels.contract import GateStatistics, Needs, Weights
from torch import Tensor

from .contract import (
    Problem,
    Setup,
    assert_close,
    assert_same,
    call_backward,
    call_forward,
    expected_of,
    named,
    pose,
    solve,
)
from .oracle import RowByRow
from .tolerances import LIBRARY, NORMS, ORDER_OF_SUMS, ORDER_OF_SUMS_F32, error


def check_against_oracle(kernels, setup, dtype):
    p = pose(replace(setup, dtype=dtype))
    tolerance = ORDER_OF_SUMS if dtype == torch.float64 else ORDER_OF_SUMS_F32
    got, expected = solve(kernels, p), expected_of(p)
    assert_close(got, expected, tolerance)
    assert ((got["norms"] - expected["norms"]).abs() <= NORMS[dtype] * expected["norms"]).all()


def expected_gates(p: Problem, wanted: int) -> GateStatistics:
    """From the oracle's gates, by NumPy's histogram, over the rows that the contract names."""
    s, rows = p.setup, RowByRow(p.dense["input"], p.dense["h_0"], p.dense["c_0"], p.weights, p.setup.lengths, p.reset)
    order = p.order if s.packed or p.rows.order is None else p.rows.order
    starting = int(p.alive.any(0).sum())
    stride = starting // min(wanted, starting)
    sample = [int(order[stride // 2 + k * stride]) for k in range(min(wanted, starting))]
    sums, counts = torch.zeros(3, s.D, s.T, dtype=torch.float64), torch.zeros(3, s.D, s.T, 10, dtype=torch.int32)
    log_forget = torch.zeros(s.D, s.H, dtype=torch.float64)
    for (d, t, b), gates in rows.gates.items():
        if b in sample:
            log_forget[d] += gates[1].log()
            for k, gate in enumerate(gates[[0, 1, 3]]):
                sums[k, d, t] += gate.sum()
                counts[k, d, t] += torch.from_numpy(np.histogram(gate, np.arange(11) / 10)[0]).int()
    return GateStatistics(sums, counts, log_forget, p.alive[:, sample].sum(1))


def check_gates(backend, setup: Setup, wanted: int, tolerance: float) -> None:
    p = pose(setup)
    got = call_backward(backend, p, call_forward(backend, p), norms=False, gate_rows=wanted).gates
    for name, one, other in zip(GateStatistics._fields, got, expected_gates(p, wanted), strict=True):
        scale = max(1.0, other.abs().max().item())
        assert error(one.to(other.dtype), other) <= (tolerance * scale if other.is_floating_point() else 0), name


def check_16_bits_keep_the_state_in_float32(kernels, setup, dtype):
    """Cells and norms come in the state's dtype; their error is that of h rounded to the 16-bit type."""
    p = pose(replace(setup, dtype=dtype))
    got, expected = solve(kernels, p), expected_of(p)
    for name, value in got.items():
        assert value.dtype == (torch.float32 if name in ("cells", "norms") else dtype), name
        scale = max(1.0, expected[name].abs().max().item())
        assert error(value.double(), expected[name]) <= 4 * torch.finfo(dtype).eps * scale, name


def check_shapes_layouts_and_padding(kernels, setup):
    """Shapes and dtypes as promised; new tensors batch-first in memory where asked; exact zeros where padded."""
    p = pose(setup, padding=1e3)
    forward = call_forward(kernels, p)
    gradients = call_backward(kernels, p, forward)
    s, P = setup, setup.P or setup.H
    assert forward.output.shape == (*p.rows.shape, s.D * P)
    assert forward.h_n.shape == (s.D, s.B, P)
    assert forward.c_n.shape == (s.D, s.B, s.H)
    assert (forward.cells is None) == (not s.cells)
    assert gradients.norms.shape == (2, s.D, s.T, s.B)
    assert gradients.input.shape == p.given["input"].shape
    for d in range(s.D):
        for given, g in zip(p.given_weights[d], gradients.weights[d], strict=True):
            assert (given is None) == (g is None)
            assert g is None or g.shape == given.shape
    for t in (forward.output, *((forward.cells,) if s.cells else ())):
        if s.batch_first and not s.packed:
            assert t.transpose(0, 1).is_contiguous()
        else:
            assert t.is_contiguous()
    if not s.packed:
        for t in (forward.output, forward.cells, gradients.input):
            assert t is None or not t[~p.alive].any()
    assert not gradients.norms[:, :, ~p.alive[:, p.order]].any()


def check_inference_saves_nothing_and_gives_the_same_bits(kernels, setup):
    p = pose(replace(setup, dtype=torch.float32))
    inference, training = call_forward(kernels, p, save=False), call_forward(kernels, p, save=True)
    assert inference.saved == ()
    assert_same(kernels, named(p, inference, None), named(p, training, None))


def check_backward_twice_and_inputs_untouched(kernels, setup):
    """``saved`` and everything given survive a backward unchanged, so that the same call gives the same bits again."""
    p = pose(replace(setup, dtype=torch.float32))
    given = {k: v for k, v in p.given.items() if v is not None}
    given |= {f"{k} {d}": v for d, w in enumerate(p.given_weights) for k, v in w._asdict().items() if v is not None}
    before = {name: value.clone() for name, value in given.items()}
    forward = call_forward(kernels, p)
    kept = [t.clone().view(torch.uint8) if t.dim() else t.clone() for t in forward.saved]
    first = named(p, forward, call_backward(kernels, p, forward))
    first = {name: value.clone() for name, value in first.items()}
    second = named(p, forward, call_backward(kernels, p, forward))
    assert_same(kernels, second, first)
    for saved, copy in zip(forward.saved, kept, strict=True):
        assert torch.equal(saved.view(torch.uint8) if saved.dim() else saved, copy)
    for name, value in given.items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), f"{name} was written to"


def check_segments(kernels, setup, tolerance):
    """Gates that backward computes again, by segments: the same results as without; ``tolerance`` 0: the same bits."""
    p = pose(setup)
    forward = call_forward(kernels, p)
    gradients = call_backward(kernels, p, forward, gate_rows=3)
    expected = named(p, forward, gradients)
    for segment in (1, 3, setup.T, setup.T + 5):
        p.setup = replace(setup, segment=segment)
        forward = call_forward(kernels, p)
        sizes = [(tuple(each.shape), each.dtype) for each in forward.saved]
        assert sizes == kernels.saves(p.call.layer, p.rows.room)
        again = call_backward(kernels, p, forward, gate_rows=3)
        got = named(p, forward, again)
        if tolerance == 0:
            assert_same(kernels, got, expected)
        else:
            assert_close(got, expected, tolerance)
        for one, other in zip(again.gates, gradients.gates, strict=True):
            assert error(one.double(), other.double()) <= tolerance * max(1.0, other.abs().max().item())


def check_needs(kernels, setup, off):
    """What is not needed is None; the rest is as with everything needed, with norms or without."""
    off = (off,) if isinstance(off, str) else off
    p = pose(setup)
    everything = solve(kernels, p)
    got = solve(kernels, p, needs=Needs()._replace(**dict.fromkeys(off, False)), norms=False)
    del everything["norms"]
    for name in off:
        fields = Weights._fields if name == "weights" else (name,)
        everything = {k: v for k, v in everything.items() if not (k.startswith("grad ") and k.split()[1] in fields)}
    assert_close(got, everything, LIBRARY[setup.dtype])


def check_missing_gradients_are_zeros(kernels, setup, given):
    """None for the gradient of an output that nobody used; each of the four on its own."""
    p, zeros = pose(setup), pose(setup)
    for name in ("grad_output", "grad_h_n", "grad_c_n", "grad_cells"):
        if name != given:
            p.given[name], zeros.given[name] = None, torch.zeros_like(zeros.given[name])
    assert_close(solve(kernels, p), solve(kernels, zeros), LIBRARY[setup.dtype])


def check_nan_in_padding_stays_there(kernels, setup):
    """No work for padding: whatever is in the padded positions of what is given, nothing of it is read."""
    p, poisoned = pose(setup), pose(setup, padding=torch.nan)
    assert_same(kernels, solve(kernels, poisoned), solve(kernels, p))


def check_garbage_in_fresh_memory(kernels, setup, dtype, request):
    """Nothing that was allocated is read before it is written."""
    p = pose(replace(setup, dtype=dtype))
    clean = solve(kernels, p)
    request.getfixturevalue("poisoned_memory")
    assert_same(kernels, solve(kernels, p), clean)


def check_keeps_no_reference(kernels, setup):
    p = pose(setup)
    forward = call_forward(kernels, p)
    gradients = call_backward(kernels, p, forward)
    tensors = [t for t in (*p.given.values(), *p.given_weights[0], *forward, gradients.input) if isinstance(t, Tensor)]
    references = [weakref.ref(t) for t in tensors]
    del tensors, p, forward, gradients
    gc.collect()
    assert not [r for r in references if r() is not None]

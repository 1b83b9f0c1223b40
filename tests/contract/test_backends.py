"""The backend contract, called directly, against the row-by-row oracle under autograd in float64.

T time, B batch, I input, H hidden, P projection (H where there is none), D directions, N packed rows.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from lstmcore.kernels.contract import Layer, Needs, Rows

from lstmcore.backends import reference

from ..support import contract_checks as checks
from ..support.contract import (
    NOTHING,
    SETUPS,
    SOME,
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
from ..support.tolerances import NORMS, ORDER_OF_SUMS, ORDER_OF_SUMS_F32


@pytest.fixture
def kernels():
    """The module of the Numba backend; the Triton backend has a choice of these tests in gpu/test_contract.py."""
    return importlib.import_module("lstmcore.kernels.cpu.backend")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_against_oracle(kernels, setup, dtype):
    checks.check_against_oracle(kernels, setup, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_gate_statistics(kernels, setup, dtype):
    checks.check_gates(kernels, replace(setup, dtype=dtype), 3, 1e-12 if dtype == torch.float64 else ORDER_OF_SUMS_F32)


@pytest.mark.parametrize("wanted", [1, 100])
def test_gate_statistics_of_as_many_rows_as_there_are(kernels, wanted):
    """More row panels in a step than a field of the kernel's counters holds; more steps than factors in a product."""
    checks.check_gates(
        kernels, Setup("many", T=90, B=33, H=40, lengths=tuple(3 * r % 91 for r in range(33))), wanted, 1e-12
    )


@pytest.mark.parametrize("setup", SOME, ids=str)
def test_no_gates_unless_asked(kernels, setup):
    p = pose(setup)
    gradients = call_backward(kernels, p, call_forward(kernels, p), norms=False)
    assert gradients.gates is None
    assert gradients.norms is None


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_reference_backward_against_oracle(setup):
    """The reference's own backward, with what it tells a recording."""
    p = pose(setup)
    got, expected = solve(reference, p), expected_of(p)
    assert_close(got, expected, ORDER_OF_SUMS)
    assert ((got["norms"] - expected["norms"]).abs() <= NORMS[torch.float64] * expected["norms"]).all()
    checks.check_gates(reference, setup, 3, 1e-12)


@pytest.mark.parametrize("setup", [*SETUPS, NOTHING], ids=str)
def test_reference_against_oracle(setup):
    """The plain loop answers the forward half of the contract; autograd is its backward."""
    p = pose(setup)
    leaves = {name: p.given[name].requires_grad_() for name in ("input", "h_0", "c_0")}
    for d, weights in enumerate(p.given_weights):
        leaves |= {f"{name} {d}": w.requires_grad_() for name, w in weights._asdict().items() if w is not None}
    forward = call_forward(reference, p)
    results, names = forward[: 4 if setup.cells else 3], ("output", "h_n", "c_n", "cells")
    grads = [p.given[f"grad_{name}"] for name, _ in zip(names, results, strict=False)]
    found = torch.autograd.grad(results, list(leaves.values()), grads, materialize_grads=True)
    got = {f"grad {name}": g for name, g in zip(leaves, found, strict=True)}
    got["grad input"] = p.from_rows(got["grad input"])
    got |= {f"grad {name}": p.from_states(got[f"grad {name}"]) for name in ("h_0", "c_0")}
    got |= {name: r.detach() for name, r in named(p, forward, None).items()}
    expected = expected_of(p)
    del expected["norms"]
    assert_close(got, expected, ORDER_OF_SUMS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("setup", SOME, ids=str)
def test_16_bits_keep_the_state_in_float32(kernels, setup, dtype):
    checks.check_16_bits_keep_the_state_in_float32(kernels, setup, dtype)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_shapes_layouts_and_padding(kernels, setup):
    checks.check_shapes_layouts_and_padding(kernels, setup)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_inference_saves_nothing_and_gives_the_same_bits(kernels, setup):
    checks.check_inference_saves_nothing_and_gives_the_same_bits(kernels, setup)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_backward_twice_and_inputs_untouched(kernels, setup):
    checks.check_backward_twice_and_inputs_untouched(kernels, setup)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_segments_give_the_same_bits(kernels, setup, dtype):
    checks.check_segments(kernels, replace(setup, dtype=dtype), 0)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_segments_of_the_reference(setup):
    with torch.no_grad():
        checks.check_segments(reference, setup, ORDER_OF_SUMS)


@pytest.mark.parametrize("setup", SOME, ids=str)
def test_segments_in_everything_else_that_is_promised(kernels, setup, request):
    """Backward twice, inputs untouched, no reference kept, what is not needed left out, no garbage read."""
    setup = replace(setup, segment=2)
    checks.check_shapes_layouts_and_padding(kernels, setup)
    checks.check_inference_saves_nothing_and_gives_the_same_bits(kernels, setup)
    checks.check_backward_twice_and_inputs_untouched(kernels, setup)
    checks.check_needs(kernels, setup, ("weights", "input"))
    checks.check_keeps_no_reference(kernels, setup)
    checks.check_garbage_in_fresh_memory(kernels, setup, torch.float32, request)


@pytest.mark.parametrize("setup", SOME, ids=str)
@pytest.mark.parametrize("off", [(), *Needs._fields, Needs._fields], ids=str)
def test_needs(kernels, setup, off):
    checks.check_needs(kernels, setup, off)


@pytest.mark.parametrize("setup", SOME, ids=str)
@pytest.mark.parametrize("given", ["grad_output", "grad_h_n", "grad_c_n", "grad_cells"])
def test_missing_gradients_are_zeros(kernels, setup, given):
    checks.check_missing_gradients_are_zeros(kernels, setup, given)


@pytest.mark.parametrize("setup", [s for s in SETUPS if s.lengths], ids=str)
def test_nan_in_padding_stays_there(kernels, setup):
    checks.check_nan_in_padding_stays_there(kernels, setup)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_garbage_in_fresh_memory(kernels, setup, dtype, request):
    checks.check_garbage_in_fresh_memory(kernels, setup, dtype, request)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_garbage_in_reused_memory(kernels, setup):
    """Scratch memory that is kept between calls: fill it with the NaNs of a call of the same shape, then call again."""
    p, nans = (pose(replace(setup, dtype=torch.float32)) for _ in range(2))
    clean = solve(kernels, p)
    nans.given = {k: torch.full_like(v, torch.nan) if v is not None and k != "reset" else v for k, v in p.given.items()}
    assert solve(kernels, nans)["output"].isnan().any()
    assert_same(kernels, solve(kernels, p), clean)


@pytest.mark.parametrize("setup", SOME, ids=str)
def test_keeps_no_reference(kernels, setup):
    checks.check_keeps_no_reference(kernels, setup)


def test_supports(kernels):
    layer = Layer(torch.device("cpu"), torch.float32, 10, 4, 8, 16)
    assert kernels.supports(layer) is None
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert kernels.supports(layer._replace(dtype=dtype)) is None
    for change in (
        {"device": torch.device("cuda")},
        {"device": torch.device("meta")},
        {"dtype": torch.int32},
        {"dtype": torch.complex64},
    ):
        reason = kernels.supports(layer._replace(**change))
        assert isinstance(reason, str)
        assert str(next(iter(change.values()))) in reason


def test_rows_from_lengths():
    rows = Rows.from_lengths(torch.tensor([2, 0, 3, 2]), 4)
    assert rows.batch_sizes.tolist() == [3, 3, 1, 0]
    assert rows.order.tolist() == [2, 0, 3, 1]
    assert (rows.total, rows.shape, rows.steps, rows.batch) == (7, (4, 4), 4, 4)
    assert not rows.new(torch.empty(1), 5).any()
    assert rows.new(torch.empty(1), 5).shape == (4, 4, 5)


def test_rows_from_packed():
    rows = Rows.from_packed(torch.tensor([3, 2, 2]))
    assert (rows.total, rows.shape, rows.steps, rows.batch, rows.packed) == (7, (7,), 3, 3, True)
    assert rows.new(torch.empty(1), 5, torch.float64).shape == (7, 5)
    dense = Rows(4, 2, batch_first=True)
    assert dense.new(torch.empty(1), 5).transpose(0, 1).is_contiguous()
    assert dense.total == 8

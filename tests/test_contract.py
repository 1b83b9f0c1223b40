"""The backend contract, called directly, against the row-by-row oracle under autograd in float64.

T time, B batch, I input, H hidden, P projection (H where there is none), D directions, N packed rows.
"""

from __future__ import annotations

import gc
import importlib
import weakref
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from lstmcore.kernels.contract import Forward, GateStatistics, Gradients, Layer, Needs, Rows, Weights, state_dtype
from torch import Tensor

import lstmcore.reference

from . import tolerances
from .oracle import RowByRow
from .tolerances import LIBRARY, NORMS, ORDER_OF_SUMS, ORDER_OF_SUMS_F32, error

EVERYTHING = Needs()
RAGGED = (4, 0, 6, 1, 6, 3, 2)


@dataclass(frozen=True)
class Setup:
    """One call of a backend: the sizes, how the rows lie, and what is asked for."""

    name: str
    T: int = 6
    B: int = 7
    I: int = 3
    H: int = 17
    P: int = 0
    D: int = 1
    bias: bool = True
    lengths: tuple[int, ...] | None = None
    packed: bool = False
    batch_first: bool = False
    strided: bool = False
    reset: float = 0.0  # the share of steps that reset
    cells: bool = True
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        return self.name


SETUPS = [
    Setup("dense"),
    Setup("ones", T=1, B=1, I=1, H=1),
    Setup("one_row", T=9, B=1, H=33),
    Setup("no_bias", bias=False),
    Setup("no_cells", cells=False),
    Setup("wide", T=3, B=14, I=33, H=64),
    Setup("batch_first", batch_first=True),
    Setup("strided", strided=True),
    Setup("strided_batch_first", strided=True, batch_first=True, D=2),
    Setup("bidirectional", D=2),
    Setup("proj", P=5),
    Setup("proj_bidirectional", P=16, D=2, cells=False),
    Setup("reset", reset=0.3),
    Setup("reset_always", reset=1.0),
    Setup("reset_bidirectional", reset=0.3, D=2),
    Setup("reset_proj", reset=0.3, P=5, D=2, batch_first=True),
    Setup("reset_long", T=90, B=3, H=5, reset=0.05, D=2),
    Setup("lengths", lengths=RAGGED),
    Setup("lengths_full", lengths=(6,) * 7),
    Setup("lengths_short", lengths=(2, 1, 0, 2, 2, 1, 1), D=2, batch_first=True),
    Setup("lengths_one_row", B=1, lengths=(4,)),
    Setup("lengths_bidirectional", lengths=RAGGED, D=2, batch_first=True),
    Setup("lengths_proj", lengths=RAGGED, P=5, strided=True),
    Setup("lengths_reset", lengths=RAGGED, reset=0.3, D=2, P=4),
    Setup("lengths_b33", B=33, H=8, lengths=tuple(5 * r % 7 for r in range(33)), reset=0.1),
    Setup("packed", lengths=(6, 3, 2, 1), B=4, packed=True),
    Setup("packed_strided", lengths=(6, 3, 2, 1), B=4, packed=True, strided=True),
    Setup("packed_unsorted", lengths=(2, 6, 6, 1, 5), B=5, packed=True, D=2),
    Setup("packed_proj", lengths=(2, 6, 6, 1, 5), B=5, packed=True, P=3, bias=False),
    Setup("packed_reset", lengths=(2, 6, 6, 1, 5), B=5, packed=True, reset=0.3, D=2, P=3),
    Setup("packed_long", T=80, lengths=(31, 80, 2), B=3, H=9, packed=True, reset=0.05),
]
NOTHING = Setup("lengths_all_zero", lengths=(0,) * 7, D=2)  # kernels start at one row: the reference takes this
SOME = [setup for setup in SETUPS if setup.name in ("dense", "lengths_reset", "packed_reset", "strided_batch_first")]


@dataclass
class Problem:
    """The tensors of a setup: dense (T, B, ·) float64 for the oracle, and as the backend gets them."""

    setup: Setup
    rows: Rows
    dense: dict[str, Tensor]
    weights: list[dict[str, Tensor | None]]
    reset: Tensor | None  # (T, B)
    alive: Tensor  # (T, B) bool
    order: Tensor  # (B,) the sorted order
    index: Tensor  # (N,) position of packed rows in (T * B)
    given: dict[str, Tensor | None] = field(default_factory=dict)
    given_weights: tuple[Weights, ...] = ()

    def to_rows(self, dense: Tensor, padding: float = 0.0) -> Tensor:
        """(T, B, ·) as the backend's tensors lie: packed, or padded with garbage, contiguous or not."""
        s = self.setup
        dense = dense.to(s.dtype) if dense.is_floating_point() else dense
        if s.packed:
            x = dense.flatten(0, 1)[self.index]
        else:
            x = dense.clone()
            if x.is_floating_point():
                x[~self.alive] = padding
            if s.batch_first:
                x = x.transpose(0, 1).contiguous().transpose(0, 1)
        if s.strided and x.is_floating_point():
            x = torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]
        return x

    def from_rows(self, got: Tensor) -> Tensor:
        if not self.setup.packed:
            return got
        dense = got.new_zeros(self.setup.T * self.setup.B, *got.shape[1:])
        dense[self.index] = got
        return dense.unflatten(0, (self.setup.T, self.setup.B))

    def to_states(self, state: Tensor) -> Tensor:
        state = state.to(self.setup.dtype)
        return state[:, self.order] if self.setup.packed else state.clone()

    def from_states(self, got: Tensor, dim: int = 1) -> Tensor:
        return got.index_select(dim, torch.argsort(self.order)) if self.setup.packed else got


def pose(s: Setup, padding: float = 0.0) -> Problem:
    torch.manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(s.dtype).double()

    P = s.P or s.H
    shapes = {"weight_ih": (4 * s.H, s.I), "weight_hh": (4 * s.H, P)}
    shapes |= {"bias_ih": (4 * s.H,), "bias_hh": (4 * s.H,)} if s.bias else {}
    shapes |= {"weight_hr": (P, s.H)} if s.P else {}
    weights = [
        {name: (normal(*shape) * s.H**-0.5).to(s.dtype).double() for name, shape in shapes.items()} for _ in range(s.D)
    ]
    dense = {
        "input": normal(s.T, s.B, s.I),
        "h_0": normal(s.D, s.B, P),
        "c_0": normal(s.D, s.B, s.H),
        "grad_output": normal(s.T, s.B, s.D * P),
        "grad_h_n": normal(s.D, s.B, P),
        "grad_c_n": normal(s.D, s.B, s.H),
        "grad_cells": normal(s.T, s.B, s.D * s.H),
    }
    reset = torch.rand(s.T, s.B) < s.reset if s.reset else None
    lengths = torch.tensor(s.lengths if s.lengths is not None else [s.T] * s.B)
    alive = torch.arange(s.T)[:, None] < lengths
    order = torch.argsort(lengths, descending=True, stable=True) if s.packed else torch.arange(s.B)
    index = torch.cat([t * s.B + order[alive[t, order]] for t in range(s.T)])
    if s.packed:
        rows = Rows.from_packed(alive.sum(1))
    elif s.lengths is not None:
        rows = Rows.from_lengths(lengths, s.T, s.batch_first)
    else:
        rows = Rows(s.T, s.B, batch_first=s.batch_first)
    p = Problem(s, rows, dense, weights, reset, alive, order, index)
    for name, value in dense.items():
        in_rows = name in ("input", "grad_output", "grad_cells")
        p.given[name] = p.to_rows(value, padding) if in_rows else p.to_states(value)
    p.given["grad_cells"] = p.given["grad_cells"].to(state_dtype(s.dtype)) if s.cells else None
    p.given["reset"] = None if reset is None else p.to_rows(reset)
    p.given_weights = tuple(Weights(**{name: w.to(s.dtype, copy=True) for name, w in d.items()}) for d in weights)
    return p


def expected_of(p: Problem) -> dict[str, Tensor]:
    """Every result by name, from the oracle: dense, in the user's order."""
    leaves = {name: p.dense[name].clone().requires_grad_() for name in ("input", "h_0", "c_0")}
    weights = [{name: w.clone().requires_grad_() for name, w in d.items()} for d in p.weights]
    lengths = p.setup.lengths
    rows = RowByRow(leaves["input"], leaves["h_0"], leaves["c_0"], weights, lengths, p.reset)
    results = {name: getattr(rows, name) for name in ("output", "h_n", "c_n", "cells")}
    grads = {name: p.dense[f"grad_{name}"] for name in results}
    if not p.setup.cells:
        del results["cells"], grads["cells"]
    wanted = [(r, grads[name]) for name, r in results.items() if r.requires_grad]
    torch.autograd.backward([r for r, _ in wanted], [g for _, g in wanted])
    expected = {name: r.detach() for name, r in results.items()}
    zeros = torch.zeros_like
    expected |= {f"grad {name}": zeros(v) if v.grad is None else v.grad for name, v in leaves.items()}
    for d, by_name in enumerate(weights):
        expected |= {f"grad {n} {d}": zeros(w) if w.grad is None else w.grad for n, w in by_name.items()}
    return expected | {"norms": rows.norms}


def call_forward(backend, p: Problem, save: bool = True) -> Forward:
    g = p.given
    return backend.forward(
        g["input"], g["h_0"], g["c_0"], p.given_weights, p.rows, reset=g["reset"], save=save, cells=p.setup.cells
    )


def call_backward(
    backend, p: Problem, forward: Forward, needs: Needs = EVERYTHING, norms: bool = True, gate_rows: int = 0
) -> Gradients:
    g = p.given
    return backend.backward(
        g["grad_output"],
        g["grad_h_n"],
        g["grad_c_n"],
        g["grad_cells"],
        input=g["input"],
        h_0=g["h_0"],
        c_0=g["c_0"],
        weights=p.given_weights,
        rows=p.rows,
        reset=g["reset"],
        output=forward.output,
        saved=forward.saved,
        needs=needs,
        norms=norms,
        gate_rows=gate_rows,
    )


def named(p: Problem, forward, gradients) -> dict[str, Tensor]:
    """What a backend returned, by the oracle's names, dense and in the user's order; None is left out."""
    rows, states = p.from_rows, p.from_states
    got = {"output": rows(forward.output), "h_n": states(forward.h_n), "c_n": states(forward.c_n)}
    got["cells"] = None if forward.cells is None else rows(forward.cells)
    if gradients is not None:
        got["grad input"] = None if gradients.input is None else rows(gradients.input)
        for name, g in (("grad h_0", gradients.h_0), ("grad c_0", gradients.c_0)):
            got[name] = None if g is None else states(g)
        for d, by_name in enumerate(gradients.weights):
            got |= {f"grad {name} {d}": g for name, g in by_name._asdict().items()}
        got["norms"] = None if gradients.norms is None else states(gradients.norms, dim=3)
    return {name: value for name, value in got.items() if value is not None}


def solve(backend, p: Problem, **kwargs) -> dict[str, Tensor]:
    forward = call_forward(backend, p)
    return named(p, forward, call_backward(backend, p, forward, **kwargs))


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item())
        assert error(got[name].double(), value.double()) <= tolerance * scale, name


def assert_bitwise(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def assert_same(kernels, got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Two runs of ``kernels`` gave the same, as ``tolerances.assert_same`` understands it."""
    ours = kernels is importlib.import_module("lstmcore.kernels.cpu.backend")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        tolerances.assert_same(got[name], value, "numba" if ours else "triton", name)


@pytest.fixture
def kernels():
    """The module of the Numba backend; the Triton backend has a choice of these tests in test_triton.py."""
    return importlib.import_module("lstmcore.kernels.cpu.backend")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_against_oracle(kernels, setup, dtype):
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_gate_statistics(kernels, setup, dtype):
    check_gates(kernels, replace(setup, dtype=dtype), 3, 1e-12 if dtype == torch.float64 else ORDER_OF_SUMS_F32)


@pytest.mark.parametrize("wanted", [1, 100])
def test_gate_statistics_of_as_many_rows_as_there_are(kernels, wanted):
    """More row panels in a step than a field of the kernel's counters holds; more steps than factors in a product."""
    check_gates(kernels, Setup("many", T=90, B=33, H=40, lengths=tuple(3 * r % 91 for r in range(33))), wanted, 1e-12)


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
    got, expected = solve(lstmcore.reference, p), expected_of(p)
    assert_close(got, expected, ORDER_OF_SUMS)
    assert ((got["norms"] - expected["norms"]).abs() <= NORMS[torch.float64] * expected["norms"]).all()
    check_gates(lstmcore.reference, setup, 3, 1e-12)


@pytest.mark.parametrize("setup", [*SETUPS, NOTHING], ids=str)
def test_reference_against_oracle(setup):
    """The plain loop answers the forward half of the contract; autograd is its backward."""
    p = pose(setup)
    leaves = {name: p.given[name].requires_grad_() for name in ("input", "h_0", "c_0")}
    for d, weights in enumerate(p.given_weights):
        leaves |= {f"{name} {d}": w.requires_grad_() for name, w in weights._asdict().items() if w is not None}
    forward = call_forward(lstmcore.reference, p)
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
    """Cells and norms come in the state's dtype; their error is that of h rounded to the 16-bit type."""
    p = pose(replace(setup, dtype=dtype))
    got, expected = solve(kernels, p), expected_of(p)
    for name, value in got.items():
        assert value.dtype == (torch.float32 if name in ("cells", "norms") else dtype), name
        scale = max(1.0, expected[name].abs().max().item())
        assert error(value.double(), expected[name]) <= 4 * torch.finfo(dtype).eps * scale, name


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_shapes_layouts_and_padding(kernels, setup):
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


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_inference_saves_nothing_and_gives_the_same_bits(kernels, setup):
    p = pose(replace(setup, dtype=torch.float32))
    inference, training = call_forward(kernels, p, save=False), call_forward(kernels, p, save=True)
    assert inference.saved == ()
    assert_same(kernels, named(p, inference, None), named(p, training, None))


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_backward_twice_and_inputs_untouched(kernels, setup):
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


@pytest.mark.parametrize("setup", SOME, ids=str)
@pytest.mark.parametrize("off", [(), *Needs._fields, Needs._fields], ids=str)
def test_needs(kernels, setup, off):
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


@pytest.mark.parametrize("setup", SOME, ids=str)
@pytest.mark.parametrize("given", ["grad_output", "grad_h_n", "grad_c_n", "grad_cells"])
def test_missing_gradients_are_zeros(kernels, setup, given):
    """None for the gradient of an output that nobody used; each of the four on its own."""
    p, zeros = pose(setup), pose(setup)
    for name in ("grad_output", "grad_h_n", "grad_c_n", "grad_cells"):
        if name != given:
            p.given[name], zeros.given[name] = None, torch.zeros_like(zeros.given[name])
    assert_close(solve(kernels, p), solve(kernels, zeros), LIBRARY[setup.dtype])


@pytest.mark.parametrize("setup", [s for s in SETUPS if s.lengths], ids=str)
def test_nan_in_padding_stays_there(kernels, setup):
    """No work for padding: whatever is in the padded positions of what is given, nothing of it is read."""
    p, poisoned = pose(setup), pose(setup, padding=torch.nan)
    assert_same(kernels, solve(kernels, poisoned), solve(kernels, p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_garbage_in_fresh_memory(kernels, setup, dtype, request):
    """Nothing that was allocated is read before it is written."""
    p = pose(replace(setup, dtype=dtype))
    clean = solve(kernels, p)
    request.getfixturevalue("poisoned_memory")
    assert_same(kernels, solve(kernels, p), clean)


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
    p = pose(setup)
    forward = call_forward(kernels, p)
    gradients = call_backward(kernels, p, forward)
    tensors = [t for t in (*p.given.values(), *p.given_weights[0], *forward, gradients.input) if isinstance(t, Tensor)]
    references = [weakref.ref(t) for t in tensors]
    del tensors, p, forward, gradients
    gc.collect()
    assert not [r for r in references if r() is not None]


def test_supports(kernels):
    layer = Layer(torch.device("cpu"), torch.float32, 10, 4, 8, 16)
    assert kernels.supports(layer) is None
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert kernels.supports(replace(layer, dtype=dtype)) is None
    for change in (
        {"device": torch.device("cuda")},
        {"device": torch.device("meta")},
        {"dtype": torch.int32},
        {"dtype": torch.complex64},
    ):
        reason = kernels.supports(replace(layer, **change))
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

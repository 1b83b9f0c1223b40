"""Calls of a backend, and what they should give: the row-by-row oracle under autograd in float64.

T time, B batch, I input, H hidden, P projection (H where there is none), D directions, N packed rows.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

import torch
from lstmcore.kernels.contract import Call, Forward, Gradients, GradOutputs, Needs, Rows, Weights, state_dtype
from torch import Tensor

from . import tolerances
from .oracle import RowByRow
from .tolerances import error

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
    segment: int = 0  # steps that backward computes again at a time

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

    @property
    def call(self) -> Call:
        g, segment = self.given, self.setup.segment
        return Call.of(g["input"], g["h_0"], g["c_0"], self.given_weights, self.rows, g["reset"], True, segment)

    @property
    def grads(self) -> GradOutputs:
        return GradOutputs(*(self.given[f"grad_{name}"] for name in GradOutputs._fields))

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
    return backend.forward(p.call, save=save, cells=p.setup.cells)


def call_backward(
    backend, p: Problem, forward: Forward, needs: Needs = EVERYTHING, norms: bool = True, gate_rows: int = 0
) -> Gradients:
    needs = needs._replace(norms=norms, gate_rows=gate_rows)
    return backend.backward(p.call, p.grads, forward.output, forward.saved, needs)


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


def assert_same(kernels, got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Two runs of ``kernels`` gave the same, as ``tolerances.assert_same`` understands it."""
    ours = kernels is importlib.import_module("lstmcore.kernels.cpu.backend")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        tolerances.assert_same(got[name], value, "numba" if ours else "triton", name)

"""Recorded calls of modules, and autograd through the oracle's loops, which knows the norms."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstmcore

from .oracle import RowByRow
from .tolerances import NORMS

F64 = torch.float64
T, B, I, H = 7, 5, 3, 17


@dataclass(frozen=True)
class Call:
    """How the module is called."""

    name: str
    lengths: tuple[int, ...] | None = None
    packed: bool = False
    reset: bool = False
    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    proj_size: int = 0
    bias: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def module(self, **kwargs) -> lstmcore.LSTM:
        options = {k: getattr(self, k) for k in ("num_layers", "bidirectional", "batch_first", "proj_size", "bias")}
        return lstmcore.LSTM(I, H, **options, **kwargs)


CALLS = [
    Call("plain"),
    Call("stack", num_layers=3, bidirectional=True),
    Call("batch_first", batch_first=True, num_layers=2),
    Call("proj", proj_size=4, num_layers=2, bidirectional=True),
    Call("no_bias", bias=False),
    Call("lengths", lengths=(3, 7, 0, 7, 1), num_layers=2, bidirectional=True),
    Call("packed", lengths=(3, 7, 2, 7, 1), packed=True, num_layers=2, bidirectional=True),
    Call("reset", reset=True, num_layers=2, bidirectional=True),
    Call("everything", (3, 7, 0, 7, 1), reset=True, num_layers=2, bidirectional=True, proj_size=4, batch_first=True),
]


def step(tensor: Tensor, call: Call) -> Tensor:
    return tensor.transpose(0, 1) if call.batch_first else tensor


def run(call: Call, module: lstmcore.LSTM, x: Tensor, weights: Tensor, reset: Tensor | None) -> Tensor:
    """The loss of ``module`` on x (T, B, I): a weighted sum of the outputs, ``weights`` zero beyond a row's end."""
    given = step(x.to(next(module.parameters()).dtype), call)
    weights = weights.to(given.dtype)
    if call.packed:
        packed = pack_padded_sequence(given, call.lengths, call.batch_first, enforce_sorted=False)
        output, states = module(packed)
        padded, _ = nn.utils.rnn.pad_packed_sequence(output, call.batch_first, total_length=T)
    else:
        padded, states = module(
            given, lengths=call.lengths, reset=None if reset is None else step(reset, call).contiguous()
        )
    return (step(padded, call) * weights).sum() + states[0].sum() + 0.5 * states[1].sum()


def expected(call: Call, module: lstmcore.LSTM, x: Tensor, weights: Tensor, reset: Tensor | None) -> list[Tensor]:
    """(2, D, T, B) norms of every layer, by autograd through the oracle's loops over rows and steps."""
    layers, states = [], torch.zeros((), dtype=F64)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    output, D = x, call.directions
    for layer in range(call.num_layers):
        by_direction = []
        for end in ("", "_reverse")[:D]:
            found = {name: getattr(module, f"{name}_l{layer}{end}", None) for name in names}
            by_direction.append({k: v.detach().double() for k, v in found.items() if v is not None})
        for each in by_direction:
            each["weight_ih"].requires_grad_()
        zeros = torch.zeros(D, B, call.proj_size or H, dtype=F64), torch.zeros(D, B, H, dtype=F64)
        layers.append(RowByRow(output, *zeros, by_direction, call.lengths, reset))
        output = layers[-1].output
        states = states + layers[-1].h_n.sum() + 0.5 * layers[-1].c_n.sum()
    ((output * weights).sum() + states).backward()
    return [layer.norms for layer in layers]


def problem(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(T, B, I, dtype=F64)
    weights = torch.randn(T, B, call.directions * (call.proj_size or H), dtype=F64)
    if call.lengths is not None:
        weights[torch.arange(T)[:, None] >= torch.tensor(call.lengths)] = 0
    return x, weights, torch.rand(T, B) < 0.3 if call.reset else None


def check_norms_are_autograds(call, dtype, backend):
    """Every norm of every row, in the caller's order, against autograd through an independent loop."""
    module = call.module(dtype=dtype, backend=backend)
    x, weights, reset = problem(call)
    truth = expected(call, module, x.to(dtype).double(), weights.to(dtype).double(), reset)
    with lstmcore.record_gradient_flow(module, rows=True) as flow:
        run(call, module, x, weights, reset).backward()
    assert len(flow.records) == call.num_layers * call.directions
    for record in flow.records:
        for which, norms in enumerate((record.h, record.c)):
            wanted = truth[record.layer][which, record.direction]
            alive = torch.ones(T, B, dtype=torch.bool)
            if call.lengths is not None:
                alive = torch.arange(T)[:, None] < torch.tensor(call.lengths)
            assert norms.rows.isnan().equal(~alive)
            got = norms.rows.nan_to_num()
            assert ((got - wanted).abs() <= NORMS[dtype] * wanted).all(), (record.name, which)
            mean = torch.stack([w[a].mean() for w, a in zip(wanted, alive, strict=True)])
            torch.testing.assert_close(norms.mean, mean, rtol=NORMS[dtype], atol=0, equal_nan=True)


def check_vanishing_norms_are_exact(dtype, backend):
    """Over 100 steps a gradient falls below where squares of float32 underflow; its norm is still right."""
    module = lstmcore.LSTM(2, 8, dtype=dtype, backend=backend)
    with torch.no_grad():  # about 0.56 a step
        for parameter in module.parameters():
            parameter.mul_(0.5)
    oracle = copy.deepcopy(module).double()
    x = torch.randn(100, 3, 2, dtype=dtype)
    weights = torch.zeros(100, 3, 8, dtype=F64)
    weights[-1] = 1
    by_direction = [{k.removesuffix("_l0"): v for k, v in oracle.named_parameters()}]
    rows = RowByRow(x.double(), *[torch.zeros(1, 3, 8, dtype=F64)] * 2, by_direction)
    (rows.output * weights).sum().backward()
    truth = rows.norms[:, 0]
    assert truth.min() < 1e-24
    with lstmcore.record_gradient_flow(module, rows=True) as flow:
        output, _ = module(x)
        (output * weights.to(dtype)).sum().backward()
    (record,) = flow.records
    for norms, wanted in zip((record.h, record.c), truth, strict=True):
        assert ((norms.rows - wanted).abs() <= NORMS[dtype] * wanted).all()
    assert record.h.mean_by_lag[0] > 1e20 * record.h.mean_by_lag[-1]

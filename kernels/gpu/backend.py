"""The Triton backend of the contract: host code, from tensors to launches and back.

A layer has three stages.  Before the recurrence, one large product: z = W_ih x + b_ih + b_hh for all steps.  The
recurrence, one launch for both directions, of the design that ``tiling.choose_design`` chooses.  After it, in backward,
large products again: dx, dW_ih, dW_hh, and the sums for the biases.  The large ones are cuBLAS's (``torch.addmm``).

The kernels know neither h_0 nor projections:

* h_0 enters through z: z of a row's first step gets W_hh h_0 added, and dh_0 = W_hh^T dz of that step.
* With a projection, h = W_hr m, the recurrence is one of m with the weights W_hh W_hr, which have the shape that W_hh
  would have without one: one hand-off per step instead of two.  y = W_hr m afterwards, for all steps at once.

Rows are kept flat (``flat_rows.py``).  A dense call can be captured into a CUDA graph, after one call outside the
graph; if the host knows the lengths, it copies a table to the device.  The host never waits, wherever the lengths are:
errors on the device are raised by a later call (``status.py``).

T time, B batch, N tokens: (step, row) pairs (with lengths on the device: T * B, of which the last are padding, see
``flat_rows.py``), I input, H hidden, P projection (H without one), D directions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..contract import (
    GATES,
    Call,
    Forward,
    GateStatistics,
    Gradients,
    GradOutputs,
    Layer,
    Needs,
    Rows,
    WeightGradients,
    Weights,
)
from ..gate_statistics import sampled_rows, statistics
from . import launch, status, tiling
from .device import INTERPRETED
from .flat_rows import FlatRows
from .launch import Recurrence

OLDEST = (8, 0)  # compute capability: tensor cores for bfloat16 and TF32, 8-column tiles


def supports(layer: Layer) -> str | None:
    """See the contract."""
    if layer.dtype not in launch.DTYPES:
        return f"it computes in float16, bfloat16 and float32, not in {layer.dtype}; use backend='auto' or 'torch'"
    if INTERPRETED.value:
        return None if layer.device.type == "cpu" else "Triton's interpreter is on, which runs on the CPU"
    if layer.device.type != "cuda":
        return f"it runs on NVIDIA GPUs, not on {layer.device}; move module and input there, or use backend='auto'"
    if torch.version.hip is not None:
        return "it was built for NVIDIA GPUs, and this torch is for ROCm; use backend='auto'"
    capability = torch.cuda.get_device_capability(layer.device)
    if capability < OLDEST:
        return (
            f"it needs compute capability {OLDEST[0]}.{OLDEST[1]} or newer, and {layer.device} has "
            f"{capability[0]}.{capability[1]}; use backend='auto'"
        )
    try:
        for backward in (False, True):
            launch.design_of(layer, backward)
    except ValueError as error:
        return f"{error}; use backend='auto'"
    return None


def saves(layer: Layer, room: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """See the contract: the gates, the cells, and with a projection m = o tanh(c)."""
    D, H = layer.directions, layer.hidden_size
    shapes = [((D, room, layer.gates), layer.dtype), ((D, room, H), torch.float32), ((room, D * H), layer.dtype)]
    return shapes if layer.projected else shapes[:2]


def measured(device: torch.device) -> bool:
    """Whether the rules of ``"auto"`` were measured on a device like this."""
    if device.type != "cuda" or INTERPRETED.value:
        return False
    least = tiling.MEASURED.get(torch.cuda.get_device_capability(device))
    return least is not None and launch.sms(device) >= least


def describe(layer: Layer) -> str:
    """The designs that such a layer would run, as text for users."""
    forward, backward = (launch.design_of(layer, backward) for backward in (False, True))
    return f"forward {forward}" + (f"; backward {backward}" if layer.training else "")


def prewarm(layer: Layer, *, training: bool) -> None:
    """See the contract: compiles by running two steps of zeros."""
    with torch.no_grad():
        make = functools.partial(torch.zeros, device=layer.device, dtype=layer.dtype)
        named = zip(layer.weight_names, map(make, layer.weight_shapes), strict=True)
        weights = (Weights(**dict(named)),) * layer.directions
        sizes = torch.full((2,), layer.batch)
        rows = Rows.from_packed(sizes) if layer.ragged else Rows(2, layer.batch)
        x = make((*rows.shape, layer.input_size))
        call = Call.of(x, None, None, weights, rows, training=training)
        result = forward(call, save=training)
        if training:
            backward(call, GradOutputs(result.output, None, None), result.output, result.saved, Needs())


def products(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Sets the precision of large products to torch's setting for RNNs, which cuDNN would use."""
    return _float32_products() if dtype == torch.float32 else nullcontext()


@contextmanager
def _float32_products() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, wanted = matmul.fp32_precision, "tf32" if launch.tf32() else "ieee"
    if before == wanted:
        yield
        return
    matmul.fp32_precision = wanted
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _recurrent_weights(weights: tuple[Weights, ...]) -> Tensor:
    """(D, 4H, H): W_hh, or W_hh W_hr."""
    each = [w.weight_hh if w.weight_hr is None else w.weight_hh @ w.weight_hr for w in weights]
    return each[0].contiguous()[None] if len(each) == 1 else torch.stack(each)


def _channel(recurrence: Recurrence, rows: FlatRows, *shape: int, dim: int) -> Tensor:
    """Integers of the dtype's size, all -1: not written yet; 0 in the tail of N, which is ``shape[dim]``."""
    if rows.tail is None:
        return torch.full(shape, -1, dtype=recurrence.bits, device=rows.device)
    return (rows.tail.to(recurrence.bits) - 1).view(-1, *[1] * (len(shape) - dim - 1)).expand(shape).contiguous()


def forward(call: Call, *, save: bool = False, cells: bool = False) -> Forward:
    """See the contract."""
    word = status.raise_pending(call.layer.device)
    flat = FlatRows(call.rows, call.layer.device, call.reset)
    recurrence = launch.recurrence_of(call.layer, flat, False, ("SAVE",) if save or cells else ())
    gates = _entering_gates(call, flat)
    with products(call.layer.dtype):
        recurrent = _recurrent_weights(call.weights)
    m, kept, c = _run_forward(call, flat, recurrence, gates, recurrent, word)
    y = m
    if call.layer.projected:
        y = flat.clear(_projected(call, m))  # zero times weights that may be infinite
    all_cells = None
    if cells:
        assert kept is not None
        all_cells = flat.unflat(flat.clear(kept.permute(1, 0, 2).reshape(flat.total, -1).clone()))
    saved: tuple[Tensor, ...] = ()
    if save:
        assert kept is not None
        saved = (gates, kept, m) if call.layer.projected else (gates, kept)
    h_n = flat.unsorted(_last_states(call, flat, y))
    return Forward(flat.unflat(y), h_n, flat.unsorted(c).to(call.layer.dtype), all_cells, saved)


def _entering_gates(call: Call, flat: FlatRows) -> Tensor:
    """(D, N, 4H): z without its recurrent part, except for that of h_0 in each row's first step."""
    x = flat.flat(call.input)
    gates = call.input.new_empty(call.layer.directions, flat.total, call.layer.gates)
    with products(call.layer.dtype):
        for d, w in enumerate(call.weights):
            if w.bias_ih is None or w.bias_hh is None:
                torch.mm(x, w.weight_ih.T, out=gates[d])
            else:
                torch.addmm(w.bias_ih + w.bias_hh, x, w.weight_ih.T, out=gates[d])
            if call.h_0 is not None:
                flat.add_at_first(gates[d], d, flat.entering(call.h_0, d), w.weight_hh.T)
    return gates


def _run_forward(
    call: Call, flat: FlatRows, recurrence: Recurrence, gates: Tensor, recurrent: Tensor, word: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """m = o tanh(c) (N, D * H); every c_t (D, N, H) if they are kept; the last ones (D, B, H), sorted."""
    D, H, N, new = call.layer.directions, call.layer.hidden_size, flat.total, call.input.new_empty
    if call.c_0 is None:
        c = torch.zeros(call.layer.c_shape, dtype=torch.float32, device=flat.device)
    else:
        c = flat.sorted(call.c_0).to(torch.float32, copy=True).contiguous()
    if flat.wrong is not None:
        status.note(flat.device, flat.wrong)
        c.masked_fill_(flat.wrong, torch.nan)  # so that none of their results looks valid
    kept = new(D, N, H, dtype=torch.float32) if "SAVE" in recurrence.given else None
    tensors: dict[str, Tensor | None]
    if recurrence.design.kind == "resident":
        m = flat.new(call.input, N, D * H)
        tensors = {"h": m, "gates": gates, "cells": kept, "c": c, "w_hh": recurrent}
    else:
        bits, row = _channel(recurrence, flat, N, D, recurrence.row, dim=0), recurrence.row
        m = bits.view(call.layer.dtype)[..., :H]
        if row > H:
            bits[..., H:] = 0  # no program writes these, so none may wait for them
            recurrent = torch.nn.functional.pad(recurrent, (0, row - H))
        tensors = {"h": bits, "h_words": bits.view(torch.int32), "gates": gates, "cells": kept, "c": c}
        tensors |= {"status": word, "w_words": recurrent.view(torch.int32)}
    recurrence.launch(flat, tensors, entered=call.h_0 is not None)
    return m.reshape(N, D * H).contiguous(), kept, c


def _projected(call: Call, m: Tensor) -> Tensor:
    """y (N, D * P) of m (N, D * H)."""
    layer = call.layer
    H, P = layer.hidden_size, layer.width
    y = m.new_empty(len(m), layer.directions * P)
    with products(layer.dtype):
        for d, w in enumerate(call.weights):
            assert w.weight_hr is not None
            torch.mm(m[:, d * H : (d + 1) * H], w.weight_hr.T, out=y[:, d * P : (d + 1) * P])
    return y


def _last_states(call: Call, flat: FlatRows, y: Tensor) -> Tensor:
    """h_n (D, B, P), sorted, from y (N, D * P)."""
    P = call.layer.width
    h_n = y.new_empty(call.layer.h_shape)
    for d in range(call.layer.directions):
        h_n[d, : flat.starting] = flat.take(y, d, False)[:, d * P : (d + 1) * P]
        if flat.may_pass:  # rows without a step keep their initial state
            flat.passes(h_n[d], None if call.h_0 is None else flat.sorted(call.h_0)[d])
    return h_n


def backward(call: Call, grads: GradOutputs, output: Tensor, saved: tuple[Tensor, ...], needs: Needs) -> Gradients:
    """See the contract."""
    word, layer = status.raise_pending(call.layer.device), call.layer
    flat = FlatRows(call.rows, layer.device, call.reset)
    gates, cells, *projected = (each.contiguous() for each in saved)  # a saved-tensors hook may have replaced them
    dy = None if grads.output is None else flat.flat(grads.output)
    dh_n = None if grads.h_n is None else flat.sorted(grads.h_n).contiguous()
    dm, dm_n = dy, dh_n  # gradients of m = o tanh(c), which is h without a projection
    with products(layer.dtype):
        if layer.projected:
            dm, dm_n = _before_projection(call, dy, dh_n)
        recurrent = _recurrent_weights(call.weights)
    optional = {
        "dy": dm,
        "dh_n": dm_n,
        "dcells": None if grads.cells is None else flat.flat(grads.cells),
        "c_0": None if call.c_0 is None else flat.sorted(call.c_0).contiguous(),
    }
    flags = tuple(f"HAS_{name.upper()}" for name, each in optional.items() if each is not None)
    recurrence = launch.recurrence_of(layer, flat, True, (*flags, "NORMS") if needs.norms else flags)
    others = {**optional, "gates": gates, "cells": cells, "w_hh": recurrent}
    dz, dc, squares = _run_backward(call, flat, recurrence, grads.c_n, others, word)
    of_layer = _Products(call, flat, dz, dy, dh_n)
    dx, dh_0, weights, arrived = of_layer.gradients(flat.flat(output), projected, needs)
    return Gradients(
        None if dx is None else flat.unflat(flat.clear(dx)),
        None if dh_0 is None else flat.unsorted(dh_0),
        flat.unsorted(dc).to(layer.dtype) if needs.c_0 else None,
        weights,
        None if squares is None else _magnitudes(flat, squares, arrived),
        _gate_statistics(flat, gates, layer.hidden_size, needs.gate_rows) if needs.gate_rows else None,
    )


def _before_projection(call: Call, dy: Tensor | None, dh_n: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of m (N, D * H) and of the last m (D, B, H), from those of y (N, D * P) and h_n (D, B, P)."""
    each: Any = [w.weight_hr for w in call.weights]
    P = call.layer.width
    dm = None if dy is None else torch.cat([dy[:, d * P : (d + 1) * P] @ w for d, w in enumerate(each)], 1)
    dm_n = None if dh_n is None else torch.stack([dh_n[d] @ w for d, w in enumerate(each)])
    return dm, dm_n


def _run_backward(
    call: Call,
    flat: FlatRows,
    recurrence: Recurrence,
    grad_c_n: Tensor | None,
    others: dict[str, Tensor | None],  # the kernel's other inputs by name
    word: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dz (D, N, 4H); the gradient of c_0 (D, B, H), sorted; sums of squares (2, D, slices, T, B) for the norms."""
    D, gates, N = call.layer.directions, call.layer.gates, flat.total
    if grad_c_n is None:
        dc = torch.zeros(call.layer.c_shape, dtype=torch.float32, device=flat.device)
    else:
        dc = flat.sorted(grad_c_n).to(torch.float32, copy=True).contiguous()
    squares = None
    if "NORMS" in recurrence.given:
        shape = (2, D, recurrence.design.slices, flat.steps, flat.batch)
        squares = torch.zeros(shape, dtype=torch.float64, device=flat.device)  # squares of tiny values underflow
    if recurrence.design.kind == "resident":
        dz = flat.new(call.input, D, N, gates)
        tensors: dict[str, Tensor | None] = {"dz": dz, "dc": dc, "norms": squares}
    else:
        bits = _channel(recurrence, flat, D, N, gates, dim=1)
        dz = bits.view(call.layer.dtype)
        tensors = {"dz": bits, "dz_words": bits.view(torch.int32), "dc": dc, "norms": squares, "status": word}
    recurrence.launch(flat, tensors | others)
    return dz, dc, squares


class _Products:
    """The large products after a backward recurrence, from the dz (D, N, 4H) of all steps."""

    def __init__(self, call: Call, flat: FlatRows, dz: Tensor, dy: Tensor | None, dh_n: Tensor | None) -> None:
        self.call, self.flat, self.dz = call, flat, dz
        self.dy, self.dh_n = dy, dh_n  # (N, D * P), (D, B, P) sorted

    def gradients(
        self, y: Tensor, projected: list[Tensor], needs: Needs
    ) -> tuple[Tensor | None, Tensor | None, tuple[WeightGradients, ...], list[Tensor]]:
        """dx (N, I), dh_0 (D, B, P) sorted, those of the weights, and with a projection those that arrive at h_t."""
        call, flat = self.call, self.flat
        x = flat.flat(call.input) if needs.weights else None
        dx: Tensor | None = None
        dh_0 = y.new_empty(call.layer.h_shape) if needs.h_0 else None
        weights, arrived = [], []
        with products(call.layer.dtype):
            for d, w in enumerate(call.weights):
                dz = self.dz[d]
                if needs.input:
                    dx = dz @ w.weight_ih if dx is None else dx.addmm_(dz, w.weight_ih)
                if dh_0 is not None:
                    self._enter(dh_0[d], d)
                dh = self._arriving(d) if call.layer.projected and (needs.weights or needs.norms) else None
                if dh is not None:
                    arrived.append(dh)
                weights.append(WeightGradients() if x is None else self._of_weights(d, x, y, dh, projected))
        return dx, dh_0, tuple(weights), arrived

    def _of_direction(self, tensor: Tensor, d: int) -> Tensor:
        """The part (N, P) of one direction of (N, D * P)."""
        P = self.call.layer.width
        return tensor[:, d * P : (d + 1) * P]

    def _enter(self, dh_0: Tensor, d: int) -> None:
        """Writes the gradient (B, P) of the h that enters each row's first step."""
        flat = self.flat
        first = flat.take(self.dz[d], d, True) @ self.call.weights[d].weight_hh
        dh_0[: flat.starting] = flat.unless_reset(first, d)
        if flat.may_pass:
            flat.passes(dh_0, None if self.dh_n is None else self.dh_n[d])

    def _arriving(self, d: int) -> Tensor:
        """(N, P): the gradient that arrives at each h_t."""
        end = None if self.dh_n is None else self.dh_n[d, : self.flat.starting]
        dh = self.flat.from_after(self.dz[d] @ self.call.weights[d].weight_hh, end, d)
        if self.dy is not None:
            dh += self._of_direction(self.dy, d)
        return dh

    def _of_weights(self, d: int, x: Tensor, y: Tensor, dh: Tensor | None, projected: list[Tensor]) -> WeightGradients:
        dz, flat, h_0, H = self.dz[d], self.flat, self.call.h_0, self.call.layer.hidden_size
        before = flat.states_before(self._of_direction(y, d), None if h_0 is None else flat.entering(h_0, d), d)
        bias = _column_sums(dz) if self.call.layer.bias else None
        return WeightGradients(
            dz.T @ x,
            dz.T @ before,
            bias,
            None if bias is None else bias.clone(),
            dh.T @ projected[0][:, d * H : (d + 1) * H] if dh is not None else None,
        )


def _column_sums(x: Tensor) -> Tensor:
    """Column sums of (N, M), accumulated in float32 (for 16-bit types by cuBLAS)."""
    if x.dtype == torch.float32:
        return x.sum(0)
    return (x.new_ones(1, len(x)) @ x).squeeze(0)  # torch's sum needs a workspace of twice the size of ``x``


def _magnitudes(flat: FlatRows, squares: Tensor, arrived: list[Tensor]) -> Tensor:
    """(2, D, T, B) norms from (2, D, slices, T, B) sums of squares; with a projection, those of h from ``arrived``."""
    result = squares.sum(2).sqrt_()
    for d, dh in enumerate(arrived):
        flat.by_step(torch.linalg.vector_norm(dh, dim=1, dtype=torch.float64), result[0, d])
    result = result.float()
    return result if flat.order is None else torch.empty_like(result).index_copy_(-1, flat.order, result)


def _gate_statistics(flat: FlatRows, gates: Tensor, hidden: int, wanted: int) -> GateStatistics:
    rows = torch.tensor(list(sampled_rows(flat.begun(), wanted)), dtype=torch.int64, device=flat.device)
    index, active = flat.places(rows)
    sample = gates[:, index].float().unflatten(-1, (GATES, hidden))  # (D, T, R, 4, H)
    return statistics(sample[..., [0, 1, 3], :].movedim(-2, 0), active)

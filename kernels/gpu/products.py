"""The large products before and after the recurrence, which are cuBLAS's, and their precision.

T time, B batch, N tokens: (step, row) pairs, I input, H hidden, P projection (H without one), D directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..contract import Call, Needs, WeightGradients, Weights
from ..precision import tf32
from .flat_rows import FlatRows


def products(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Sets the precision of large products to torch's setting for RNNs, which cuDNN would use."""
    return _float32_products() if dtype == torch.float32 else nullcontext()


@contextmanager
def _float32_products() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, wanted = matmul.fp32_precision, "tf32" if tf32() else "ieee"
    if before == wanted:
        yield
        return
    matmul.fp32_precision = wanted
    try:
        yield
    finally:
        matmul.fp32_precision = before


def recurrent_weights(weights: tuple[Weights, ...]) -> Tensor:
    """(D, 4H, H): W_hh, or W_hh W_hr."""
    with products(weights[0].weight_hh.dtype):
        each = [w.weight_hh if w.weight_hr is None else w.weight_hh @ w.weight_hr for w in weights]
    return each[0].contiguous()[None] if len(each) == 1 else torch.stack(each)


def entering_gates(call: Call, flat: FlatRows) -> Tensor:
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


def projected(call: Call, m: Tensor) -> Tensor:
    """y (N, D * P) of m (N, D * H)."""
    layer = call.layer
    H, P = layer.hidden_size, layer.width
    y = m.new_empty(len(m), layer.directions * P)
    with products(layer.dtype):
        for d, w in enumerate(call.weights):
            assert w.weight_hr is not None
            torch.mm(m[:, d * H : (d + 1) * H], w.weight_hr.T, out=y[:, d * P : (d + 1) * P])
    return y


def before_projection(call: Call, dy: Tensor | None, dh_n: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of m (N, D * H) and of the last m (D, B, H), from those of y (N, D * P) and h_n (D, B, P)."""
    each: Any = [w.weight_hr for w in call.weights]
    P = call.layer.width
    with products(call.layer.dtype):
        dm = None if dy is None else torch.cat([dy[:, d * P : (d + 1) * P] @ w for d, w in enumerate(each)], 1)
        dm_n = None if dh_n is None else torch.stack([dh_n[d] @ w for d, w in enumerate(each)])
    return dm, dm_n


class AfterRecurrence:
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

"""The autograd Function of one layer, one or both directions.

T time, B batch, N alive rows over all steps, I input, H hidden, P projection (H where there is none), D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lstmcore import backends, recording, reference
from lstmcore.kernels.contract import Needs, Rows, Weights

_FIELDS = len(Weights._fields)
_BEFORE = 5  # arguments of _Layer that have no gradient, before those that may


def layer(
    backend: str,  # "numba", "triton" or "reference"
    input: Tensor,  # (T, B, I) or (N, I)
    h_0: Tensor | None,  # (D, B, P); None for zeros
    c_0: Tensor | None,  # (D, B, H); None for zeros
    weights: Sequence[Weights],
    rows: Rows,
    reset: Tensor | None = None,  # (T, B) or (N,), bool
    cells: bool = False,
    source: recording.Source | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(output, h_n, c_n, cells) of one layer; with a graph only when autograd will want one."""
    sized = rows.total and input.shape[-1] and weights[0].weight_hh.numel()
    # autograd's own graph of the plain loop cannot be recorded
    plain = backend == "reference" and (source is None or not recording.watched(source.module()))
    if plain or not sized:  # kernels want every size to be 1 at least
        return reference.forward(input, h_0, c_0, weights, rows, reset=reset, cells=cells)[:4]
    kernels = backends.load(backend)
    if torch.is_grad_enabled():
        flat = [tensor for direction in weights for tensor in direction]
        if any(tensor is not None and tensor.requires_grad for tensor in (input, *flat, h_0, c_0)):
            return _Layer.apply(source, kernels, rows, cells, reset, input, h_0, c_0, *flat)
    return kernels.forward(input, h_0, c_0, weights, rows, reset=reset, save=False, cells=cells)[:4]


class _Layer(Function):
    """One layer on a backend's kernels; differentiated twice, through the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        source: recording.Source | None,
        kernels: Any,
        rows: Rows,
        cells: bool,
        reset: Tensor | None,
        input: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        *flat: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        result = kernels.forward(input, h_0, c_0, _unflatten(flat), rows, reset=reset, save=True, cells=cells)
        ctx.source, ctx.kernels, ctx.rows = source, kernels, rows
        ctx.save_for_backward(reset, input, h_0, c_0, *flat, result.output, *result.saved)
        ctx.weights = len(flat)
        ctx.set_materialize_grads(False)  # an output nobody used has no gradient, and costs nothing
        return result[:4]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if not torch._C._is_any_autocast_enabled():
            return _backward(ctx, grads)
        with torch.autocast(next(grad for grad in grads if grad is not None).device.type, enabled=False):
            return _backward(ctx, grads)


def _backward(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    reset, input, h_0, c_0, *rest = ctx.saved_tensors
    flat, output, saved = rest[: ctx.weights], rest[ctx.weights], tuple(rest[ctx.weights + 1 :])
    needs = ctx.needs_input_grad[_BEFORE:]
    watching = recording.watchers(ctx.source)
    # create_graph=True: the gradient itself has to be differentiable
    kernels = reference if torch.is_grad_enabled() else ctx.kernels
    result = kernels.backward(
        *grads,
        input=input,
        h_0=h_0,
        c_0=c_0,
        weights=_unflatten(flat),
        rows=ctx.rows,
        reset=reset,
        output=output,
        saved=saved,
        needs=Needs(needs[0], needs[1], needs[2], any(needs[3:])),
        norms=bool(watching),
        gate_rows=max((watcher.gate_rows for watcher in watching), default=0),
    )
    if watching:
        recording.show(watching, ctx.source, ctx.rows, result.norms, result.gates, grads[:3])
    flat_grads = (w for d in result.weights for w in d)
    return (*[None] * _BEFORE, result.input, result.h_0, result.c_0, *flat_grads)


def _unflatten(flat: Sequence[Tensor | None]) -> tuple[Weights, ...]:
    return tuple(Weights(*flat[start : start + _FIELDS]) for start in range(0, len(flat), _FIELDS))  # type: ignore[arg-type]

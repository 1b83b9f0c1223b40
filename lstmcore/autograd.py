"""The autograd Function of one layer, one or both directions.

T time, B batch, N alive rows over all steps, I input, H hidden, P projection (H where there is none), D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lstmcore import backends, checks, ops, recording, reference
from lstmcore.kernels.contract import Needs, Rows, directions_of

_BEFORE = 6  # arguments of _Layer that have no gradient, before those that may


def layer(
    backend: str,  # "numba", "triton" or "reference"
    input: Tensor,  # (T, B, I) or (N, I)
    h_0: Tensor | None,  # (D, B, P); None for zeros
    c_0: Tensor | None,  # (D, B, H); None for zeros
    weights: Sequence[Tensor],  # as directions_of takes them
    directions: int,
    rows: Rows,
    reset: Tensor | None = None,  # (T, B) or (N,), bool
    cells: bool = False,
    source: recording.Source | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(output, h_n, c_n, cells) of one layer; with a graph only when autograd will want one."""
    sized = rows.total and input.shape[-1] and weights[1].numel()
    # autograd's own graph of the plain loop cannot be recorded
    plain = backend == "reference" and (source is None or not recording.watched(source.module()))
    if plain or not sized:  # kernels want every size to be 1 at least
        each = directions_of(weights, directions)
        return reference.forward(input, h_0, c_0, each, rows, reset=reset, cells=cells)[:4]
    if rows.lengths is not None and backend != "triton":
        rows = rows.on_host()
    input, h_0, c_0, *weights = checks.plain((input, h_0, c_0, *weights))
    checks.in_memory((input, h_0, c_0, reset, *weights))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, *weights, h_0, c_0)):
        return _Layer.apply(source, backend, rows, cells, directions, reset, input, h_0, c_0, *weights)
    kernels, each = backends.load(backend), directions_of(weights, directions)
    return kernels.forward(input, h_0, c_0, each, rows, reset=reset, save=False, cells=cells)[:4]


class _Layer(Function):
    """One layer on a backend's kernels; differentiated twice, through the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        source: recording.Source | None,
        backend: str,
        rows: Rows,
        cells: bool,
        directions: int,
        reset: Tensor | None,
        input: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        given = directions_of(weights, directions)
        kernels = backends.load(backend)
        result = kernels.forward(input, h_0, c_0, given, rows, reset=reset, save=True, cells=cells)
        ctx.source, ctx.backend, ctx.rows = source, backend, rows
        ctx.save_for_backward(reset, input, h_0, c_0, *weights, result.output, *result.saved)
        ctx.weights, ctx.directions = len(weights), directions
        ctx.sizes = [(each.shape, each.dtype) for each in result.saved]
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
    # what a saved-tensors hook brings may be a view with a pending negation
    reset, input, h_0, c_0, *rest = checks.plain(ctx.saved_tensors)
    weights, output, saved = rest[: ctx.weights], rest[ctx.weights], tuple(rest[ctx.weights + 1 :])
    needs = ctx.needs_input_grad[_BEFORE:]
    if torch._C._are_functorch_transforms_active():  # vmap over a backward
        rows = ctx.rows
        lengths = None if rows.packed or not rows.ragged else rows.row_lengths()
        tensors = ops.Tensors(input, h_0, c_0, reset, rows.batch_sizes if rows.packed else None, lengths)
        call = ops.Call(rows.batch, ctx.directions, rows.batch_first, grads[3] is not None, True, ctx.backend)
        needed = (*needs[:3], False, False, False, *needs[3:])
        found = ops.gradients(grads, needed, (output, *saved), tensors, weights, call)  # type: ignore[arg-type]
        return *[None] * _BEFORE, *found[:3], *found[6:]
    each = directions_of(weights, ctx.directions)
    watching = recording.watchers(ctx.source)
    # create_graph=True: the gradient itself has to be differentiable; is_grads_batched=True: grads lie nowhere
    plain = torch.is_grad_enabled() or not all(grad is None or torch._C._has_storage(grad) for grad in grads)
    if not plain:
        grads = tuple(checks.plain(grads))
    checks.layer(
        ctx.rows, input, h_0, c_0, weights, ctx.directions, reset, output, () if plain else grads, (saved, ctx.sizes)
    )
    kernels = reference if plain else backends.load(ctx.backend)
    result = kernels.backward(
        *grads,
        input=input,
        h_0=h_0,
        c_0=c_0,
        weights=each,
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
    return (*[None] * _BEFORE, result.input, result.h_0, result.c_0, *result.of(each))

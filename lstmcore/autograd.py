"""The autograd Function of one layer, one or both directions.

T time, B batch, N alive rows over all steps, I input, H hidden, P projection (H where there is none), D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lstmcore import backends, reference
from lstmcore.kernels.contract import Needs, Rows, Weights

_FIELDS = len(Weights._fields)


def layer(
    backend: str,  # "numba", "triton" or "reference"
    input: Tensor,  # (T, B, I) or (N, I)
    h_0: Tensor | None,  # (D, B, P); None for zeros
    c_0: Tensor | None,  # (D, B, H); None for zeros
    weights: Sequence[Weights],
    rows: Rows,
    reset: Tensor | None = None,  # (T, B) or (N,), bool
    cells: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(output, h_n, c_n, cells) of one layer; with a graph only when autograd will want one."""
    sized = rows.total and input.shape[-1] and weights[0].weight_hh.numel()
    if backend == "reference" or not sized:  # kernels want every size to be 1 at least
        return reference.forward(input, h_0, c_0, weights, rows, reset=reset, cells=cells)[:4]
    kernels = backends.load(backend)
    if torch.is_grad_enabled():
        flat = [tensor for direction in weights for tensor in direction]
        if any(tensor is not None and tensor.requires_grad for tensor in (input, *flat, h_0, c_0)):
            return _Layer.apply(kernels, rows, cells, reset, input, h_0, c_0, *flat)
    return kernels.forward(input, h_0, c_0, weights, rows, reset=reset, save=False, cells=cells)[:4]


class _Layer(Function):
    """One layer on a backend's kernels; differentiated twice, through the reference."""

    @staticmethod
    def forward(
        ctx: Any,
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
        ctx.kernels, ctx.rows = kernels, rows
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
    needs = ctx.needs_input_grad[4:]
    if torch.is_grad_enabled():  # create_graph=True: the gradient itself has to be differentiable
        return (None,) * 4 + _through_reference([input, h_0, c_0, *flat], needs, grads, ctx.rows, reset)
    result = ctx.kernels.backward(
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
        norms=False,
    )
    return (None, None, None, None, result.input, result.h_0, result.c_0, *(w for d in result.weights for w in d))


def _through_reference(
    tensors: list[Tensor | None],
    needs: Sequence[bool],
    grads: tuple[Tensor | None, ...],
    rows: Rows,
    reset: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The same gradients, by differentiating the reference, and so differentiable in turn.

    Every tensor enters through an alias of its own, which stops the walk back at this layer: without it the gradient
    with respect to ``input`` would take in the paths that lead from ``input`` to ``h_0`` outside of the layer.
    """
    aliases: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    input, h_0, c_0, *flat = aliases
    outputs = reference.forward(input, h_0, c_0, _unflatten(flat), rows, reset=reset, cells=grads[3] is not None)[:4]
    used = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out is not None and grad is not None]
    wanted = [alias for alias, need in zip(aliases, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in used], wanted, [grad for _, grad in used], create_graph=True, allow_unused=True
        )
    )
    return tuple(next(found) if need else None for need in needs)


def _unflatten(flat: Sequence[Tensor | None]) -> tuple[Weights, ...]:
    return tuple(Weights(*flat[start : start + _FIELDS]) for start in range(0, len(flat), _FIELDS))  # type: ignore[arg-type]

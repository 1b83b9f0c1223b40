"""The tensors of a call: allocated, in the form that the kernels read, by the names of their buffers.

T time, B batch, N tokens: (step, row) pairs, I input, H hidden, P projection (or H), D directions, H' and P' padded to
whole vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

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
from ..integers import ceil_div
from . import buffers, tiling
from .backward import NORM_PANELS
from .prepare import BackwardForm, ForwardForm
from .prepared import Strides
from .problem import kernels_of

Named = dict[object, Any]


def saves(layer: Layer, room: int) -> list[tuple[tuple[int], torch.dtype]]:
    """See the contract: the gates of each direction, then their cells; with segments, the h and c that enter each."""
    kernels = kernels_of(layer.dtype)
    padded = kernels.block.padded(layer.hidden_size)
    sizes = (GATES * padded, layer.dtype), (padded, kernels.compute)
    if layer.segment:
        room, row = layer.segments * layer.batch, kernels.variant.operand_row(layer.width)
        sizes = (row // kernels.operand.itemsize, kernels.operand), (padded, kernels.compute)
    return [((room * width,), dtype) for width, dtype in sizes for _ in range(layer.directions)]


class ForwardTensors(NamedTuple):
    """The tensors of a forward."""

    call: Call
    form: ForwardForm
    named: Named
    output: Tensor
    h_n: Tensor
    c_n: Tensor
    kept: list[Tensor]  # every c_t, (N, H') of each direction; empty if not wanted
    saved: list[Tensor]

    @staticmethod
    def of(call: Call, save: bool, cells: bool = False) -> ForwardTensors:
        layer, rows, x, kernels = call.layer, call.rows, _rows_dense(call.input), kernels_of(call.layer.dtype)
        h_0, c_0, flags = _rows_dense(call.h_0), _rows_dense(call.c_0), _flags(call.reset)
        output = rows.new(x, layer.directions * layer.width, zero=False)
        h_n, c_n = x.new_empty(layer.h_shape), x.new_empty(layer.c_shape)
        saved = [buffers.take(count, dtype) for (count,), dtype in saves(layer, rows.room)] if save else []
        whole = save and not layer.segment
        kept = saved[layer.directions :] if whole else []
        if cells and not kept:
            width = kernels.block.padded(layer.hidden_size)
            kept = [buffers.take(rows.room * width, kernels.compute) for _ in range(layer.directions)]
        strides = _strides(x), _strides(output), _strides(flags), _strides(h_0), _strides(c_0)
        form = ForwardForm(*strides, gates=whole, cells=bool(kept), borders=save and not whole)
        named: Named = {
            "x": x, "y": output, "reset": flags, "h_0": h_0, "c_0": c_0, "h_n": h_n, "c_n": c_n,
            **_parameters(call.weights, kernels, forward=True),
            **by_direction("cells", kept), **_by_name(layer, saved),
        }  # fmt: skip
        return ForwardTensors(call, form, named, output, h_n, c_n, kept, saved)

    def result(self, cells: bool = False) -> Forward:
        """What forward returns, once the kernels have run."""
        every = _cells_out(self.call, self.kept, self.output) if cells else None
        return Forward(self.output, self.h_n, self.c_n, every, tuple(self.saved))


class BackwardTensors(NamedTuple):
    """The tensors of a backward."""

    call: Call
    needs: Needs
    form: BackwardForm
    named: Named
    dx: list[Tensor]  # of each direction; empty if not wanted
    grad_h: Tensor | None
    grad_c: Tensor | None
    gradients: list[WeightGradients]  # in the compute dtype
    squares: list[Tensor]

    @staticmethod
    def of(call: Call, grads: GradOutputs, output: Tensor, saved: tuple[Tensor, ...], needs: Needs) -> BackwardTensors:
        layer, rows, kernels, count = call.layer, call.rows, kernels_of(call.layer.dtype), call.layer.directions
        x, y, h_0, c_0 = map(_rows_dense, (call.input, output, call.h_0, call.c_0))
        dy, dh_n, dc_n, flags = *map(_rows_dense, grads[:3]), _flags(call.reset)
        saved = tuple(each.contiguous() for each in saved)  # a saved-tensors hook may have replaced them
        dx = [rows.new(x, layer.input_size, zero=False) for _ in range(count * needs.input)]
        grad_h = x.new_empty(layer.h_shape) if needs.h_0 else None
        grad_c = x.new_empty(layer.c_shape) if needs.c_0 else None
        squares = [_no_squares(layer, kernels.block) for _ in range(count * needs.norms)]
        padded = kernels.block.padded(layer.hidden_size)
        dcells = [] if grads.cells is None else _cells_in(call, padded, grads.cells, kernels.compute)
        form = BackwardForm(
            _strides(x), _strides(y), _strides(flags), _strides(h_0), _strides(c_0), _strides(dx[0] if dx else None),
            _strides(dy), _strides(dh_n), _strides(dc_n), bool(dcells),
            needs._replace(gate_rows=0) if needs.gate_rows else needs,  # the kernels do not depend on how many
        )  # fmt: skip
        gradients = [_new_gradients(weights, kernels.compute, needs) for weights in call.weights]
        named: Named = {
            "x": x, "y": y, "dy": dy, "reset": flags, "h_0": h_0, "c_0": c_0, "dh_n": dh_n, "dc_n": dc_n,
            "grad_h": grad_h, "grad_c": grad_c,
            **_parameters(call.weights, kernels, forward=layer.segment > 0), **_by_name(layer, saved),
            **by_direction("dx", dx), **by_direction("norms", squares), **by_direction("dcells", dcells),
            **{(f"grad of {name}", d): g for d, each in enumerate(gradients) for name, g in each._asdict().items()},
        }  # fmt: skip
        return BackwardTensors(call, needs, form, named, dx, grad_h, grad_c, gradients, squares)

    def result(self, statistics: GateStatistics | None = None) -> Gradients:
        """What backward returns, once the kernels have run."""
        call, dx = self.call, self.dx
        if len(dx) == 2:
            dx[0] += dx[1]
        pairs = zip(self.gradients, call.weights, strict=True)
        weights = tuple(_as_weights(each, parameters) for each, parameters in pairs)
        norms = None
        if self.needs.norms:
            norms = _magnitudes(call.rows, kernels_of(call.layer.dtype), self.squares)
        return Gradients(dx[0] if dx else None, self.grad_h, self.grad_c, weights, norms, statistics)


def _strides(tensor: Tensor | None) -> Strides:
    return None if tensor is None else tensor.stride()


def _rows_dense(tensor: Tensor | None) -> Any:
    """``tensor`` with a last dimension of stride 1."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _flags(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else reset.contiguous().view(torch.uint8)


def _parameters(weights: tuple[Weights, ...], kernels: Any, forward: bool) -> dict[object, Tensor | None]:
    """The weights as the jobs read them, by (name, direction): contiguous, and in the dtypes of sums and operands.

    ``forward``: also the transpose of weight_hr, which forward reads.
    """
    named: dict[object, Tensor | None] = {}
    for direction, parameters in enumerate(weights):
        each = parameters._asdict()
        if forward and parameters.weight_hr is not None:
            each["weight_hr.T"] = parameters.weight_hr.T
        for name, weight in each.items():
            dtype = kernels.compute if name.startswith("bias") else kernels.operand
            if weight is not None and (weight.dtype != dtype or not weight.is_contiguous()):
                weight = weight.detach().to(dtype).contiguous()
            named[name, direction] = weight
    return named


def by_direction(name: str, each: Iterable[Any]) -> dict[object, Any]:
    return {(name, direction): one for direction, one in enumerate(each)}


def _by_name(layer: Layer, saved: Sequence[Tensor]) -> dict[object, Any]:
    """What forward saves, by (name, direction)."""
    names = ("borders_h", "borders_c") if layer.segment else ("gates", "cells")
    halves = saved[: layer.directions], saved[layer.directions :]
    return {(name, d): each for name, half in zip(names, halves, strict=True) for d, each in enumerate(half)}


def _new_gradients(parameters: Weights, compute: torch.dtype, needs: Needs) -> WeightGradients:
    """Tensors for the weight gradients in the compute dtype."""
    if not needs.weights:
        return WeightGradients()
    shapes = [None if w is None else w.shape for w in parameters]
    if shapes[-1] is not None:
        shapes[-1] = shapes[-1][::-1]  # the kernels compute that of weight_hr transposed
    return WeightGradients(*(None if s is None else torch.empty(s, dtype=compute, device="cpu") for s in shapes))


def _as_weights(gradients: WeightGradients, parameters: Weights) -> WeightGradients:
    """``gradients`` in the shapes and the dtypes of the weights."""
    pairs = zip(gradients, parameters, strict=True)
    found = WeightGradients(*(g if g is None or w is None or g.dtype == w.dtype else g.to(w.dtype) for g, w in pairs))
    return found if found.weight_hr is None else found._replace(weight_hr=found.weight_hr.T)


def _cells_out(call: Call, kept: list[Tensor], like: Tensor) -> Tensor:
    """Every c_t as a new tensor of the user's layout, from the internal (N, H') of each direction."""
    hidden, rows = call.layer.hidden_size, call.rows
    cells = rows.new(like, len(kept) * hidden, kept[0].dtype)
    for direction, internal in enumerate(kept):
        values = internal.view(rows.room, -1)[: rows.total, :hidden]
        rows.unflat(values, cells[..., direction * hidden : (direction + 1) * hidden])
    return cells


def _cells_in(call: Call, padded: int, grad_cells: Tensor, compute: torch.dtype) -> list[Tensor]:
    """The gradients of every c_t in the internal layout, (N, H') for each direction."""
    hidden, rows, result = call.layer.hidden_size, call.rows, []
    for direction in range(call.layer.directions):
        internal = torch.zeros((rows.total, padded), dtype=compute, device="cpu")
        internal[:, :hidden] = rows.flat(grad_cells[..., direction * hidden : (direction + 1) * hidden])
        result.append(internal)
    return result


def _no_squares(layer: Layer, block: tiling.Block) -> Tensor:
    """Zeros for the sums of squares of one direction, (2, T * B, ·); they stay zero where rows are not active."""
    groups = ceil_div(ceil_div(max(layer.hidden_size, layer.width), block.lanes), NORM_PANELS)
    count = layer.steps * layer.batch
    squares = buffers.take(2 * count * groups, torch.float64).view(2, count, groups)
    squares.numpy().fill(0)  # NumPy's: torch's would never return in a forked child
    return squares


def _magnitudes(rows: Rows, kernels: Any, squares: list[Tensor]) -> Tensor:
    """(2, D, T, B) norms from the partial sums of squares (2, T * B, ·) of each direction."""
    each = torch.empty((len(squares), 2, rows.steps * rows.batch), dtype=kernels.compute, device="cpu")
    kernel = kernels.norms()
    for direction, of_direction in enumerate(squares):
        kernel(each[direction].numpy(), of_direction.numpy())
    norms = each.view(len(squares), 2, rows.steps, rows.batch).transpose(0, 1)
    if rows.order is None:
        return norms
    return torch.empty_like(norms).index_copy_(-1, rows.order, norms)

"""The Numba backend of the contract: host code, from tensors to launches and back.

Tensors are allocated and read here; the kernels' arguments are prepared once per kind of call (``prepare.py``).  A call
then runs three launches: jobs that pack the weights and read the states (``jobs.py``), one launch per direction and
part of the batch, in parallel where threads allow, and jobs that write the states and the weight gradients.

T time, B batch, N tokens: (step, row) pairs, I input, H hidden, P projection (or H), D directions, H' and P' padded to
whole vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..contract import (
    GATES,
    Call,
    Forward,
    Gradients,
    GradOutputs,
    Layer,
    Needs,
    Rows,
    WeightGradients,
    Weights,
)
from ..integers import ceil_div
from . import buffers, process, threads, tiling
from .backward import NORM_PANELS
from .prepare import BackwardForm, ForwardForm, Strides, prepare_backward, prepare_forward, prepared_for
from .problem import DTYPES, kernels_of, threads_for
from .segments import Segmented
from .statistics import Statistics


def supports(layer: Layer) -> str | None:
    """None if this backend runs ``layer``; else what is missing."""
    if layer.device.type != "cpu":
        return f"the Numba kernels run on the CPU, the tensors are on {layer.device.type!r}"
    if layer.dtype not in DTYPES:
        return f"the Numba kernels compute float32, float64, bfloat16 and float16, not {layer.dtype}"
    return None


def saves(layer: Layer, room: int) -> list[tuple[tuple[int], torch.dtype]]:
    """See the contract: the gates of each direction, then their cells; with segments, the h and c that enter each."""
    kernels = kernels_of(layer.dtype)
    padded = kernels.block.padded(layer.hidden_size)
    sizes = (GATES * padded, layer.dtype), (padded, kernels.compute)
    if layer.segment:
        room = layer.segments * layer.batch
        sizes = (kernels.block.padded(layer.width), kernels.compute), (padded, kernels.compute)
    return [((room * width,), dtype) for width, dtype in sizes for _ in range(layer.directions)]


def prewarm(layer: Layer, *, training: bool) -> None:
    """Compiles, or loads from the disk cache, the kernels that ``layer`` will use."""
    kernels = kernels_of(layer.dtype)
    kernels.jobs()
    kernels.forward()
    if training:
        kernels.backward()
    threads.prewarm()


def _strides(tensor: Tensor | None) -> Strides:
    return None if tensor is None else tensor.stride()


def _rows_dense(tensor: Tensor | None) -> Any:
    """``tensor`` with a last dimension of stride 1."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _flags(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else reset.contiguous().view(torch.uint8)


def _parameters(weights: tuple[Weights, ...], compute: torch.dtype, forward: bool) -> dict[object, Tensor | None]:
    """The weights as the jobs read them, by (name, direction): contiguous and in the compute dtype.

    ``forward``: also the transpose of weight_hr, which forward reads.
    """
    named: dict[object, Tensor | None] = {}
    for direction, parameters in enumerate(weights):
        each = parameters._asdict()
        if forward and parameters.weight_hr is not None:
            each["weight_hr.T"] = parameters.weight_hr.T
        for name, weight in each.items():
            if weight is not None and (weight.dtype != compute or not weight.is_contiguous()):
                weight = weight.detach().to(compute).contiguous()
            named[name, direction] = weight
    return named


@process.one_torch_thread
def forward(call: Call, *, save: bool = False, cells: bool = False) -> Forward:
    """See the contract."""
    layer, rows, x = call.layer, call.rows, _rows_dense(call.input)
    h_0, c_0, flags, kernels = _rows_dense(call.h_0), _rows_dense(call.c_0), _flags(call.reset), kernels_of(layer.dtype)
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
    prepared = prepared_for(prepare_forward, call, threads.available(threads_for(layer, rows.total)), form)
    tensors: dict[object, Any] = {
        "x": x, "y": output, "reset": flags, "h_0": h_0, "c_0": c_0, "h_n": h_n, "c_n": c_n,
        **_parameters(call.weights, kernels.compute, forward=True),
        **_by_direction("cells", kept), **_saved(layer, saved),
    }  # fmt: skip
    prepared.run([kernels.forward()], tensors)
    return Forward(output, h_n, c_n, _cells_out(call, kept, output) if cells else None, tuple(saved))


def _saved(layer: Layer, saved: Sequence[Tensor]) -> dict[object, Any]:
    """What forward saves, by (name, direction)."""
    names = ("borders_h", "borders_c") if layer.segment else ("gates", "cells")
    halves = saved[: layer.directions], saved[layer.directions :]
    return {(name, d): each for name, half in zip(names, halves, strict=True) for d, each in enumerate(half)}


def _by_direction(name: str, each: Iterable[Any]) -> dict[object, Any]:
    return {(name, direction): one for direction, one in enumerate(each)}


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


@process.one_torch_thread
def backward(call: Call, grads: GradOutputs, output: Tensor, saved: tuple[Tensor, ...], needs: Needs) -> Gradients:
    """See the contract."""
    layer, rows, kernels, count = call.layer, call.rows, kernels_of(call.layer.dtype), call.layer.directions
    x, y, h_0, c_0 = map(_rows_dense, (call.input, output, call.h_0, call.c_0))
    dy, dh_n, dc_n, flags = *map(_rows_dense, grads[:3]), _flags(call.reset)
    saved = tuple(each.contiguous() for each in saved)  # a saved-tensors hook may have replaced them
    padded = kernels.block.padded(layer.hidden_size)
    dx = [rows.new(x, layer.input_size, zero=False) for _ in range(count * needs.input)]
    grad_h = x.new_empty(layer.h_shape) if needs.h_0 else None
    grad_c = x.new_empty(layer.c_shape) if needs.c_0 else None
    squares = [_no_squares(layer, kernels.block) for _ in range(count * needs.norms)]
    dcells = [] if grads.cells is None else _cells_in(call, padded, grads.cells, kernels.compute)
    asked = needs._replace(gate_rows=0) if needs.gate_rows else needs  # the kernels do not depend on how many
    form = BackwardForm(
        _strides(x), _strides(y), _strides(flags), _strides(h_0), _strides(c_0), _strides(dx[0] if dx else None),
        _strides(dy), _strides(dh_n), _strides(dc_n), bool(dcells), asked,
    )  # fmt: skip
    prepared = prepared_for(prepare_backward, call, threads.available(threads_for(layer, rows.total)), form)
    gradients = [_new_gradients(parameters, kernels.compute, needs) for parameters in call.weights]
    tensors: dict[object, Any] = {
        "x": x, "y": y, "dy": dy, "reset": flags, "h_0": h_0, "c_0": c_0, "dh_n": dh_n, "dc_n": dc_n,
        "grad_h": grad_h, "grad_c": grad_c, **_parameters(call.weights, kernels.compute, forward=layer.segment > 0),
        **_saved(layer, saved), **_by_direction("dx", dx), **_by_direction("norms", squares),
        **_by_direction("dcells", dcells),
        **{(f"grad of {name}", d): g for d, each in enumerate(gradients) for name, g in each._asdict().items()},
    }  # fmt: skip
    statistics = None
    if needs.gate_rows:
        statistics = Statistics(kernels.statistics(), kernels.block.lanes, call, needs.gate_rows)
    if isinstance(prepared, Segmented):
        _run_segments(prepared, tensors, statistics)
    else:
        prepared.run([kernels.backward()], tensors)
        if statistics is not None:
            for direction in range(count):
                statistics.add(direction, saved[direction].data_ptr(), 0, layer.steps)
    if len(dx) == 2:
        dx[0] += dx[1]
    return Gradients(
        dx[0] if dx else None,
        grad_h,
        grad_c,
        tuple(_as_weights(each, parameters) for each, parameters in zip(gradients, call.weights, strict=True)),
        _magnitudes(rows, kernels, squares) if needs.norms else None,
        None if statistics is None else statistics.result(),
    )


def _run_segments(prepared: Segmented, tensors: dict[object, Any], statistics: Statistics | None) -> None:
    """Runs a backward that computes gates and cells again, a segment at a time."""
    p, segments, room = prepared.problem, prepared.segments, prepared.segments.room
    kernels, directions = p.kernels, range(p.directions)
    gates = [buffers.take(room * p.padded_gates, p.layer.dtype) for _ in directions]
    cells = [buffers.take(room * p.padded_hidden, kernels.compute) for _ in directions]

    def each(number: int) -> None:
        assert statistics is not None
        for direction in directions:
            moved = int(segments.gates[direction, number]) * p.padded_gates * p.stored
            last = int(segments.last[number])
            statistics.add(direction, gates[direction].data_ptr() - moved, int(segments.first[number]), last)

    tensors |= {**_by_direction("gates", gates), **_by_direction("cells", cells)}
    prepared.run([kernels.forward(), kernels.backward()], tensors, None if statistics is None else each)


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

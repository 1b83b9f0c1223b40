"""The Numba backend of the contract: host code, from tensors to launches and back.

Tensors are allocated and read here; what the kernels are told of them is laid out once for a kind of call
(``layout.py``), which then works off three launches: jobs that pack the weights and read the states (``jobs.py``), one
launch a direction and part of the batch, side by side where threads allow, and jobs that write what is left.

T time, B batch, N alive rows, I input, H hidden, P projection (or H), D directions, H' and P' padded to whole vectors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..contract import Forward, GateStatistics, Gradients, Layer, Needs, Rows, WeightGradients, Weights
from ..gate_statistics import sampled_rows
from ..integers import ceil_div
from . import buffers, process, threads, tiling
from .backward import NORM_PANELS
from .layout import BackwardGiven, ForwardGiven, Strides, lay_backward, lay_forward, layout_of
from .problem import DTYPES, Kind, kernels_of, starts_of
from .statistics import statistics


def supports(layer: Layer) -> str | None:
    """None if this backend runs ``layer``; else what is missing."""
    if layer.device.type != "cpu":
        return f"the Numba kernels run on the CPU, the tensors are on {layer.device.type!r}"
    if layer.dtype not in DTYPES:
        return f"the Numba kernels compute float32, float64, bfloat16 and float16, not {layer.dtype}"
    return None


def saves(layer: Layer, room: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """See the contract: the gates of each direction, then their cells."""
    kernels = kernels_of(layer.dtype)
    padded = kernels.block.padded(layer.hidden_size)
    sizes = ((4 * padded, layer.dtype), (padded, kernels.compute))
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
    return None if tensor is None else tuple(stride * tensor.itemsize for stride in tensor.stride())


def _rows_dense(tensor: Tensor | None) -> Any:
    """``tensor``, its last dimension without gaps."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _flags(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else reset.contiguous().view(torch.uint8)


def _parameters(weights: tuple[Weights, ...], compute: torch.dtype, forward: bool) -> dict[object, Tensor | None]:
    """The weights as the jobs read them, by (name, direction): contiguous, in the compute dtype."""
    named: dict[object, Tensor | None] = {}
    for direction, parameters in enumerate(weights):
        for name, weight in zip(Weights._fields, parameters, strict=True):
            if weight is not None and name == "weight_hr" and forward:
                weight = weight.T
            if weight is not None and (weight.dtype != compute or not weight.is_contiguous()):
                weight = weight.detach().to(compute).contiguous()
            named[name, direction] = weight
    return named


@process.one_torch_thread
def forward(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: tuple[Weights, ...],
    rows: Rows,
    *,
    reset: Tensor | None = None,
    save: bool = False,
    cells: bool = False,
) -> Forward:
    """See the contract."""
    x, h_0, c_0, flags = _rows_dense(input), _rows_dense(h_0), _rows_dense(c_0), _flags(reset)
    kind, kernels, count = Kind.of(x, weights, rows), kernels_of(x.dtype), len(weights)
    output = rows.new(x, count * kind.width, zero=False)
    h_n, c_n = x.new_empty((count, kind.batch, kind.width)), x.new_empty((count, kind.batch, kind.hidden))
    padded = kernels.block.padded(kind.hidden)
    kept = [buffers.take(rows.room * padded, kernels.compute) for _ in range(count * (save or cells))]
    gates = [buffers.take(rows.room * 4 * padded, x.dtype) for _ in range(count * save)]
    available = threads.available(kind.threads(rows.total))
    given = ForwardGiven(_strides(x), _strides(output), _strides(flags), _strides(h_0), _strides(c_0), save, bool(kept))
    layout = layout_of(lay_forward, kind, rows, available, given)
    tensors: dict[object, Any] = {
        "x": x, "y": output, "reset": flags, "h_0": h_0, "c_0": c_0, "h_n": h_n, "c_n": c_n,
        **_parameters(weights, kernels.compute, forward=True),
        **_by_direction("gates", gates), **_by_direction("cells", kept),
    }  # fmt: skip
    layout.run(kernels.forward(), tensors)
    return Forward(
        output, h_n, c_n, _cells_out(rows, kind, padded, kept, output) if cells else None,
        (*gates, *kept) if save else (),
    )  # fmt: skip


def _by_direction(name: str, each: Iterable[Any]) -> dict[object, Any]:
    return {(name, direction): one for direction, one in enumerate(each)}


def _flat_index(rows: Rows) -> Tensor | None:
    """Where row n of the internal order lies in a padded tensor flattened to (T * B, ·); None: at n."""
    if rows.batch_sizes is None or rows.packed:
        return None
    t, r = (torch.arange(rows.batch, device="cpu") < rows.batch_sizes[:, None]).nonzero(as_tuple=True)
    return t * rows.batch + (r if rows.order is None else rows.order[r])


def _cells_out(rows: Rows, kind: Kind, padded: int, kept: list[Tensor], like: Tensor) -> Tensor:
    """Every c_t, from the internal order into a new tensor of the user's rows."""
    hidden, index = kind.hidden, _flat_index(rows)
    cells = rows.new(like, len(kept) * hidden, kept[0].dtype)
    for direction, internal in enumerate(kept):
        values = internal.view(-1, padded)[: rows.total, :hidden]
        target = cells[..., direction * hidden : (direction + 1) * hidden]
        if index is not None:
            target[index // rows.batch, index % rows.batch] = values
        else:
            target.copy_(values.view(*rows.shape, hidden) if rows.packed else values.unflatten(0, rows.shape))
    return cells


def _cells_in(rows: Rows, kind: Kind, padded: int, grad_cells: Tensor, compute: torch.dtype) -> list[Tensor]:
    """The gradients of every c_t in the internal order, (N, H') for each direction."""
    hidden, index, result = kind.hidden, _flat_index(rows), []
    for direction in range(kind.directions):
        values = grad_cells[..., direction * hidden : (direction + 1) * hidden]
        if index is not None:
            values = values[index // rows.batch, index % rows.batch]
        internal = torch.zeros((rows.total, padded), dtype=compute, device="cpu")
        internal[:, :hidden] = values.reshape(rows.total, hidden)
        result.append(internal)
    return result


@process.one_torch_thread
def backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    *,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: tuple[Weights, ...],
    output: Tensor,
    saved: tuple[Tensor, ...],
    rows: Rows,
    reset: Tensor | None = None,
    needs: Needs = Needs(),  # noqa: B008 (immutable)
    norms: bool = False,
    gate_rows: int = 0,
) -> Gradients:
    """See the contract."""
    x, y, dy, h_0, c_0, dh_n, dc_n = map(_rows_dense, (input, output, grad_output, h_0, c_0, grad_h_n, grad_c_n))
    kind, kernels, count, flags = Kind.of(x, weights, rows), kernels_of(x.dtype), len(weights), _flags(reset)
    saved = tuple(each.contiguous() for each in saved)  # a saved-tensors hook may have brought them
    padded = kernels.block.padded(kind.hidden)
    dx = [rows.new(x, kind.inputs, zero=False) for _ in range(count * needs.input)]
    grad_h = x.new_empty((count, kind.batch, kind.width)) if needs.h_0 else None
    grad_c = x.new_empty((count, kind.batch, kind.hidden)) if needs.c_0 else None
    squares = [_no_squares(kind, kernels.block) for _ in range(count * norms)]
    dcells = [] if grad_cells is None else _cells_in(rows, kind, padded, grad_cells, kernels.compute)
    available = threads.available(kind.threads(rows.total))
    given = BackwardGiven(
        _strides(x), _strides(y), _strides(flags), _strides(h_0), _strides(c_0), _strides(dx[0] if dx else None),
        _strides(dy), _strides(dh_n), _strides(dc_n), bool(dcells), needs, norms,
    )  # fmt: skip
    layout = layout_of(lay_backward, kind, rows, available, given)
    gradients = [_new_gradients(parameters, kernels.compute, needs) for parameters in weights]
    tensors: dict[object, Any] = {
        "x": x, "y": y, "dy": dy, "reset": flags, "h_0": h_0, "c_0": c_0, "dh_n": dh_n, "dc_n": dc_n,
        "grad_h": grad_h, "grad_c": grad_c, **_parameters(weights, kernels.compute, forward=False),
        **_by_direction("gates", saved[:count]), **_by_direction("cells", saved[count:]),
        **_by_direction("dx", dx), **_by_direction("norms", squares), **_by_direction("dcells", dcells),
        **{(f"grad of {name}", d): g for d, each in enumerate(gradients) for name, g in each._asdict().items()},
    }  # fmt: skip
    layout.run(kernels.backward(), tensors)
    if len(dx) == 2:
        dx[0] += dx[1]
    return Gradients(
        dx[0] if dx else None,
        grad_h,
        grad_c,
        tuple(_as_given(each, parameters) for each, parameters in zip(gradients, weights, strict=True)),
        _magnitudes(rows, kernels, squares) if norms else None,
        _gate_statistics(rows, kind, kernels, saved[:count], gate_rows) if gate_rows else None,
    )


def _new_gradients(parameters: Weights, compute: torch.dtype, needs: Needs) -> WeightGradients:
    """Tensors for the weight gradients in the compute dtype."""
    if not needs.weights:
        return WeightGradients()
    shapes = [None if w is None else w.shape for w in parameters]
    if shapes[-1] is not None:
        shapes[-1] = shapes[-1][::-1]  # weight_hr's comes transposed
    return WeightGradients(*(None if s is None else torch.empty(s, dtype=compute, device="cpu") for s in shapes))


def _as_given(gradients: WeightGradients, parameters: Weights) -> WeightGradients:
    """``gradients`` in the shapes and the dtypes of the weights."""
    pairs = zip(gradients, parameters, strict=True)
    found = WeightGradients(*(g if g is None or w is None or g.dtype == w.dtype else g.to(w.dtype) for g, w in pairs))
    return found if found.weight_hr is None else found._replace(weight_hr=found.weight_hr.T)


def _no_squares(kind: Kind, block: tiling.Block) -> np.ndarray:
    """Zeros for the sums of squares of one direction, (2, T * B, ·); rows that have ended stay so."""
    blocks = ceil_div(ceil_div(max(kind.hidden, kind.width), block.lanes), NORM_PANELS)
    rows = kind.steps * kind.batch
    squares = buffers.take(2 * rows * blocks, torch.float64).numpy().reshape(2, rows, blocks)
    squares.fill(0)  # NumPy's: torch's would wait for ever in a forked child
    return squares


def _magnitudes(rows: Rows, kernels: Any, squares: list[np.ndarray]) -> Tensor:
    """(2, D, T, B) norms from the partial sums of squares (2, T * B, ·) of each direction."""
    each = torch.empty((len(squares), 2, rows.steps * rows.batch), dtype=kernels.compute, device="cpu")
    kernel = kernels.norms()
    for direction, of_direction in enumerate(squares):
        kernel(each[direction].numpy(), of_direction)
    norms = each.view(len(squares), 2, rows.steps, rows.batch).transpose(0, 1)
    if rows.order is None:
        return norms
    return torch.empty_like(norms).index_copy_(-1, rows.order, norms)


def _gate_statistics(rows: Rows, kind: Kind, kernels: Any, gates: tuple[Tensor, ...], wanted: int) -> GateStatistics:
    sizes = None if rows.batch_sizes is None else np.ascontiguousarray(rows.batch_sizes.numpy(), np.int64)
    starting = rows.batch if sizes is None else int(sizes[0])
    starts = None if sizes is None else starts_of(sizes)
    return statistics(
        kernels.statistics(), gates, np.array(sampled_rows(starting, wanted)), sizes, starts,
        rows.steps, rows.batch, kind.hidden, kernels.block.lanes,
    )  # fmt: skip

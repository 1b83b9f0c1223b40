"""The Numba backend of the contract: host code, from tensors to launches and back.

Tensors are allocated in ``tensors.py``; the kernels' arguments are prepared once per kind of call (``prepare.py``).
A call then runs three launches: jobs that pack the weights and read the states (``jobs.py``), one launch per direction
and part of the batch, in parallel where threads allow, and jobs that write the states and the weight gradients.

T time, B batch, N tokens: (step, row) pairs, I input, H hidden, P projection (or H), D directions, H' and P' padded to
whole vectors.
"""

from __future__ import annotations

from torch import Tensor

from ..contract import Call, Forward, Gradients, GradOutputs, Layer, Needs
from . import buffers, process, threads
from .prepare import prepare_backward, prepare_forward, prepared_for
from .problem import DTYPES, kernels_of, threads_for
from .segments import Segmented
from .statistics import Statistics
from .tensors import BackwardTensors, ForwardTensors, Named, by_direction, saves
from .wavefront import backward_stack, forward_stack, stacks

__all__ = ["backward", "backward_stack", "forward", "forward_stack", "prewarm", "saves", "stacks", "supports"]


def supports(layer: Layer) -> str | None:
    """None if this backend runs ``layer``; else what is missing."""
    if layer.device.type != "cpu":
        return f"the Numba kernels run on the CPU, the tensors are on {layer.device.type!r}"
    if layer.dtype not in DTYPES:
        return f"the Numba kernels compute float32, float64, bfloat16 and float16, not {layer.dtype}"
    return None


def prewarm(layer: Layer, *, training: bool) -> None:
    """Compiles, or loads from the disk cache, the kernels that ``layer`` will use."""
    kernels = kernels_of(layer.dtype)
    kernels.jobs()
    kernels.forward()
    if training:
        kernels.backward()
    threads.prewarm()


@process.one_torch_thread
def forward(call: Call, *, save: bool = False, cells: bool = False) -> Forward:
    """See the contract."""
    tensors = ForwardTensors.of(call, save, cells)
    available = threads.available(threads_for(call.layer, call.rows.total))
    prepared = prepared_for(prepare_forward, call, available, tensors.form)
    prepared.run([kernels_of(call.layer.dtype).forward()], tensors.named)
    return tensors.result(cells)


@process.one_torch_thread
def backward(call: Call, grads: GradOutputs, output: Tensor, saved: tuple[Tensor, ...], needs: Needs) -> Gradients:
    """See the contract."""
    layer, kernels = call.layer, kernels_of(call.layer.dtype)
    tensors = BackwardTensors.of(call, grads, output, saved, needs)
    available = threads.available(threads_for(layer, call.rows.total))
    prepared = prepared_for(prepare_backward, call, available, tensors.form)
    statistics = None
    if needs.gate_rows:
        statistics = Statistics(kernels.statistics(), kernels.block.lanes, call, needs.gate_rows)
    if isinstance(prepared, Segmented):
        _run_segments(prepared, tensors.named, statistics)
    else:
        prepared.run([kernels.backward()], tensors.named)
        if statistics is not None:
            for direction in range(layer.directions):
                statistics.add(direction, tensors.named["gates", direction].data_ptr(), 0, layer.steps)
    return tensors.result(None if statistics is None else statistics.result())


def _run_segments(prepared: Segmented, named: Named, statistics: Statistics | None) -> None:
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

    named |= {**by_direction("gates", gates), **by_direction("cells", cells)}
    prepared.run([kernels.forward(), kernels.backward()], named, None if statistics is None else each)

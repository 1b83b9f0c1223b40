"""Layers of a stack at once: a wavefront over ranges of steps.

Where one layer cannot occupy the threads (one row, or so few that dividing them gains little), layer l computes a range
of steps while layer l + 1 computes the range before it, and in backward the range after it.  Each (layer, range) is a
launch of one member; a thread takes every n-th of them in the order of the wave, and waits for those that its own
continues or reads (``sync.my_turn``).  No sum changes, so the bits are those of one layer after the other.

T time, B batch, L layers, H hidden, P projection (or H).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..contract import Call, Forward, Gradients, GradOutputs, Layer, Needs
from ..integers import ceil_div
from . import process, threads, tiling
from .prepare import (
    BackwardForm,
    ForwardForm,
    backward_stage,
    forward_stage,
    prepare_backward,
    prepare_forward,
    prepared_for,
)
from .prepared import LINE, Jobs, Prepared, Stage
from .problem import Problem, kernels_of, threads_for, threads_worth_of
from .tensors import BackwardTensors, ForwardTensors, Named

# As measured on an AMD EPYC with AVX-512, two threads.
RANGES = 8  # per layer, at most: so many that the wave rises and falls in little time
SHORTEST = 16  # steps of a range in forward
GAIN = 0.85  # of the time of one layer after the other: the most that a wavefront may take by the model
MOST_LAYERS = 32  # of a wavefront: its arguments grow with their square, and an address names one of some 2000 buffers
START = 200_000.0  # nanoseconds that a wavefront takes beside its steps: many launches, threads to wake


@functools.lru_cache(maxsize=1024)
def _range(layer: Layer, num_layers: int, backward: bool) -> int:
    """Steps of a range; in backward whole chunks, because a chunk's dx is complete when its first step is done."""
    most = RANGES * num_layers
    if not backward:
        return max(SHORTEST, ceil_div(layer.steps, most))
    chunk = _plan(layer, 1, backward).chunk
    return chunk * ceil_div(ceil_div(layer.steps, chunk), most)


def _plan(layer: Layer, available: int, backward: bool) -> tiling.Plan:
    kernels = kernels_of(layer.dtype)
    return tiling.plan(
        layer.steps, layer.batch, layer.hidden_size, layer.width, layer.input_size, kernels.block, kernels.size,
        available, backward,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _worth(layer: Layer, num_layers: int, available: int, backward: bool) -> bool:
    """Whether a wavefront takes less time than one layer after the other, by the model of a step."""
    workers = min(num_layers, available)
    if workers < 2 or num_layers > MOST_LAYERS or layer.ragged or layer.directions > 1 or layer.segment:
        return False
    kernels = kernels_of(layer.dtype)
    core = tiling.this_core(kernels.products)
    sizes = layer.hidden_size, layer.width, layer.input_size, kernels.block, kernels.size
    if backward and tiling.parts(layer.batch, *sizes, 1) > 1:
        return False  # parts run side by side already

    def time(row_groups: int, unit_groups: int) -> float:
        hidden, depth, inputs, block, size = sizes
        return tiling.shared_step_time(
            layer.batch, hidden, depth, inputs, row_groups, unit_groups, block, size, core
        )  # fmt: skip

    plan = _plan(layer, available, backward)
    ranges = ceil_div(layer.steps, _range(layer, num_layers, backward))
    wave = time(1, 1) * num_layers / workers * (ranges + num_layers - 1) / ranges + START / layer.steps
    return wave < GAIN * num_layers * time(plan.row_groups, plan.unit_groups)


def stacks(layer: Layer, num_layers: int) -> bool:
    """See the contract; ``layer``: the second of the stack, which the later ones are like.

    In training it depends on the sizes alone, and each pass decides by the threads that there are: a checkpoint, which
    may compute forward again on another number of threads, has to find the same tensors saved.
    """
    total = layer.steps * layer.batch
    if not layer.training:
        return _worth(layer, num_layers, threads_for(layer, total), False)
    most = min(num_layers, threads_worth_of(layer, total))
    return any(_worth(layer, num_layers, each, back) for each in range(2, most + 1) for back in (False, True))


@process.one_torch_thread
def forward_stack(calls: Sequence[Call], *, save: bool = False) -> list[Forward]:
    """See the contract."""
    tensors: list[ForwardTensors] = []
    for call in calls:
        tensors.append(ForwardTensors.of(call._replace(input=tensors[-1].output) if tensors else call, save))
    _run(tensors, backward=False)
    return [each.result() for each in tensors]


@process.one_torch_thread
def backward_stack(
    calls: Sequence[Call],
    grads: Sequence[GradOutputs],
    results: Sequence[Forward],
    needs: Sequence[Needs],
) -> list[Gradients]:
    """See the contract."""
    tensors: list[BackwardTensors] = []
    for call, grad, result, need in reversed(list(zip(calls, grads, results, needs, strict=True))):
        if tensors:
            grad = grad._replace(output=tensors[0].dx[0])
        tensors.insert(0, BackwardTensors.of(call, grad, result.output, result.saved, need))
    _run(tensors, backward=True)
    return [each.result() for each in tensors]


def _run(tensors: Sequence[ForwardTensors | BackwardTensors], *, backward: bool) -> None:
    """Runs the kernels of a pass, as a wavefront if that is worth it."""
    layers, forms = tuple(each.call.layer for each in tensors), tuple(each.form for each in tensors)
    available = threads.available(threads_for(layers[-1], layers[0].steps * layers[0].batch))
    kernels = kernels_of(layers[0].dtype)
    kernel = kernels.backward() if backward else kernels.forward()
    if _worth(layers[-1], len(layers), available, backward):
        named: Named = {(index, name): each for index, own in enumerate(tensors) for name, each in own.named.items()}
        _wavefront(layers, forms, min(available, len(layers)), backward).run([kernel], named)
        return
    for own in reversed(tensors) if backward else tensors:
        _alone(own, available, backward).run([kernel], own.named)


@functools.lru_cache(maxsize=128)
def _wavefront(
    layers: tuple[Layer, ...], forms: tuple[ForwardForm | BackwardForm, ...], workers: int, backward: bool
) -> _Wavefront:
    whole = Problem(layers[0], None, workers)
    before, after, stages, problems = Jobs(whole), Jobs(whole), list[Stage](), list[Problem]()
    for index, (layer, form) in enumerate(zip(layers, forms, strict=True)):
        own = Problem(layer, None, 1, whole, index)
        first, last = Jobs(own), Jobs(own)
        stage: Callable[..., Stage] = backward_stage if backward else forward_stage
        stages.append(stage(own, form, first, last))
        before.extend(first)
        after.extend(last)
        problems.append(own)
    if backward:
        stages.reverse()
    steps = _range(layers[-1], len(layers), backward)
    progress = whole.buffers.reserve(progress=8 * LINE * len(layers))["progress"]
    before.clear(progress, 8 * LINE * len(layers))
    return _Wavefront(whole, before, [_waves(stages, layers[0].steps, steps, progress, backward)], after, problems)


class _Wavefront(Prepared):
    """The arguments of a wavefront; it owns the problems of its layers, whose tables they point to."""

    def __init__(
        self, problem: Problem, before: Jobs, stages: Sequence[Stage], after: Jobs, problems: Sequence[Problem]
    ) -> None:
        super().__init__(problem, before, stages, after)
        self.problems = problems


def _waves(stages: Sequence[Stage], total: int, steps: int, progress: int, backward: bool) -> Stage:
    """The launches of all layers, in the order in which they may run; ``stages``: of one each, in that order."""
    ranges, names = ceil_div(total, steps), stages[0].names
    order, turn = np.divmod(np.arange(len(stages) * ranges), ranges)
    waves = np.lexsort((order, order + turn))  # each depends on launches of the wave before its own
    order, turn = order[waves], turn[waves]
    structs = np.concatenate([stage.structs for stage in stages])[order]

    def column(name: str) -> np.ndarray:
        return structs[:, names.index(name)]

    first = (ranges - 1 - turn if backward else turn) * steps
    column("first")[:], column("last")[:], column("turn")[:] = first, np.minimum(first + steps, total), turn
    column("done")[:] = progress + 8 * LINE * order
    column("done_before")[:] = np.where(order > 0, progress + 8 * LINE * (order - 1), 0)
    return Stage(structs, names, 1)


def _alone(tensors: Any, available: int, backward: bool) -> Prepared:
    return prepared_for(prepare_backward if backward else prepare_forward, tensors.call, available, tensors.form)

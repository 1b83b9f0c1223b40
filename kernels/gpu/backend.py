"""The Triton backend of the contract: its functions, over one pass (``passes.py``) or several (``segments.py``).

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
from dataclasses import replace

import torch
from torch import Tensor

from ..contract import Call, Forward, Gradients, GradOutputs, Kernels, Layer, Needs, Rows, Weights
from . import launch, segments, status
from .device import INTERPRETED
from .device_lengths import admitted, in_range
from .passes import Pass

# Of float32, relative: TF32 keeps ten bits and cuts off the others.  Three of its products keep twice as many; what is
# left is the order of sums of up to 4H terms, in accumulators that cut off too.
ROUNDING = {"tf32": 2.0**-10, "float32": 2.0**-18}
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
    """See the contract: the gates, the cells, and with a projection m = o tanh(c); with segments what enters each."""
    if layer.segment:
        return segments.saves(layer)
    D, H = layer.directions, layer.hidden_size
    shapes = [((D, room, layer.gates), layer.dtype), ((D, room, H), torch.float32), ((room, D * H), layer.dtype)]
    return shapes if layer.projected else shapes[:2]


def describe(layer: Layer) -> str:
    """The designs that such a layer would run, as text for users."""
    again = ""
    if layer.segment:
        steps = min(layer.segment, layer.steps)
        again = f"; one direction after the other, by segments of {steps} steps that backward computes again"
        layer = segments.one_direction(layer)
    designs = [launch.design_of(layer, backward) for backward in (False, True)[: 1 + layer.training]]
    said = [
        f"{each}, one launch per step (the device refused one for all)" if launch.stepwise(each, layer.device) else each
        for each in designs
    ]
    return "; ".join(f"{name} {each}" for name, each in zip(("forward", "backward"), said, strict=False)) + again


def kernels(layer: Layer) -> Kernels:
    """See the contract.  How many groups of rows there are is no constant of a kernel, nor is the number of tiles.

    But one tile and several are told apart: what a program keeps from one to the next is right or wrong with several.
    """
    precision = launch.precision_of(layer.dtype)
    one = segments.one_direction(layer) if layer.segment else layer
    designs = [launch.design_of(one, backward) for backward in (False, True)[: 1 + layer.training]]
    same = tuple(replace(each, rows=0, groups=0, tiles=min(each.tiles, 2), step_time=0.0) for each in designs)
    rounding = torch.finfo(layer.dtype).eps if precision == "16" else ROUNDING[precision]
    return Kernels((layer.dtype, layer.hidden_size, precision, same), rounding)


def settle(device: torch.device) -> None:
    """See the contract."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    status.raise_pending(device)


def prewarm(layer: Layer, *, training: bool) -> None:
    """See the contract: compiles by running two steps of zeros."""
    with torch.no_grad():
        make = functools.partial(torch.zeros, device=layer.device, dtype=layer.dtype)
        named = zip(layer.weight_names, map(make, layer.weight_shapes), strict=True)
        weights = (Weights(**dict(named)),) * layer.directions
        sizes = torch.full((2,), layer.batch)
        rows = Rows.from_packed(sizes) if layer.ragged else Rows(2, layer.batch)
        x = make((*rows.shape, layer.input_size))
        call = Call.of(x, None, None, weights, rows, None, training, layer.segment)
        result = forward(call, save=training)
        if training:
            backward(call, GradOutputs(result.output, None, None), result.output, result.saved, Needs())


def forward(call: Call, *, save: bool = False, cells: bool = False) -> Forward:
    """See the contract."""
    word, call = status.raise_pending(call.layer.device), admitted(call)
    if save and call.layer.segment:
        return segments.forward(call, cells, word)
    this = Pass.of(call, word)
    recurred = this.recur(keep=save or cells)
    result = this.returned(recurred, cells)
    return result._replace(c_n=result.c_n.to(call.layer.dtype), saved=this.saved(recurred) if save else ())


def backward(call: Call, grads: GradOutputs, output: Tensor, saved: tuple[Tensor, ...], needs: Needs) -> Gradients:
    """See the contract."""
    word, (call, _) = status.raise_pending(call.layer.device), in_range(call)
    saved = tuple(each.contiguous() for each in saved)  # a saved-tensors hook may have replaced them
    if call.layer.segment:
        return segments.backward(call, grads, output, saved, needs, word)
    this = Pass.of(call, word)
    result = this.gradients(grads, output, saved, needs)
    return result._replace(
        c_0=None if result.c_0 is None else result.c_0.to(call.layer.dtype),
        gates=this.statistics(saved[0], this.flat.sample(needs.gate_rows)) if needs.gate_rows else None,
    )

"""The autograd Function of one layer, one or both directions.

T time, B batch, N tokens: (step, row) pairs, I input, H hidden, P projection (H without one), D directions.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from lstmcore import backends, guards, recording, transforms
from lstmcore.backends import REFERENCE, REGISTRY, reference
from lstmcore.guards import Kept
from lstmcore.kernels.contract import Call, GradOutputs, Layer, Needs, Rows


class _Run(NamedTuple):
    """How a call is run, and those of its arguments that are not tensors."""

    layer: Layer
    rows: Rows
    backend: str
    cells: bool
    source: recording.Source | None


def layer(
    backend: str, call: Call, cells: bool = False, source: recording.Source | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(output, h_n, c_n, cells) of one layer; with a graph only if autograd needs one."""
    entry, rows = REGISTRY[backend], call.rows
    sized = rows.total and call.layer.input_size and call.layer.hidden_size
    # autograd's own graph of the plain loop cannot be recorded
    plain = not (entry.fused or call.layer.segment) and (source is None or not recording.watched(source.module()))
    if plain or not sized:  # kernels need every size to be at least 1
        kernels = backends.load(backend if plain else REFERENCE)
        return kernels.forward(call, cells=cells)[:4]
    if rows.lengths is not None and not entry.device_lengths:
        rows = rows.on_host()
        call = call._replace(rows=rows)
    given = call.tensors
    tensors = guards.plain(given)
    guards.in_memory(tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Layer.apply(_Run(call.layer, rows, backend, cells, source), *tensors)
    if tensors is not given:
        call = Call.with_tensors(call.layer, rows, tensors)
    return backends.load(backend).forward(call, save=False, cells=cells)[:4]


class _Layer(Function):
    """One layer on a backend's kernels; differentiated twice, through the reference."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        call = Call.with_tensors(run.layer, run.rows, tensors)
        try:
            result = backends.load(run.backend).forward(call, save=True, cells=run.cells)
        except (MemoryError, RuntimeError) as error:
            if (advised := with_advice(error, run.layer)) is None:
                raise
            raise advised from error
        ctx.run, ctx.inputs = run, len(tensors)
        ctx.save_for_backward(*tensors, result.output, *result.saved)
        ctx.sizes = [(each.shape, each.dtype) for each in result.saved]
        ctx.set_materialize_grads(False)  # an unused output has no gradient, and costs nothing
        return result[:4]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if not torch._C._is_any_autocast_enabled():
            return _backward(ctx, GradOutputs(*grads))
        with torch.autocast(ctx.run.layer.device.type, enabled=False):
            return _backward(ctx, GradOutputs(*grads))


def with_advice(error: MemoryError | RuntimeError, layer: Layer) -> Exception | None:
    """The error of a forward that has no memory for what backward needs, with what would help; None for others."""
    text = str(error)
    if layer.segment or not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate" in text):
        return None
    return type(error)(
        f"{text}\nThere is no memory for what backward needs of {layer.steps} steps, {layer.batch} rows and "
        f"{layer.hidden_size} units: with recompute='auto' it keeps the states between segments of steps instead"
    )


def _backward(ctx: Any, grads: GradOutputs) -> tuple[Tensor | None, ...]:
    run: _Run = ctx.run
    # a saved-tensors hook may return a view with a pending negation
    kept = guards.plain(ctx.saved_tensors)
    call, output, saved = (
        Call.with_tensors(run.layer, run.rows, kept[: ctx.inputs]),
        kept[ctx.inputs],
        kept[ctx.inputs + 1 :],
    )
    wanted = ctx.needs_input_grad[2:]  # after the run and reset: input, h_0, c_0, the weights
    needs = Needs(wanted[0], wanted[1], wanted[2], any(wanted[3:]))
    if torch._C._are_functorch_transforms_active():  # vmap over a backward
        found = transforms.of_saved(run.backend, call, grads, needs, (output, *saved))
        return None, None, *found
    watching = recording.watchers(run.source)
    # create_graph=True: the gradient itself has to be differentiable; is_grads_batched=True: grads have no storage
    plain = torch.is_grad_enabled() or not all(grad is None or torch._C._has_storage(grad) for grad in grads)
    if not plain:
        grads = GradOutputs(*guards.plain(grads))
        if torch._C._len_torch_dispatch_stack() and not watching:  # a mode that came after forward sees an operator
            return None, None, *transforms.of_saved(run.backend, call, grads, needs, (output, *saved))
    guards.layer(call, Kept(output, () if plain else grads, saved, ctx.sizes))
    kernels = reference if plain else backends.load(run.backend)
    if watching:
        needs = needs._replace(norms=True, gate_rows=max(watcher.gate_rows for watcher in watching))
    # what another backend saved says nothing to the reference, which computes forward again
    result = kernels.backward(call, grads, output, () if plain else tuple(saved), needs)
    if watching and run.source is not None:
        recording.show(watching, run.source, run.rows, result.norms, result.gates, grads[:3])
    return None, None, result.input, result.h_0, result.c_0, *chain.from_iterable(result.weights)

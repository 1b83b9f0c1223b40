"""The autograd Function of a stack of layers that a backend runs at once; the results of one layer after the other.

T time, B batch, I input, H hidden, P projection (H without one), L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from lstmcore import autograd, backends, guards, recording, transforms
from lstmcore.backends import REGISTRY, reference
from lstmcore.guards import Kept
from lstmcore.kernels.contract import (
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

Results = tuple[Tensor, Tensor, Tensor]  # output (T, B, P), h_n (L, B, P), c_n (L, B, H)
_OF_LAYER = 2 + len(Weights._fields)  # tensors: h_0, c_0, the weights field by field


def at_once(backend: str, layer: Layer, num_layers: int, rows: Rows) -> bool:
    """Whether the backend of this name runs such a stack at once; ``layer``: the first."""
    if num_layers == 1 or layer.directions > 1 or layer.segment or rows.ragged or not REGISTRY[backend].fused:
        return False
    stacks = getattr(backends.load(backend), "stacks", None)
    return stacks is not None and bool(rows.total) and layer.input_size > 0 and stacks(layer.after(), num_layers)


class _Run(NamedTuple):
    """How a stack is run, and those of its arguments that are not tensors."""

    layers: tuple[Layer, ...]
    rows: tuple[Rows, ...]  # the same, but for the layout of the last output
    backend: str
    sources: tuple[recording.Source | None, ...]

    def calls(self, tensors: Sequence[Tensor | None], outputs: Sequence[Tensor | None]) -> list[Call]:
        """The calls of all layers from reset, input and the tensors of each; ``outputs``: of all but the last."""
        reset, input, *rest = tensors
        calls = []
        for index, (layer, rows, x) in enumerate(zip(self.layers, self.rows, (input, *outputs), strict=True)):
            h_0, c_0, *weights = rest[index * _OF_LAYER : (index + 1) * _OF_LAYER]
            calls.append(Call(layer, rows, x, h_0, c_0, (Weights(*weights),), reset))  # type: ignore[arg-type]
        return calls

    def forward(self, tensors: Sequence[Tensor | None], save: bool) -> list[Forward]:
        calls = self.calls(tensors, (None,) * (len(self.layers) - 1))
        return backends.load(self.backend).forward_stack(calls, save=save)


def layers(backend: str, calls: Sequence[Call], sources: Sequence[recording.Source | None]) -> Results:
    """A stack with a graph if autograd needs one; ``input`` of all calls but the first is not read."""
    run = _Run(tuple(call.layer for call in calls), tuple(call.rows for call in calls), backend, tuple(sources))
    first = calls[0]
    given = [first.reset, first.input]
    for call in calls:
        given += [call.h_0, call.c_0, *call.weights[0]]
    tensors = guards.plain(tuple(given))
    guards.in_memory(tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Stack.apply(run, *tensors)
    return _joined(run.forward(tensors, save=False))


def _joined(results: Sequence[Forward]) -> Results:
    return results[-1].output, torch.cat([each.h_n for each in results]), torch.cat([each.c_n for each in results])


class _Stack(Function):
    """A stack on a backend's kernels; differentiated twice, through the reference."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor | None) -> Results:
        try:
            results = run.forward(tensors, save=True)
        except (MemoryError, RuntimeError) as error:
            if (advised := autograd.with_advice(error, run.layers[-1])) is None:
                raise
            raise advised from error
        ctx.run, ctx.inputs = run, len(tensors)
        outputs = [each.output for each in results]
        ctx.save_for_backward(*tensors, *outputs, *(saved for each in results for saved in each.saved))
        ctx.sizes = [[(saved.shape, saved.dtype) for saved in each.saved] for each in results]
        ctx.set_materialize_grads(False)  # an unused output has no gradient, and costs nothing
        return _joined(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if not torch._C._is_any_autocast_enabled():
            return _backward(ctx, grads)
        with torch.autocast(ctx.run.layers[0].device.type, enabled=False):
            return _backward(ctx, grads)


def _backward(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    run: _Run = ctx.run
    kept = guards.plain(ctx.saved_tensors)  # a saved-tensors hook may return a view with a pending negation
    tensors, count = kept[: ctx.inputs], len(run.layers)
    needs = _needs(ctx.needs_input_grad[2:], count)
    if torch._C._are_functorch_transforms_active():  # vmap over a backward
        return None, None, *_transformed(run, tensors, grads, needs)
    plain = torch.is_grad_enabled() or not all(grad is None or torch._C._has_storage(grad) for grad in grads)
    watching = [recording.watchers(source) for source in run.sources]
    found: list[Gradients] = []
    if any(watching) or not plain:
        back = _Back.of(ctx, kept, grads if plain else guards.plain(grads), needs)
        if any(watching):
            found = back.observed(run, watching, plain)
        elif torch._C._len_torch_dispatch_stack():  # a mode that came after forward sees operators
            found = back.by_operators(run)
        else:
            found = backends.load(run.backend).backward_stack(*back)
    if plain:
        return None, None, *_by_reference(run, tensors, grads)
    return None, None, found[0].input if needs[0].input else None, *_flat(found)


class _Back(NamedTuple):
    """The arguments of a backend's ``backward_stack``."""

    calls: list[Call]
    grads: list[GradOutputs]
    results: list[Forward]
    needs: list[Needs]

    @staticmethod
    def of(ctx: Any, kept: Sequence[Tensor], grads: tuple[Tensor | None, ...], needs: list[Needs]) -> _Back:
        """From what forward saved; RuntimeError where it is no longer what it was."""
        run, count = ctx.run, len(needs)
        tensors, kept = kept[: ctx.inputs], kept[ctx.inputs :]
        outputs, rest = kept[:count], iter(kept[count:])
        back = _Back(run.calls(tensors, outputs[:-1]), _of_layers(grads, count), [], needs)
        for call, output, sizes, grad in zip(back.calls, outputs, ctx.sizes, back.grads, strict=True):
            saved = tuple(next(rest) for _ in sizes)
            guards.layer(call, Kept(output, grad, saved, sizes))
            back.results.append(Forward(output, None, None, None, saved))  # type: ignore[arg-type]
        return back

    @torch.no_grad()
    def observed(self, run: _Run, watching: Sequence[Sequence[recording.Watcher]], plain: bool) -> list[Gradients]:
        """Layer by layer, which shows each to those who record it: the graph may be older than the recording."""
        kernels = reference if plain else backends.load(run.backend)
        found: list[Gradients] = []
        for call, grad, result, needs, source, own in reversed(list(zip(*self, run.sources, watching, strict=True))):
            grad = grad._replace(output=found[0].input) if found else grad
            if own:
                needs = needs._replace(norms=True, gate_rows=max(watcher.gate_rows for watcher in own))
            found.insert(0, kernels.backward(call, grad, result.output, result.saved, needs))
            if own and found[0].norms is not None:
                recording.show(own, source, call.rows, found[0].norms, found[0].gates, grad[:3])
        return found

    def by_operators(self, run: _Run) -> list[Gradients]:
        """Layer by layer, each an operator of ``ops.py``."""
        found: list[Gradients] = []
        for call, grad, result, needs in reversed(list(zip(*self, strict=True))):
            grad = grad._replace(output=found[0].input) if found else grad
            input, h_0, c_0, *weights = transforms.of_saved(
                run.backend, call, grad, needs, (result.output, *result.saved)
            )
            found.insert(0, Gradients(input, h_0, c_0, (WeightGradients(*weights),)))
        return found


def _needs(wanted: Sequence[bool], count: int) -> list[Needs]:
    """What is needed of each layer, from what is of input and of the tensors of each."""
    each = [wanted[1 + index * _OF_LAYER : 1 + (index + 1) * _OF_LAYER] for index in range(count)]
    return [Needs(wanted[0] or index > 0, own[0], own[1], any(own[2:])) for index, own in enumerate(each)]


def _of_layers(grads: tuple[Tensor | None, ...], count: int) -> list[GradOutputs]:
    """The gradients of each layer's results, as far as they come from outside the stack."""
    output, *states = grads
    of_states = [(None,) * count if state is None else state.split(1) for state in states]
    return [
        GradOutputs(output if index == count - 1 else None, h_n, c_n)
        for index, (h_n, c_n) in enumerate(zip(*of_states, strict=True))
    ]


def _flat(found: Sequence[Gradients]) -> list[Tensor | None]:
    return [grad for each in found for grad in (each.h_0, each.c_0, *each.weights[0])]


def _transformed(
    run: _Run, tensors: Sequence[Tensor | None], grads: tuple[Tensor | None, ...], needs: Sequence[Needs]
) -> list[Tensor | None]:
    """The gradients of input and of the tensors of each layer by the operators, which have every derivative.

    The layers are computed again, because what was saved between them has no graph.
    """
    calls: list[Call] = []
    for call in run.calls(tensors, (None,) * (len(run.layers) - 1)):
        if calls:
            call = call._replace(input=transforms.transformed(transforms.arguments(calls[-1], run.backend))[0])
        calls.append(call)
    result: list[Tensor | None] = []
    arrived = None
    for call, grad, need in reversed(list(zip(calls, _of_layers(grads, len(calls)), needs, strict=True))):
        used = grad if arrived is None else grad._replace(output=arrived)
        arrived, *others = transforms.of_saved(run.backend, call, used, need, ())
        result[:0] = others
    return [arrived, *result]


def _by_reference(run: _Run, tensors: Sequence[Tensor | None], grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The gradients of input and of the tensors of each layer, which have a graph of their own in grad mode."""
    reset, *rest = tensors

    def stack(*values: Tensor | None) -> Results:
        results: list[Forward] = []
        for call in run.calls((reset, *values), (None,) * (len(run.layers) - 1)):
            results.append(reference.forward(call._replace(input=results[-1].output) if results else call))
        return _joined(results)

    return reference.pull(stack, rest, grads)

"""Derivatives, autocast and ``torch.func`` transforms of the operators of ``ops.py``.

vmap over inputs, states, lengths or resets folds the mapped dimension into the batch: one call of the kernels.  Over
weights (ensembles), and for separate gradients of the weights (per-sample gradients), it calls the kernels once per
entry of the mapped dimension.  The derivative of the backward is that of the reference's, to any order.

T time, B batch, N tokens: (step, row) pairs, I input, H hidden, P projection (H without one), D directions,
V entries of a mapped dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lstmcore.backends import reference
from lstmcore.kernels.contract import Call, GradOutputs, Needs, Rows, Weights
from lstmcore.ops import BEFORE_WEIGHTS, GRADS, LIBRARY, Arguments, BackwardArguments

INPUT, H_0, C_0 = 0, 1, 2  # of the tensors of a layer


def in_graph(given: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(output, h_n, c_n, cells or None): one node in the graph of the compiler, exporter or mode that traces."""
    run: Any = torch.ops.lstmcore.layer
    if torch.compiler.is_exporting():
        given = given._replace(save=False, segment=0)  # mostly for inference; training then computes forward again
        if torch.onnx.is_in_onnx_export():  # here for inference mode, below for previously exported programs
            from lstmcore import onnx

            run = onnx.layer
    output, h_n, c_n, kept = run(*given)
    return output, h_n, c_n, kept[0] if given.cells else None


def transformed(given: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(output, h_n, c_n, cells or None), for tensors under ``torch.func`` transforms."""
    given = given._replace(save=False)
    output, h_n, c_n, *kept = _Layer.apply(given.without_tensors(), *given.tensors)
    return output, h_n, c_n, kept[0] if given.cells else None


def of_saved(
    backend: str, call: Call, grads: GradOutputs, needs: Needs, kept: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of input, h_0, c_0 and of the weights field by field, from what an eager forward saved."""
    given = arguments(call, backend)._replace(cells=grads.cells is not None)
    found = iter(_gradients(BackwardArguments(grads, needs, kept, given)))
    states = [next(found) for _ in range(3)]
    return (*states, *(None if weight is None else next(found) for each in call.weights for weight in each))


def arguments(call: Call, backend: str) -> Arguments:
    """The arguments of the operator for an eager call, whose results are saved."""
    rows, weights = call.rows, [weight for each in call.weights for weight in each if weight is not None]
    lengths = None if rows.packed or not rows.ragged else rows.row_lengths()
    return Arguments(
        call.input, call.h_0, call.c_0, call.reset, rows.batch_sizes if rows.packed else None, lengths,
        weights, rows.batch, call.layer.directions, rows.batch_first, False, True, backend, call.layer.segment,
    )  # fmt: skip


def _gradients(given: BackwardArguments) -> tuple[Tensor | None, ...]:
    """The gradients of input, h_0, c_0 and each weight, None for those that are not needed."""
    needs, weights = given.needs, len(given.of_layer.weights)
    found = iter(_Backward.apply(given.without_tensors(), weights, *given.tensors))
    states = [next(found) if want else None for want in needs[:3]]
    return (*states, *(found if needs.weights else [None] * weights))


class _Layer(Function):
    """The operator ``layer`` with its gradient."""

    @staticmethod
    def forward(plain: Arguments, *tensors: Any) -> tuple[Tensor, ...]:
        output, h_n, c_n, kept = torch.ops.lstmcore.layer(*plain.with_tensors(tensors))
        return output, h_n, c_n, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.plain, *tensors = inputs
        y, _, _, *kept = output
        saved = kept[ctx.plain.cells :]
        ctx.count = len(tensors)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # an unused output has no gradient, and costs nothing
        ctx.save_for_backward(*tensors, *((y, *saved) if ctx.plain.save else ()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        used = GradOutputs(*grads[: GRADS if ctx.plain.cells else GRADS - 1])
        if all(grad is None for grad in used):
            return (None,) * (1 + ctx.count)
        tensors, kept = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        wanted = ctx.needs_input_grad[1:]
        needs = Needs(wanted[INPUT], wanted[H_0], wanted[C_0], any(wanted[BEFORE_WEIGHTS:]))
        found = _gradients(BackwardArguments(used, needs, kept, ctx.plain.with_tensors(tensors)))
        return None, *found[:3], *[None] * (BEFORE_WEIGHTS - 3), *found[3:]

    @staticmethod
    def vmap(info: Any, in_dims: Any, plain: Arguments, *tensors: Any) -> tuple[Any, Any]:
        return _mapped_layer(_Layer.apply, info.batch_size, in_dims[1:], plain, *tensors)


class _Backward(Function):
    """The operator ``layer_backward`` with its gradient: the reference's."""

    @staticmethod
    def forward(plain: BackwardArguments, weights: int, *tensors: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ops.lstmcore.layer_backward(*plain.with_tensors(tensors, weights).pack()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.plain, ctx.weights, *tensors = inputs
        ctx.inputs = len(tensors)
        ctx.save_for_backward(*tensors[: GRADS + BEFORE_WEIGHTS + ctx.weights])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = list(ctx.saved_tensors)
        given: BackwardArguments = ctx.plain.with_tensors(tensors, ctx.weights)
        rows = given.of_layer.rows()
        at = [k for k, tensor in enumerate(tensors) if tensor is not None and tensor.is_floating_point()]

        def first(*values: Tensor) -> tuple[Tensor, ...]:
            """What ``layer_backward`` computes, as a function of all tensors that it is differentiable in."""
            own: list[Any] = [None] * len(tensors)
            for k, value in zip(at, values, strict=True):
                own[k] = value
            return _by_reference(given, own, rows)

        pull: Any = torch.func.vjp(first, *(tensors[k] for k in at))[1]
        result: list[Tensor | None] = [None] * ctx.inputs
        for k, grad in zip(at, pull(grads), strict=True):
            result[k] = grad
        return None, None, *result

    @staticmethod
    def vmap(info: Any, in_dims: Any, plain: BackwardArguments, weights: int, *tensors: Any) -> tuple[Any, Any]:
        return _mapped_backward(_Backward.apply, info.batch_size, in_dims[2:], plain, weights, *tensors)


def _by_reference(given: BackwardArguments, own: list[Any], rows: Rows) -> tuple[Tensor, ...]:
    """The gradients that ``given`` needs, computed from the tensors ``own`` in differentiable operations."""
    reset, directions, needs = given.of_layer.reset, given.of_layer.directions, given.needs
    used = [k for k in range(GRADS) if own[k] is not None]
    first_weight = GRADS + BEFORE_WEIGHTS
    wanted = {GRADS + INPUT: needs.input, GRADS + H_0: needs.h_0, GRADS + C_0: needs.c_0}
    leaves = [k for k in (*wanted, *range(first_weight, len(own))) if own[k] is not None]

    def layer(*values: Tensor) -> tuple[Tensor, ...]:
        here = list(own)
        for k, value in zip(leaves, values, strict=True):
            here[k] = value
        weights = Weights.by_direction(here[first_weight:], directions)
        x, h_0, c_0 = here[GRADS : GRADS + 3]
        call = Call.of(x, h_0, c_0, weights, rows, reset)
        result = reference.forward(call, cells=GRADS - 1 in used)
        return tuple(result[k] for k in used)  # type: ignore[misc]

    pull: Any = torch.func.vjp(layer, *(own[k] for k in leaves))[1]
    found = dict(zip(leaves, pull(tuple(own[k] for k in used)), strict=True))
    return tuple(grad for k, grad in found.items() if wanted.get(k, needs.weights))


# vmap: of the Functions, whose ``apply`` an outer transform may intercept again, and of the operators


def _mapped_layer(
    run: Callable[..., Any], V: int, dims: Sequence[int | None], plain: Arguments, *tensors: Any
) -> tuple[Any, Any]:
    # what one call saves cannot be split among the entries
    if plain.save or any(dim is not None for dim in dims[BEFORE_WEIGHTS:]):
        return _stacked([run(plain, *_entry(tensors, dims, v)) for v in range(V)])
    folded = _fold(plain.with_tensors(tensors), dims, V)
    places = (0, 1, 1, 0) if folded.packed else (1, 1, 1, 1)
    return _unfold(run(folded.without_tensors(), *folded.tensors), places, V)


def _mapped_backward(
    run: Callable[..., Any],
    V: int,
    dims: Sequence[int | None],
    plain: BackwardArguments,
    weights: int,
    *tensors: Any,
) -> tuple[Any, Any]:
    end = GRADS + BEFORE_WEIGHTS + weights
    given, needs = plain.with_tensors(tensors, weights), plain.needs
    if needs.weights or given.kept or any(dim is not None for dim in dims[GRADS + BEFORE_WEIGHTS :]):
        kept: Sequence[Tensor] = ()
        same = not given.kept and all(dim is None for dim in dims[GRADS:])  # one forward for all entries
        if same and not torch._C._are_functorch_transforms_active():
            of_layer = plain.of_layer._replace(save=True)
            output, _, _, *kept = _Layer.forward(of_layer, *tensors[GRADS:])
            kept = (output, *kept[of_layer.cells :])
        return _stacked([run(plain, weights, *_entry(tensors, dims, v), *kept) for v in range(V)])
    row = 0 if given.of_layer.packed else 1
    grads = [
        None if grad is None else _folded(grad, dim, at, V)
        for grad, dim, at in zip(given.grads, dims[:GRADS], (row, 1, 1, row), strict=True)
    ]
    folded = given._replace(grads=GradOutputs(*grads), of_layer=_fold(given.of_layer, dims[GRADS:end], V))
    results = run(folded.without_tensors(), weights, *folded.tensors)
    return _unfold(results, [at for at, want in zip((row, 1, 1), needs, strict=False) if want], V)


def _entry(tensors: Sequence[Any], dims: Sequence[int | None], v: int) -> list[Any]:
    """The tensors of entry ``v``."""
    return [each if dim is None else each.select(dim, v) for each, dim in zip(tensors, dims, strict=True)]


def _stacked(entries: list[tuple[Tensor, ...]]) -> tuple[Any, Any]:
    """The results of all entries, stacked, and their mapped dimensions."""
    results = tuple(torch.stack(each) for each in zip(*entries, strict=True))
    return results, (0,) * len(results)


def _folded(tensor: Tensor, dim: int | None, row: int, V: int) -> Tensor:
    """``tensor`` with the mapped dimension folded into its dimension ``row``: b of entry v becomes b * V + v."""
    if dim is None:
        shape = tensor.shape
        return tensor.unsqueeze(row + 1).expand(*shape[: row + 1], V, *shape[row + 1 :]).flatten(row, row + 1)
    return tensor.movedim(dim, row + 1).flatten(row, row + 1)


def _fold(given: Arguments, dims: Sequence[int | None], V: int) -> Arguments:
    """One call for all entries; ``dims``: the mapped dimension of each tensor, None for none."""
    rows = (0, 1, 1, 0, 0, 0) if given.packed else (1, 1, 1, 1, 0, 0)
    folded = [
        None if tensor is None else _folded(tensor, dim, row, V)
        for tensor, dim, row in zip(given.tensors, dims, rows, strict=False)
    ]
    result = given.with_tensors([*folded, *given.weights])._replace(batch=given.batch * V)
    return result if given.batch_sizes is None else result._replace(batch_sizes=given.batch_sizes * V)


def _unfold(results: Sequence[Tensor], rows: Sequence[int], V: int) -> tuple[Any, Any]:
    """The inverse of :func:`_folded`, and the mapped dimensions."""
    pairs = list(zip(results, rows, strict=False))
    unfolded = tuple(result.unflatten(row, (result.shape[row] // V, V)) for result, row in pairs)
    return unfolded, tuple(row + 1 for _, row in pairs)


# Registration


def _autograd_layer(keys: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    if torch.onnx.is_in_onnx_export():
        from lstmcore import onnx

        return onnx.layer(*args)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        given = Arguments(*args)
        output, h_n, c_n, *kept = _Layer.apply(given.without_tensors(), *given.tensors)
        return output, h_n, c_n, kept
    return torch.ops.lstmcore.layer.default.redispatch(keys & torch._C._after_autograd_keyset, *args)


def _autograd_backward(keys: Any, *args: Any) -> list[Tensor]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        given = BackwardArguments.unpack(args)
        return list(_Backward.apply(given.without_tensors(), len(given.of_layer.weights), *given.tensors))
    return torch.ops.lstmcore.layer_backward.default.redispatch(keys & torch._C._after_autograd_keyset, *args)


def _vmap_layer(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    given = Arguments(*args)
    flat = (*in_dims[:BEFORE_WEIGHTS], *_flat_dims(in_dims[BEFORE_WEIGHTS], given.weights))
    (output, h_n, c_n, *kept), out_dims = _mapped_layer(
        _Layer.forward, info.batch_size, flat, given.without_tensors(), *given.tensors
    )
    return (output, h_n, c_n, kept), (*out_dims[:3], list(out_dims[3:]))


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    given = BackwardArguments.unpack(args)
    grads, of_kept, of_layer = in_dims[:GRADS], in_dims[GRADS + 1], in_dims[GRADS + 2 :]
    weights = given.of_layer.weights
    of_weights = _flat_dims(of_layer[BEFORE_WEIGHTS], weights)
    dims = (*grads, *of_layer[:BEFORE_WEIGHTS], *of_weights, *_flat_dims(of_kept, given.kept))
    results, out_dims = _mapped_backward(
        _Backward.forward, info.batch_size, dims, given.without_tensors(), len(weights), *given.tensors
    )
    return list(results), list(out_dims)


def _flat_dims(dims: Any, tensors: Sequence[Tensor]) -> Sequence[int | None]:
    """The mapped dimension of each tensor of a list; None: there is none in the whole list."""
    return [None] * len(tensors) if dims is None else dims


def _autocast(device: str) -> Any:
    def layer(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Casts floating-point tensors, except float64, to autocast's dtype, as ``torch.lstm`` does."""
        dtype = torch.get_autocast_dtype(device)

        def cast(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [cast(each) for each in value]
            eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(dtype) if eligible else value

        with torch.autocast(device, enabled=False):
            return torch.ops.lstmcore.layer(*map(cast, args))

    return layer


LIBRARY.impl("layer", _autograd_layer, "Autograd", with_keyset=True)
LIBRARY.impl("layer_backward", _autograd_backward, "Autograd", with_keyset=True)
for _device in ("cpu", "cuda"):
    LIBRARY.impl("layer", _autocast(_device), f"Autocast{_device.upper()}")
torch.library.register_vmap("lstmcore::layer", _vmap_layer, lib=LIBRARY)
torch.library.register_vmap("lstmcore::layer_backward", _vmap_backward, lib=LIBRARY)

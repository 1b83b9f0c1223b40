"""One layer as ``torch.library`` operators, for everything that looks at a call instead of running it.

``torch.ops.lstmcore.layer`` and ``layer_backward`` are one node each in a graph of ``torch.compile`` or
``torch.export``: opaque to the compiler, with fake kernels that know every shape whatever the values, so that steps and
batch stay symbolic.  ``torch.func`` transforms go through the same two (:func:`transformed`).  An ordinary call does
not come through here: ``autograd.py`` has the same layer as a plain autograd Function, which costs less.

What the schema calls ``kept`` is, behind the cells where they are asked for, what forward saves for backward; without
``save`` (inference, exported graphs, transforms) nothing, and backward then computes forward anew.

vmap over inputs, states, lengths or resets folds the mapped dimension into the batch: one call of the kernels.  Over
weights (ensembles), and where the gradients of the weights are wanted one by one (per-sample gradients), it calls the
kernels once a member.  The derivative of the backward is that of the reference's, to any order.

T time, B batch, N alive rows over all steps, I input, H hidden, P projection (H where there is none), D directions,
V members of a vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from lstmcore import backends, checks, reference
from lstmcore.kernels.contract import Layer, Needs, Rows, directions_of, state_dtype

_previous: Any = vars(torch.ops.lstmcore).get("library")
if _previous is not None:  # lstmcore is imported anew, as notebooks do: what the first import registered goes
    _previous._destroy()
_LIBRARY = torch.library.Library("lstmcore", "DEF")
vars(torch.ops.lstmcore)["library"] = _LIBRARY
_INPUTS = (
    "Tensor input, Tensor? h_0, Tensor? c_0, Tensor? reset, Tensor? batch_sizes, Tensor? lengths, Tensor[] weights, "
    "SymInt batch, int directions, bool batch_first, bool cells, bool save, str backend"
)
_LIBRARY.define(f"layer({_INPUTS}) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor[] kept)")
_LIBRARY.define(
    "layer_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cells, "
    f"bool[4] needs, Tensor[] kept, {_INPUTS}) -> Tensor[]"
)


class Call(NamedTuple):
    """What is not a tensor in a call, in the order of the schema."""

    batch: int  # B; symbolic where it is dynamic
    directions: int
    batch_first: bool
    cells: bool
    save: bool
    backend: str  # "auto": as for long sequences, whatever T and B


class Tensors(NamedTuple):
    """The tensors of a call before its weights, in the order of the schema."""

    input: Tensor  # (T, B, I), or (N, I) with batch_sizes
    h_0: Tensor | None  # (D, B, P)
    c_0: Tensor | None  # (D, B, H)
    reset: Tensor | None  # (T, B) or (N,), bool
    batch_sizes: Tensor | None  # (T,) int64 on the CPU, of packed rows
    lengths: Tensor | None  # (B,), any integers, of padded rows


Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # of output, h_n, c_n, cells


# What runs


def _rows(tensors: Tensors, call: Call) -> Rows:
    if tensors.batch_sizes is not None:
        data, sizes = checks.packed(tensors.input, tensors.batch_sizes, None)
        if (len(data), sizes[0]) != (len(tensors.input), call.batch):
            raise RuntimeError(f"Expected {len(tensors.input)} rows of {call.batch} sequences, got {sizes.tolist()}")
        return Rows.from_packed(torch.from_numpy(sizes))
    steps, batch, _ = tensors.input.shape
    lengths = tensors.lengths
    if lengths is None:
        return Rows(steps, batch, batch_first=call.batch_first)
    if lengths.device.type == "cpu":
        return Rows.from_lengths(lengths, steps, call.batch_first, roomy=True)
    return Rows(steps, batch, batch_first=call.batch_first, lengths=lengths, roomy=True)


def _described(tensors: Tensors, weights: Sequence[Tensor], rows: Rows, call: Call) -> Layer:
    first = directions_of(weights, call.directions)[0]
    return Layer(
        tensors.input.device, tensors.input.dtype, rows.steps, rows.batch, tensors.input.shape[-1],
        first.weight_hh.shape[0] // 4, 0 if first.weight_hr is None else first.weight_hr.shape[0], call.directions,
        first.bias_ih is not None, rows.ragged, call.save,
    )  # fmt: skip


def _backend(tensors: Tensors, layer: Layer, call: Call) -> Any:
    """The module that a graph with this call in it is made for."""
    extended = tensors.reset is not None or tensors.lengths is not None or call.cells
    return backends.load(backends.in_graph(call.backend, layer, extended))


def _kernels(tensors: Tensors, layer: Layer, rows: Rows, call: Call) -> Any:
    """The module that runs the call: the reference where there is nothing to compute, or no kernel for these sizes."""
    kernels = _backend(tensors, layer, call)
    sized = rows.total and layer.input_size and layer.hidden_size
    return kernels if sized and kernels.supports(layer) is None else reference


def _laid_out(tensor: Tensor, rows: Rows) -> Tensor:
    """``tensor`` with the strides that the fake kernels tell."""
    if rows.packed or not rows.batch_first:
        return tensor.contiguous()
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def _unsaved(tensors: Tensors, layer: Layer, room: Any, call: Call) -> list[Tensor]:
    """New tensors of the sizes that forward saves."""
    sizes = _backend(tensors, layer, call).saves(layer, room)
    return [tensors.input.new_empty(size, dtype=dtype) for size, dtype in sizes]


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    tensors, weights, call = Tensors(*args[:6]), args[6], Call(*args[7:])
    rows = _rows(tensors, call)
    if not rows.steps:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    checks.layer(rows, *tensors[:3], weights, call.directions, tensors.reset)
    layer = _described(tensors, weights, rows, call)
    given = directions_of(weights, call.directions)
    result = _kernels(tensors, layer, rows, call).forward(
        tensors.input, tensors.h_0, tensors.c_0, given, rows, reset=tensors.reset, save=call.save, cells=call.cells
    )
    kept = [] if result.cells is None else [_laid_out(result.cells, rows)]
    if call.save:
        kept += result.saved or _unsaved(tensors, layer, rows.room, call)
    return _laid_out(result.output, rows), result.h_n.contiguous(), result.c_n.contiguous(), kept


@contextmanager
def _autograd_inside() -> Iterator[None]:
    """Lets an operator's own code use autograd, which a dispatch mode around it has switched off."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude):
        yield


def _backward(*args: Any) -> list[Tensor]:
    grads, needs, kept, tensors = args[:4], Needs(*args[4]), args[5], Tensors(*args[6:12])
    weights, call = args[12], Call(*args[13:])
    rows = _rows(tensors, call)
    layer = _described(tensors, weights, rows, call)
    output, *saved = kept or [None]
    sizes = []
    if kept:  # with room for padded steps; without, where the eager Function has run forward
        saves = _backend(tensors, layer, call).saves
        exact = [tuple(each.shape) for each in saved] == [size for size, _ in saves(layer, rows.total)]
        sizes = saves(layer, rows.total if exact else rows.room)
    checks.layer(rows, *tensors[:3], weights, call.directions, tensors.reset, output, grads, (saved, sizes))
    kernels = _kernels(tensors, layer, rows, call)
    given = directions_of(weights, call.directions)
    if not kept and kernels.saves(layer, 0):
        done = kernels.forward(
            tensors.input, tensors.h_0, tensors.c_0, given, rows, reset=tensors.reset, save=True, cells=False
        )
        output, saved = done.output, done.saved
    with _autograd_inside(), torch.no_grad():
        found = kernels.backward(
            *grads, input=tensors.input, h_0=tensors.h_0, c_0=tensors.c_0, weights=given, rows=rows,
            reset=tensors.reset, output=output, saved=tuple(saved), needs=needs,
        )  # fmt: skip
    result = [] if found.input is None else [_laid_out(found.input, rows)]
    memory = set()
    for grad in (found.h_0, found.c_0, *found.of(given)):
        if grad is not None:
            grad = grad.contiguous()
            at = grad.untyped_storage().data_ptr()
            result.append(grad.clone() if at in memory else grad)  # operators return nothing twice; ATen does
            memory.add(at)
    return result


# What a compiler sees of it: shapes, whatever the values


def _like_rows(tensors: Tensors, width: Any, dtype: torch.dtype, call: Call) -> Tensor:
    """A new tensor of the rows of ``input``: (N, width) or (T, B, width), in memory as ``Rows.new`` lays it out."""
    if tensors.batch_sizes is not None:
        return tensors.input.new_empty((tensors.input.shape[0], width), dtype=dtype)
    steps, batch, _ = tensors.input.shape
    if call.batch_first:
        return tensors.input.new_empty((batch, steps, width), dtype=dtype).transpose(0, 1)
    return tensors.input.new_empty((steps, batch, width), dtype=dtype)


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    tensors, weights, call = Tensors(*args[:6]), args[6], Call(*args[7:])
    input, packed = tensors.input, tensors.batch_sizes is not None
    width, hidden = weights[1].shape[1], weights[1].shape[0] // 4
    kept = []
    if call.cells:
        kept.append(_like_rows(tensors, call.directions * hidden, state_dtype(input.dtype), call))
    if call.save:
        room = input.shape[0] if packed else input.shape[0] * input.shape[1]
        kept += _unsaved(tensors, _described(tensors, weights, Rows(1, 1), call), room, call)
    return (
        _like_rows(tensors, call.directions * width, input.dtype, call),
        input.new_empty((call.directions, call.batch, width)),
        input.new_empty((call.directions, call.batch, hidden)),
        kept,
    )


def _fake_backward(*args: Any) -> list[Tensor]:
    needs, tensors, weights, call = Needs(*args[4]), Tensors(*args[6:12]), args[12], Call(*args[13:])
    result = []
    if needs.input:
        result.append(_like_rows(tensors, tensors.input.shape[-1], tensors.input.dtype, call))
    for tensor, wanted in ((tensors.h_0, needs.h_0), (tensors.c_0, needs.c_0), *((w, needs.weights) for w in weights)):
        if wanted:
            result.append(tensor.new_empty(tensor.shape))
    return result


# Derivatives and transforms


def in_graph(tensors: Tensors, weights: Sequence[Tensor], call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(output, h_n, c_n, cells or None): one node in the graph of whoever is looking."""
    layer: Any = torch.ops.lstmcore.layer
    if torch.compiler.is_exporting():
        call = call._replace(save=False)  # mostly for inference; a training computes forward anew
        if torch.onnx.is_in_onnx_export():  # here for inference mode, below for programs that were exported before
            from lstmcore import onnx

            layer = onnx.layer
    output, h_n, c_n, kept = layer(*tensors, list(weights), *call)
    return output, h_n, c_n, kept[0] if call.cells else None


def transformed(
    tensors: Tensors, weights: Sequence[Tensor], call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(output, h_n, c_n, cells or None), for tensors under ``torch.func`` transforms."""
    output, h_n, c_n, *kept = _Layer.apply(call._replace(save=False), *tensors, *weights)
    return output, h_n, c_n, kept[0] if call.cells else None


def gradients(
    grads: Grads,
    needs: Sequence[bool],  # of the tensors and the weights
    kept: Sequence[Tensor],  # output and what forward saved; nothing: it is computed anew
    tensors: Tensors,
    weights: Sequence[Tensor],
    call: Call,
) -> tuple[Tensor | None, ...]:
    """The gradients of the tensors and the weights, None for those that have none or are not needed."""
    wanted = (needs[0], needs[1], needs[2], any(needs[len(tensors) :]))
    found = iter(_Backward.apply(call, wanted, len(weights), *grads, *tensors, *weights, *kept))
    states = [next(found) if want else None for want in wanted[:3]]
    return (*states, None, None, None, *(found if wanted[3] else [None] * len(weights)))


class _Layer(Function):
    """The operator ``layer`` with its gradient."""

    @staticmethod
    def forward(call: Call, *given: Any) -> tuple[Tensor, ...]:
        output, h_n, c_n, kept = torch.ops.lstmcore.layer(*given[:6], list(given[6:]), *call)
        return output, h_n, c_n, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *given = inputs
        y, _, _, *kept = output
        saved = kept[ctx.call.cells :]
        ctx.count = len(given)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # an output nobody used has no gradient, and costs nothing
        ctx.save_for_backward(*given, *((y, *saved) if ctx.call.save else ()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        used: Any = (*grads[:3], grads[3] if ctx.call.cells else None)
        if all(grad is None for grad in used):
            return (None,) * (1 + ctx.count)
        given, kept = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        return None, *gradients(used, ctx.needs_input_grad[1:], kept, Tensors(*given[:6]), given[6:], ctx.call)

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, *given: Any) -> tuple[Any, Any]:
        return _mapped_layer(_Layer.apply, info.batch_size, in_dims[1:], call, *given)


class _Backward(Function):
    """The operator ``layer_backward`` with its gradient: the reference's."""

    @staticmethod
    def forward(call: Call, needs: Sequence[bool], weights: int, *given: Any) -> tuple[Tensor, ...]:
        end = 10 + weights
        kept, of_weights = list(given[end:]), list(given[10:end])
        return tuple(torch.ops.lstmcore.layer_backward(*given[:4], needs, kept, *given[4:10], of_weights, *call))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, ctx.needs, ctx.weights, *given = inputs
        ctx.inputs = len(inputs)
        ctx.save_for_backward(*given[: 10 + ctx.weights])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given = list(ctx.saved_tensors)
        call, needs, fixed = ctx.call, Needs(*ctx.needs), Tensors(*given[4:10])
        rows = _rows(fixed, call)
        at = [k for k, tensor in enumerate(given) if tensor is not None and tensor.is_floating_point()]

        def first(*tensors: Tensor) -> tuple[Tensor, ...]:
            """What ``layer_backward`` computes, of all tensors that it can be differentiated in."""
            of: list[Any] = [None] * len(given)
            for k, tensor in zip(at, tensors, strict=True):
                of[k] = tensor
            used = [k for k in range(4) if of[k] is not None]
            leaves = [k for k in (4, 5, 6, *range(10, len(given))) if of[k] is not None]

            def layer(*values: Tensor) -> tuple[Tensor, ...]:
                own = list(of)
                for k, value in zip(leaves, values, strict=True):
                    own[k] = value
                weights = directions_of(own[10:], call.directions)
                x, h_0, c_0 = own[4:7]
                result = reference.forward(x, h_0, c_0, weights, rows, reset=fixed.reset, cells=3 in used)
                return tuple(result[k] for k in used)  # type: ignore[misc]

            pull: Any = torch.func.vjp(layer, *(of[k] for k in leaves))[1]
            found = dict(zip(leaves, pull(tuple(of[k] for k in used)), strict=True))
            wanted = {4: needs.input, 5: needs.h_0, 6: needs.c_0}
            return tuple(grad for k, grad in found.items() if wanted.get(k, needs.weights))

        pull: Any = torch.func.vjp(first, *(given[k] for k in at))[1]
        result: list[Tensor | None] = [None] * (ctx.inputs - 3)
        for k, grad in zip(at, pull(grads), strict=True):
            result[k] = grad
        return None, None, None, *result

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, needs: Sequence[bool], weights: int, *given: Any) -> tuple[Any, Any]:
        return _mapped_backward(_Backward.apply, info.batch_size, in_dims[3:], call, needs, weights, *given)


# vmap: of the Functions, whose ``apply`` a transform further out may look at again, and of the operators


def _mapped_layer(
    run: Callable[..., Any], V: int, dims: Sequence[int | None], call: Call, *given: Any
) -> tuple[Any, Any]:
    packed = given[4] is not None
    if call.save or any(dim is not None for dim in dims[6:]):  # what is saved in one call cannot be taken apart
        return _stacked([run(call, *_member(given, dims, v)) for v in range(V)])
    folded = (*_fold(Tensors(*given[:6]), dims[:6], V), *given[6:])
    places = (0, 1, 1, 0) if packed else (1, 1, 1, 1)
    return _unfold(run(call._replace(batch=call.batch * V), *folded), places, V)


def _mapped_backward(
    run: Callable[..., Any],
    V: int,
    dims: Sequence[int | None],
    call: Call,
    needs: Sequence[bool],
    weights: int,
    *given: Any,
) -> tuple[Any, Any]:
    end = 10 + weights
    if needs[3] or len(given) > end or any(dim is not None for dim in dims[10:]):
        kept: Sequence[Tensor] = ()
        if (
            len(given) == end
            and all(dim is None for dim in dims[4:])
            and not torch._C._are_functorch_transforms_active()
        ):
            output, _, _, *kept = _Layer.forward(call._replace(save=True), *given[4:])  # the same for all members
            kept = (output, *kept[call.cells :])
        return _stacked([run(call, needs, weights, *_member(given, dims, v), *kept) for v in range(V)])
    row = 1 if given[8] is None else 0
    grads = [
        None if grad is None else _folded(grad, dim, at, V)
        for grad, dim, at in zip(given[:4], dims[:4], (row, 1, 1, row), strict=True)
    ]
    folded = _fold(Tensors(*given[4:10]), dims[4:10], V)
    results = run(call._replace(batch=call.batch * V), needs, weights, *grads, *folded, *given[10:])
    return _unfold(results, [at for at, want in zip((row, 1, 1), needs, strict=False) if want], V)


def _member(given: Sequence[Any], dims: Sequence[int | None], v: int) -> list[Any]:
    """The arguments of member ``v``."""
    return [each if dim is None else each.select(dim, v) for each, dim in zip(given, dims, strict=True)]


def _stacked(members: list[tuple[Tensor, ...]]) -> tuple[Any, Any]:
    """The results of all members, and their mapped dimensions."""
    results = tuple(torch.stack(each) for each in zip(*members, strict=True))
    return results, (0,) * len(results)


def _folded(tensor: Tensor, dim: int | None, row: int, V: int) -> Tensor:
    """``tensor`` with the mapped dimension folded into its dimension ``row``: row b of member v is row b * V + v."""
    if dim is None:
        shape = tensor.shape
        return tensor.unsqueeze(row + 1).expand(*shape[: row + 1], V, *shape[row + 1 :]).flatten(row, row + 1)
    return tensor.movedim(dim, row + 1).flatten(row, row + 1)


def _fold(tensors: Tensors, dims: Sequence[int | None], V: int) -> Tensors:
    """One call for all members; ``dims``: the mapped dimension of each tensor, None for none."""
    packed = tensors.batch_sizes is not None
    rows = (0, 1, 1, 0, 0, 0) if packed else (1, 1, 1, 1, 0, 0)
    folded: list[Any] = [
        None if tensor is None else _folded(tensor, dim, row, V)
        for tensor, dim, row in zip(tensors, dims, rows, strict=True)
    ]
    result = Tensors(*folded)
    return result if tensors.batch_sizes is None else result._replace(batch_sizes=tensors.batch_sizes * V)


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
        output, h_n, c_n, *kept = _Layer.apply(Call(*args[7:]), *args[:6], *args[6])
        return output, h_n, c_n, kept
    return torch.ops.lstmcore.layer.default.redispatch(keys & torch._C._after_autograd_keyset, *args)


def _autograd_backward(keys: Any, *args: Any) -> list[Tensor]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        given = (*args[:4], *args[6:12], *args[12], *args[5])
        return list(_Backward.apply(Call(*args[13:]), args[4], len(args[12]), *given))
    return torch.ops.lstmcore.layer_backward.default.redispatch(keys & torch._C._after_autograd_keyset, *args)


def _vmap_layer(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    dims = (*in_dims[:6], *_flat_dims(in_dims[6], args[6]))
    (output, h_n, c_n, *kept), out_dims = _mapped_layer(
        _Layer.forward, info.batch_size, dims, Call(*args[7:]), *args[:6], *args[6]
    )
    return (output, h_n, c_n, kept), (*out_dims[:3], list(out_dims[3:]))


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    kept = _flat_dims(in_dims[5], args[5])
    dims = (*in_dims[:4], *in_dims[6:12], *_flat_dims(in_dims[12], args[12]), *kept)
    given = (*args[:4], *args[6:12], *args[12], *args[5])
    call, V = Call(*args[13:]), info.batch_size
    results, out_dims = _mapped_backward(_Backward.forward, V, dims, call, args[4], len(args[12]), *given)
    return list(results), list(out_dims)


def _flat_dims(dims: Any, tensors: Sequence[Tensor]) -> Sequence[int | None]:
    """The mapped dimension of each in a list; one None stands for a list without any."""
    return [None] * len(tensors) if dims is None else dims


def _autocast(device: str) -> Any:
    def layer(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Floating-point tensors but float64 in autocast's dtype, as ``torch.lstm`` takes them."""
        dtype = torch.get_autocast_dtype(device)

        def cast(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [cast(each) for each in value]
            eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(dtype) if eligible else value

        with torch.autocast(device, enabled=False):
            return torch.ops.lstmcore.layer(*map(cast, args))

    return layer


_LIBRARY.impl("layer", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("layer_backward", _backward, "CompositeExplicitAutograd")
_LIBRARY.impl("layer", _autograd_layer, "Autograd", with_keyset=True)
_LIBRARY.impl("layer_backward", _autograd_backward, "Autograd", with_keyset=True)
for _device in ("cpu", "cuda"):
    _LIBRARY.impl("layer", _autocast(_device), f"Autocast{_device.upper()}")
torch.library.register_vmap("lstmcore::layer", _vmap_layer, lib=_LIBRARY)
torch.library.register_vmap("lstmcore::layer_backward", _vmap_backward, lib=_LIBRARY)
torch.library.register_fake("lstmcore::layer", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("lstmcore::layer_backward", _fake_backward, lib=_LIBRARY)

"""Checks of a layer's tensors before their addresses are taken: they fit each other, and their memory exists.

Errors have torch's types and wording wherever torch raises too.

T time, B batch, N tokens: (step, row) pairs, I input, H hidden, P projection (H without one), D directions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstmcore.kernels.contract import Call, Layer, Weights, state_dtype


def plain(tensors: tuple[Any, ...]) -> Any:
    """The same tensors with their values in memory: no pending negation, no symbolic zeros.

    Returns ``tensors`` itself if nothing had to change.
    """
    result: list[Any] | None = None
    for index, tensor in enumerate(tensors):
        if tensor is not None and (tensor.is_neg() or tensor._is_zerotensor()):
            result = list(tensors) if result is None else result
            result[index] = tensor.resolve_neg() if tensor.is_neg() else tensor.clone()
    return tensors if result is None else tuple(result)


def in_memory(tensors: Iterable[Tensor | None]) -> None:
    """Raises RuntimeError if a tensor's storage is smaller than its shape and strides say.

    A storage can be freed or resized without the tensor noticing (sharded training does that).
    """
    for tensor in tensors:
        if tensor is not None and tensor.untyped_storage().nbytes() < _end(tensor):
            raise RuntimeError(
                f"the memory of a tensor of shape {tuple(tensor.shape)} is gone: its storage has "
                f"{tensor.untyped_storage().nbytes()} bytes of {_end(tensor)}. Was it freed or resized too early?"
            )


def _end(tensor: Tensor) -> Any:
    """The number of bytes of its storage that ``tensor`` needs."""
    if tensor.is_contiguous():
        return tensor.storage_offset() * tensor.itemsize + tensor.nbytes
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.storage_offset() + last + 1) * tensor.itemsize


class Kept(NamedTuple):
    """The arguments of a backward in addition to its call."""

    output: Tensor | None = None
    grads: Sequence[Tensor | None] = ()  # of output, h_n, c_n, cells
    saved: Sequence[Tensor] = ()
    sizes: Sequence[tuple[Sequence[int], torch.dtype]] = ()  # what ``saved`` should be


def weights(params: Sequence[Tensor], directions: int) -> tuple[Weights, ...]:
    """The parameters of one layer by direction; RuntimeError if their number or a rank is wrong."""
    fields, most = len(params), len(Weights._fields)
    if directions not in (1, 2) or fields % directions or not 2 <= fields // directions <= most:
        raise RuntimeError(f"Expected 2 to {most} weights in each of 1 or 2 directions, got {fields} in {directions}")
    grouped = Weights.by_direction(params, directions)
    weight_ih, weight_hh, _, _, weight_hr = grouped[0]
    shapes = {"weight_ih": ("(4H, I)", weight_ih), "weight_hh": ("(4H, P)", weight_hh)}
    if weight_hr is not None:
        shapes["weight_hr"] = "(P, H)", weight_hr
    for name, (shape, each) in shapes.items():
        if each.dim() != 2:
            raise RuntimeError(f"Expected a tensor of shape {shape} as {name}, got {tuple(each.shape)}")
    return grouped


def layer(call: Call, kept: Kept = Kept()) -> None:  # noqa: B008 (immutable)
    """Raises RuntimeError unless all tensors of a call, and of its backward, fit its sizes and have memory.

    Between forward and backward a parameter's ``.data`` may be replaced, or a saved-tensors hook may return something
    else.
    """
    if len(kept.saved) != len(kept.sizes):
        raise RuntimeError(f"Expected {len(kept.sizes)} tensors that forward saved, got {len(kept.saved)}")
    device = call.layer.device
    expected = _expected(call.layer, call.rows.shape)
    pairs = zip((*call.tensors, kept.output, *kept.grads), expected, strict=False)
    for tensor, (shape, dtype) in chain(pairs, zip(kept.saved, kept.sizes, strict=True)):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype is not dtype or tensor.device != device:
            raise RuntimeError(
                f"Expected a tensor of shape {tuple(shape)}, {dtype} and on {device}, got {tuple(tensor.shape)}, "
                f"{tensor.dtype} and on {tensor.device}; between forward and backward it must stay what it was"
            )
        if tensor.untyped_storage().nbytes() < _end(tensor):
            in_memory((tensor,))


@functools.lru_cache(maxsize=1024)
def _expected(layer: Layer, rows: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes and dtypes of ``Call.tensors``, then of the output and the gradients of output, h_n, c_n and cells."""
    weights = iter(layer.weight_shapes)
    fields = [next(weights) if name in layer.weight_names else () for name in Weights._fields]
    output, cells = (*rows, layer.directions * layer.width), (*rows, layer.directions * layer.hidden_size)
    before = [rows, (*rows, layer.input_size), layer.h_shape, layer.c_shape, *fields * layer.directions]
    shapes = [*before, output, output, layer.h_shape, layer.c_shape, cells]
    dtypes = [torch.bool, *[layer.dtype] * (len(shapes) - 2), state_dtype(layer.dtype)]
    return tuple(zip(shapes, dtypes, strict=True))

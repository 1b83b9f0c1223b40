"""What a caller can get wrong, or forge: looked at here, before any kernel takes an address.

Types and wording are torch's where torch raises.

T time, B batch, N alive rows over all steps, I input, H hidden, P projection (H where there is none), L layers,
D directions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lstmcore.kernels.contract import Rows, state_dtype

# A call


def packed(
    data: Tensor,  # (N, I), or more rows than the sizes use
    batch_sizes: Tensor,  # (T,)
    sorted_indices: Tensor | None,  # (B,)
) -> tuple[Tensor, np.ndarray]:
    """``data`` without spare rows, and a copy of ``batch_sizes`` that nobody else can change.

    Raises RuntimeError where the fields of a PackedSequence do not fit each other.
    """
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        raise RuntimeError(
            "batch_sizes of a PackedSequence should be 1-D, of dtype torch.int64 and on the CPU, got "
            f"{batch_sizes.dim()}-D, {batch_sizes.dtype} and {batch_sizes.device}"
        )
    # a transform of torch.func may have wrapped the tensor, or wrap what NumPy would get
    transformed = torch._C._are_functorch_transforms_active()
    sizes = np.array(batch_sizes.tolist() if transformed else batch_sizes.numpy(), np.int64)
    if not len(sizes):
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN: batch_sizes is empty")
    if sizes.min() < 1:
        at = int(sizes.argmin())
        raise RuntimeError(f"batch_sizes of a PackedSequence should be positive, got {sizes[at]} for step {at}")
    rises = sizes[1:] > sizes[:-1]
    if rises.any():
        at = int(rises.argmax())
        raise RuntimeError(
            "batch_sizes of a PackedSequence should never rise (its sequences are sorted, the longest first), got "
            f"{sizes[at + 1]} for step {at + 1} after {sizes[at]}"
        )
    rows = len(data)
    total = int(sizes.sum(dtype=np.float64) if sizes[0] > rows else sizes.sum())  # integers could wrap around
    if total > rows:
        raise RuntimeError(f"batch_sizes of a PackedSequence add up to {total} rows, but its data has {rows}")
    if sorted_indices is not None and sorted_indices.shape != (sizes[0],):
        raise RuntimeError(
            f"sorted_indices of a PackedSequence should be of shape ({sizes[0]},), one for each sequence, got "
            f"{tuple(sorted_indices.shape)}"
        )
    return data if total == rows else data[:total], sizes


def states(hx: Any, packed: bool, batched: bool) -> tuple[Tensor, Tensor]:
    """(h_0, c_0), each (L * D, B, ·), from what the caller passed as ``hx``."""
    if isinstance(hx, Tensor) or len(hx) != 2:
        kind = f"a tensor of shape {tuple(hx.shape)}" if isinstance(hx, Tensor) else f"{len(hx)} of them"
        error = IndexError if len(hx) < 2 else RuntimeError  # the types of torch
        raise error(f"lstm expects two hidden states: hx must be a tuple (h_0, c_0), got {kind}")
    h_0, c_0 = hx
    rank = 3 if batched else 2
    if not packed and (h_0.dim() != rank or c_0.dim() != rank):
        raise RuntimeError(
            f"For {'batched 3' if batched else 'unbatched 2'}-D input, hx and cx should "
            f"also be {rank}-D but got ({h_0.dim()}-D, {c_0.dim()}-D) tensors"
        )
    return (h_0, c_0) if batched else (h_0.unsqueeze(1), c_0.unsqueeze(1))


def state(which: int, state: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raises RuntimeError unless ``hx[which]`` is as expected."""
    if state.shape != shape:
        raise RuntimeError(f"Expected hidden[{which}] size {shape}, got {list(state.shape)}")
    if state.device != device:
        raise RuntimeError(
            "Input and hidden tensors are not at the same device, "
            f"found input tensor at {device} and hidden tensor at {state.device}"
        )
    if state.dtype != dtype and not torch.is_autocast_enabled(device.type):
        raise RuntimeError(f"Expected hidden[{which}] dtype {dtype}, got {state.dtype}; convert it: state.to({dtype})")


def params(
    params: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> None:
    """Raises RuntimeError unless the flat list of parameters is as expected."""
    for param, shape in zip(params, shapes, strict=True):
        if param.device != device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, "
                f"found input tensor at {device} and parameter tensor at {param.device}"
            )
        if param.shape != shape or param.dtype != dtype:
            raise RuntimeError(
                f"Expected a parameter of shape {shape} and {dtype}, got {tuple(param.shape)} and {param.dtype}; "
                f"all of them, in order: {', '.join(map(str, shapes))}"
            )


def shapes(
    input_size: int, hidden_size: int, proj_size: int, num_layers: int, directions: int, has_biases: bool
) -> tuple[tuple[int, ...], ...]:
    """The shapes of the flat list of parameters."""
    width = proj_size or hidden_size
    shapes: list[tuple[int, ...]] = []
    for layer in range(num_layers):
        one: list[tuple[int, ...]] = [
            (4 * hidden_size, directions * width if layer else input_size),
            (4 * hidden_size, width),
        ]
        if has_biases:
            one += [(4 * hidden_size,)] * 2
        if proj_size:
            one += [(proj_size, hidden_size)]
        shapes += one * directions
    return tuple(shapes)


known_shapes = functools.lru_cache(maxsize=1024)(shapes)


def lengths(lengths: Tensor | Sequence[int], packed: bool, batch: int, device: torch.device) -> Tensor:
    """``lengths`` (B,), checked but for their values."""
    if packed:
        raise ValueError("lengths go with padded input; a PackedSequence carries its own")
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(lengths, device="cpu")  # whatever the default device is
        lengths = lengths if lengths.numel() else lengths.to(torch.int64)
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"lengths should be of an integer dtype, got: {lengths.dtype}")
    if lengths.shape != (batch,):
        raise RuntimeError(f"Expected lengths size ({batch},), got {list(lengths.shape)}")
    if lengths.device != device and lengths.device.type != "cpu":
        raise RuntimeError(f"Expected lengths on the CPU or on {device}, as input is, got them on {lengths.device}")
    return lengths


def reset(reset: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises TypeError or RuntimeError unless ``reset`` is as expected."""
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset should be a tensor of dtype torch.bool, got: {type(reset).__name__}")
    if reset.dtype != torch.bool:
        raise TypeError(f"reset should be of dtype torch.bool, got: {reset.dtype}")
    if reset.device != device:
        raise RuntimeError(f"Expected reset on {device}, as input is, got it on {reset.device}")
    if reset.shape != shape:
        raise RuntimeError(f"Expected reset size {shape} (input's, without features), got {list(reset.shape)}")


def cell(input: Tensor, hx: Any, hidden_size: int) -> None:
    """Raises ValueError, TypeError or RuntimeError unless ``input`` (B, I) or (I,) and ``hx`` fit: ATen trusts them."""
    rank = input.dim()
    if rank not in (1, 2):
        raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {rank}D instead")
    if hx is None:
        return
    if isinstance(hx, Tensor):
        raise TypeError(f"lstm_cell: hx must be a tuple (h_0, c_0), got a tensor of shape {tuple(hx.shape)}")
    if len(hx) != 2:
        raise RuntimeError(f"lstm_cell expects two hidden states: hx must be (h_0, c_0), got {len(hx)} of them")
    expected = (*input.shape[:-1], hidden_size)
    for index, each in enumerate(hx):
        if each.shape != expected:
            if each.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {each.dim()}D instead")
            got = tuple(each.shape)
            if each.dim() != rank:
                what = f"Expected hx[{index}] to be {rank}D, as input is"
            elif rank == 2 and len(each) != len(input):
                what = f"Input batch size {len(input)} doesn't match hidden{index} batch size {len(each)}"
            else:
                what = f"hidden{index} has inconsistent hidden_size: got {got[-1]}, expected {hidden_size}"
            raise RuntimeError(f"{what}: expected a state of shape {expected}, got {got}")


# A layer, before its addresses are taken


def plain(tensors: Iterable[Tensor | None]) -> Any:
    """The same, their values in memory as they are: no negation that is still to be done, no zeros by name only."""
    result = list(tensors)
    for index, tensor in enumerate(result):
        if tensor is not None:
            if tensor.is_neg():
                result[index] = tensor.resolve_neg()
            elif tensor._is_zerotensor():
                result[index] = tensor.clone()
    return result


def in_memory(tensors: Iterable[Tensor | None]) -> None:
    """Raises RuntimeError where a tensor's storage does not hold all that its shape and strides say.

    Storages can be freed or resized under a tensor (sharded training does that), and nobody tells the tensor.
    """
    for tensor in tensors:
        if tensor is not None and tensor.untyped_storage().nbytes() < _end(tensor):
            raise RuntimeError(
                f"the memory of a tensor of shape {tuple(tensor.shape)} is gone: its storage has "
                f"{tensor.untyped_storage().nbytes()} bytes of {_end(tensor)}. Was it freed or resized too early?"
            )


def _end(tensor: Tensor) -> Any:
    """How many bytes of its storage ``tensor`` needs."""
    if tensor.is_contiguous():
        return tensor.storage_offset() * tensor.itemsize + tensor.nbytes
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.storage_offset() + last + 1) * tensor.itemsize


def layer(
    rows: Rows,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],  # as directions_of takes them
    directions: int,
    reset: Tensor | None,
    output: Tensor | None = None,
    grads: Sequence[Tensor | None] = (),  # of output, h_n, c_n, cells
    saved: tuple[Sequence[Tensor], Sequence[tuple[Sequence[int], torch.dtype]]] = ((), ()),  # and what they should be
) -> None:
    """Raises RuntimeError unless all tensors of one layer fit each other, and lie in memory.

    Between forward and backward a parameter's ``.data`` may be swapped, a saved-tensors hook may bring something else.
    """
    if directions not in (1, 2) or len(weights) // directions not in (2, 3, 4, 5) or len(weights) % directions:
        raise RuntimeError(f"Expected 2 to 5 weights in each of 1 or 2 directions, got {len(weights)} in {directions}")
    if weights[1].dim() != 2 or not input.dim():
        raise RuntimeError(f"Expected a tensor of shape (4H, P) as weight_hh, got {tuple(weights[1].shape)}")
    gates, width = weights[1].shape  # (4H, P)
    dtype, device, fields = input.dtype, input.device, len(weights) // directions
    if fields in (2, 4):  # no projection
        width = gates // 4
    expected = _layer(rows.shape, rows.batch, input.shape[-1], gates // 4, width, directions, fields, dtype)
    if len(saved[0]) != len(saved[1]):
        raise RuntimeError(f"Expected {len(saved[1])} tensors that forward saved, got {len(saved[0])}")
    pairs = zip((input, h_0, c_0, *weights, reset, output, *grads), expected, strict=False)
    for tensor, (shape, kind) in chain(pairs, zip(*saved, strict=True)):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype is not kind or tensor.device != device:
            raise RuntimeError(
                f"Expected a tensor of shape {tuple(shape)}, {kind} and on {device}, got {tuple(tensor.shape)}, "
                f"{tensor.dtype} and on {tensor.device}; between forward and backward it must stay what it was"
            )
        if tensor.untyped_storage().nbytes() < _end(tensor):
            in_memory((tensor,))


@functools.lru_cache(maxsize=1024)
def _layer(
    rows: tuple[int, ...],
    batch: int,
    inputs: int,
    hidden: int,
    width: int,
    directions: int,
    fields: int,
    dtype: torch.dtype,
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes and dtypes of input, h_0, c_0, weights, reset, output, and the gradients of output, h_n, c_n and cells."""
    biases, projection = fields > 3, fields in (3, 5)
    each = [(4 * hidden, inputs), (4 * hidden, width), *[(4 * hidden,)] * 2 * biases, *[(width, hidden)] * projection]
    output, h, c = (*rows, directions * width), (directions, batch, width), (directions, batch, hidden)
    shapes = [(*rows, inputs), h, c, *each * directions, rows, output, output, h, c, (*rows, directions * hidden)]
    kinds = [dtype] * len(shapes)
    kinds[-6], kinds[-1] = torch.bool, state_dtype(dtype)  # reset, the gradient of the cells
    return tuple(zip(shapes, kinds, strict=True))

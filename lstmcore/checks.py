"""Validates everything that a caller passes, and brings it into one form.

Errors have torch's types and wording wherever torch raises too.

T time, B batch, N tokens: (step, row) pairs, I input, H hidden, P projection (H without one), L layers,
D directions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lstmcore import guards, routing
from lstmcore.kernels.contract import Layer, Weights
from lstmcore.recompute import Recompute

# A call


class Options(NamedTuple):
    """The arguments of ``torch.lstm`` after the parameters, in its order."""

    has_biases: bool = True
    num_layers: int = 1  # L
    dropout: float = 0.0
    train: bool = False
    bidirectional: bool = False
    batch_first: bool = False

    @property
    def directions(self) -> int:
        """D."""
        return 2 if self.bidirectional else 1


class Given(NamedTuple):
    """The arguments of :func:`lstmcore.lstm`, as the caller passed them."""

    input: Any
    hx: Any
    params: Sequence[Tensor]
    options: Options
    lengths: Any = None
    reset: Any = None
    return_cells: Any = False
    recompute: Recompute = Recompute()

    @property
    def data(self) -> Tensor:
        """(T, B, I), (B, T, I), (T, I) or packed (N, I)."""
        return self.input.data if isinstance(self.input, PackedSequence) else self.input

    @property
    def extended(self) -> bool:
        """Whether the call uses something that torch's LSTM does not have."""
        return self.lengths is not None or self.reset is not None or bool(self.return_cells)


class Form(NamedTuple):
    """The layout of a call's tensors, so that results are returned in the same layout."""

    batched: bool
    batch_first: bool  # False for packed or unbatched input
    batch_sizes: Tensor | None = None  # of a PackedSequence: the caller's
    sorted_indices: Tensor | None = None
    unsorted_indices: Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.batch_sizes is not None

    def of_input(self, tensor: Tensor) -> Tensor | PackedSequence:
        """Converts a result (T, B, ·) or (N, ·) to the form of the input."""
        if self.packed:
            return PackedSequence(tensor, self.batch_sizes, self.sorted_indices, self.unsorted_indices)
        if not self.batched:
            return tensor.squeeze(1)
        return tensor.transpose(0, 1) if self.batch_first else tensor

    def of_state(self, tensor: Tensor) -> Tensor:
        """Converts a state (L * D, B, ·) to the form of ``hx``."""
        if self.unsorted_indices is not None:
            tensor = tensor.index_select(1, self.unsorted_indices)
        return tensor if self.batched else tensor.squeeze(1)


class Checked(NamedTuple):
    """A call whose arguments fit each other: its tensors with time first, and sorted if they are packed."""

    layer: Layer  # the first, with ragged and training False
    form: Form
    options: Options
    data: Tensor  # (T, B, I) or (N, I)
    h_0: Tensor | None  # (L * D, B, P)
    c_0: Tensor | None  # (L * D, B, H)
    params: list[Tensor]
    first: tuple[Weights, ...]  # of the first layer, by direction
    sizes: Tensor | None  # (T,) of packed rows: a private copy if values can be read
    lengths: Tensor | None  # (B,)
    reset: Tensor | None  # (T, B) or (N,)
    cells: bool | str
    recompute: Recompute

    def of_layer(self, params: Sequence[Any], index: int) -> Sequence[Any]:
        """The entries of one layer in a list like that of the parameters."""
        if self.options.num_layers == 1:
            return params
        each = len(params) // self.options.num_layers
        return params[index * each : (index + 1) * each]

    def states(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """(h_0, c_0) of one layer, (D, B, ·)."""
        if self.h_0 is None or self.c_0 is None or self.options.num_layers == 1:
            return self.h_0, self.c_0
        own = slice(index * self.layer.directions, (index + 1) * self.layer.directions)
        return self.h_0[own], self.c_0[own]


def call(given: Given, compiling: bool = False) -> Checked:
    """The checked call; raises the errors of :func:`lstmcore.lstm`, except for unknown backends."""
    if given.return_cells and given.return_cells not in (True, "all"):
        raise ValueError(f"return_cells should be False, True or 'all', got: {given.return_cells!r}")
    options, params = given.options, list(given.params)
    form, data, (steps, batch), sizes = _form(given)
    h_0, c_0 = (None, None) if given.hx is None else states(given.hx, form.packed, form.batched)
    if data.dtype != params[0].dtype and not is_autocast(data):
        raise (RuntimeError if form.packed else ValueError)(
            f"RNN input dtype ({data.dtype}) does not match weight dtype ({params[0].dtype}). "
            f"Convert input: input.to({params[0].dtype}), or convert model: model.to({data.dtype})"
        )
    weights = _first_weights(params, options)
    layer = Layer.of(data, weights, steps, batch)
    features(data, layer.input_size)
    of_params = shapes if compiling else known_shapes  # a compiler does not trace through a cache
    check_params(params, of_params(layer, options.num_layers), params[0].dtype, data.device)
    if h_0 is not None and c_0 is not None:
        stack = options.num_layers * layer.directions, batch
        state(0, h_0, (*stack, layer.width), params[0].dtype, data.device)
        state(1, c_0, (*stack, layer.hidden_size), params[0].dtype, data.device)
        if form.sorted_indices is not None:
            h_0, c_0 = h_0.index_select(1, form.sorted_indices), c_0.index_select(1, form.sorted_indices)
    some_steps(steps)
    lengths = None if given.lengths is None else check_lengths(given.lengths, form.packed, batch, data.device)
    reset = None if given.reset is None else _reset(given, form, data, steps, batch)
    cells, recompute = given.return_cells, given.recompute
    return Checked(
        layer, form, options, data, h_0, c_0, params, weights, sizes, lengths, reset, cells, recompute
    )  # fmt: skip


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of ``tensor``."""
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(tensor.device.type)


def dense(what: str, tensor: Tensor) -> None:
    """TypeError for a nested tensor, which has no shape to check; RuntimeError for another layout without strides."""
    if tensor.is_nested:
        raise TypeError(
            f"LSTM: expected {what} to be a plain tensor, got a nested one. Convert it to a padded one: "
            "torch.nested.to_padded_tensor(nested, 0.0), and pass the lengths of its rows as lengths="
        )
    if tensor.layout is not torch.strided:
        raise RuntimeError(
            f"LSTM: expected {what} to be dense, got layout {tensor.layout}; convert it: {what}.to_dense()"
        )


def _form(given: Given) -> tuple[Form, Tensor, tuple[Any, Any], Tensor | None]:
    """The form of the input, its data with time first, (T, B), and a copy of batch sizes."""
    if not isinstance(given.input, PackedSequence):
        data, batched = time_first("LSTM", given.input, given.options.batch_first)
        return Form(batched, batched and given.options.batch_first), data, (data.shape[0], data.shape[1]), None
    if len(given.input) != 4:
        raise RuntimeError(
            f"Expected a PackedSequence of four fields, got one of {len(given.input)}: torch.compile makes such ones "
            "of packed._replace(data=...); write PackedSequence(data, *packed[1:])"
        )
    data, batch_sizes, *indices = given.input
    if data.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
    dense("input", data)
    form = Form(True, False, batch_sizes, *indices)
    if routing.has_values(batch_sizes):
        data, sizes = packed(data, batch_sizes, form.sorted_indices)
        return form, data, (len(sizes), int(sizes[0])), torch.from_numpy(sizes)
    first: Any = batch_sizes[0]  # torch.jit's tracer records its use
    batch = first if torch._C._get_tracing_state() else int(first)
    return form, data, (batch_sizes.shape[0], batch), batch_sizes


def time_first(kind: str, input: Tensor, batch_first: bool) -> tuple[Tensor, bool]:
    """The input as (T, B, I), and whether it was batched; ValueError for a wrong rank.  ``kind``: the module's name."""
    rank = input.dim()
    if rank not in (2, 3):
        raise ValueError(f"{kind}: Expected input to be 2D or 3D, got {rank}D instead")
    dense("input", input)
    if rank == 2:
        return input.unsqueeze(1), False
    return (input.transpose(0, 1) if batch_first else input), True


def features(data: Tensor, input_size: int) -> None:
    """RuntimeError unless the input has I features."""
    if data.shape[-1] != input_size:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {input_size}, got {data.shape[-1]}")


def some_steps(steps: int) -> None:
    """RuntimeError for T = 0."""
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")


def _first_weights(params: Sequence[Tensor], options: Options) -> tuple[Weights, ...]:
    """The weights of the first layer by direction; RuntimeError for a wrong number of parameters."""
    directions, fields = options.directions, 4 if options.has_biases else 2
    each, rest = divmod(len(params), options.num_layers * directions)
    if rest or each not in (fields, fields + 1):
        raise RuntimeError(
            f"got an incorrect number of RNN parameters: {options.num_layers} layers in {directions} directions have "
            f"{fields} each ({fields + 1} with a projection), got {len(params)} in all"
        )
    return Weights.by_direction(params[: each * directions], directions)


def _reset(given: Given, form: Form, data: Tensor, steps: int, batch: int) -> Tensor:
    """``reset``, checked: (T, B) or (N,)."""
    reset: Tensor = given.reset
    expected = (batch, steps) if form.batch_first else (steps, batch) if form.batched else (steps,)
    check_reset(reset, (len(given.data),) if form.packed else expected, data.device)
    if form.packed:
        return reset[: len(data)]
    return reset.T if form.batch_first else reset if form.batched else reset[:, None]


def packed(
    data: Tensor,  # (N, I), or more rows than the sizes use
    batch_sizes: Tensor,  # (T,)
    sorted_indices: Tensor | None,  # (B,)
) -> tuple[Tensor, np.ndarray]:
    """``data`` without unused rows, and a private copy of ``batch_sizes``.

    Raises RuntimeError if the fields of a PackedSequence do not fit each other.
    """
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        raise RuntimeError(
            "batch_sizes of a PackedSequence should be 1-D, of dtype torch.int64 and on the CPU, got "
            f"{batch_sizes.dim()}-D, {batch_sizes.dtype} and {batch_sizes.device}"
        )
    # a transform of torch.func may have wrapped the tensor, which NumPy cannot read then
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
    dense("h_0", h_0)
    dense("c_0", c_0)
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


def check_params(
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


def shapes(layer: Layer, num_layers: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of the flat list of parameters of a stack that begins with ``layer``."""
    return layer.weight_shapes * layer.directions + layer.after().weight_shapes * layer.directions * (num_layers - 1)


@functools.lru_cache(maxsize=1024)
def _known_shapes(sizes: tuple[Any, ...], num_layers: int) -> tuple[tuple[int, ...], ...]:
    return shapes(Layer(torch.device("cpu"), torch.float32, 1, 1, *sizes), num_layers)


def known_shapes(layer: Layer, num_layers: int) -> tuple[tuple[int, ...], ...]:
    """:func:`shapes`, cached."""
    return _known_shapes(layer[4:9], num_layers)  # I, H, P, D, bias


def check_lengths(lengths: Tensor | Sequence[int], packed: bool, batch: int, device: torch.device) -> Tensor:
    """``lengths`` (B,) as a tensor, checked except for their values."""
    if packed:
        raise ValueError("lengths go with padded input; a PackedSequence carries its own")
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(lengths, device="cpu")  # not the default device
        lengths = lengths if lengths.numel() else lengths.to(torch.int64)
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"lengths should be of an integer dtype, got: {lengths.dtype}")
    if lengths.shape != (batch,):
        raise RuntimeError(f"Expected lengths size ({batch},), got {list(lengths.shape)}")
    if lengths.device != device and lengths.device.type != "cpu":
        raise RuntimeError(f"Expected lengths on the CPU or on {device}, as input is, got them on {lengths.device}")
    return lengths


def check_reset(reset: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises TypeError or RuntimeError unless ``reset`` is as expected."""
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset should be a tensor of dtype torch.bool, got: {type(reset).__name__}")
    if reset.dtype != torch.bool:
        raise TypeError(f"reset should be of dtype torch.bool, got: {reset.dtype}")
    if reset.device != device:
        raise RuntimeError(f"Expected reset on {device}, as input is, got it on {reset.device}")
    if reset.shape != shape:
        raise RuntimeError(f"Expected reset size {shape} (input's, without features), got {list(reset.shape)}")


def row_indices(rows: Any, batch: int) -> Tensor:
    """``rows``, indices or a mask (B,), as indices; raises IndexError or TypeError."""
    if isinstance(rows, np.ndarray):
        rows = np.ascontiguousarray(rows)  # torch has no negative strides
    elif isinstance(rows, Tensor):
        guards.in_memory((rows,))
    found = torch.as_tensor(rows, device="cpu").reshape(-1)
    if found.dtype == torch.bool:
        if len(found) != batch:
            raise IndexError(f"Expected a mask of ({batch},) rows, got {len(found)}")
        return found.nonzero()[:, 0]
    if len(found) and (found.is_floating_point() or found.is_complex()):
        raise TypeError(f"rows should be indices or bools, got: {found.dtype}")
    if len(found) and not -batch <= int(found.min()) <= int(found.max()) < batch:
        raise IndexError(f"Expected rows from {-batch} to {batch - 1}, got {found.tolist()}")
    return found.long() % batch


def cell(input: Tensor, hx: Any, hidden_size: int) -> None:
    """Raises ValueError, TypeError or RuntimeError unless ``input`` (B, I) or (I,) and ``hx`` fit, as ATen assumes."""
    rank = input.dim()
    if rank not in (1, 2):
        raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {rank}D instead")
    dense("input", input)
    if hx is None:
        return
    if isinstance(hx, Tensor):
        raise TypeError(f"lstm_cell: hx must be a tuple (h_0, c_0), got a tensor of shape {tuple(hx.shape)}")
    if len(hx) != 2:
        raise RuntimeError(f"lstm_cell expects two hidden states: hx must be (h_0, c_0), got {len(hx)} of them")
    expected = (*input.shape[:-1], hidden_size)
    for index, each in enumerate(hx):
        dense(f"hx[{index}]", each)
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

"""The LSTM as a function: all validation, then layers, directions, packing and the dropout between layers.

T time, B batch, N alive rows over all steps, I input, H hidden, P projection (H where there is none), L layers,
D directions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import _VF, Tensor
from torch.nn.utils.rnn import PackedSequence

from lstmcore import aten, autograd, backends, ops, recording, routing
from lstmcore.kernels.contract import Rows
from lstmcore.routing import Way

_KERNELS = ("triton", "numba")
_dense_rows = functools.lru_cache(maxsize=1024)(Rows)  # finding a frozen dataclass is quicker than building one


def lstm(
    input: Tensor | PackedSequence,  # (T, B, I), (B, T, I) when batch_first, (T, I) unbatched; or packed (N, I)
    hx: tuple[Tensor, Tensor] | None,  # (L * D, B, P) and (L * D, B, H); without B when unbatched
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    lengths: Tensor | Sequence[int] | None = None,  # (B,)
    reset: Tensor | None = None,  # (T, B), (B, T) when batch_first, (T,) unbatched; or packed (N,)
    return_cells: bool | Literal["all"] = False,
    backend: str = "auto",
    module: torch.nn.Module | None = None,
) -> tuple[Any, ...]:
    """A multi-layer LSTM over sequences: what ``torch.lstm`` computes, and more.

    The equations are those of ``torch.nn.LSTM`` (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al.
    2000 and the projection of Sak et al. 2014); :mod:`lstmcore.kernels` writes them out.

    Args:
        input: a floating-point tensor of the parameters' dtype and device, or a ``PackedSequence`` of one.
        hx: the initial states ``(h_0, c_0)``; None for zeros.
        params: the flat list of parameters in the order of ``torch.nn.LSTM``: layer by layer, direction by direction,
            weight_ih (4H, I or D * P), weight_hh (4H, P), bias_ih (4H,), bias_hh (4H,), weight_hr (P, H); without the
            biases when ``has_biases`` is False, without weight_hr when there is no projection.
        has_biases, num_layers, dropout, train, bidirectional, batch_first: as in ``torch.nn.LSTM``.  ``train`` turns
            the dropout between layers on; on the CPU the same seed draws the same masks as torch's.
        lengths: how many steps each row has, integers from 0 to T in any order.  Row b computes what it would compute
            alone, cut to ``lengths[b]`` steps; what lies beyond is not read, and reads zero in the output.  A row of
            length 0 ends in its initial state.  The Triton kernels do not wait for lengths on the GPU: values out of
            range make the next call on that device raise, and the row's results NaN.
        reset: bool; where True, h and c of that row are zeroed before step t computes, in every layer and direction,
            and no gradient passes.  Of a rollout with ``done[t]`` (the episode ended with the action of step t) it is
            ``reset[t] = done[t - 1]``, and ``reset[0]`` the last ``done`` of the rollout before.  With packed input it
            is packed like the data, in the same order.
        return_cells: also return every c_t of the last layer; ``"all"``: of every layer.
        backend: ``"auto"``, ``"triton"``, ``"numba"``, ``"torch"`` or ``"reference"``; see :mod:`lstmcore.backends`.
        module: whose call this is, for :func:`lstmcore.record_gradient_flow`; None cannot be recorded.

    Returns:
        ``output, h_n, c_n``, and with ``return_cells`` also ``cells``.  output: like ``input``, with D * P features
        (packed if it is packed); h_n (L * D, B, P) and c_n (L * D, B, H), without B when unbatched; cells: like
        ``output``, with D * H features, in float32 for 16-bit inputs; a tuple of L of them with ``"all"``.

    Raises:
        ValueError: input of a wrong rank or dtype; unknown backend; ``lengths`` out of range, or with packed input;
            another ``return_cells``.
        RuntimeError: a size or device that does not fit; T = 0; a named backend that cannot run the call.
        TypeError: ``lengths`` that are not integers, ``reset`` that is not bool; a Tensor subclass that holds its
            values elsewhere.
    """
    if return_cells and return_cells not in (True, "all"):
        raise ValueError(f"return_cells should be False, True or 'all', got: {return_cells!r}")
    packed = isinstance(input, PackedSequence)
    compiling = torch.compiler.is_compiling()
    if compiling and torch.compiler.is_dynamo_compiling() and (packed or recording.watched(module)):
        return _beside_the_graph(
            input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first,
            lengths=lengths, reset=reset, return_cells=return_cells, backend=backend, module=module,
        )  # fmt: skip
    if compiling and packed and torch.compiler.is_exporting():
        raise RuntimeError(
            "a PackedSequence cannot be exported, because its sizes are values: pass padded input, and lengths="
        )
    batched = True
    batch_sizes = sorted_indices = unsorted_indices = None
    data: Tensor
    if packed:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
        steps, batch = len(batch_sizes), int(batch_sizes[0])
    else:
        data = input  # type: ignore[assignment]
        rank = data.dim()
        if rank == 3:
            if batch_first:
                data = data.transpose(0, 1)
        elif rank == 2:
            batched = batch_first = False  # batch_first says nothing about a single sequence
            data = data.unsqueeze(1)
        else:
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {rank}D instead")
        steps, batch, _ = data.shape
    h_0, c_0 = (None, None) if hx is None else _unpack_states(hx, packed, batched)

    device, dtype = data.device, data.dtype
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device.type):
        if backend != "torch":  # ATen's LSTM casts by itself
            casted = _autocast(input, hx, params)
            with torch.autocast(device.type, enabled=False):
                return lstm(
                    *casted, has_biases, num_layers, dropout, train, bidirectional, batch_first,
                    lengths=lengths, reset=reset, return_cells=return_cells, backend=backend, module=module,
                )  # fmt: skip
    elif dtype != params[0].dtype:
        raise (RuntimeError if packed else ValueError)(
            f"RNN input dtype ({dtype}) does not match weight dtype ({params[0].dtype}). "
            f"Convert input: input.to({params[0].dtype}), or convert model: model.to({dtype})"
        )

    params = list(params)
    directions = 2 if bidirectional else 1
    fields = 4 if has_biases else 2
    projected = len(params) == num_layers * directions * (fields + 1)
    fields += projected
    if len(params) != num_layers * directions * fields:
        raise RuntimeError(
            f"got an incorrect number of RNN parameters: {num_layers} layers in {directions} directions have "
            f"{fields} each ({fields + 1} with a projection), got {len(params)} in all"
        )
    hidden_size, input_size = params[0].shape[0] // 4, params[0].shape[1]
    proj_size = params[fields - 1].shape[0] if projected else 0
    width = proj_size or hidden_size  # P
    if data.shape[-1] != input_size:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {input_size}, got {data.shape[-1]}")
    shapes_of = _shapes if compiling else _known_shapes  # a compiler looks through no cache
    shapes = shapes_of(input_size, hidden_size, proj_size, num_layers, directions, has_biases)
    _check_params(params, shapes, params[0].dtype, device)

    states = num_layers * directions
    if h_0 is not None and c_0 is not None:
        _check_state(0, h_0, (states, batch, width), params[0].dtype, device)
        _check_state(1, c_0, (states, batch, hidden_size), params[0].dtype, device)
        if sorted_indices is not None:
            h_0, c_0 = h_0.index_select(1, sorted_indices), c_0.index_select(1, sorted_indices)
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if lengths is not None:
        lengths = _integers(lengths, packed, batch, device)
    if reset is not None:
        expected = (batch, steps) if batch_first else (steps, batch)
        _check_reset(reset, (len(data),) if packed else expected if batched else expected[:1], device)
        if not packed:
            reset = reset.T if batch_first else reset if batched else reset[:, None]

    tensors = (data, h_0, c_0, *params)
    way = Way.GRAPH if compiling else routing.way(tensors, backend)
    name, rows = backend, None
    training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None)
    if way not in (Way.GRAPH, Way.TRANSFORMED):  # for these the operators choose: sizes may be symbols
        rows = _rows(steps, batch, batch_sizes, lengths, batch_first)
        name = backends.plan(
            "reference" if way is Way.FORWARD_MODE and backend != "torch" else backend,
            device, dtype, steps, batch, input_size, hidden_size, proj_size, num_layers, directions, has_biases,
            rows.ragged, training,
            extended=lengths is not None or reset is not None or bool(return_cells) or recording.watched(module),
            opaque=way is Way.OPERATIONS,
        ).name  # fmt: skip
        if name in _KERNELS and torch._C._len_torch_dispatch_stack():
            way = Way.GRAPH  # who looks at operators finds one

    cells: list[Tensor] = []
    if name == "torch" and rows is not None:
        if h_0 is None or c_0 is None:
            h_0 = data.new_zeros(states, batch, width)
            c_0 = h_0 if width == hidden_size else data.new_zeros(states, batch, hidden_size)
        options = (has_biases, num_layers, dropout, train, bidirectional)
        output, h_n, c_n = aten.run(data, batch_sizes, (h_0, c_0), params, *options)
        if training and device.type == "cuda":
            aten.differentiable_again((output, h_n, c_n), data, batch_sizes, (h_0, c_0), params, *options)
    else:
        output, h_ns, c_ns = data, [], []
        h_0s: Sequence[Tensor | None] = [h_0] * num_layers if h_0 is None or num_layers == 1 else h_0.split(directions)
        c_0s: Sequence[Tensor | None] = [c_0] * num_layers if c_0 is None or num_layers == 1 else c_0.split(directions)
        for index in range(num_layers):
            last = index == num_layers - 1
            weights = params[index * directions * fields : (index + 1) * directions * fields]
            wanted = return_cells == "all" or (last and bool(return_cells))
            by_row = batch_first and last  # time-major between layers, as torch: dropout masks depend on it
            if rows is None or way is Way.GRAPH:
                given = ops.Tensors(output, h_0s[index], c_0s[index], reset, batch_sizes, lengths)
                call = ops.Call(batch, directions, by_row, wanted, training, name)
                run = ops.transformed if way is Way.TRANSFORMED else ops.in_graph
                output, h, c, c_all = run(given, weights, call)
            else:
                output, h, c, c_all = autograd.layer(
                    name, output, h_0s[index], c_0s[index], weights, directions,
                    rows if by_row == rows.batch_first else replace(rows, batch_first=by_row), reset, wanted,
                    recording.source(module, index, unsorted_indices),
                )  # fmt: skip
            if dropout and train and not last:
                output = torch.dropout(output, dropout, True)
            h_ns.append(h)
            c_ns.append(c)
            if c_all is not None:
                cells.append(c_all)
        h_n, c_n = (h_ns[0], c_ns[0]) if num_layers == 1 else (torch.cat(h_ns), torch.cat(c_ns))

    if unsorted_indices is not None:
        h_n, c_n = h_n.index_select(1, unsorted_indices), c_n.index_select(1, unsorted_indices)
    if not batched:
        h_n, c_n = h_n.squeeze(1), c_n.squeeze(1)

    def like_input(tensor: Tensor) -> Tensor | PackedSequence:
        if packed:
            return PackedSequence(tensor, batch_sizes, sorted_indices, unsorted_indices)
        if not batched:
            return tensor.squeeze(1)
        return tensor.transpose(0, 1) if batch_first else tensor

    if not return_cells:
        return like_input(output), h_n, c_n
    all_cells = tuple(map(like_input, cells))
    return like_input(output), h_n, c_n, all_cells if return_cells == "all" else all_cells[0]


_beside_the_graph = torch._disable_dynamo(lstm)  # torch.compiler.disable would import the compiler


def _unpack_states(hx: Any, packed: bool, batched: bool) -> tuple[Tensor, Tensor]:
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


def _check_state(which: int, state: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if state.shape != shape:
        raise RuntimeError(f"Expected hidden[{which}] size {shape}, got {list(state.shape)}")
    if state.device != device:
        raise RuntimeError(
            "Input and hidden tensors are not at the same device, "
            f"found input tensor at {device} and hidden tensor at {state.device}"
        )
    if state.dtype != dtype and not torch._C._is_any_autocast_enabled():
        raise RuntimeError(f"Expected hidden[{which}] dtype {dtype}, got {state.dtype}; convert it: state.to({dtype})")


def _check_params(
    params: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> None:
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


def _shapes(
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


_known_shapes = functools.lru_cache(maxsize=1024)(_shapes)


def _rows(steps: int, batch: int, batch_sizes: Tensor | None, lengths: Tensor | None, batch_first: bool) -> Rows:
    if batch_sizes is not None:
        return Rows(steps, batch, batch_sizes, packed=True)
    if lengths is None:
        return _dense_rows(steps, batch, batch_first=batch_first)
    if lengths.device.type != "cpu":  # not to be waited for; a copy, because backward reads them again
        return Rows(steps, batch, batch_first=batch_first, lengths=lengths.to(torch.int64, copy=True))
    return Rows.from_lengths(lengths, steps, batch_first)


def _integers(lengths: Tensor | Sequence[int], packed: bool, batch: int, device: torch.device) -> Tensor:
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


def _check_reset(reset: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset should be a tensor of dtype torch.bool, got: {type(reset).__name__}")
    if reset.dtype != torch.bool:
        raise TypeError(f"reset should be of dtype torch.bool, got: {reset.dtype}")
    if reset.device != device:
        raise RuntimeError(f"Expected reset on {device}, as input is, got it on {reset.device}")
    if reset.shape != shape:
        raise RuntimeError(f"Expected reset size {shape} (input's, without features), got {list(reset.shape)}")


def _autocast(input: Any, hx: Any, params: Sequence[Tensor]) -> tuple[Any, Any, list[Tensor]]:
    """The tensors as autocast wants them: padded calls in its dtype, packed ones in that of input, as torch returns."""
    packed = isinstance(input, PackedSequence)
    data = input.data if packed else input
    dtype = data.dtype if packed else torch.get_autocast_dtype(data.device.type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 or not tensor.is_floating_point() else tensor.to(dtype)

    return (
        input._replace(data=cast(data)) if packed else cast(data),
        None if hx is None else tuple(map(cast, hx)),
        [cast(param) for param in params],
    )


def lstm_cell(
    input: Tensor,  # (B, I) or (I,)
    hx: tuple[Tensor, Tensor] | None,  # (B, H) and (B, H), or (H,) and (H,)
    weight_ih: Tensor,  # (4H, I)
    weight_hh: Tensor,  # (4H, H)
    bias_ih: Tensor | None = None,  # (4H,)
    bias_hh: Tensor | None = None,  # (4H,)
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM: ``(h_1, c_1)``, each (B, H) or (H,); None for ``hx`` stands for zeros.

    ``"auto"`` and ``"torch"`` run ATen's fused cell: one step has no recurrence for a kernel to keep in cache.  The
    others run :func:`lstm` over one step.

    Raises ValueError for a wrong rank or an unknown backend, RuntimeError for sizes that do not fit.
    """
    if input.dim() not in (1, 2):
        raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
    if hx is not None:
        if isinstance(hx, Tensor):
            raise TypeError(f"lstm_cell: hx must be a tuple (h_0, c_0), got a tensor of shape {tuple(hx.shape)}")
        if len(hx) != 2:
            raise RuntimeError(f"lstm_cell expects two hidden states: hx must be (h_0, c_0), got {len(hx)} of them")
        for index, state in enumerate(hx):
            if state.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {state.dim()}D instead")
    batched = input.dim() == 2
    if not batched:
        input = input.unsqueeze(0)
        hx = None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
    if backend in ("auto", "torch"):
        if hx is None:
            zeros = input.new_zeros(input.shape[0], weight_hh.shape[1])
            hx = (zeros, zeros)
        h_1, c_1 = _VF.lstm_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    else:
        params = [p for p in (weight_ih, weight_hh, bias_ih, bias_hh) if p is not None]
        states = None if hx is None else (hx[0][None], hx[1][None])
        _, h_n, c_n = lstm(input[None], states, params, has_biases=len(params) == 4, backend=backend)
        h_1, c_1 = h_n[0], c_n[0]
    return (h_1, c_1) if batched else (h_1.squeeze(0), c_1.squeeze(0))

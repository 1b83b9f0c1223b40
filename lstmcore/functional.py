"""The LSTM as a function: what comes in is checked, then layers, directions, packing and the dropout between layers.

T time, B batch, N alive rows over all steps, I input, H hidden, P projection (H where there is none), L layers,
D directions.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import _VF, Tensor
from torch.nn.utils.rnn import PackedSequence

from lstmcore import aten, autograd, backends, checks, direct, ops, recording, routing
from lstmcore.kernels.contract import Rows
from lstmcore.kernels.cpu import process, threads
from lstmcore.routing import Way

# What is checked here does not end up in a trace; torch keeps quiet about its own checks in the same way.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"lstmcore\.(functional|checks)")

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
    batch_sizes = sorted_indices = unsorted_indices = sizes = None
    data: Tensor
    if packed:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
        rows_given = len(data)
        if routing.has_values(batch_sizes):
            data, sizes = checks.packed(data, batch_sizes, sorted_indices)
            steps, batch = len(sizes), int(sizes[0])
        else:
            first: Any = batch_sizes[0]  # torch.jit's tracer records what becomes of it
            steps, batch = batch_sizes.shape[0], first if torch._C._get_tracing_state() else int(first)
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
    h_0, c_0 = (None, None) if hx is None else checks.states(hx, packed, batched)

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
    shapes_of = checks.shapes if compiling else checks.known_shapes  # a compiler looks through no cache
    shapes = shapes_of(input_size, hidden_size, proj_size, num_layers, directions, has_biases)
    checks.params(params, shapes, params[0].dtype, device)

    states = num_layers * directions
    if h_0 is not None and c_0 is not None:
        checks.state(0, h_0, (states, batch, width), params[0].dtype, device)
        checks.state(1, c_0, (states, batch, hidden_size), params[0].dtype, device)
        if sorted_indices is not None:
            h_0, c_0 = h_0.index_select(1, sorted_indices), c_0.index_select(1, sorted_indices)
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if lengths is not None:
        lengths = checks.lengths(lengths, packed, batch, device)
    if reset is not None:
        expected = (batch, steps) if batch_first else (steps, batch)
        checks.reset(reset, (rows_given,) if packed else expected if batched else expected[:1], device)
        if packed:
            reset = reset[: len(data)]
        else:
            reset = reset.T if batch_first else reset if batched else reset[:, None]

    tensors = (data, h_0, c_0, *params)
    way = Way.GRAPH if compiling else routing.way(tensors, backend)
    name, rows = backend, None
    training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None)
    if way not in (Way.GRAPH, Way.TRANSFORMED):  # for these the operators choose: sizes may be symbols
        rows = _rows(steps, batch, batch_sizes if sizes is None else torch.from_numpy(sizes), lengths, batch_first)
        name = backends.plan(
            "reference" if way is Way.FORWARD_MODE and backend != "torch" else backend,
            device, dtype, steps, batch, input_size, hidden_size, proj_size, num_layers, directions, has_biases,
            rows.ragged, training,
            extended=lengths is not None or reset is not None or bool(return_cells) or recording.watched(module),
            opaque=way is Way.OPERATIONS, orphan=process.torch_would_hang(), several=threads.count() > 1,
        ).name  # fmt: skip
        if name != "torch" and (packed or lengths is not None) and torch._C._get_tracing_state():
            raise RuntimeError(
                f"backend {name!r} runs this call as a loop, in which torch.jit.trace would record the lengths as "
                "constants, wrong for any other batch: trace a PackedSequence with backend='auto' or 'torch', without "
                "reset and return_cells, or use torch.export, which keeps lengths= dynamic"
            )
        if name in _KERNELS and torch._C._len_torch_dispatch_stack():
            way = Way.GRAPH  # who looks at operators finds one

    cells: list[Tensor] = []
    if name == "torch" and rows is not None:
        if h_0 is None or c_0 is None:
            h_0 = data.new_zeros(states, batch, width)
            c_0 = h_0 if width == hidden_size else data.new_zeros(states, batch, hidden_size)
        options = (has_biases, num_layers, dropout, train, bidirectional)
        output, h_n, c_n = aten.run(data, batch_sizes, (h_0, c_0), params, *options)
        if way is Way.EAGER and lengths is None and reset is None and not return_cells:
            sizes_of = ((states, batch, width), (states, batch, hidden_size), shapes)
            told = (backend, has_biases, num_layers, bidirectional, batch_first)
            direct.remember(input, hx, told, *sizes_of, training)
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


def _rows(steps: int, batch: int, batch_sizes: Tensor | None, lengths: Tensor | None, batch_first: bool) -> Rows:
    if batch_sizes is not None:
        return Rows(steps, batch, batch_sizes, packed=True)
    if lengths is None:
        return _dense_rows(steps, batch, batch_first=batch_first)
    if lengths.device.type != "cpu":  # not to be waited for; a copy, because backward reads them again
        return Rows(steps, batch, batch_first=batch_first, lengths=lengths.to(torch.int64, copy=True))
    return Rows.from_lengths(lengths, steps, batch_first)


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

    Raises ValueError for a wrong rank or an unknown backend, RuntimeError for ranks and sizes that do not fit.
    """
    checks.cell(input, hx, weight_hh.shape[1])
    batched = input.dim() == 2
    if not batched:
        input = input.unsqueeze(0)
        hx = None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
    if backends.runs_atens_cell(backend, input.device):
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

"""The LSTM as a function: check the arguments, choose a backend, run layer by layer.

T time, B batch, N tokens: (step, row) pairs, I input, H hidden, P projection (H without one), L layers,
D directions.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import _VF, Tensor
from torch.nn.utils.rnn import PackedSequence

from lstmcore import autograd, backends, checks, direct, recording, routing, stack, transforms
from lstmcore import recompute as recomputing
from lstmcore.backends import REFERENCE, REGISTRY
from lstmcore.checks import Checked, Given, Options
from lstmcore.kernels.contract import Call, Layer, Rows, Weights
from lstmcore.ops import Arguments
from lstmcore.routing import Way

# The checks here do not become part of a trace; torch suppresses the warnings about its own checks in the same way.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"lstmcore\.(functional|checks)")

_autocasting = torch._C._is_any_autocast_enabled  # looked up once: every call uses it
_dense_rows = functools.lru_cache(maxsize=1024)(Rows)  # looking up a frozen dataclass is faster than building one


def lstm(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    return_cells: bool | Literal["all"] = False,
    recompute: int | Literal["auto"] | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
    module: torch.nn.Module | None = None,
) -> tuple[Any, ...]:
    """A multi-layer LSTM over sequences: what ``torch.lstm`` computes, and more.

    The equations are those of ``torch.nn.LSTM`` (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al.
    2000 and the projection of Sak et al. 2014); :mod:`lstmcore.kernels` writes them out.

    Args:
        input: (T, B, I), (B, T, I) when batch_first, (T, I) unbatched, or a ``PackedSequence`` of (N, I); of the
            parameters' dtype and device.
        hx: the initial states ``(h_0, c_0)``, (L * D, B, P) and (L * D, B, H), without B when unbatched; None for
            zeros.
        params: the flat list of parameters in the order of ``torch.nn.LSTM``: layer by layer, direction by direction,
            weight_ih (4H, I or D * P), weight_hh (4H, P), bias_ih (4H,), bias_hh (4H,), weight_hr (P, H); without the
            biases when ``has_biases`` is False, without weight_hr when there is no projection.
        has_biases: whether ``params`` holds biases.
        num_layers: L.
        dropout: the probability of the dropout between layers; on the CPU the same seed draws the same masks as
            torch's.
        train: whether there is any dropout.
        bidirectional: whether D is 2.
        batch_first: input, output and ``reset`` have B before T; the states are not affected.
        lengths: (B,), the number of steps of each row, integers from 0 to T in any order.  Row b gives the results of
            its first ``lengths[b]`` steps alone; steps beyond are not read, and their outputs are zero.  A row of
            length 0 ends in its initial state.  The Triton kernels do not wait for lengths on the GPU: a value out of
            range makes the row's results NaN and the next call on that device raise.
        reset: bool, (T, B), (B, T) when batch_first, (T,) unbatched, or packed (N,); where True, h and c of that row
            are zeroed before step t computes, in every layer and direction, and no gradient passes.  For a rollout with
            ``done[t]`` (the episode ended with the action of step t), ``reset[t] = done[t - 1]``, and ``reset[0]`` is
            the last ``done`` of the previous rollout.  With packed input it is packed like the data, in the same order.
        return_cells: also return every c_t of the last layer; ``"all"``: of every layer.
        recompute: None keeps gates and cells of all steps for backward.  A number of steps S keeps the states between
            segments of S steps instead, and backward computes one segment after another again: the same results (bit
            for bit on the CPU) for one forward more; in memory, T / S states and S steps instead of T steps.
            ``"auto"`` does so where they would exceed ``memory_budget``, with the S that needs least (in a compiled
            graph, which serves any T and B, always, with 256 steps).
        memory_budget: with ``recompute="auto"``, bytes of gates and states that a call may keep for backward, beside
            the inputs and outputs of its layers; None: a quarter of the memory that is available.
        backend: ``"auto"``, ``"triton"``, ``"numba"``, ``"torch"`` or ``"reference"``.
        module: the module that makes this call, for :func:`lstmcore.record_gradient_flow`; None: not recorded.

    Returns:
        ``output, h_n, c_n``, and with ``return_cells`` also ``cells``.  output: like ``input``, with D * P features
        (packed if it is packed); h_n (L * D, B, P) and c_n (L * D, B, H), without B when unbatched; cells: like
        ``output``, with D * H features, in float32 for 16-bit inputs; a tuple of L of them with ``"all"``.

    Raises:
        ValueError: input of a wrong rank or dtype; unknown backend; ``lengths`` out of range, or with packed input;
            another ``return_cells``; ``recompute`` or ``memory_budget`` below 1, or a budget without ``"auto"``.
        RuntimeError: a size or device that does not fit; T = 0; a named backend that cannot run the call; a
            ``memory_budget`` that no segment fits.
        TypeError: ``lengths`` that are not integers, ``reset`` that is not bool; a ``recompute`` or ``memory_budget``
            of another type; a Tensor subclass that holds its values elsewhere.
    """
    options = Options(has_biases, num_layers, dropout, train, bidirectional, batch_first)
    keep = recomputing.asked(recompute, memory_budget)
    return _lstm(Given(input, hx, params, options, lengths, reset, return_cells, keep), backend, module)


def _lstm(given: Given, backend: str, module: torch.nn.Module | None) -> tuple[Any, ...]:
    compiling = torch.compiler.is_compiling()
    if compiling:
        packed = isinstance(given.input, PackedSequence)
        if torch.compiler.is_dynamo_compiling() and (packed or recording.watched(module)):
            return _outside_the_graph(given, backend, module)
        if torch.compiler.is_exporting() and packed:
            raise RuntimeError(
                "a PackedSequence cannot be exported, because its sizes are values: pass padded input, and lengths="
            )
    if _autocasting() and checks.is_autocast(given.data) and not _whole(backend):  # ATen's LSTM casts by itself
        with torch.autocast(given.data.device.type, enabled=False):
            return _lstm(autocast(given), backend, module)

    call = checks.call(given, compiling)
    route = _route(call, given.extended, backend, module, compiling)
    if route.rows is not None and _whole(route.backend):
        output, h_n, c_n = _at_once(call, route)
        cells: list[Tensor] = []
        if route.way is Way.EAGER and not given.extended:
            direct.remember(given, backend, route.layer)
    elif _at_once_by_kernels(call, route, module):
        output, h_n, c_n = _stack(call, route, module)
        cells = []
    else:
        output, h_n, c_n, cells = _layer_by_layer(call, route, module)

    form = call.form
    results = form.of_input(output), form.of_state(h_n), form.of_state(c_n)
    if not given.return_cells:
        return results
    all_cells = tuple(map(form.of_input, cells))
    return *results, all_cells if given.return_cells == "all" else all_cells[0]


_outside_the_graph = torch._disable_dynamo(_lstm)  # torch.compiler.disable would import the compiler


def _whole(backend: str) -> bool:
    """Whether the backend of this name runs all layers at once; False for "auto"."""
    return backend in REGISTRY and REGISTRY[backend].whole


class Route(NamedTuple):
    """How a call is run."""

    way: Way
    backend: str  # "auto" if the operators choose
    rows: Rows | None  # None if the operators make them: sizes may be symbols
    layer: Layer  # the first


def _route(call: Checked, extended: bool, backend: str, module: torch.nn.Module | None, compiling: bool) -> Route:
    """How to run the call; RuntimeError if a named backend cannot."""
    tensors = (call.data, call.h_0, call.c_0, *call.params)
    fused = backend not in REGISTRY or REGISTRY[backend].fused
    way = Way.GRAPH if compiling else routing.way(tensors, fused)
    training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None)
    segment = _segment(call, way, training)
    if way in (Way.GRAPH, Way.TRANSFORMED):
        return Route(way, backend, None, call.layer.as_called(False, training, segment))
    rows = _rows(call)
    layer = call.layer.as_called(rows.ragged, training, segment)
    wanted = REFERENCE if way is Way.FORWARD_MODE and fused else backend
    extended = extended or segment > 0 or recording.watched(module)
    situation = backends.Situation.now(layer, extended, opaque=way is Way.OPERATIONS)
    name = backends.chosen(wanted, layer, call.options.num_layers, situation).name
    if not _whole(name) and (call.form.packed or call.lengths is not None) and torch._C._get_tracing_state():
        raise RuntimeError(
            f"backend {name!r} runs this call as a loop, in which torch.jit.trace would record the lengths as "
            "constants, wrong for any other batch: trace a PackedSequence with backend='auto' or 'torch', without "
            "reset and return_cells, or use torch.export, which keeps lengths= dynamic"
        )
    if REGISTRY[name].fused and torch._C._len_torch_dispatch_stack():
        way = Way.GRAPH  # a mode that intercepts operators sees one
    return Route(way, name, rows, layer)


def _segment(call: Checked, way: Way, training: bool) -> int:
    """The steps that backward computes again at a time; 0 if it does not, or if autograd has the operations."""
    if not training or call.recompute.segment is None or way in (Way.FORWARD_MODE, Way.OPERATIONS):
        return 0
    return recomputing.segment(call.recompute, call.layer, call.options.num_layers)


def _rows(call: Checked) -> Rows:
    steps, batch, batch_first = call.layer.steps, call.layer.batch, call.form.batch_first
    if call.sizes is not None:
        return Rows(steps, batch, call.sizes, packed=True)
    if call.lengths is None:
        return _dense_rows(steps, batch, batch_first=batch_first)
    if call.lengths.device.type != "cpu":  # the host does not wait for them; a copy, because backward reads them again
        return Rows(steps, batch, batch_first=batch_first, lengths=call.lengths.to(torch.int64, copy=True))
    return Rows.from_lengths(call.lengths, steps, batch_first)


def _at_once(call: Checked, route: Route) -> tuple[Tensor, Tensor, Tensor]:
    """output, h_n, c_n of all layers, from a backend that runs them at once."""
    h_0, c_0, layer = call.h_0, call.c_0, route.layer
    if h_0 is None or c_0 is None:
        stack = call.options.num_layers * layer.directions, layer.batch
        h_0 = call.data.new_zeros(*stack, layer.width)
        c_0 = h_0 if layer.width == layer.hidden_size else call.data.new_zeros(*stack, layer.hidden_size)
    run = backends.load(route.backend).run
    return run(call.data, call.form.batch_sizes, (h_0, c_0), call.params, call.options)


def _at_once_by_kernels(call: Checked, route: Route, module: torch.nn.Module | None) -> bool:
    """Whether the backend's kernels run all layers at once: nothing is wanted of what lies between them."""
    options = call.options
    if options.num_layers == 1 or route.rows is None or route.way is not Way.EAGER:
        return False
    if (options.dropout and options.train) or call.cells or recording.watched(module):
        return False
    if route.layer.training:  # layers below the first that needs a gradient keep nothing, one by one
        first = (call.data, *call.states(0), *call.of_layer(call.params, 0))
        if not any(each is not None and each.requires_grad for each in first):
            return False
    return stack.at_once(route.backend, route.layer, options.num_layers, route.rows)


def _stack(call: Checked, route: Route, module: torch.nn.Module | None) -> tuple[Tensor, Tensor, Tensor]:
    """output, h_n, c_n of all layers, at once."""
    assert route.rows is not None
    layer, last, calls = route.layer, call.options.num_layers - 1, []
    for index in range(last + 1):
        by_row = call.form.batch_first and index == last
        rows = route.rows if by_row == route.rows.batch_first else replace(route.rows, batch_first=by_row)
        weights = Weights.by_direction(call.of_layer(call.params, index), layer.directions) if index else call.first
        calls.append(Call(layer, rows, call.data, *call.states(index), weights, call.reset))
        layer = layer if index else layer.after()
    return stack.layers(route.backend, calls, [recording.source(module, index) for index in range(last + 1)])


def _layer_by_layer(
    call: Checked, route: Route, module: torch.nn.Module | None
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """output, h_n, c_n, and the cells of the layers for which they were requested."""
    output, layer, options, form = call.data, route.layer, call.options, call.form
    h_ns, c_ns, cells = [], [], []
    for index in range(options.num_layers):
        last = index == options.num_layers - 1
        wanted = call.cells == "all" or (last and bool(call.cells))
        by_row = form.batch_first and last  # time first between layers, as in torch: dropout masks depend on it
        params, (h_0, c_0) = call.of_layer(call.params, index), call.states(index)
        if route.rows is None or route.way is Way.GRAPH:
            given = Arguments(
                output, h_0, c_0, call.reset, form.batch_sizes, call.lengths, params, layer.batch, layer.directions,
                by_row, wanted, layer.training, route.backend, layer.segment,
            )  # fmt: skip
            run = transforms.transformed if route.way is Way.TRANSFORMED else transforms.in_graph
            output, h, c, c_all = run(given)
        else:
            rows = route.rows if by_row == route.rows.batch_first else replace(route.rows, batch_first=by_row)
            weights = Weights.by_direction(params, layer.directions) if index else call.first
            source = recording.source(module, index, form.unsorted_indices)
            one = Call(layer, rows, output, h_0, c_0, weights, call.reset)
            output, h, c, c_all = autograd.layer(route.backend, one, wanted, source)
        if options.dropout and options.train and not last:
            output = torch.dropout(output, options.dropout, True)
        h_ns.append(h)
        c_ns.append(c)
        if c_all is not None:
            cells.append(c_all)
        if not last:
            layer = layer.after()
    h_n, c_n = (h_ns[0], c_ns[0]) if len(h_ns) == 1 else (torch.cat(h_ns), torch.cat(c_ns))
    return output, h_n, c_n, cells


def autocast(given: Given) -> Given:
    """Casts the tensors as torch does under autocast: to its dtype, packed calls to that of input."""
    packed, data = isinstance(given.input, PackedSequence), given.data
    dtype = data.dtype if packed else torch.get_autocast_dtype(data.device.type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 or not tensor.is_floating_point() else tensor.to(dtype)

    return given._replace(
        input=given.input._replace(data=cast(data)) if packed else cast(data),
        hx=None if given.hx is None else tuple(map(cast, given.hx)),
        params=[cast(param) for param in given.params],
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
    """One step of an LSTM: ``(h_1, c_1)``, each (B, H) or (H,); ``hx`` None means zeros.

    ``"auto"`` and ``"torch"`` run ATen's fused cell: one step has no recurrence for a kernel to keep in cache.  The
    others run :func:`lstm` over one step.

    Raises ValueError for a wrong rank or an unknown backend, RuntimeError for ranks and sizes that do not fit.
    """
    checks.cell(input, hx, weight_hh.shape[1])
    batched = input.dim() == 2
    if not batched:
        input = input.unsqueeze(0)
        hx = None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
    if backends.own_cell(backend, input.device) is not None:
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

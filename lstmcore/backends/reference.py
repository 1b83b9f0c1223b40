"""The LSTM as a plain, differentiable loop over time: a readable formula, and the path of double backward.

:func:`forward` implements the backend contract of :mod:`lstmcore.kernels` in ordinary torch operations, so autograd
differentiates it any number of times.  The kernels are not tested against it, because both take their arithmetic from
``kernels/cell.py``: the tests compare them with float64 ``torch.nn.LSTM``.

T time, B batch, N tokens: (step, row) pairs, n active rows of one step, I input, H hidden, P projection, D directions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from lstmcore.kernels import cell
from lstmcore.kernels.contract import (
    Call,
    Forward,
    GateStatistics,
    Gradients,
    GradOutputs,
    Layer,
    Needs,
    Rows,
    WeightGradients,
    Weights,
    state_dtype,
)
from lstmcore.kernels.gate_statistics import sampled_rows, statistics


def supports(layer: Layer) -> str | None:
    """None: it runs every layer, on every device."""
    return None


def saves(layer: Layer, room: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Nothing, backward computes forward again; with segments, the h and c that enter each (D, K, B, ·)."""
    if not layer.segment:
        return []
    shape, widths = (layer.directions, layer.segments, layer.batch), (layer.width, layer.hidden_size)
    dtypes = layer.dtype, state_dtype(layer.dtype)
    return [((*shape, width), dtype) for width, dtype in zip(widths, dtypes, strict=True)]


class Trace:
    """What a recording needs from a pass: the norms of the gradients at every state, the gates of some rows.

    The norms are written when the pass is differentiated.
    """

    def __init__(self, call: Call, gate_rows: int) -> None:
        self._rows = rows = call.rows
        self._hooks: list[Any] = []
        starting = rows.batch if rows.batch_sizes is None else int(rows.batch_sizes[0])
        self._sample = torch.tensor(list(sampled_rows(starting, gate_rows)), dtype=torch.int64)
        state, directions, hidden = state_dtype(call.layer.dtype), call.layer.directions, call.layer.hidden_size
        self._norms = call.input.new_zeros((2, directions, rows.steps, rows.batch), dtype=torch.float64)
        self._gates = call.input.new_zeros((3, directions, rows.steps, len(self._sample), hidden), dtype=state)

    def step(self, d: int, t: int, gates: tuple[Tensor, ...], h: Tensor, c: Tensor) -> None:
        """One step of one direction; gates and c (n, H), h (n, P)."""
        sample = self._sample[self._sample < len(h)]
        for k, gate in enumerate(gates):
            self._gates[k, d, t, : len(sample)] = gate.detach()[sample]
        for which, state in enumerate((h, c)):
            if state.requires_grad:
                arrived = functools.partial(self._arrived, self._norms[which, d, t, : len(h)])
                self._hooks.append(state.register_hook(arrived))

    def end(self) -> None:
        """Stops the recording, so that later passes over the same graph are not recorded."""
        for hook in self._hooks:
            hook.remove()

    @staticmethod
    def _arrived(norms: Tensor, grad: Tensor) -> None:
        norms.copy_(torch.linalg.vector_norm(grad.detach(), dim=-1, dtype=torch.float64))

    @property
    def norms(self) -> Tensor:
        """(2, D, T, B), in the caller's order of rows and in the state dtype."""
        norms = self._norms.to(self._gates.dtype)
        order = self._rows.order
        return norms if order is None else norms.index_select(-1, torch.argsort(order).to(norms.device))

    @property
    def gates(self) -> GateStatistics | None:
        """Statistics of the sampled rows; None if there are none."""
        if not len(self._sample):
            return None
        sizes, active = self._rows.batch_sizes, None
        if sizes is not None:
            active = (self._sample < sizes[:, None]).to(self._gates.device)
        return statistics(self._gates, active)


class _Start(NamedTuple):
    """A call as the loop takes it: step by step, rows sorted."""

    inputs: Sequence[Tensor] | Mapping[int, Tensor]  # by step, (n, I)
    resets: Sequence[Tensor | None]  # T of (n, 1)
    h_0: Tensor  # (D, B, P)
    c_0: Tensor  # (D, B, H)

    @staticmethod
    def of(call: Call) -> _Start:
        rows, input = call.rows, call.input
        h_0 = input.new_zeros(call.layer.h_shape) if call.h_0 is None else call.h_0
        c_0 = input.new_zeros(call.layer.c_shape) if call.c_0 is None else call.c_0
        resets = [None] * rows.steps if call.reset is None else rows.split(call.reset[..., None])
        return _Start(rows.split(input), resets, _sorted(rows, h_0), _sorted(rows, c_0))


class _Steps(NamedTuple):
    """What the loop computes, by step."""

    h: dict[int, Tensor]  # (n, P)
    c: dict[int, Tensor]  # (n, H), state dtype


class _EachStep(NamedTuple):
    """The gradients that arrive at every step of one direction."""

    h: list[Tensor] | None  # T of (n, P)
    c: list[Tensor] | None  # T of (n, H)

    @staticmethod
    def of(rows: Rows, grads: GradOutputs, layer: Layer, d: int) -> _EachStep:
        P, H = layer.width, layer.hidden_size
        dy = None if grads.output is None else rows.split(grads.output[..., d * P : (d + 1) * P])
        return _EachStep(dy, None if grads.cells is None else rows.split(grads.cells[..., d * H : (d + 1) * H]))

    def at(self, steps: _Steps) -> Iterator[tuple[Tensor, Tensor]]:
        """The states of ``steps``, each with the gradient that arrives there."""
        for states, arrived in zip(steps, self, strict=True):
            if arrived is not None:
                yield from ((state, arrived[t]) for t, state in states.items())


def _ends(rows: Rows, grads: GradOutputs, like: tuple[Tensor, ...], d: int) -> tuple[Tensor, ...]:
    """The gradients of the last h and c of one direction, sorted, in the dtypes of ``like``; zeros if not used."""
    return tuple(
        each.new_zeros(each.shape[2:]) if grad is None else _sorted(rows, grad)[d].to(each.dtype)
        for grad, each in zip(grads[1:3], like, strict=True)
    )


def _sorted(rows: Rows, state: Tensor) -> Tensor:
    return state if rows.order is None else state.index_select(1, rows.order.to(state.device))


def _unsorted(rows: Rows, state: Tensor) -> Tensor:
    return state if rows.order is None else state.index_select(1, torch.argsort(rows.order).to(state.device))


def _times(layer: Layer, d: int, segment: int) -> list[range]:
    """The steps of a direction in its order, segment by segment; ``segment`` 0: all in one."""
    T, length = layer.steps, segment or layer.steps
    firsts = range(0, T, length)
    if d == 0:
        return [range(first, min(first + length, T)) for first in firsts]
    return [range(T - 1 - first, max(T - 1 - first - length, -1), -1) for first in firsts]


def forward(call: Call, *, save: bool = False, cells: bool = False, trace: Trace | None = None) -> Forward:
    """One layer, differentiable in every floating-point tensor; ``save`` keeps borders if there are segments.

    16-bit types compute in float32 and round where the kernels do: h_t, because the next step and the caller read it.
    ``trace`` records gates and norms on the way.
    """
    call = call._replace(rows=call.rows.on_host())
    rows, start, layer = call.rows, _Start.of(call), call.layer
    every: list[_Steps] = []
    last: list[tuple[Tensor, Tensor]] = []
    borders: list[tuple[Tensor, Tensor]] = []
    for d, weights in enumerate(call.weights):
        every.append(_Steps({}, {}))
        h, c = start.h_0[d], start.c_0[d].to(state_dtype(layer.dtype))
        for times in _times(layer, d, layer.segment * save):
            borders.append((h, c))
            h, c = _direction(start, h, c, weights, times, every[-1], d, trace)
        last.append((h, c))
    h_n, c_n = (_unsorted(rows, torch.stack(each)) for each in zip(*last, strict=True))
    output = torch.cat([rows.join([steps.h[t] for t in range(rows.steps)]) for steps in every], dim=-1)
    all_cells = None
    if cells:
        all_cells = torch.cat([rows.join([steps.c[t] for t in range(rows.steps)]) for steps in every], dim=-1)
    saved: tuple[Tensor, ...] = ()
    if save and layer.segment:
        saved = tuple(torch.stack(each).unflatten(0, (layer.directions, -1)) for each in zip(*borders, strict=True))
    return Forward(output, h_n, c_n.to(call.input.dtype), all_cells, saved)


def backward(call: Call, grads: GradOutputs, output: Tensor, saved: tuple[Tensor, ...], needs: Needs) -> Gradients:
    """See the contract; computes forward again and differentiates it; ``output`` is not used.

    In grad mode the gradients have a graph of their own, so they can be differentiated.
    """
    call = call._replace(rows=call.rows.on_host())
    trace = Trace(call, needs.gate_rows) if needs.norms or needs.gate_rows else None
    if call.layer.segment and saved and not torch.is_grad_enabled():
        result = _by_segments(call, grads, saved, needs, trace)
    else:
        result = differentiate(functools.partial(forward, trace=trace), call, grads, needs)
    if trace is None:
        return result
    trace.end()
    return result._replace(norms=trace.norms if needs.norms else None, gates=trace.gates)


def differentiate(forward: Callable[..., Forward], call: Call, grads: GradOutputs, needs: Needs) -> Gradients:
    """The gradients of ``forward``, by autograd; with a graph of their own in grad mode."""
    reset, *tensors = call.tensors

    def run(*values: Tensor | None) -> tuple[Tensor | None, ...]:
        own = Call.with_tensors(call.layer, call.rows, (reset, *values))
        return forward(own, cells=grads.cells is not None)[:4]

    found = pull(run, tensors, grads)
    wanted = [needs.input, needs.h_0, needs.c_0, *[needs.weights] * (len(tensors) - 3)]
    result = [grad if want else None for grad, want in zip(found, wanted, strict=True)]
    width = len(Weights._fields)
    weights = tuple(WeightGradients(*result[at : at + width]) for at in range(3, len(result), width))
    return Gradients(result[0], result[1], result[2], weights)


def _by_segments(
    call: Call, grads: GradOutputs, saved: tuple[Tensor, ...], needs: Needs, trace: Trace | None
) -> Gradients:
    """The gradients with the graph of one segment at a time; ``saved``: the h and c that enter each (D, K, B, ·)."""
    rows, layer, start = call.rows, call.layer, _Start.of(call)
    dx = [torch.zeros_like(x) for x in start.inputs]  # type: ignore[arg-type]
    states: list[Sequence[Tensor]] = []
    weights: list[WeightGradients] = []
    for d, parameters in enumerate(call.weights):
        leaves = Weights(*(None if w is None else _leaf(w.to(saved[1].dtype)) for w in parameters))  # type: ignore[arg-type]
        present = [w for w in leaves if w is not None]
        sums = [torch.zeros_like(w) for w in present]
        arrived, ends = _EachStep.of(rows, grads, layer, d), _ends(rows, grads, saved, d)
        for k, times in reversed(list(enumerate(_times(layer, d, layer.segment)))):
            xs, steps = {t: _leaf(start.inputs[t]) for t in times}, _Steps({}, {})
            h, c = _leaf(saved[0][d, k]), _leaf(saved[1][d, k])
            with torch.enable_grad():
                last = _direction(start._replace(inputs=xs), h, c, leaves, times, steps, d, trace)
            outs, given = zip(*zip(last, ends, strict=True), *arrived.at(steps), strict=True)
            found = torch.autograd.grad(outs, [h, c, *present, *xs.values()], given, materialize_grads=True)
            ends = found[:2]
            for total, grad in zip((*sums, *(dx[t] for t in times)), found[2:], strict=True):
                total += grad
        states.append(ends)
        each = iter(sums)
        weights.append(WeightGradients(*(None if w is None else next(each).to(w.dtype) for w in parameters)))
    h_0, c_0 = (_unsorted(rows, torch.stack(each)) for each in zip(*states, strict=True))
    return Gradients(
        rows.join(dx) if needs.input else None,
        h_0 if needs.h_0 else None,
        c_0.to(layer.dtype) if needs.c_0 else None,
        tuple(weights) if needs.weights else (WeightGradients(),) * layer.directions,
    )


def pull(
    run: Callable[..., Sequence[Tensor | None]], tensors: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of ``tensors`` from those of the outputs of ``run``; with a graph of their own in grad mode."""
    again = torch.is_grad_enabled()
    # Every tensor enters through an alias of its own, which stops the walk back at this layer: without it the gradient
    # with respect to ``input`` would include the paths that lead from ``input`` to ``h_0`` outside the layer.
    aliases = [
        tensor if tensor is None else tensor.view_as(tensor) if again and tensor.requires_grad else _leaf(tensor)
        for tensor in tensors
    ]
    with torch.enable_grad():
        outputs = run(*aliases)
    used = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out is not None and grad is not None]
    leaves = [alias for alias in aliases if alias is not None]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in used],
            leaves,
            [grad for _, grad in used],
            create_graph=again,
            materialize_grads=True,
        )
    )
    return [None if alias is None else next(found) for alias in aliases]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _direction(
    start: _Start,
    h: Tensor,  # (B, P)
    c: Tensor,  # (B, H), state dtype
    weights: Weights,
    times: range,  # the steps, in the direction's order
    steps: _Steps,  # out
    d: int,  # the direction
    trace: Trace | None,
) -> tuple[Tensor, Tensor]:
    """The loop: writes every h_t and c_t to ``steps``; the state of every row after the last."""
    dtype, state, inputs = h.dtype, c.dtype, start.inputs
    w_ih, w_hh, b_ih, b_hh, w_hr = (None if w is None else w.to(state) for w in weights)
    assert w_ih is not None  # optional only as a gradient, and so is w_hh
    assert w_hh is not None
    for t in times:
        n = inputs[t].shape[0]  # rows are sorted: the first n are active, the others keep their state
        h_prev, c_prev = h[:n], c[:n]
        restart = start.resets[t]
        if restart is not None:
            h_prev, c_prev = h_prev.masked_fill(restart, 0), c_prev.masked_fill(restart, 0)
        z = linear(inputs[t].to(state), w_ih, b_ih) + linear(h_prev.to(state), w_hh, b_hh)  # (n, 4H)
        z_i, z_f, z_g, z_o = z.chunk(4, dim=-1)
        i, f, g, o = z_i.sigmoid(), z_f.sigmoid(), z_g.tanh(), z_o.sigmoid()
        c_t = cell.cell_state(i, f, g, c_prev)
        h_t = cell.hidden_state(o, c_t.tanh())
        h_t = (h_t if w_hr is None else linear(h_t, w_hr)).to(dtype)
        if trace is not None:
            trace.step(d, t, (i, f, o), h_t, c_t)
        steps.h[t], steps.c[t] = h_t, c_t
        h, c = torch.cat([h_t, h[n:]]), torch.cat([c_t, c[n:]])
    return h, c

"""The LSTM as a plain, differentiable loop over time: a readable formula, and the path of double backward.

:func:`forward` implements the backend contract of :mod:`lstmcore.kernels` in ordinary torch operations, so autograd
differentiates it any number of times.  The kernels are not tested against it, because both take their arithmetic from
``kernels/cell.py``: the tests compare them with float64 ``torch.nn.LSTM``.

T time, B batch, N tokens: (step, row) pairs, n active rows of one step, I input, H hidden, P projection, D directions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

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
    WeightGradients,
    Weights,
    state_dtype,
)
from lstmcore.kernels.gate_statistics import sampled_rows, statistics


def supports(layer: Layer) -> str | None:
    """None: it runs every layer, on every device."""
    return None


def saves(layer: Layer, room: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Nothing: backward computes forward again."""
    return []


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


def forward(call: Call, *, save: bool = False, cells: bool = False, trace: Trace | None = None) -> Forward:
    """One layer, differentiable in every floating-point tensor; ``save`` is accepted and has no effect.

    16-bit types compute in float32 and round where the kernels do: h_t, because the next step and the caller read it.
    ``trace`` records gates and norms on the way.
    """
    rows, input = call.rows.on_host(), call.input
    h_0 = input.new_zeros(call.layer.h_shape) if call.h_0 is None else call.h_0
    c_0 = input.new_zeros(call.layer.c_shape) if call.c_0 is None else call.c_0
    if rows.order is not None:
        h_0, c_0 = h_0.index_select(1, rows.order.to(h_0.device)), c_0.index_select(1, rows.order.to(c_0.device))
    inputs = rows.split(input)
    resets = [None] * rows.steps if call.reset is None else rows.split(call.reset[..., None])
    outputs = [
        _direction(inputs, h, c, direction, resets, trace, d)
        for d, (h, c, direction) in enumerate(zip(h_0, c_0, call.weights, strict=True))
    ]
    h_n = torch.stack([h for _, _, h, _ in outputs])
    c_n = torch.stack([c for _, _, _, c in outputs])
    if rows.order is not None:
        unsort = torch.argsort(rows.order).to(h_n.device)
        h_n, c_n = h_n.index_select(1, unsort), c_n.index_select(1, unsort)
    output = torch.cat([rows.join(h) for h, _, _, _ in outputs], dim=-1)
    all_cells = torch.cat([rows.join(c) for _, c, _, _ in outputs], dim=-1) if cells else None
    return Forward(output, h_n, c_n.to(input.dtype), all_cells, ())


def backward(call: Call, grads: GradOutputs, output: Tensor, saved: tuple[Tensor, ...], needs: Needs) -> Gradients:
    """See the contract; computes forward again and differentiates it; ``output`` and ``saved`` are not used.

    In grad mode the gradients have a graph of their own, so they can be differentiated.
    """
    if not needs.norms and not needs.gate_rows:
        return differentiate(forward, call, grads, needs)
    call = call._replace(rows=call.rows.on_host())
    trace = Trace(call, needs.gate_rows)
    result = differentiate(functools.partial(forward, trace=trace), call, grads, needs)
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
    inputs: Sequence[Tensor],  # T of (n, I)
    h: Tensor,  # (B, P)
    c: Tensor,  # (B, H)
    weights: Weights,
    resets: Sequence[Tensor | None],  # T of (n, 1)
    trace: Trace | None,
    d: int,  # the direction
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """The loop: every h_t (n, P) and c_t (n, H) in the order of time, then the last state of every row."""
    dtype, state = h.dtype, state_dtype(h.dtype)
    w_ih, w_hh, b_ih, b_hh, w_hr = (None if w is None else w.to(state) for w in weights)
    assert w_ih is not None  # optional only as a gradient, and so is w_hh
    assert w_hh is not None
    c = c.to(state)
    hs, cs = list(inputs), list(inputs)  # every entry is overwritten
    for t in range(len(inputs) - 1, -1, -1) if d == 1 else range(len(inputs)):
        n = inputs[t].shape[0]  # rows are sorted: the first n are active, the others keep their state
        h_prev, c_prev = h[:n], c[:n]
        restart = resets[t]
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
        hs[t], cs[t] = h_t, c_t
        h, c = torch.cat([h_t, h[n:]]), torch.cat([c_t, c[n:]])
    return hs, cs, h, c

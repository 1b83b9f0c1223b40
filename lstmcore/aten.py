"""ATen's LSTM, as ``torch.nn.LSTM`` runs it, as a backend of the contract: one layer, for the operators of ``ops.py``.

An ordinary call of ``backend="torch"`` takes :func:`run` from here: ATen gets all layers at once and keeps a graph of
its own.

A graph that is compiled or exported has a node a layer, and what ATen keeps for its backward cannot be told beforehand:
so :func:`forward` keeps nothing, and :func:`backward` computes it anew.

B batch, N alive rows over all steps, T time, I input, H hidden, P projection, L layers, D directions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import _VF, Tensor

from lstmcore import reference
from lstmcore.kernels.contract import Forward, Gradients, Layer, Needs, Rows, Weights, directions_of


def supports(layer: Layer) -> str | None:
    """None: it runs every layer, on every device."""
    return None


def saves(layer: Layer, room: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Nothing: backward computes forward anew."""
    return []


def run(
    input: Tensor,  # (T, B, I), or (N, I) with batch_sizes
    batch_sizes: Tensor | None,  # (T,)
    hx: tuple[Tensor, Tensor],  # (L * D, B, P), (L * D, B, H)
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.lstm``: output, h_n, c_n."""
    options = (has_biases, num_layers, dropout, train, bidirectional)
    if batch_sizes is None:
        return _VF.lstm(input, hx, params, *options, False)  # type: ignore[call-overload]
    return _VF.lstm(input, batch_sizes, hx, params, *options)  # type: ignore[call-overload]


def differentiable_again(
    results: tuple[Tensor, Tensor, Tensor],
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: tuple[Tensor, Tensor],
    params: Sequence[Tensor],
    *options: Any,
) -> None:
    """Lets cuDNN's gradient, of the :func:`run` that gave ``results``, be differentiated in turn.

    ATen does so by itself on the CPU.  For cuDNN a hook on its node in the graph puts, under ``create_graph=True``, the
    reference's gradient in the place of its own; not where there is dropout between layers.
    """
    node = results[0].grad_fn
    for _ in range(3):  # views may be in between
        if node is not None and node.name() == "CudnnRnnBackward0":
            node.register_hook(functools.partial(_again, input, batch_sizes, hx, params, options))
            return
        node = None if node is None or not node.next_functions else node.next_functions[0][0]


def _again(
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: tuple[Tensor, Tensor],
    params: Sequence[Tensor],
    options: tuple[Any, ...],
    grad_inputs: tuple[Tensor | None, ...],  # of input, the parameters, h_0 and c_0; None where not needed
    grad_outputs: tuple[Tensor | None, ...],  # of output, h_n, c_n, and of what else the node puts out
) -> tuple[Tensor | None, ...] | None:
    _, num_layers, dropout, train, bidirectional = options
    masked = dropout and train and num_layers > 1  # by masks that cuDNN alone knows: its gradient stays as it is
    if masked or not torch.is_grad_enabled():
        return None
    directions = 2 if bidirectional else 1
    steps, batch = input.shape[:2]
    rows = Rows(steps, batch) if batch_sizes is None else Rows.from_packed(batch_sizes)

    def run(output: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        h_ns, c_ns, each = [], [], len(params) // num_layers
        for index in range(num_layers):
            weights = directions_of(rest[index * each : (index + 1) * each], directions)
            states = [state[index * directions : (index + 1) * directions] for state in rest[-2:]]
            result = reference.forward(output, states[0], states[1], weights, rows)
            output = result.output
            h_ns.append(result.h_n)
            c_ns.append(result.c_n)
        return output, torch.cat(h_ns), torch.cat(c_ns)

    grads = [
        None if grad is None else grad.view(like)
        for grad, like in zip(grad_outputs, ((*input.shape[:-1], -1), hx[0].shape, hx[1].shape), strict=False)
    ]
    found = reference.pull(run, (input, *params, *hx), grads)
    return tuple(
        None if grad is None or new is None else new.reshape(grad.shape)
        for new, grad in zip(found, grad_inputs, strict=True)
    )


def forward(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Weights],
    rows: Rows,
    *,
    reset: Tensor | None = None,
    save: bool = False,
    cells: bool = False,
) -> Forward:
    """See the contract, but for what ATen does not have: ``reset``, ``cells`` and ragged rows that are not packed."""
    assert reset is None
    assert not cells
    assert rows.packed or not rows.ragged
    gates, width = weights[0].weight_hh.shape
    if h_0 is None:
        h_0 = input.new_zeros(len(weights), rows.batch, width)
    if c_0 is None:
        c_0 = input.new_zeros(len(weights), rows.batch, gates // 4)
    flat = [param for direction in weights for param in direction if param is not None]
    biases = weights[0].bias_ih is not None
    output, h_n, c_n = run(input, rows.batch_sizes, (h_0, c_0), flat, biases, 1, 0.0, False, len(weights) == 2)
    return Forward(output, h_n, c_n, None, ())


def backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    *,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Weights],
    output: Tensor,
    saved: tuple[Tensor, ...],
    rows: Rows,
    reset: Tensor | None = None,
    needs: Needs = Needs(),  # noqa: B008 (immutable)
    norms: bool = False,
    gate_rows: int = 0,
) -> Gradients:
    """See the contract: by computing forward anew and differentiating it; nothing can be recorded."""
    assert not norms
    assert not gate_rows
    grads = (grad_output, grad_h_n, grad_c_n, grad_cells)
    return reference.differentiate(forward, grads, input, h_0, c_0, weights, rows, reset, needs)

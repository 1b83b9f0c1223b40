"""ATen's LSTM, as ``torch.nn.LSTM`` runs it, as a backend of the contract: one layer, for the operators of ``ops.py``.

An ordinary call of ``backend="torch"`` uses :func:`run`: ATen gets all layers at once and keeps a graph of its own.

A graph that is compiled or exported has one node per layer, and what ATen saves for its backward is not known in
advance: so :func:`forward` saves nothing, and :func:`backward` computes it again.

B batch, N tokens: (step, row) pairs, T time, I input, H hidden, P projection, L layers, D directions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import _VF, Tensor

from lstmcore.backends import reference
from lstmcore.checks import Options
from lstmcore.kernels.contract import Call, Forward, Gradients, GradOutputs, Layer, Needs, Rows, Weights


def supports(layer: Layer) -> str | None:
    """None: it runs every layer, on every device."""
    return None


def saves(layer: Layer, room: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Nothing: backward computes forward again."""
    return []


def run(
    input: Tensor,  # (T, B, I), or (N, I) with batch_sizes
    batch_sizes: Tensor | None,  # (T,)
    hx: tuple[Tensor, Tensor],  # (L * D, B, P), (L * D, B, H)
    params: Sequence[Tensor],
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.lstm``: output, h_n, c_n; time comes first, regardless of the options."""
    if batch_sizes is None:
        results = _VF.lstm(input, hx, params, *options[:5], False)  # type: ignore[call-overload]
    else:
        results = _VF.lstm(input, batch_sizes, hx, params, *options[:5])  # type: ignore[call-overload]
    if results[0].is_cuda and results[0].requires_grad:
        _differentiable_again(results, input, batch_sizes, hx, params, options)
    return results


def _differentiable_again(
    results: tuple[Tensor, Tensor, Tensor],
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: tuple[Tensor, Tensor],
    params: Sequence[Tensor],
    options: Options,
) -> None:
    """Makes cuDNN's gradient of the :func:`run` that returned ``results`` differentiable.

    ATen's gradient on the CPU already is.  For cuDNN a hook on its node in the graph replaces its gradient under
    ``create_graph=True`` by the reference's, unless there is dropout between layers.
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
    options: Options,
    grad_inputs: tuple[Tensor | None, ...],  # of input, the parameters, h_0 and c_0; None where not needed
    grad_outputs: tuple[Tensor | None, ...],  # of output, h_n, c_n, and of the node's other outputs
) -> tuple[Tensor | None, ...] | None:
    L, D = options.num_layers, options.directions
    masked = options.dropout and options.train and L > 1  # only cuDNN knows the masks: its gradient stays as it is
    if masked or not torch.is_grad_enabled():
        return None
    steps, batch = input.shape[:2]
    rows = Rows(steps, batch) if batch_sizes is None else Rows.from_packed(batch_sizes)

    def run(output: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        h_ns, c_ns, each = [], [], len(params) // L
        for index in range(L):
            weights = Weights.by_direction(rest[index * each : (index + 1) * each], D)
            h_0, c_0 = (state[index * D : (index + 1) * D] for state in rest[-2:])
            result = reference.forward(Call.of(output, h_0, c_0, weights, rows))
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


def forward(call: Call, *, save: bool = False, cells: bool = False) -> Forward:
    """See the contract, without what ATen does not have: ``reset``, ``cells``, and ragged rows that are not packed."""
    layer, rows = call.layer, call.rows
    assert call.reset is None
    assert not cells
    assert rows.packed or not rows.ragged
    h_0 = call.input.new_zeros(layer.h_shape) if call.h_0 is None else call.h_0
    c_0 = call.input.new_zeros(layer.c_shape) if call.c_0 is None else call.c_0
    params = [param for direction in call.weights for param in direction if param is not None]
    options = Options(layer.bias, bidirectional=layer.directions == 2)
    output, h_n, c_n = run(call.input, rows.batch_sizes, (h_0, c_0), params, options)
    return Forward(output, h_n, c_n, None, ())


def backward(call: Call, grads: GradOutputs, output: Tensor, saved: tuple[Tensor, ...], needs: Needs) -> Gradients:
    """See the contract; computes forward again and differentiates it; nothing can be recorded."""
    assert not needs.norms
    assert not needs.gate_rows
    return reference.differentiate(forward, call, grads, needs)

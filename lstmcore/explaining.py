"""Which backend a call would run, and why, without running it.

T time, B batch, I input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lstmcore import backends, checks, recompute
from lstmcore.backends import AUTO, Choice, Situation
from lstmcore.checks import Given, Options

_CELL = "ATen's fused cell: one step has no recurrence for a kernel to keep in cache"


def explain(module: torch.nn.Module, input: Tensor | PackedSequence, *, extended: bool = False) -> Choice:
    """Which backend ``module(input)`` would run, and why; print the result.

    Args:
        module: an :class:`lstmcore.LSTM` or ``LSTMCell``, or one of ``torch.nn`` (taken as ``backend="auto"``).
        input: what it would be called with: ``(T, B, I)``, ``(B, T, I)`` when batch_first, ``(T, I)``, or packed;
            ``(B, I)`` or ``(I,)`` of a cell.
        extended: the call would pass ``lengths``, ``reset`` or ``return_cells``, or be recorded.

    Raises:
        RuntimeError: the module names a backend that cannot run the call.
        ValueError, RuntimeError: as the call itself, if the input does not fit the module.
    """
    m: Any = module
    backend = getattr(module, "backend", AUTO)
    params = list(module.parameters())
    if isinstance(module, torch.nn.RNNCellBase):
        data: Any = input
        checks.cell(data, None, m.hidden_size)
        if (own := backends.own_cell(backend, data.device)) is not None:
            return Choice(own, ((own, _CELL),))
        given = Given(data.view(1, -1, data.shape[-1]), None, params, Options(m.bias))
    else:
        options = Options(m.bias, m.num_layers, m.dropout, m.training, m.bidirectional, m.batch_first)
        keep = recompute.asked(getattr(m, "recompute", None), getattr(m, "memory_budget", None))
        weights = [getattr(m, name) for name in m._flat_weights_names]
        given = Given(input, None, weights, options, recompute=keep)
    call = checks.call(given)
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (given.data, *params))
    segment = recompute.segment(given.recompute, call.layer, call.options.num_layers) if training else 0
    layer = call.layer.as_called(call.form.packed, training, segment)
    situation = Situation.now(extended or segment > 0)
    return backends.chosen(backend, layer, call.options.num_layers, situation).with_threads()

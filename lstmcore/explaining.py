"""Which backend a call of one module would run, and why, without running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lstmcore import backends, checks, functional, recompute
from lstmcore.backends import AUTO, Choice, Situation
from lstmcore.checks import Given, Options
from lstmcore.module import LSTM, LSTMCell

_CELL = "ATen's fused cell: one step has no recurrence for a kernel to keep in cache"


def choose(module: nn.Module, input: Tensor | PackedSequence, *, extended: bool = False) -> Choice:
    """The backend that ``module(input)`` would run; a module of ``torch.nn`` is taken as one of ours with "auto".

    Raises what :func:`lstmcore.explain` does.
    """
    backend: str = module.backend if isinstance(module, (LSTM, LSTMCell)) else AUTO
    if isinstance(module, nn.RNNCellBase):
        checks.cell(input, None, module.hidden_size)  # type: ignore[arg-type]
        if (own := backends.own_cell(backend, input.data.device)) is not None:
            return Choice(own, ((own, _CELL),))
        given = _cell(module, input.data)
    else:
        given = _layers(module, input)
    call = checks.call(functional.autocast(given) if checks.is_autocast(given.data) else given)
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (given.data, *given.params))
    segment = recompute.segment(given.recompute, call.layer, call.options.num_layers) if training else 0
    layer = call.layer.as_called(call.form.packed, training, segment)
    situation = Situation.now(layer, extended or segment > 0)
    return backends.chosen(backend, layer, call.options.num_layers, situation).with_threads()


def _cell(module: Any, data: Tensor) -> Given:
    params = [module.weight_ih, module.weight_hh, *((module.bias_ih, module.bias_hh) if module.bias else ())]
    return Given(data.view(1, -1, data.shape[-1]), None, params, Options(module.bias))


def _layers(module: Any, input: Tensor | PackedSequence) -> Given:
    m = module
    options = Options(m.bias, m.num_layers, m.dropout, m.training, m.bidirectional, m.batch_first)
    keep = recompute.asked(m.recompute, m.memory_budget) if isinstance(m, LSTM) else recompute.Recompute()
    return Given(input, None, [getattr(m, name) for name in m._flat_weights_names], options, recompute=keep)

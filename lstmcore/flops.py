"""How many floating-point operations an LSTM takes, for tools that count them operator by operator.

An LSTM multiplies each token by each of its weight matrices: 2 · 4H · (I + P) operations a token and direction, a
multiplication and an addition each, and 2 · P · H more for the projection.  Like the counters, these formulas leave out
what is not a product of matrices.  Rows of padding count where their lengths are known.

- ``torch.utils.flop_counter.FlopCounterMode``: nothing to do.  Its table gets the operators of ``ops.py``, and those of
  oneDNN and cuDNN that ``torch.nn.LSTM`` consists of, which it counts as nothing by itself.
- fvcore: ``FlopCountAnalysis(model, x).set_op_handle(**lstmcore.flops.FVCORE)``; by itself it has no handle for an
  LSTM, and says so.  It counts a multiplication with its addition as one.

T time, B batch, N tokens: (step, row) pairs, I input, H hidden, P projection (H without one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lstmcore import routing
from lstmcore.kernels.contract import Weights
from lstmcore.ops import Arguments, BackwardArguments

__all__ = ["FVCORE"]


def _products(tokens: Any, matrices: Sequence[Tensor]) -> Any:
    """Operations of the product of each token with each of these; biases among them do not count."""
    return 2 * tokens * sum(each.numel() for each in matrices if each.dim() == 2)


# The operators of ops.py


def _tokens(given: Arguments) -> tuple[Any, Any]:
    """N, and how many rows have any: of padded rows as many as the tensors hold, unless their lengths can be read."""
    if given.packed:
        return given.input.shape[0], given.batch
    lengths = given.lengths
    if lengths is None or not routing.has_values(lengths) or lengths.device.type == "meta":
        return given.input.shape[0] * given.input.shape[1], given.batch
    return int(lengths.sum()), int((lengths > 0).sum())


def _layer(*args: Any, out_val: Any = None, _node_meta: Any = None, **named: Any) -> Any:
    given = Arguments(*args, **named)
    return _products(_tokens(given)[0], given.weights)


def _layer_backward(*args: Any, out_val: Any = None, _node_meta: Any = None) -> Any:
    """The products that the requested gradients need, and forward's where it is computed again."""
    _, needs, kept, given = BackwardArguments.unpack(args)
    tokens, rows = _tokens(given)
    saved = kept[1 + given.cells :]
    flops = 0 if saved and not given.segment else _products(tokens, given.weights)
    if needs.weights:
        flops += _products(tokens, given.weights)
    for weight_ih, weight_hh, _, _, weight_hr in Weights.by_direction(given.weights, given.directions):
        flops += _products(tokens, [weight_ih] * needs.input + ([] if weight_hr is None else [weight_hr]))
        flops += _products(tokens if needs.h_0 else tokens - rows, [weight_hh])  # from a first step on, only to h_0
    return flops


# ATen's


def _onednn(input: Tensor, weight_ih: Tensor, weight_hh: Tensor, *_: Any, **__: Any) -> Any:
    """``mkldnn_rnn_layer``: one layer, one direction; input (T, B, I)."""
    return _products(input.shape[0] * input.shape[1], (weight_ih, weight_hh))


def _onednn_backward(*args: Any, **named: Any) -> Any:
    """All gradients, whichever are needed."""
    return 2 * _onednn(*args, **named)


def _cudnn(input: Tensor, weights: Sequence[Tensor], *_: Any, **__: Any) -> Any:
    """``_cudnn_rnn``: all layers and directions; input (T, B, I), (B, T, I) or (N, I)."""
    return _products(math.prod(input.shape[:-1]), weights)


def _cudnn_backward(*args: Any, **named: Any) -> Any:
    """The gradients of inputs and states, and those of the weights if the last argument asks for them."""
    return _cudnn(*args) * (2 if args[-1][3] else 1)


def formulas() -> dict[Any, Callable[..., Any]]:
    """By operator, what ``FlopCounterMode`` takes: functions of the arguments of a call, and of ``out_val``."""
    aten, own = torch.ops.aten, torch.ops.lstmcore
    return {
        own.layer: _layer, own.layer_backward: _layer_backward,
        aten.mkldnn_rnn_layer: _onednn, aten.mkldnn_rnn_layer_backward: _onednn_backward,
        aten._cudnn_rnn: _cudnn, aten._cudnn_rnn_backward: _cudnn_backward,
    }  # fmt: skip


def register() -> None:
    """Enters the formulas into torch's table of them, from which each ``FlopCounterMode`` starts."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for operator, formula in formulas().items():
        if operator not in flop_registry:  # a newer torch may know its own
            register_flop_formula(operator, get_raw=True)(formula)


# What torch.jit traced, for fvcore: values with shapes instead of tensors


def _sizes(value: Any) -> list[int]:
    return value.type().sizes()


def _traced_lstm(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """``aten::lstm`` of (input, hx, params, ...) or, packed, (data, batch_sizes, hx, params, ...)."""
    packed = isinstance(inputs[1].type(), torch.TensorType)
    params = inputs[3 if packed else 2].node().inputs()
    return math.prod(_sizes(inputs[0])[:-1]) * sum(math.prod(size) for size in map(_sizes, params) if len(size) == 2)


FVCORE: dict[str, Callable[[Sequence[Any], Sequence[Any]], int]] = {"aten::lstm": _traced_lstm}
"""By operator, for ``set_op_handle`` of fvcore's ``FlopCountAnalysis``: multiply-adds in one forward pass."""

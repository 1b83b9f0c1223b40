"""A layer in ONNX: ``torch.onnx.export`` replaces the operator ``layer`` of ``ops.py`` by it.

ONNX has an operator LSTM for which runtimes have kernels: a layer becomes one node, with both directions.  What it does
not have (projection, reset, the c_t of every step) ``backend="reference"`` exports as plain operators, unrolled over a
fixed number of steps.

Operators of the graph bring the weights into ONNX's order.  For small weights (8192 entries) the exporter's optimizer
computes them in advance; onnxruntime computes the others when it loads the model.  To store those in the file, too:
``onnxscript.optimizer.optimize(program.model, input_size_limit=2**40, output_size_limit=2**40)``.

The node's placeholder in torch computes nothing, so ``torch.onnx.export(verify=True)``, which runs it, finds a
difference: compare with the model itself.

T time, B batch, I input, H hidden, P projection (H without one), D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.onnx import ops

from lstmcore.backends import REFERENCE, reference
from lstmcore.kernels.contract import GATES, Call, Rows, Weights
from lstmcore.ops import Arguments

_OPSET = 14  # of the LSTM operator; opset 22 added bfloat16 to it, which the exporter's default does not reach
_DTYPES = (torch.float32, torch.float64, torch.float16)


def layer(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Replaces ``torch.ops.lstmcore.layer`` without ``save``: output, h_n, c_n, [cells].

    Raises ValueError for calls that cannot be exported.
    """
    given = Arguments(*args)
    if given.packed:
        raise ValueError("a PackedSequence cannot be exported to ONNX: pass padded input, and lengths=")
    weights = Weights.by_direction(given.weights, given.directions)
    if given.backend == REFERENCE:
        return _unrolled(given, weights)
    _refuse(given, weights)
    return _node(given, weights)


def _refuse(given: Arguments, weights: Sequence[Weights]) -> None:
    """Raises ValueError for features that ONNX's LSTM does not have."""
    names = {
        "projection (proj_size)": weights[0].weight_hr is not None,
        "reset": given.reset is not None,
        "return_cells": given.cells,
    }
    missing = [name for name, wanted in names.items() if wanted]
    if missing:
        raise ValueError(
            f"ONNX's LSTM has no {', no '.join(missing)}: backend='reference' exports plain operators instead, "
            f"unrolled over a fixed number of steps{'' if given.lengths is None else ', but not with lengths='}"
        )
    if given.input.dtype not in _DTYPES:
        dtype = given.input.dtype
        raise ValueError(f"ONNX's LSTM computes in no {dtype}: convert the model, and its input, with .float()")


def _node(given: Arguments, weights: Sequence[Weights]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """One node for the whole layer."""
    input, h_0, c_0, lengths, directions = given.input, given.h_0, given.c_0, given.lengths, given.directions
    hidden = weights[0].weight_hh.shape[1]

    def ordered(name: str) -> Tensor:
        """A parameter of all directions, with the gates i, f, g, o in ONNX's order i, o, f, g: (D, 4H, ·)."""
        each = [getattr(direction, name) for direction in weights]
        # Slices, not chunks: the exporter's optimizer does not evaluate operators with several outputs.
        gates = [gate for w in each for gate in (w[:hidden], w[3 * hidden :], w[hidden : 3 * hidden])]
        return torch.cat(gates).unflatten(0, (directions, GATES * hidden))

    biased = weights[0].bias_ih is not None
    bias = torch.cat([ordered("bias_ih"), ordered("bias_hh")], 1) if biased else None  # (D, 8H)
    steps, device = input.shape[0], input.device
    if lengths is not None:
        lengths = lengths.to(device, torch.int32)
    state = (directions, given.batch, hidden)
    found = ops.symbolic_multi_out(
        "LSTM",
        (input, ordered("weight_ih"), ordered("weight_hh"), bias, lengths, h_0, c_0),
        {"hidden_size": hidden, "direction": "bidirectional" if directions == 2 else "forward"},
        dtypes=[input.dtype] * 3,
        shapes=[(steps, directions, given.batch, hidden), state, state],
        version=_OPSET,
    )
    # The placeholder's results are always on the CPU; the real ones will be on the runtime's device.
    output, h_n, c_n = found if device.type == "cpu" else [each.to(device) for each in found]
    output = output.squeeze(1) if directions == 1 else output.transpose(1, 2).flatten(2)  # (T, B, D * H)
    if lengths is not None and h_0 is not None and c_0 is not None:
        # ONNX does not define the end of a row without steps: onnxruntime returns zeros, we the initial state.
        some = (lengths > 0)[:, None]
        h_n, c_n = torch.where(some, h_n, h_0), torch.where(some, c_n, c_0)
    return output, h_n, c_n, []


def _unrolled(given: Arguments, weights: tuple[Weights, ...]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The steps one by one, in plain operators."""
    if given.lengths is not None:  # their values would decide the operators
        raise ValueError("backend='reference' cannot be exported to ONNX with lengths=: use backend='auto'")
    steps = given.input.shape[0]
    if isinstance(steps, torch.SymInt):
        raise ValueError(
            "backend='reference' is exported step by step, so the number of steps has to be fixed: "
            "leave the dimension of time out of dynamic_shapes"
        )
    call = Call.of(given.input, given.h_0, given.c_0, weights, Rows(steps, given.batch), given.reset)
    result = reference.forward(call, cells=given.cells)
    return result.output, result.h_n, result.c_n, [] if result.cells is None else [result.cells]

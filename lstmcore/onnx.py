"""A layer in ONNX: what ``torch.onnx.export`` puts in the place of the operator ``layer`` of ``ops.py``.

ONNX has an operator LSTM that runtimes have kernels for: it becomes one node a layer, both directions in one.  What it
does not have (projection, reset, the c_t of every step) ``backend="reference"`` exports as plain operators, unrolled
over a fixed number of steps.

The weights are brought into ONNX's order by operators of the graph.  The exporter's optimizer computes those of small
weights (8192 entries) once and for all; onnxruntime computes the others when it loads the model.  To have them in the
file, too: ``onnxscript.optimizer.optimize(program.model, input_size_limit=2**40, output_size_limit=2**40)``.

What stands for the node while torch looks computes nothing, so ``torch.onnx.export(verify=True)``, which runs it, finds
a difference: compare with the model itself.

T time, B batch, I input, H hidden, P projection (H where there is none), D directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.onnx import ops

from lstmcore import reference
from lstmcore.kernels.contract import Rows, Weights, directions_of

_OPSET = 14  # the LSTM that is meant; opset 22 added bfloat16 to it, which the exporter's default does not reach
_DTYPES = (torch.float32, torch.float64, torch.float16)


def layer(
    input: Tensor,  # (T, B, I)
    h_0: Tensor | None,  # (D, B, P); None for zeros
    c_0: Tensor | None,  # (D, B, H); None for zeros
    reset: Tensor | None,  # (T, B), bool
    batch_sizes: Tensor | None,  # of packed rows
    lengths: Tensor | None,  # (B,), any integers
    weights: Sequence[Tensor],
    batch: int,
    directions: int,
    batch_first: bool,
    cells: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """What ``torch.ops.lstmcore.layer`` takes and, without ``save``, returns: output, h_n, c_n, [cells].

    Raises ValueError for what cannot be exported.
    """
    if batch_sizes is not None:
        raise ValueError("a PackedSequence cannot be exported to ONNX: pass padded input, and lengths=")
    given = directions_of(weights, directions)
    if backend == "reference":
        return _unrolled(input, h_0, c_0, reset, lengths, given, batch, cells)
    names = {
        "projection (proj_size)": given[0].weight_hr is not None,
        "reset": reset is not None,
        "return_cells": cells,
    }
    missing = [name for name, wanted in names.items() if wanted]
    if missing:
        raise ValueError(
            f"ONNX's LSTM has no {', no '.join(missing)}: backend='reference' exports plain operators instead, "
            f"unrolled over a fixed number of steps{'' if lengths is None else ', but not with lengths='}"
        )
    if input.dtype not in _DTYPES:
        raise ValueError(f"ONNX's LSTM computes in no {input.dtype}: convert the model, and its input, with .float()")
    hidden = given[0].weight_hh.shape[1]

    def ordered(name: str) -> Tensor:
        """A parameter of all directions, with the gates i, f, g, o in ONNX's order i, o, f, g: (D, 4H, ·)."""
        each = [getattr(direction, name) for direction in given]
        # Slices, and not chunks: the exporter's optimizer computes nothing that has several outputs.
        gates = [part for w in each for part in (w[:hidden], w[3 * hidden :], w[hidden : 3 * hidden])]
        return torch.cat(gates).unflatten(0, (directions, 4 * hidden))

    biased = given[0].bias_ih is not None
    bias = torch.cat([ordered("bias_ih"), ordered("bias_hh")], 1) if biased else None  # (D, 8H)
    steps, device = input.shape[0], input.device
    if lengths is not None:
        lengths = lengths.to(device, torch.int32)
    state = (directions, batch, hidden)
    found = ops.symbolic_multi_out(
        "LSTM",
        (input, ordered("weight_ih"), ordered("weight_hh"), bias, lengths, h_0, c_0),
        {"hidden_size": hidden, "direction": "bidirectional" if directions == 2 else "forward"},
        dtypes=[input.dtype] * 3,
        shapes=[(steps, directions, batch, hidden), state, state],
        version=_OPSET,
    )
    # The stand-in's results are on the CPU, whatever its inputs; the real one's will be where the runtime computes.
    output, h_n, c_n = found if device.type == "cpu" else [each.to(device) for each in found]
    output = output.squeeze(1) if directions == 1 else output.transpose(1, 2).flatten(2)  # (T, B, D * H)
    if lengths is not None and h_0 is not None and c_0 is not None:
        # ONNX does not say where a row of no steps ends: onnxruntime's end in zeros, ours where they started.
        some = (lengths > 0)[:, None]
        h_n, c_n = torch.where(some, h_n, h_0), torch.where(some, c_n, c_0)
    return output, h_n, c_n, []


def _unrolled(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    weights: Sequence[Weights],
    batch: int,
    cells: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The steps one by one, in plain operators."""
    if lengths is not None:  # their values would decide which operators there are
        raise ValueError("backend='reference' cannot be exported to ONNX with lengths=: use backend='auto'")
    if isinstance(input.shape[0], torch.SymInt):
        raise ValueError(
            "backend='reference' is exported step by step, so the number of steps has to be fixed: "
            "leave the dimension of time out of dynamic_shapes"
        )
    rows = Rows(input.shape[0], batch)
    result = reference.forward(input, h_0, c_0, weights, rows, reset=reset, cells=cells)
    return result.output, result.h_n, result.c_n, [] if result.cells is None else [result.cells]

"""Lengths on the device, which nobody has checked: the host does not wait to see whether they are in range.

T time, B batch, H hidden, D directions.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..contract import Call
from . import status


def in_range(call: Call) -> tuple[Call, Tensor | None]:
    """The call with lengths from 0 to T, and the rows (B,) whose lengths are not; None if the host knows the lengths.

    Such a row takes part in all steps, so that all of them are NaN, and has no resets, which would remove the NaN.
    """
    rows, reset = call.rows, call.reset
    if rows.lengths is None:
        return call, None
    lengths = rows.lengths.to(torch.int64)
    wrong = (lengths < 0) | (lengths > rows.steps)
    rows = replace(rows, lengths=lengths.masked_fill(wrong, rows.steps))
    return call._replace(rows=rows, reset=None if reset is None else reset & ~wrong), wrong


def admitted(call: Call) -> Call:
    """As :func:`in_range`; a row that is wrong starts with NaN for c_0, and a later call raises an error for it."""
    call, wrong = in_range(call)
    if wrong is None:
        return call
    wrong = wrong[:, None]
    status.note(call.layer.device, wrong)
    c_0 = call.input.new_zeros(call.layer.c_shape) if call.c_0 is None else call.c_0
    return call._replace(c_0=c_0.masked_fill(wrong, torch.nan))

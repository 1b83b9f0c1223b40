"""What a choice of a backend depends on in addition to the layers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lstmcore.kernels.contract import Layer
from lstmcore.kernels.cpu import process, threads
from lstmcore.kernels.precision import tf32


class Situation(NamedTuple):
    """What a choice depends on in addition to the layers; the defaults are those of a graph, which is kept."""

    # the call uses what torch's LSTM does not have: lengths, reset, cells, recompute, a recording
    extended: bool = False
    opaque: bool = False  # its tensors are of a subclass, or torch.jit traces it
    orphan: bool = False  # torch may wait for threads that only the parent process has
    threads: int = 0  # of a launch on the CPU; 0: not known, taken for several
    strict: bool = False  # float32 on a GPU without TF32

    @staticmethod
    def now(layer: Layer, extended: bool, opaque: bool = False) -> Situation:
        """The situation of a call in this process and thread."""
        strict = layer.dtype is torch.float32 and layer.device.type == "cuda" and not tf32()
        return Situation(extended, opaque, process.torch_would_hang(), threads.count(), strict)

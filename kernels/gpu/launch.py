"""From a layer to the launch of its recurrence: the design, the kernel, its arguments by name, the compiler's options.

Code that compiles kernels without running them uses the same arguments.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..contract import Layer
from ..precision import tf32
from . import persistent, split, tiling, wide
from .device import INTERPRETED
from .flat_rows import FlatRows
from .tiling import Design

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
BITS = {2: torch.int16, 4: torch.int32}  # integers of a dtype's size
# How often a program polls for another's data before it gives up; a poll takes about a microsecond.
PATIENCE = 4_000_000
JITTER = 0  # nanoseconds of random delay per step, for tests
_refused: dict[torch.device, int] = {}  # the fewest programs that a device refused to run at the same time


@functools.lru_cache(maxsize=64)
def sms(device: torch.device) -> int:
    """How many programs can wait for each other: one per SM."""
    return 16 if INTERPRETED.value else torch.cuda.get_device_properties(device).multi_processor_count


def stepwise(design: Design, device: torch.device) -> bool:
    """Whether the steps of a design are launched one by one, because the device refused to run it in one launch."""
    return design.kind != "resident" and design.programs >= _refused.get(device, design.programs + 1)


def _refuse(design: Design, device: torch.device, error: RuntimeError) -> None:
    """Remembers, and warns once for a device, that it does not run so many programs at the same time."""
    if device not in _refused:
        warnings.warn(
            f"{device} did not run {design.programs} programs of an LSTM at the same time ({error}), as one launch for "
            f"all steps has to. Each step is a launch of its own from now on: right, but slower by some ten "
            f"microseconds a step. Is the device shared with other processes (MPS with a limit of threads), or is a "
            f"part of it in use? lstmcore.explain says where steps are launched one by one; backend='torch' may be "
            f"faster",
            RuntimeWarning,
            stacklevel=2,
        )
    _refused[device] = min(design.programs, _refused.get(device, design.programs))


@functools.lru_cache(maxsize=64)
def shared(device: torch.device) -> int:
    """Bytes of shared memory that a program may use."""
    if INTERPRETED.value:
        return tiling.SHARED
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs leave this one out
    return properties.shared_memory_per_block_optin


@functools.lru_cache(maxsize=64)
def wgmma(device: torch.device) -> bool:
    """Whether the tensor cores multiply from shared memory as Hopper's do, and no older or newer ones."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def precision_of(dtype: torch.dtype) -> str:
    """The tensor cores' precision under torch's settings; see ``tiling.precision_of``."""
    return tiling.precision_of(dtype, dtype == torch.float32 and tf32())


def design_of(layer: Layer, backward: bool) -> Design:
    """The design of a layer's recurrence on its device; ValueError if none fits."""
    sizes = layer.hidden_size, layer.batch, layer.directions, precision_of(layer.dtype), sms(layer.device)
    return tiling.choose_design(*sizes, backward, shared=shared(layer.device), wgmma=wgmma(layer.device))


@dataclass(frozen=True)
class Recurrence:
    """A recurrence, as a kernel is compiled for it."""

    design: Design
    dtype: torch.dtype
    hidden: int  # H
    precision: str  # see tiling.precision_of
    backward: bool
    reset: bool
    ragged: bool
    given: tuple[str, ...]  # which of the kernel's SAVE, HAS_... and NORMS are set
    state: torch.dtype | None = None  # of the backward kernel's c_0, where it is not the dtype of the layer

    @property
    def module(self) -> ModuleType:
        return {"resident": persistent, "split": split, "wide": wide}[self.design.kind]

    @property
    def kernel(self) -> Any:
        return self.module.lstm_bwd_kernel if self.backward else self.module.lstm_fwd_kernel

    @property
    def row(self) -> int:
        """H': H padded so that a row can be read 16 bytes at a time."""
        return (self.hidden + 7) // 8 * 8

    @property
    def bits(self) -> torch.dtype:
        """Integers of the dtype's size."""
        return BITS[self.dtype.itemsize]

    @functools.cached_property
    def constants(self) -> dict[str, Any]:
        """The kernel's constants by name."""
        design = self.design
        every = {
            "H": self.hidden, "H_ROW": self.row, "D": design.directions, "U": design.units, "BT": design.tile,
            "KW": design.warps, "K": design.chunk, "NK": design.chunks, "STREAM": design.stream,
            "AHEAD": design.ahead, "HELD": design.held, "PARTS": design.parts,
            "HAS_RESET": self.reset, "RAGGED": self.ragged, "DTYPE": DTYPES[self.dtype], "JITTER": 0,
            "BITS": tl.int16 if self.bits == torch.int16 else tl.int32,
            "PRECISION": "tf32x3" if self.precision == "float32" else "tf32",
        }  # fmt: skip
        names = self.kernel.arg_names
        flags = [name for name in names if name in ("SAVE", "NORMS") or name.startswith("HAS_")]
        every = {name: name in self.given for name in flags} | every
        return {name: value for name, value in every.items() if name in names}

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """Compiler options: its default aims at two programs per SM, with so few registers that some kernels spill."""
        warps = self.design.warps
        options = {"num_warps": warps, "enable_fp_fusion": True, "maxnreg": min(255, 65536 // (32 * warps))}
        return options | ({} if self.design.kind == "resident" else {"launch_cooperative_grid": True})

    def pointers(self) -> dict[str, torch.dtype]:
        """The dtypes of the kernel's tensors by name."""
        state, words = dict.fromkeys(("c", "cells", "dc", "dcells", "sums"), torch.float32), torch.int32
        dtypes = state | dict.fromkeys(("status", "counts", "h_words", "dz_words", "w_words", "reset"), words)
        dtypes |= {"offsets": torch.int64, "norms": torch.float64}
        if self.design.kind == "split":
            dtypes |= {"h": self.bits}
        if self.design.kind != "resident":
            dtypes |= {"dz": self.bits}
        if self.state is not None:
            dtypes["c_0"] = self.state
        rest = {*self.module.SIZES, *self.constants}
        return {name: dtypes.get(name, self.dtype) for name in self.kernel.arg_names if name not in rest}

    def exchange(self, rows: FlatRows, word: Tensor) -> dict[str, Tensor]:
        """The tensors by which the programs of a wide design pass on what they have: counters, and in backward sums."""
        if self.design.kind != "wide":
            return {}
        design, device = self.design, rows.device
        directions, tiles = design.directions, design.groups * design.tiles
        if not self.backward:
            counts = torch.zeros(directions, rows.steps, tiles, dtype=torch.int32, device=device)
            return {"counts": counts, "status": word}
        each = design.parts + design.slices // design.parts
        counts = torch.zeros(directions, rows.steps, tiles, each, dtype=torch.int32, device=device)
        sums = torch.empty(directions, 2, design.parts, rows.batch, self.hidden, device=device)
        return {"counts": counts, "status": word, "sums": sums}

    def launch(self, rows: FlatRows, tensors: Mapping[str, Tensor | None], entered: bool = False) -> None:
        """Launches the kernel; ``tensors``: its tensors by name, None for absent ones.

        ``entered`` (forward): z already includes the contribution of h_0.
        """
        design, given = self.design, {**self.constants, **({} if INTERPRETED.value else self.options)}
        nothing = next(each for each in tensors.values() if each is not None)
        for name, each in {**tensors, "reset": rows.reset, "offsets": rows.offsets}.items():
            given[name] = nothing if each is None else each
        given.update(T=rows.steps, B=rows.batch, N=rows.total, step=rows.step, stride=rows.stride)
        if not self.backward:
            given["entered"] = int(entered)
        kernel, device = self.kernel[(design.programs,)], nothing.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            if design.kind == "resident":
                kernel(**given)
                return
            given.update(groups=design.groups, tiles=design.tiles, rows=design.rows, patience=PATIENCE, JITTER=JITTER)
            phases: list[dict[str, int]] = [{}]
            if design.kind == "wide" and self.backward:
                phases = [{"phases": wide.MULTIPLY}, {"phases": wide.FINISH}]
            if (design.slices == 1 or not INTERPRETED.value) and not stepwise(design, device):
                whole = {name: sum(each[name] for each in phases) for name in phases[0]}
                try:
                    kernel(**given, **whole, begin=0, end=rows.steps)
                    return
                except RuntimeError as error:
                    if "cooperative" not in str(error):
                        raise
                    _refuse(design, device, error)
            given.pop("launch_cooperative_grid", None)
            for i in range(rows.steps):  # one launch per step, or phase of one: no program waits for another
                for phase in phases:
                    kernel(**given, **phase, begin=i, end=i + 1)


_recurrence = functools.lru_cache(maxsize=1024)(Recurrence)  # so that its constants are computed once


def recurrence_of(
    layer: Layer, rows: FlatRows, backward: bool, given: tuple[str, ...], state: torch.dtype | None = None
) -> Recurrence:
    """The recurrence of a layer over these rows."""
    design, precision = design_of(layer, backward), precision_of(layer.dtype)
    given_rows = rows.reset is not None, rows.ragged
    return _recurrence(design, layer.dtype, layer.hidden_size, precision, backward, *given_rows, given, state)

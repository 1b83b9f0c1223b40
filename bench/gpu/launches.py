"""The one place where the benchmark reaches into the Triton backend: its designs, and the launch of the recurrence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from lstmcore.kernels.gpu import tiling
from lstmcore.kernels.gpu.tiling import Design

from bench.cases import Case

AHEAD = 1_000_000  # clock cycles for which the device sleeps while the host prepares the launch that is timed


def _backend() -> Any:
    """Imported on use: it needs Triton, which is not everywhere."""
    from lstmcore.kernels.gpu import backend

    return backend


def limits() -> tuple[int, int]:
    """Of the present GPU: programs that can wait for each other, and bytes of shared memory that one may use."""
    device = torch.device("cuda", torch.cuda.current_device())
    return _backend()._sms(device), _backend()._shared(device)


def predicted_us(case: Case, backward: bool, multiprocessors: int) -> float:
    """The model's microseconds a step of the recurrence, without the input product."""
    precision = tiling.precision_of(case.torch_dtype, case.tf32)
    return tiling.predict(case.hidden_size, case.batch, case.directions, precision, multiprocessors, backward)


@contextmanager
def using(design: Design) -> Iterator[None]:
    """Every call in here takes this design."""
    with mock.patch.object(_backend(), "_plan", lambda *_: design):
        yield


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Microseconds of the launch of the recurrence in ``run()``, and what that returned."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    recurrence = _backend()._Recurrence
    launch = recurrence.launch

    def between(call: Any, *arguments: Any, **options: Any) -> None:
        torch.cuda._sleep(AHEAD)
        events[0].record()
        launch(call, *arguments, **options)
        events[1].record()

    with mock.patch.object(recurrence, "launch", between):
        result = run()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) * 1000, result


def source(
    design: Design, backward: bool, *, dtype: str, hidden: int, directions: int, ragged: bool, reset: bool, save: bool
) -> tuple[Any, dict[str, Any]]:
    """What a launch of the design hands to Triton's compiler: the kernel with its arguments' types, and the options.

    ``save``: forward keeps what backward needs; backward is given everything that it can be, and norms are wanted.
    """
    import triton.language as tl
    from lstmcore.kernels.gpu import persistent, split
    from triton.compiler import ASTSource

    module = persistent if design.kind == "resident" else split
    kernel = module.lstm_bwd_kernel if backward else module.lstm_fwd_kernel
    value = {"float16": "fp16", "bfloat16": "bf16"}.get(dtype, "fp32")
    element = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}[value]
    bits = "i32" if value == "fp32" else "i16"
    constants = {
        "H": hidden, "H_ROW": (hidden + 7) // 8 * 8, "D": directions,
        "U": design.units, "BT": design.tile, "KW": design.warps,
        "K": design.chunk, "NK": design.chunks, "STREAM": design.stream, "SAVE": save, "HAS_RESET": reset,
        "RAGGED": ragged, "HAS_DY": True, "HAS_DH_N": save, "HAS_DCELLS": save,
        "HAS_C_0": save, "NORMS": save,
        "PRECISION": "tf32x3" if dtype == "float32" else "tf32", "DTYPE": element,
        "BITS": tl.int16 if bits == "i16" else tl.int32, "JITTER": 0,
    }  # fmt: skip
    special = {"c": "*fp32", "cells": "*fp32", "dc": "*fp32", "norms": "*fp32", "dcells": "*fp32"}
    special |= dict.fromkeys(("status", "h_words", "dz_words", "w_words", "reset"), "*i32") | {"offsets": "*i64"}
    if design.kind == "split":
        special |= {"h": f"*{bits}", "dz": f"*{bits}"}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = "i32" if name in module.SIZES else special.get(name, f"*{value}")
    constants = {name: constant for name, constant in constants.items() if name in signature}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    options = {"num_warps": design.warps, **_backend().hints(design.warps)}
    if design.kind == "split":
        options["launch_cooperative_grid"] = True
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned), options

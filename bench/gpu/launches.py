"""The one place where the benchmark reaches into the Triton backend: its designs, and the launch of the recurrence."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from lstmcore.kernels.gpu import status, tiling
from lstmcore.kernels.gpu.tiling import Design

from bench.cases import Case

TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
CYCLES = 2e9  # of a device in a second, at most (an H200's clock: 1.98 GHz)
AHEAD = 1_000_000  # clock cycles for which the device sleeps while the host prepares the launch that is timed


def _launch() -> Any:
    """Imported on use: it needs Triton, which is not everywhere."""
    from lstmcore.kernels.gpu import launch

    return launch


def limits() -> tuple[int, int, bool]:
    """Of the present GPU: programs that can wait for each other, bytes of shared memory of one, if it has wgmma."""
    device = torch.device("cuda", torch.cuda.current_device())
    return _launch().sms(device), _launch().shared(device), _launch().wgmma(device)


def predicted_us(case: Case, backward: bool) -> float:
    """The model's microseconds a step of the recurrence on the present GPU, without the input product."""
    precision, (programs, shared, wgmma) = tiling.precision_of(case.torch_dtype, case.tf32), limits()
    sizes = (case.hidden_size, case.batch, case.directions, precision, programs, backward)
    return tiling.predict(*sizes, shared=shared, wgmma=wgmma)


def settle() -> None:
    """Waits for the GPU; RuntimeError if a kernel has said that it gave up waiting for another part of itself."""
    torch.cuda.synchronize()
    status.raise_pending(torch.device("cuda", torch.cuda.current_device()))


def seconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a call: for which the host is busy with it, and the device once all of it is queued.

    For calls of few launches: of many the queue is full before the device begins, and the host waits.
    """
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    host = time.perf_counter() - started
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda._sleep(AHEAD + int(2 * host * CYCLES))
    events[0].record()
    call()
    events[1].record()
    torch.cuda.synchronize()
    return host, events[0].elapsed_time(events[1]) / 1e3


@contextmanager
def using(design: Design) -> Iterator[None]:
    """Every call in here takes this design."""
    with mock.patch.object(_launch(), "design_of", lambda *_: design):
        yield


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Microseconds of the launch of the recurrence in ``run()``, and what that returned."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    recurrence = _launch().Recurrence
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
    from triton.compiler import ASTSource

    given = ("SAVE", "HAS_DY", "HAS_DH_N", "HAS_DCELLS", "HAS_C_0", "NORMS") if save else ("HAS_DY",)
    kind = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(dtype, torch.float32)
    precision = "16" if kind.itemsize == 2 else dtype
    recurrence = _launch().Recurrence(design, kind, hidden, precision, backward, reset, ragged, given)
    kernel, constants, types = recurrence.kernel, recurrence.constants, recurrence.pointers()
    signature = {
        name: "constexpr" if name in constants else f"*{TYPES[types[name]]}" if name in types else "i32"
        for name in kernel.arg_names
    }
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(kernel.arg_names) if name in types}
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned), recurrence.options

"""The hand-off of the Triton backend's split design among programs that really run at the same time.

Triton's interpreter runs the programs of a launch one after the other.  Here each gets a process of its own, over
shared memory, and one launch for all steps: they wait for each other as CTAs do.  What comes out has to be, to the bit,
what a launch a step computes, in which nobody waits.  (A GPU's memory is weaker ordered than that of an x86 CPU; but an
entry is its own flag, so there is no order between two places that could matter.)
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ..support import contract, gpu_designs
from ..support.contract import Setup, pose
from ..support.gpu_designs import Share

pytestmark = [
    pytest.mark.serial,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs fork and shared memory"),
]

LIMIT_S = 100.0  # for one launch
DELAY_S = 0.003  # at most, at the end of a step

SETUP = Setup("concurrent", T=8, B=5, H=40, dtype=torch.float32)


class Concurrent:
    """In place of a kernel: a launch runs each program in a process of its own."""

    def __init__(self, kernel) -> None:
        self.kernel, self.arg_names = kernel, kernel.arg_names
        self.programs: list[int] = []  # of each launch

    def __getitem__(self, grid):
        def launch(**arguments):
            self.programs.append(grid[0])
            for each in arguments.values():
                if isinstance(each, torch.Tensor):
                    each.share_memory_()
            children = [self.start(program, grid[0], arguments) for program in range(grid[0])]
            end = time.monotonic() + LIMIT_S
            statuses = []
            for child in children:
                while not (status := os.waitpid(child, os.WNOHANG))[0]:
                    if time.monotonic() > end:
                        for each in children:
                            os.kill(each, signal.SIGKILL)
                        pytest.fail(f"{grid[0]} programs still wait for each other after {LIMIT_S} s")
                    time.sleep(0.002)
                statuses.append(os.waitstatus_to_exitcode(status[1]))
            assert not any(statuses), f"exit statuses of the programs: {statuses}"

        return launch

    def start(self, program: int, programs: int, arguments) -> int:
        """The process that runs one program; returns its pid."""
        if child := os.fork():
            return child
        try:
            from triton.runtime import interpreter

            builder = interpreter.interpreter_builder
            delays = random.Random(program)
            builder.set_grid_dim = lambda *_: setattr(builder, "grid_dim", (programs, 1, 1))
            builder.set_grid_idx = lambda *_: setattr(builder, "grid_idx", (program, 0, 0))
            builder.create_barrier = lambda: time.sleep(delays.random() * DELAY_S)
            # Copying arguments back onto themselves would undo what the others write meanwhile.
            interpreter.GridExecutor._restore_args_dev = lambda *_: None
            self.kernel[(1,)](**arguments)
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)


@pytest.mark.parametrize(
    ("change", "share"),
    [
        ({}, Share(units=16, warps=2, chunk=32)),
        ({"dtype": torch.bfloat16}, Share(units=16, warps=2, chunk=64)),
        ({"D": 2, "lengths": (4, 0, 8, 1, 6), "reset": 0.2}, Share(units=32, warps=2, chunk=64, groups=2)),
        ({"B": 9, "P": 3}, Share(units=16, warps=2, chunk=32, stream=True, tiles=2)),
        ({"dtype": torch.bfloat16, "lengths": (4, 8, 8, 1, 6)}, Share(units=8, warps=2, chunk=16, parts=2)),
        ({"B": 9, "D": 2, "reset": 0.2}, Share(units=16, warps=2, chunk=16, parts=2, tiles=2)),
    ],
    ids=["float32", "bfloat16", "ragged_both_directions", "streamed_projection", "wide", "wide_both_directions"],
)
def test_programs_at_the_same_time(triton_kernels, monkeypatch, change, share):
    launch = triton_kernels.launch
    module = launch.wide if share.parts else launch.split
    p = pose(replace(SETUP, **change))
    gpu_designs.use(monkeypatch, share=share)
    monkeypatch.setattr(triton_kernels.launch, "sms", lambda device: 132)
    monkeypatch.setattr(triton_kernels.launch, "shared", lambda device: 227 * 1024)
    expected = contract.solve(triton_kernels, p)  # a launch a step

    kernels = [Concurrent(getattr(module, f"lstm_{name}_kernel")) for name in ("fwd", "bwd")]
    for name, kernel in zip(("fwd", "bwd"), kernels, strict=True):
        monkeypatch.setattr(module, f"lstm_{name}_kernel", kernel)
    # the host code launches as on a device: all steps at once
    monkeypatch.setattr(triton_kernels.launch, "INTERPRETED", SimpleNamespace(value=False))
    got = contract.solve(triton_kernels, p)
    for kernel in kernels:
        assert len(kernel.programs) == 1
        assert kernel.programs[0] > 1
    assert not triton_kernels.status.word(torch.device("cpu")).item(), "a program gave up waiting"
    contract.assert_same(triton_kernels, got, expected)

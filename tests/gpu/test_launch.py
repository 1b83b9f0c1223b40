"""The host code down to the launch, with a pretended device: arguments are bound and kernels compiled, none is run.

In a process of its own, because this one interprets kernels and cannot compile any.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the GPU kernels need Triton, which is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("launches")]  # which one process makes, for all

PROGRAM = """
import json, warnings
warnings.simplefilter("ignore")
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from lstmcore.kernels.gpu import backend, launch
from lstmcore.kernels.contract import Call, GradOutputs, Needs, Rows, Weights


class Pretended:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


driver.set_active(Pretended())
launches = []
run = JITFunction.run


def only_compile(self, *args, grid, warmup, **kwargs):
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    variants = sum(len(caches[0]) for caches in self.device_caches.values())
    module = self.fn.__module__.split(".")[-1]
    launches.append((module, self.__name__, grid[0], kernel.metadata.launch_cooperative_grid, variants))
    return kernel


JITFunction.run = only_compile
launch.sms = lambda device: 132
launch.shared = lambda device: 232448
launch.wgmma = lambda device: True
for hidden, directions, dtype, batch in ((40, 1, torch.bfloat16, 5), (130, 2, torch.float16, 6)):
    make = lambda *shape: torch.zeros(shape, dtype=dtype)
    bias = make(4 * hidden)
    weights = (Weights(make(4 * hidden, 3), make(4 * hidden, hidden), bias, bias),) * directions
    for steps, batch in ((7, batch), (16, batch), (1, batch + 2), (9, 1)):
        x, rows = make(steps, batch, 3), Rows(steps, batch)
        call = Call.of(x, None, None, weights, rows)
        f = backend.forward(call, save=True)
        backend.backward(call, GradOutputs(torch.zeros_like(f.output), None, None), f.output, f.saved, Needs())
whole, launches = launches, []
for steps, batch in ((7, 3), (16, 8), (1, 1)):  # states at addresses of any alignment
    x, rows, state = make(steps, batch, 3), Rows(steps, batch), make(2, batch, hidden)
    call = Call.of(x, None, None, weights, rows, None, True, 3)
    f = backend.forward(call, save=True)
    backend.backward(call, GradOutputs(torch.zeros_like(f.output), state, None), f.output, f.saved, Needs())
print(json.dumps({"whole": whole, "segments": launches}))
"""


@pytest.fixture(scope="module")
def made() -> dict[str, list[list]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def launches(made) -> list[list]:
    """(module, kernel, programs, whether they are launched together, variants compiled so far), of whole calls."""
    return made["whole"]


def test_each_call_is_one_launch_a_pass(launches):
    kernels = [(module, name) for module, name, *_ in launches]
    passes = ["lstm_fwd_kernel", "lstm_bwd_kernel"] * 4
    assert kernels == [("persistent", name) for name in passes] + [("split", name) for name in passes]


def test_programs_that_wait_for_each_other_are_launched_together(launches):
    for module, _, programs, cooperative, _ in launches:
        assert cooperative == (module == "split")
        assert 1 <= programs <= 132


def test_no_recompilation_when_steps_or_batch_change(launches):
    """Also not where one of them is 1 or a multiple of 16, which Triton would make special by itself."""
    for module, name, _, _, variants in launches:
        assert variants == 1, (module, name)


def test_segments_compile_three_kernels(made):
    """Of one direction: forward without gates, and with them; backward from a float32 state.  None at each border."""
    segments = made["segments"]
    assert len(segments) == 2 * (3 + 6 + 1) * 3
    variants = {name: max(count for _, each, *_, count in segments if each == name) for _, name, *_ in segments}
    assert variants == {"lstm_fwd_kernel": 1 + 2, "lstm_bwd_kernel": 1 + 1}
    assert {(module, cooperative) for module, _, _, cooperative, _ in segments} == {("split", True)}

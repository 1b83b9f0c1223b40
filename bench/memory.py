"""Peak memory of one training step.

Torch does not track its CPU allocations, so the operating system is asked, in a process of its own: the growth of the
process's highest resident size over its size just before the step.  By then a first step on the beginning of the same
problem has loaded the libraries, compiled the kernels and started the threads.  On a GPU torch's allocator counts, all
that cuDNN and our kernels take included, so any process will do.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bench.cases import CASES, Case
from bench.providers import OURS, Runner, algorithm, build, draw

WARM_UP_STEPS = 4
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def _status_kib(field: str) -> int:
    """A size out of Linux's account of this process."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"expected a line {field}: in {_STATUS}, got none")


def _peak_kib() -> int:
    """The highest resident size of this process so far."""
    if _STATUS.exists():
        return _status_kib("VmHWM")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


def _forget() -> None:
    """Lets go of the memory that our kernels keep for the next step: it counts as part of the step that is measured."""
    with suppress(ImportError):  # another commit may keep none, or elsewhere
        from lstmcore.kernels.cpu import buffers

        buffers.clear()


def _measure(case: Case, provider: str, backend: str) -> float:
    """MiB that one training step adds to this process."""
    if provider == OURS:  # by name: what "auto" picks depends on the number of steps
        backend = algorithm(provider, case, "training", backend)
    build(provider, draw(case, steps=min(WARM_UP_STEPS, case.steps)), backend).training()
    runner = build(provider, draw(case), backend)
    if provider == OURS:
        _forget()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what was freed while drawing the data must not hide what this step allocates
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")  # the highest size starts over from the present one
        before = _status_kib("VmRSS")
    else:
        before = _peak_kib()
    runner.training()
    return (_peak_kib() - before) / 1024


def gpu_peak_mib(runner: Runner) -> float:
    """MiB that one training step allocates on the GPU at its peak; one has to have run before."""
    _forget()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runner.training()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_memory_mib(case: Case, provider: str, backend: str = "auto", **where: Any) -> float:
    """MiB that one training step of the case adds to a process, in a fresh one; ``where``: its folder and variables."""
    child = subprocess.run(
        [sys.executable, "-m", "bench.memory", case.name, provider, backend, str(torch.get_num_threads())],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        **({"cwd": Path(__file__).parents[1]} | where),
    )
    return float(json.loads(child.stdout)["mib"])


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    print(json.dumps({"mib": _measure(CASES[sys.argv[1]], *sys.argv[2:4])}))

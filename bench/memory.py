"""Peak memory of one training step, or of one call in inference.

Torch does not track its CPU allocations, so the operating system is asked, in a process of its own: the growth of the
process's highest resident size over its size just before the step.  By then a first step on the beginning of the same
problem has loaded the libraries, compiled the kernels and started the threads.  On a GPU torch's allocator counts, all
that cuDNN and our kernels take included, so any process will do.

The process may take most of what the machine has to spare and no more: a step that needs more raises, where otherwise
the operating system would end whatever process it likes.
"""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bench.cases import CASES, Case
from bench.providers import OURS, Runner, algorithm, build, draw

WARM_UP_STEPS = 4
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
SHARE = 0.85  # of what is available; the process that waits for the answer, and others, need some
# How torch, oneDNN and C++ say it; a MemoryError says it by its type.
_NO_MEMORY = ("allocate memory", "not enough memory", "out of memory", "bad_alloc")
# Memory that was granted and is not there when it is used; C++ that finds none and has nobody to tell.
_ENDED = (signal.SIGKILL, signal.SIGABRT)


class OutOfMemory(Exception):
    """A call takes more memory than its process may; the message says how much that was, or what ended it."""


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


def _limit() -> float | None:
    """Lets this process take so much of the available memory and no more; GiB, None where nothing is limited."""
    try:
        from lstmcore.recompute import available
    except ImportError:  # another commit may not ask how much there is
        return None
    if not _STATUS.exists():
        return None
    import resource

    allowed = int(SHARE * available(torch.device("cpu")))
    resource.setrlimit(resource.RLIMIT_AS, (_status_kib("VmSize") * 1024 + allowed,) * 2)
    return allowed / 2**30


def _no_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(text in str(error) for text in _NO_MEMORY)


def _measure(case: Case, provider: str, backend: str, mode: str, options: Mapping[str, Any]) -> float:
    """MiB that one call adds to this process; ``options`` are for the constructor of ours."""
    if provider == OURS:  # by name: what "auto" picks depends on the number of steps
        backend = algorithm(provider, case, mode, backend, options)
    getattr(build(provider, draw(case, steps=min(WARM_UP_STEPS, case.steps)), backend, options), mode)()
    runner = build(provider, draw(case), backend, options)
    if provider == OURS:
        _forget()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what was freed while drawing the data must not hide what this step allocates
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")  # the highest size starts over from the present one
        before = _status_kib("VmRSS")
    else:
        before = _peak_kib()
    getattr(runner, mode)()
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


def peak_memory_mib(
    case: Case,
    provider: str,
    backend: str = "auto",
    *,
    mode: str = "training",
    options: Mapping[str, Any] | None = None,
    **where: Any,
) -> float:
    """MiB that one call on the case adds to a process, in a fresh one.

    ``options`` are for the constructor of ours; ``where`` is the process's folder and variables.  Raises OutOfMemory
    where it has not enough.
    """
    threads = torch.get_num_threads()
    question = {"case": case.name, "provider": provider, "backend": backend, "mode": mode, "options": options or {}}
    child = subprocess.run(
        [sys.executable, "-m", "bench.memory", json.dumps(question), str(threads)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        **({"cwd": Path(__file__).parents[1]} | where),
    )
    if -child.returncode in _ENDED:
        raise OutOfMemory(f"ended by {signal.Signals(-child.returncode).name}")
    child.check_returncode()
    answer = json.loads(child.stdout)
    if "mib" not in answer:
        raise OutOfMemory(f"more than {answer['allowed_gib']:.3g} GiB")
    return float(answer["mib"])


def _answer(case: str, **question: Any) -> dict[str, float | None]:
    """What the process found: the peak, or how much was not enough."""
    allowed = _limit()
    try:
        return {"mib": _measure(CASES[case], **question)}
    except (MemoryError, RuntimeError) as error:
        if allowed is None or not _no_memory(error):
            raise
        return {"allowed_gib": allowed}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(_answer(**json.loads(sys.argv[1]))))

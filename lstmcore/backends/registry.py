"""The registry of backends: one entry each, the fastest first, in the order in which ``"auto"`` considers them."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lstmcore.backends import rules
from lstmcore.backends.situation import Situation
from lstmcore.backends.timings import Verdict
from lstmcore.kernels.contract import Layer

AUTO = "auto"
OLDEST_TRITON = (3, 6)
OLDEST_NUMBA = (0, 62)  # before, its LLVM wants the type that a pointer points to; the kernels name none
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """A module that implements the contract of :mod:`lstmcore.kernels`, and what is known before it is loaded."""

    name: str
    module: str
    why: str  # the reason for it in a choice of "auto", as text for users
    device: str | None = None  # the type of device that it runs on; None: any
    dtypes: tuple[torch.dtype, ...] | None = FLOATS  # None: any
    missing: Callable[[], str | None] = lambda: None  # one sentence if it cannot or must not be imported
    # "auto" takes it on a device after a check against the reference there, once for all layers that run the same
    # kernels (self_check.py)
    checked: bool = False
    # Whether it was measured faster than those after it in the registry; "auto" takes it only then, and says why.
    faster: Callable[[Layer, Situation], Verdict] = lambda layer, situation: Verdict(True)
    fused: bool = True  # opaque to autograd, tracers, modes and tensor subclasses; else it consists of torch operations
    extended: bool = True  # it has lengths, reset and cells, and can be recorded
    whole: bool = False  # it has ``run``, which computes all layers of a call at once, with a graph of its own
    cell: bool = False  # it has a single step of its own, torch's
    device_lengths: bool = False  # it takes rows whose lengths the host does not know
    torch_threads: bool = False  # on the CPU it waits for threads of torch's, which a forked child lacks


def _too_old(name: str, found: str, oldest: tuple[int, int]) -> str | None:
    """One sentence unless the version that was found is the oldest that serves, or a newer one."""
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) >= oldest:
        return None
    least = ".".join(map(str, oldest))
    return f"it needs {name} {least} or newer, found {found}; pip install '{name.lower()}>={least}'"


def _triton_missing() -> str | None:
    found = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none"
    return _too_old("Triton", found, OLDEST_TRITON)


def _numba_missing() -> str | None:
    numba = importlib.import_module("numba")
    if (why := _too_old("Numba", numba.__version__, OLDEST_NUMBA)) is not None:
        return why
    if numba.config.DISABLE_JIT:
        return "Numba's compiler is switched off; unset NUMBA_DISABLE_JIT before Python starts"
    return None


_ENTRIES = (
    Backend(
        "triton",
        "lstmcore.kernels.gpu.backend",
        "the fused GPU kernels cover this call",
        device="cuda",
        missing=_triton_missing,
        checked=True,
        faster=rules.cudnn_or_ours,
        device_lengths=True,
    ),
    Backend(
        "numba",
        "lstmcore.kernels.cpu.backend",
        "the fused CPU kernels cover this call",
        device="cpu",
        missing=_numba_missing,
        faster=rules.aten_or_ours,
    ),
    Backend(
        "torch",
        "lstmcore.backends.aten",
        "ATen's LSTM, as torch.nn.LSTM runs it",
        dtypes=None,
        fused=False,
        extended=False,
        whole=True,
        cell=True,
        torch_threads=True,
    ),
    Backend(
        "reference",
        "lstmcore.backends.reference",
        "the plain step loop computes what no other backend does",
        fused=False,
    ),
)
REGISTRY: dict[str, Backend] = {each.name: each for each in _ENTRIES}
REFERENCE = "reference"  # computes the same as all others, and can be differentiated any number of times


def names() -> tuple[str, ...]:
    """The values that ``backend=`` accepts."""
    return (AUTO, *REGISTRY)


def check_name(name: str) -> None:
    """ValueError unless ``name`` is one of :func:`names`."""
    if name != AUTO and name not in REGISTRY:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(map(repr, names()))}")


@functools.cache
def load(name: str) -> Any:
    """The module of a backend, imported on first use (Numba alone takes a third of a second).

    Raises ImportError, which says what would help, if a package that it needs is missing, too old or switched off.
    """
    backend = REGISTRY[name]
    try:
        reason = backend.missing()
        module = importlib.import_module(backend.module) if reason is None else None
    except ModuleNotFoundError as error:
        raise ImportError(f"it needs a package that is missing ({error}); pip install {name}") from error
    except OSError as error:  # a library that is damaged, or another's: llvmlite opens its own by path
        raise ImportError(f"a library that it needs cannot be opened: {error}") from error
    if reason is not None:
        raise ImportError(reason)
    return module

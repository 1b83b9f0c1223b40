"""Whether a backend computes on a device what the reference computes: asked before ``"auto"`` takes it there.

Kernels that a compiler has made for a device of which no other test knows may be wrong.  So the kernels that a layer
would run are checked once in each process and on each device: small problems of the layer's own hidden size,
directions and dtype, with its own tiles, because a wrong kernel may be wrong in the tiles of one size only.  The steps
are few, and the rows as few as run these kernels.

* Every layer: all states and gradients given, and of rows that may end early lengths, among them 0.
* A call with what torch's LSTM does not have: the same with resets, in training with cells and the norms of a
  recording.

What a call leaves out (a state, a gradient, resets) leaves that part out of these kernels too.  In training all
gradients are compared.  A backend that fails is refused for the rest of the process, with a reason.

The check runs in a thread of its own, where nothing of the caller's is on: no dispatch mode (FakeTensor), transform,
tracer, autocast, inference mode, default device, stream or saved-tensors hook.  It draws from generators of its own.

T time, B batch, H hidden, P projection (H without one), D directions.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstmcore.backends import reference
from lstmcore.backends.registry import load
from lstmcore.kernels.contract import Call, GradOutputs, Layer, Needs, Rows, Weights
from lstmcore.kernels.cpu import process

STEPS, INPUTS, SEGMENT, SEED = 5, 8, 2, 17
# How far a result may be from the reference's in float64, in roundings of the backend (``Kernels.rounding``).  A value
# passes through some eight of at most half a rounding each: those of z, of the h that enters, of four saved gates, of
# dz, and its own; five steps pass on less than twice that.  One entry may have all of them on one side, relative to the
# largest entry; on average they add up like a random walk, to about one (1.2 for operands that are cut off, as TF32's).
MOST, ON_AVERAGE = 8.0, 4.0
TERM = 0.25  # a term of a sum at least: a few entries may cancel to less, but their rounding follows the terms
MANY = 64  # entries that do not all cancel


class Undecided(Exception):
    """The check cannot run now, for the reason that the text says; a later call may ask again."""


class _Problem(NamedTuple):
    """What a check computes."""

    ragged: bool  # rows of several lengths
    extended: bool  # with resets, in training with cells and norms


class _Key(NamedTuple):
    """What a verdict is about."""

    backend: str
    device: torch.device
    kernels: Any  # Kernels.identity
    training: bool
    segments: bool
    problem: _Problem


_verdicts: dict[_Key, str | None] = {}  # None: it passed
_warned: set[torch.device] = set()
_lock = process.RLock()  # one check at a time: another thread that asks waits for the answer


@process.after_fork
def _in_child() -> None:
    global _lock
    _lock = process.RLock()


def refusal(backend: str, layer: Layer, extended: bool) -> str | None:
    """One sentence if the backend's kernels for such a layer are wrong on its device, else None; checks them if new.

    ``extended``: the call has what torch's LSTM does not have.  The first refusal on a device is also a RuntimeWarning.

    Raises Undecided if the check cannot run now, and the error of an earlier call, or of the device, as it is.
    """
    layer = layer._replace(batch=max(layer.batch, 1))  # without rows no kernel is launched, and nothing found out
    for wanted in (False, True) if extended else (False,):
        reason = _verdict(backend, layer, _Problem(layer.ragged, wanted))
        if reason is not None:
            _warn_once(backend, layer.device, reason)
            return f"it failed its check against the reference on {layer.device}: {reason}; by its name it runs anyway"
    return None


def _verdict(backend: str, layer: Layer, problem: _Problem) -> str | None:
    """What is wrong with the kernels of a layer in this problem; None: nothing."""
    kernels = load(backend)
    about = kernels.kernels(layer)
    key = _Key(backend, layer.device, about.identity, layer.training, layer.segment > 0, problem)
    with _lock:
        if key not in _verdicts:
            _verdicts[key] = _checked(kernels, _with_few_rows(kernels, layer), problem, about.rounding)
        return _verdicts[key]


def _with_few_rows(kernels: Any, layer: Layer) -> Layer:
    """The layer with as few rows as run the same kernels: of 16,384, the reference would take gigabytes in float64.

    An odd number, so that the last tile of rows is not full.
    """
    identity, rows = kernels.kernels(layer).identity, 5
    while rows < layer.batch:
        fewer = layer._replace(batch=rows)
        if kernels.supports(fewer) is None and kernels.kernels(fewer).identity == identity:
            return fewer
        rows = 2 * rows - 1  # 5, 9, 17, 33 ...
    return layer


def _warn_once(backend: str, device: torch.device, reason: str) -> None:
    with _lock:
        first = device not in _warned
        _warned.add(device)
    if first:
        warnings.warn(
            f"the kernels of backend {backend!r} failed their check against the reference on {device}: {reason}. "
            f"Calls that would run them go to the next backend, which is slower and right (lstmcore.explain says "
            f"which); please report this with what `python -m lstmcore info` prints",
            RuntimeWarning,
            stacklevel=2,
        )


# The check


def _checked(kernels: Any, layer: Layer, problem: _Problem, rounding: float) -> str | None:
    """What is wrong with the kernels, found in a thread of its own; None: nothing."""
    if layer.device.type == "cuda":
        with torch.cuda.device(layer.device):
            capturing = torch.cuda.is_current_stream_capturing()
        if capturing:
            raise Undecided(
                "its kernels have not been checked on this device yet, and cannot be while a CUDA graph is captured; "
                "make one such call before the capture"
            )
    return _in_a_thread(functools.partial(_wrong, kernels, layer, problem, rounding))


def _in_a_thread(function: Callable[[], str | None]) -> str | None:
    """What the function returns or raises in a native thread that ends with it; Undecided if there can be none."""
    results: list[str | None] = []
    errors: list[BaseException] = []
    done = process.new_lock()
    done.acquire()

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)
        finally:
            done.release()

    try:
        process.start_thread(run)
    except RuntimeError as error:
        raise Undecided(f"its kernels cannot be checked without a thread of their own: {error}") from error
    done.acquire()
    if errors:
        raise errors[0]
    return results[0]


def _wrong(kernels: Any, layer: Layer, problem: _Problem, rounding: float) -> str | None:
    """What is wrong: a result, or the error of a compiler or a launch.

    Raises the error of an earlier call, and one that ends all use of the device: these say nothing about the kernels.
    """
    cuda = layer.device.type == "cuda"
    with torch.cuda.device(layer.device) if cuda else nullcontext():
        kernels.settle(layer.device)
        try:
            found = _difference(kernels, layer, problem, rounding)
            kernels.settle(layer.device)
            return found
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise Undecided(f"there is no memory to check its kernels: {_first_line(error)}") from error
        except Exception as error:
            if cuda:
                torch.cuda.synchronize(layer.device)  # raises again if the device is lost
            return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    """The first line of an error's text; with the last one where it only says where (``at 12:3:``), as Triton's do."""
    first, *rest = (str(error).strip() or "no message").splitlines()
    return f"{first} {rest[-1].strip()}" if rest and first.endswith(":") else first


def _difference(kernels: Any, layer: Layer, problem: _Problem, rounding: float) -> str | None:
    """The first result that is too far from the reference's in float64; None if there is none."""
    call, grads = _posed(layer, problem)
    expected = _results(reference, *_in_float64(call, grads))
    got = _results(kernels, call, grads)
    if odd := expected.keys() ^ got.keys():
        return f"{min(odd)} is missing, or nobody asked for it"
    for name, value in expected.items():
        if got[name].shape != value.shape:
            return f"{name} has shape {tuple(got[name].shape)}, expected {tuple(value.shape)}"
    measured = torch.stack([_measured(got[name], value) for name, value in expected.items()])
    for (name, value), numbers in zip(expected.items(), measured.tolist(), strict=True):  # here the host waits
        worst, largest, mean_off, mean = numbers
        allowed = MOST * rounding * max(TERM, largest)
        if not worst <= allowed:  # also if it is NaN
            return f"{name} is off by {worst:.2g}, allowed {allowed:.2g}"
        allowed = ON_AVERAGE * rounding * mean
        if value.numel() >= MANY and not mean_off <= allowed:
            return f"{name} is off by {mean_off:.2g} on average, allowed {allowed:.2g}"
    return None


def _measured(got: Tensor, expected: Tensor) -> Tensor:
    """(4,): the largest difference, the largest entry expected, and the root mean squares of both."""
    off = got.to(torch.float64) - expected
    pairs = [(each.abs().max(), each.square().mean().sqrt()) for each in (off, expected)]
    return torch.stack([pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]])


def _posed(layer: Layer, problem: _Problem) -> tuple[Call, GradOutputs]:
    """A problem of a layer's sizes over few steps and inputs, and the gradients that arrive at its results."""
    device, B, D, P = layer.device, layer.batch, layer.directions, layer.width
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = layer.dtype) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return drawn.mul_(scale).to(dtype)

    rows, reset = Rows(STEPS, B), None
    if problem.ragged:  # 4, 5, 0, 1, 2, 3, 4 ... steps
        lengths = torch.tensor([(STEPS - 1 - STEPS * row) % (STEPS + 1) for row in range(B)], device="cpu")
        rows = Rows.from_lengths(lengths, STEPS)
    if problem.extended:  # each row has one reset, at 3, 0, 2, 4, 1, 3 ...
        places = torch.arange(STEPS, device=device)[:, None] + 3 * torch.arange(B, device=device)
        reset = places % STEPS == 3
    shapes = dict(zip(layer.weight_names, layer._replace(input_size=INPUTS).weight_shapes, strict=True))
    # a recurrence whose errors show: W_hh h is as large as W_ih x
    scales = {name: shape[-1] ** -0.5 if len(shape) == 2 else 0.5 for name, shape in shapes.items()}
    weights = tuple(
        Weights(**{name: normal(*shape, scale=scales[name]) for name, shape in shapes.items()}) for _ in range(D)
    )
    x, h_0, c_0 = normal(STEPS, B, INPUTS), normal(*layer.h_shape), normal(*layer.c_shape)
    call = Call.of(x, h_0, c_0, weights, rows, reset, layer.training, min(layer.segment, SEGMENT))
    cells = None
    if problem.extended and layer.training:
        cells = normal(STEPS, B, D * layer.hidden_size, dtype=torch.float32)
    grads = GradOutputs(normal(STEPS, B, D * P), normal(*layer.h_shape), normal(*layer.c_shape), cells)
    return call, grads


def _in_float64(call: Call, grads: GradOutputs) -> tuple[Call, GradOutputs]:
    """The same problem in float64, without segments."""
    double = torch.float64
    reset, *tensors = call.tensors
    wide = [None if tensor is None else tensor.to(double) for tensor in tensors]
    exact = Call.with_tensors(call.layer._replace(dtype=double, segment=0), call.rows, (reset, *wide))
    return exact, GradOutputs(*(None if grad is None else grad.to(double) for grad in grads))


@torch.no_grad()
def _results(backend: Any, call: Call, grads: GradOutputs) -> dict[str, Tensor]:
    """All that a backend returns for a problem, by name; in training with the gradients."""
    training, every = call.layer.training, grads.cells is not None
    done = backend.forward(call, save=training, cells=every)
    results = {"output": done.output, "h_n": done.h_n, "c_n": done.c_n, "cells": done.cells}
    if training:
        found = backend.backward(call, grads, done.output, done.saved, Needs(norms=every))
        results |= {f"the gradient of {name}": getattr(found, name) for name in ("input", "h_0", "c_0")}
        for direction, weights in zip(("", "_reverse"), found.weights, strict=False):
            results |= {f"the gradient of {name}{direction}": grad for name, grad in weights._asdict().items()}
        results["norms"] = found.norms
    return {name: value for name, value in results.items() if value is not None}

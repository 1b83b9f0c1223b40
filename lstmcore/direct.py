"""A fast path to ATen: the first call of a kind is checked in full, later calls with the same key are not.

A call of a few steps goes to ATen's LSTM, and takes no longer than checking it and choosing a backend.  After another
operation of torch's, which has displaced Python's data from the caches, a call of one step took 215 microseconds, and
``torch.nn.LSTM`` 191 (Intel Xeon with AVX-512, two threads, T = B = 1, I = H = 16).

The key has what such calls have in common; conditions that may change otherwise are tested at every call.

T time, B batch, I input, H hidden, P projection (H without one), L layers, D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from lstmcore import checks, recording, routing
from lstmcore.backends import aten
from lstmcore.checks import Given, Options
from lstmcore.kernels.contract import Layer
from lstmcore.kernels.cpu import process

MOST = 1024  # keys; beyond that all are dropped

# looked up once: every call uses them
_autocasting = torch._C._is_any_autocast_enabled
_compiling = torch.compiler.is_compiling
_strided = torch.strided


class Known(NamedTuple):
    """What is known about calls with one key."""

    h: tuple[int, int, int]  # (L * D, B, P)
    c: tuple[int, int, int]  # (L * D, B, H)
    shapes: Sequence[tuple[int, ...]]  # of the parameters
    training: set[bool]  # whether gradients were needed in calls for which ATen was chosen


_known: dict[tuple[Any, ...], Known] = {}


def _key(input: Tensor, hx: tuple[Tensor, Tensor] | None, options: tuple[Any, ...]) -> tuple[Any, ...]:
    if hx is None:
        return input.shape, input.dtype, torch.get_num_threads(), options
    h_0, c_0 = hx
    return input.shape, input.dtype, torch.get_num_threads(), options, h_0.shape, h_0.dtype, c_0.shape, c_0.dtype


def _options_key(backend: str, options: Options) -> tuple[Any, ...]:
    """The options of a key; without dropout, whose masks are ATen's in any case."""
    return backend, options.has_biases, options.num_layers, options.bidirectional, options.batch_first


def _plain(tensor: Any) -> bool:
    """On the CPU, in strided memory, no subclass."""
    return type(tensor) is Tensor and tensor.is_cpu and tensor.layout is _strided and not tensor.is_nested


def _ordinary(input: Any, hx: Any) -> bool:
    """Padded, and plain: what a key describes."""
    if not _plain(input) or input.dim() != 3:
        return False
    if hx is None:
        return True
    return type(hx) is tuple and len(hx) == 2 and _plain(hx[0]) and _plain(hx[1])


def remember(given: Given, backend: str, layer: Layer) -> None:
    """Remembers that a checked call went to ATen, so that calls with its key do; ``layer``: the first."""
    if _ordinary(given.input, given.hx):
        key = _key(given.input, given.hx, _options_key(backend, given.options))
        known = _known.get(key)
        if known is None:
            if len(_known) >= MOST:
                _known.clear()
            layers = given.options.num_layers
            states = layers * layer.directions, layer.batch
            shapes = checks.known_shapes(layer, layers)
            known = _known[key] = Known((*states, layer.width), (*states, layer.hidden_size), shapes, set())
        known.training.add(layer.training)


def forget() -> None:
    """Checks all calls in full again: what went to ATen may be chosen otherwise."""
    _known.clear()


def call(
    module: Any, input: Any, hx: Any, params: Sequence[Tensor], backend: str
) -> tuple[Tensor, Tensor, Tensor] | None:
    """output, h_n, c_n of a call that is known to go to ATen; None for others."""
    # (Compiling is tested first: the compiler would guard a graph on all entries of _known.)
    if _compiling() or not _known or not _ordinary(input, hx):
        return None
    options_key = backend, module.bias, module.num_layers, module.bidirectional, module.batch_first
    known = _known.get(_key(input, hx, options_key))
    if known is None or not routing.undisturbed() or _autocasting() or recording.watched(module):
        return None
    if process.torch_would_hang():
        return None
    dtype, wanted = input.dtype, input.requires_grad
    if hx is not None:
        wanted = wanted or hx[0].requires_grad or hx[1].requires_grad
    if len(params) != len(known.shapes):
        return None
    for param, shape in zip(params, known.shapes):  # they may have been replaced  # noqa: B905 (lengths are equal)
        if type(param) is not Parameter or param.shape != shape or param.dtype is not dtype or not param.is_cpu:
            return None
        wanted = wanted or param.requires_grad
    if (wanted and torch.is_grad_enabled()) not in known.training:
        return None
    if hx is None:
        h_0 = input.new_zeros(known.h)
        hx = h_0, h_0 if known.h == known.c else input.new_zeros(known.c)
    data = input.transpose(0, 1) if module.batch_first else input
    options = Options(module.bias, module.num_layers, module.dropout, module.training, module.bidirectional)
    output, h_n, c_n = aten.run(data, None, hx, params, options)
    return output.transpose(0, 1) if module.batch_first else output, h_n, c_n

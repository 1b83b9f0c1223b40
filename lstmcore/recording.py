"""Recordings of backward passes: the interface between the autograd Functions and the recordings.

A module passes a :class:`Source` to its forward pass; its node in the graph asks for :func:`watchers` in backward, and
shows them an :class:`Observation`.  Without a recording this costs one test of a flag.

T steps, B rows, R of them sampled, D directions, P features of h.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lstmcore.kernels.contract import GateStatistics, Rows
from lstmcore.kernels.gate_statistics import sampled_rows

SAMPLE = 4  # rows of the batch for which `entering` is computed


class Source(NamedTuple):
    """The origin of a node of the graph."""

    module: weakref.ReferenceType[nn.Module]  # weak: a graph may outlive it, and a module may hold a graph's output
    layer: int
    unsorted: Tensor | None = None  # (B,) of a PackedSequence: each row's index in the sorted batch


class Observation(NamedTuple):
    """What the backward pass of one layer shows."""

    source: Source
    norms: Tensor  # (2, D, T, B) of dL/dh_t and dL/dc_t; (1, D, T, B) of a plain RNN; in the caller's order of rows
    lengths: Tensor | None  # (B,) int64 on the CPU; None: every row has T steps
    entering: Tensor  # (D, T, R) of a sample of rows: the norms of what comes to h_t and c_t from outside the layer
    entering_lengths: Tensor | None  # (R,) int64 on the CPU
    gates: GateStatistics | None


class Watcher(Protocol):
    """A recording."""

    gate_rows: int  # rows of the batch whose gates are wanted; 0 for none

    def wants(self) -> bool:
        """Whether this backward pass is recorded; asked once by each node that runs."""

    def observe(self, observation: Observation) -> None:
        """Receives what a node shows; the watcher may keep the tensors."""


_watched: dict[nn.Module, tuple[Watcher, ...]] = {}
_watching = False  # whether there are any: a compiler guards on it, but not on the content of a dictionary
_lock = threading.Lock()


def watch(modules: Sequence[nn.Module], watcher: Watcher) -> None:
    """From now on ``watcher`` sees the backward passes of ``modules``, also of graphs that exist already."""
    global _watching
    with _lock:
        _watching = True
        for module in modules:
            _watched[module] = (*_watched.get(module, ()), watcher)


def unwatch(watcher: Watcher) -> None:
    """Stops showing backward passes to ``watcher``."""
    global _watching
    with _lock:
        for module, present in list(_watched.items()):
            left = tuple(each for each in present if each is not watcher)
            if left:
                _watched[module] = left
            else:
                del _watched[module]
        _watching = bool(_watched)


def watched(module: nn.Module | None) -> bool:
    """Whether ``module`` is recorded: its forward pass must then leave nodes that can be."""
    return _watching and module in _watched


def source(module: nn.Module | None, layer: int, unsorted: Tensor | None = None) -> Source | None:
    """The :class:`Source` of a layer of ``module``; None for None."""
    return None if module is None else Source(weakref.ref(module), layer, unsorted)


def watchers(source: Source | None) -> list[Watcher]:
    """The watchers that record this backward pass of ``source``."""
    if not _watching or source is None:
        return []
    module = source.module()
    return [] if module is None else [watcher for watcher in _watched.get(module, ()) if watcher.wants()]


def show(
    watching: Sequence[Watcher],
    source: Source,
    rows: Rows,
    norms: Tensor,
    gates: GateStatistics | None,
    grads: tuple[Tensor | None, ...],  # of output (T, B, D * P) or (N, D * P), h_n (D, B, P), c_n (D, B, H)
) -> None:
    """Shows an observation to each of ``watching``; ``norms`` (·, D, T, B) in the order of ``rows``."""
    rows = rows.on_host()
    lengths = sampled = None
    if rows.ragged:
        lengths = sampled = rows.row_lengths()
        if rows.order is not None:
            sampled = lengths[rows.order]
    sample = sampled_rows(rows.batch if sampled is None else int((sampled > 0).sum()), SAMPLE)
    sampled = None if sampled is None else sampled[list(sample)]
    entering = _entering(grads, rows, sample, sampled, norms.shape[1], norms.device)
    if source.unsorted is not None:
        assert lengths is not None
        norms = norms.index_select(-1, source.unsorted)
        lengths = lengths.index_select(0, source.unsorted.to("cpu"))
    for watcher in watching:
        watcher.observe(Observation(source, norms, lengths, entering, sampled, gates))


def _entering(
    grads: tuple[Tensor | None, ...],
    rows: Rows,
    sample: range,  # R rows of the sorted batch
    lengths: Tensor | None,  # (R,)
    directions: int,
    device: torch.device,
) -> Tensor:
    """(D, T, R): the norms of the gradients that come to each step from outside the layer.

    Norms of what comes from different sides (output, h_n, c_n) are added up.
    """
    output, *ends = grads
    if output is None:
        entering = torch.zeros((directions, rows.steps, len(sample)), dtype=torch.float64, device=device)
    else:
        entering = _norms(rows.of_some(output, sample), directions)
        if lengths is not None:
            entering.masked_fill_((torch.arange(rows.steps)[:, None] >= lengths).to(device), 0)
    for state in ends:
        if state is not None:
            each = _norms(state[:, rows.users(sample, device)], 1)[0]  # (D, R)
            entering[1:, 0] += each[1:]
            if lengths is None:
                entering[0, -1] += each[0]
            else:
                entering[0, (lengths - 1).to(device), torch.arange(len(sample), device=device)] += each[0]
    return entering


def _norms(grad: Tensor, directions: int) -> Tensor:
    """(D, ·, R) in float64, from (·, R, D * P)."""
    grad = grad.detach()
    grad = grad if grad.dtype == torch.float64 else grad.float()
    if grad.device.type != "cpu":
        return torch.linalg.vector_norm(grad.unflatten(-1, (directions, -1)), dim=-1).permute(2, 0, 1).double()
    # NumPy's: torch's would wake its threads, which then spin on the kernels' cores
    values = grad.numpy().reshape(*grad.shape[:2], directions, -1)
    return torch.from_numpy(np.sqrt(np.einsum("trdp,trdp->dtr", values, values), dtype=np.float64))

"""One pass over rows, forward or backward: large products, the recurrence, large products.

A pass takes a whole call, or a segment of one direction.  The cell state that enters and leaves it is never rounded to
16 bits; what the caller gets in the dtype of the layer is rounded after the last pass.

T time, B batch, N tokens: (step, row) pairs, I input, H hidden, P projection (H without one), D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import GATES, Call, Forward, GateStatistics, Gradients, GradOutputs, Needs
from ..gate_statistics import statistics
from . import launch
from .flat_rows import FlatRows
from .launch import Recurrence
from .products import AfterRecurrence, before_projection, entering_gates, projected, recurrent_weights


class Recurred(NamedTuple):
    """What a forward recurrence computes."""

    m: Tensor  # (N, D * H): o tanh(c), which is h without a projection
    c: Tensor  # (D, B, H) float32: the last ones, rows sorted
    gates: Tensor  # (D, N, 4H), activated if they are kept
    cells: Tensor | None  # (D, N, H) float32: every c_t, if they are kept


class Pass(NamedTuple):
    """A call, or a segment of one, as it is launched."""

    call: Call
    flat: FlatRows
    recurrent: Tensor  # (D, 4H, H): see ``recurrent_weights``
    word: Tensor  # the device's status

    @staticmethod
    def of(call: Call, word: Tensor) -> Pass:
        """The pass of a whole call."""
        return Pass(call, FlatRows(call.rows, call.layer.device, call.reset), recurrent_weights(call.weights), word)

    def recur(self, keep: bool) -> Recurred:
        """The gates that enter, and the recurrence; ``keep``: with gates and cells as backward needs them."""
        call, flat = self.call, self.flat
        recurrence = launch.recurrence_of(call.layer, flat, False, ("SAVE",) if keep else ())
        gates = entering_gates(call, flat)
        D, H, N, new = call.layer.directions, call.layer.hidden_size, flat.total, call.input.new_empty
        c = self._float32(call.c_0)
        kept = new(D, N, H, dtype=torch.float32) if keep else None
        recurrent, tensors = self.recurrent, dict[str, Tensor | None](gates=gates, cells=kept, c=c)
        if recurrence.design.kind != "split":
            m = flat.new(call.input, N, D * H)
            tensors |= {"h": m, "w_hh": recurrent, **recurrence.exchange(flat, self.word)}
        else:
            bits, row = _channel(recurrence, flat, N, D, recurrence.row, dim=0), recurrence.row
            m = bits.view(call.layer.dtype)[..., :H]
            if row > H:
                bits[..., H:] = 0  # no program writes these, so none may wait for them
                recurrent = torch.nn.functional.pad(recurrent, (0, row - H))
            tensors |= {"h": bits, "h_words": bits.view(torch.int32), "status": self.word}
            tensors["w_words"] = recurrent.view(torch.int32)
        recurrence.launch(flat, tensors, entered=call.h_0 is not None)
        return Recurred(m.reshape(N, D * H).contiguous(), c, gates, kept)

    def returned(self, recurred: Recurred, cells: bool) -> Forward:
        """What forward returns, with c_n in float32 and nothing saved; ``cells``: with every c_t, which is kept."""
        flat, y = self.flat, recurred.m
        if self.call.layer.projected:
            y = flat.clear(projected(self.call, y))  # zero times weights that may be infinite
        every = None
        if cells:
            assert recurred.cells is not None
            every = flat.unflat(flat.clear(recurred.cells.permute(1, 0, 2).reshape(flat.total, -1).clone()))
        h_n = flat.unsorted(self._last_states(y))
        return Forward(flat.unflat(y), h_n, flat.unsorted(recurred.c), every, ())

    def saved(self, recurred: Recurred) -> tuple[Tensor, ...]:
        """What backward needs: the gates, the cells, and with a projection m."""
        gates, cells, m = recurred.gates, recurred.cells, recurred.m
        assert cells is not None
        return (gates, cells, m) if self.call.layer.projected else (gates, cells)

    def _float32(self, state: Tensor | None) -> Tensor:
        """A copy of (D, B, H), rows sorted, which a kernel may write to; zeros if there is none."""
        if state is None:
            return torch.zeros(self.call.layer.c_shape, dtype=torch.float32, device=self.flat.device)
        return self.flat.sorted(state).to(torch.float32, copy=True).contiguous()

    def _last_states(self, y: Tensor) -> Tensor:
        """h_n (D, B, P), sorted, from y (N, D * P)."""
        call, flat, P = self.call, self.flat, self.call.layer.width
        h_n = y.new_empty(call.layer.h_shape)
        for d in range(call.layer.directions):
            h_n[d, : flat.starting] = flat.take(y, d, False)[:, d * P : (d + 1) * P]
            if flat.may_pass:  # rows without a step keep their initial state
                flat.passes(h_n[d], None if call.h_0 is None else flat.sorted(call.h_0)[d])
        return h_n

    def gradients(self, grads: GradOutputs, output: Tensor, saved: Sequence[Tensor], needs: Needs) -> Gradients:
        """What backward returns, with the gradient of c_0 in float32 and without statistics of gates."""
        call, flat, layer = self.call, self.flat, self.call.layer
        gates, cells, *m = saved
        dy = None if grads.output is None else flat.flat(grads.output)
        dh_n = None if grads.h_n is None else flat.sorted(grads.h_n).contiguous()
        dm, dm_n = before_projection(call, dy, dh_n) if layer.projected else (dy, dh_n)
        optional = {
            "dy": dm,
            "dh_n": dm_n,
            "dcells": None if grads.cells is None else flat.flat(grads.cells),
            "c_0": None if call.c_0 is None else flat.sorted(call.c_0).contiguous(),
        }
        flags = tuple(f"HAS_{name.upper()}" for name, each in optional.items() if each is not None)
        state = None if call.c_0 is None or call.c_0.dtype == layer.dtype else call.c_0.dtype
        recurrence = launch.recurrence_of(layer, flat, True, (*flags, "NORMS") if needs.norms else flags, state)
        dz, dc, squares = self._recur_back(recurrence, grads.c_n, {**optional, "gates": gates, "cells": cells})
        after = AfterRecurrence(call, flat, dz, dy, dh_n)
        dx, dh_0, weights, arrived = after.gradients(flat.flat(output), m, needs)
        return Gradients(
            None if dx is None else flat.unflat(flat.clear(dx)),
            None if dh_0 is None else flat.unsorted(dh_0),
            flat.unsorted(dc) if needs.c_0 else None,
            weights,
            None if squares is None else _magnitudes(flat, squares, arrived),
        )

    def _recur_back(
        self,
        recurrence: Recurrence,
        grad_c_n: Tensor | None,
        others: dict[str, Tensor | None],  # the kernel's other inputs by name
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """dz (D, N, 4H); the gradient of c_0 (D, B, H), sorted; sums of squares (2, D, slices, T, B) for the norms."""
        flat, layer = self.flat, self.call.layer
        D, gates, N = layer.directions, layer.gates, flat.total
        dc, squares = self._float32(grad_c_n), None
        if "NORMS" in recurrence.given:
            shape = (2, D, recurrence.design.slices, flat.steps, flat.batch)
            squares = torch.zeros(shape, dtype=torch.float64, device=flat.device)  # squares of tiny values underflow
        tensors: dict[str, Any] = {"dc": dc, "norms": squares, "w_hh": self.recurrent}
        if recurrence.design.kind != "split":
            dz = flat.new(self.call.input, D, N, gates)
            tensors["dz"] = dz if recurrence.design.kind == "resident" else dz.view(recurrence.bits)
            tensors |= recurrence.exchange(flat, self.word)
        else:
            bits = _channel(recurrence, flat, D, N, gates, dim=1)
            dz = bits.view(layer.dtype)
            tensors |= {"dz": bits, "dz_words": bits.view(torch.int32), "status": self.word}
        recurrence.launch(flat, tensors | others)
        return dz, dc, squares

    def statistics(self, gates: Tensor, rows: Tensor) -> GateStatistics:
        """Of the activated gates (D, N, 4H), over ``rows`` (R,) of ours."""
        flat, hidden = self.flat, self.call.layer.hidden_size
        index, active = flat.places(rows)
        sample = gates[:, index].float().unflatten(-1, (GATES, hidden))  # (D, T, R, 4, H)
        sums, counts, log_forget, count = statistics(sample[..., [0, 1, 3], :].movedim(-2, 0), active)
        return GateStatistics(flat.in_time(sums, 2), flat.in_time(counts, 2), log_forget, flat.in_time(count, 0))


def _channel(recurrence: Recurrence, rows: FlatRows, *shape: int, dim: int) -> Tensor:
    """Integers of the dtype's size, all -1: not written yet; 0 in the tail of N, which is ``shape[dim]``."""
    if rows.tail is None:
        return torch.full(shape, -1, dtype=recurrence.bits, device=rows.device)
    return (rows.tail.to(recurrence.bits) - 1).view(-1, *[1] * (len(shape) - dim - 1)).expand(shape).contiguous()


def _magnitudes(flat: FlatRows, squares: Tensor, arrived: list[Tensor]) -> Tensor:
    """(2, D, T, B) norms from (2, D, slices, T, B) sums of squares; with a projection, those of h from ``arrived``."""
    result = squares.sum(2).sqrt_()
    for d, dh in enumerate(arrived):
        flat.by_step(torch.linalg.vector_norm(dh, dim=1, dtype=torch.float64), result[0, d])
    result = flat.in_time(result.float(), 2)
    return result if flat.order is None else torch.empty_like(result).index_copy_(-1, flat.order, result)

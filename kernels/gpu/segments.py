"""Passes over segments of steps: forward keeps the states between them, and backward computes the rest again.

A segment of one direction is a pass of its own (``passes.py``), whose h_0 and c_0 are the states that enter it.  The
directions run one after the other, since the segments of direction 1 begin at the last steps.  Forward runs by the same
segments as backward, from the same states by the same operations, so what backward computes again is what forward
computed.

h enters a segment as h_0 enters a call: W_hh h is added to z, which is in the dtype of the layer.  Without segments it
is added in float32, so the results differ by a rounding where segments meet.  c, and its gradient on the way back, are
float32 from end to end; the gradient of h is rounded to the dtype of the layer between segments.  Gradients of weights
are products in that dtype for each segment, summed in float32.

T time, B batch, I input, H hidden, P projection (H without one), D directions, R sampled rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..contract import Call, Forward, GateStatistics, Gradients, GradOutputs, Layer, Needs, WeightGradients
from ..gate_statistics import BINS
from .flat_rows import FlatRows
from .passes import Pass
from .products import recurrent_weights

States = tuple[Tensor, Tensor]  # h (1, B, P) in the dtype of the layer, c (1, B, H) float32; or their gradients


def saves(layer: Layer) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """See the contract: h and c that enter each segment, in the caller's order of rows."""
    shape = layer.directions, layer.segments, layer.batch
    return [((*shape, layer.width), layer.dtype), ((*shape, layer.hidden_size), torch.float32)]


def one_direction(layer: Layer) -> Layer:
    """The layer whose recurrence is launched for a segment, but for its steps."""
    return layer._replace(directions=1, segment=0)


class _Segment:
    """Some steps of one direction of a call: its part of each tensor, and its passes."""

    def __init__(self, call: Call, direction: int, number: int, recurrent: Tensor, word: Tensor) -> None:
        layer = call.layer
        self.direction, self.number = direction, number
        first = number * layer.segment
        last = min(first + layer.segment, layer.steps)
        if direction == 1:
            first, last = layer.steps - last, layer.steps - first
        self.times = slice(first, last)
        self.rows, self.place = call.rows.part(first, last), call.rows.place(first, last)
        self._call, self._recurrent, self._word = call, recurrent, word

    @staticmethod
    def each(call: Call, direction: int, word: Tensor, back: bool = False) -> Iterator[_Segment]:
        """The segments of a direction, in its order or from the last to the first."""
        recurrent = recurrent_weights(call.weights[direction : direction + 1])
        numbers = range(call.layer.segments)
        for number in reversed(numbers) if back else numbers:
            yield _Segment(call, direction, number, recurrent, word)

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a tensor of the call's rows: its steps, and the features of its direction."""
        return tensor[self.place].chunk(self._call.layer.directions, -1)[self.direction]

    def given(self, tensor: Tensor | None) -> Tensor | None:
        """As :meth:`of`, for a kernel to read."""
        return None if tensor is None else _aligned(self.of(tensor))

    def entered(self, states: States) -> Pass:
        """The pass over the segment that these states enter."""
        call, d = self._call, self.direction
        h, c = states[0], _aligned(states[1])
        layer = one_direction(call.layer)._replace(steps=self.rows.steps)
        reset = None if call.reset is None else call.reset[self.place]
        part = Call(layer, self.rows, call.input[self.place], h, c, call.weights[d : d + 1], reset)
        flat = FlatRows(self.rows, layer.device, reset, backwards=d == 1)
        return Pass(part, flat, self._recurrent, self._word)


def _aligned(tensor: Tensor) -> Tensor:
    """The same at a multiple of 16 bytes: Triton compiles a kernel again for a tensor that is not at one."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def forward(call: Call, cells: bool, word: Tensor) -> Forward:
    """See the contract; it saves what :func:`saves` says."""
    layer, rows, new = call.layer, call.rows, call.input.new_empty
    output = rows.new(call.input, layer.directions * layer.width)
    every = rows.new(call.input, layer.directions * layer.hidden_size, torch.float32) if cells else None
    borders = tuple(new(shape, dtype=dtype) for shape, dtype in saves(layer))
    h_n, c_n = new(layer.h_shape), new(layer.c_shape)
    for d in range(layer.directions):
        states = _of_direction(call, (call.h_0, call.c_0), d)
        for segment in _Segment.each(call, d, word):
            for border, state in zip(borders, states, strict=True):
                border[d, segment.number] = state[0]
            if segment.rows.total:  # else no row has any of its steps
                states = _walk(segment, states, output, every)
        h_n[d], c_n[d] = states[0][0], states[1][0]
    return Forward(output, h_n, c_n, every, borders)


def _of_direction(call: Call, states: Sequence[Tensor | None], direction: int) -> States:
    """One direction of (D, B, P) and (D, B, H), or of their gradients; zeros where there are none."""
    given = zip(states, (call.layer.h_shape, call.layer.c_shape), strict=True)
    zeros, d = call.input.new_zeros, direction
    h, c = (zeros(1, *shape[1:]) if state is None else state[d : d + 1] for state, shape in given)
    return h, c.to(torch.float32)


def _walk(segment: _Segment, states: States, output: Tensor, every: Tensor | None) -> States:
    """Writes the segment's part of the output, and of every c_t; the states that leave it."""
    this = segment.entered(states)
    result = this.returned(this.recur(keep=every is not None), cells=every is not None)
    segment.of(output).copy_(result.output)
    if every is not None and result.cells is not None:
        segment.of(every).copy_(result.cells)
    return result.h_n, result.c_n


def backward(
    call: Call, grads: GradOutputs, output: Tensor, saved: tuple[Tensor, ...], needs: Needs, word: Tensor
) -> Gradients:
    """See the contract."""
    walk = _WalkBack(call, grads, output, saved, needs)
    ends, weights = zip(*(walk.direction(d, word) for d in range(call.layer.directions)), strict=True)
    h_0, c_0 = (torch.cat(each) for each in zip(*ends, strict=True))
    return Gradients(
        walk.dx,
        h_0 if needs.h_0 else None,
        c_0.to(call.layer.dtype) if needs.c_0 else None,
        weights,
        walk.norms,
        walk.gates,
    )


class _WalkBack:
    """What a backward was given, and the results of which each segment writes its part."""

    def __init__(self, call: Call, grads: GradOutputs, output: Tensor, saved: tuple[Tensor, ...], needs: Needs) -> None:
        self._call, self._grads, self._output, self._saved = call, grads, output, saved
        self._wanted = needs._replace(h_0=True, c_0=True, gate_rows=0)  # of one segment
        layer, zeros = call.layer, call.input.new_zeros
        D, T, B, H = layer.directions, layer.steps, layer.batch, layer.hidden_size
        self.dx = call.rows.new(call.input, layer.input_size) if needs.input else None
        self.norms = zeros((2, D, T, B), dtype=torch.float32) if needs.norms else None
        self.gates: GateStatistics | None = None
        if needs.gate_rows:
            whole = FlatRows(call.rows, layer.device, None)
            self._sampled = whole.users(whole.sample(needs.gate_rows))  # (R,)
            self.gates = GateStatistics(
                zeros((3, D, T), dtype=torch.float64),
                zeros((3, D, T, BINS), dtype=torch.int32),
                zeros((D, H), dtype=torch.float64),
                zeros(T, dtype=torch.int64),
            )

    def direction(self, d: int, word: Tensor) -> tuple[States, WeightGradients]:
        """The gradients of h_0 and c_0 of a direction, and those of its weights."""
        weights = self._call.weights[d] if self._wanted.weights else WeightGradients()
        sums = [None if w is None else torch.zeros_like(w, dtype=torch.float32) for w in weights]
        h, c = _of_direction(self._call, self._grads[1:3], d)
        states = _aligned(h), c
        for segment in _Segment.each(self._call, d, word, back=True):
            if segment.rows.total:
                states, found = self._segment(segment, states)
                for total, grad in zip(sums, found, strict=True):
                    if total is not None and grad is not None:
                        total += grad
        return states, WeightGradients(*(None if each is None else each.to(self._output.dtype) for each in sums))

    def _segment(self, segment: _Segment, arrived: States) -> tuple[States, WeightGradients]:
        """The gradients of the states that enter a segment, from those of the states that leave it; of the weights."""
        d, times = segment.direction, segment.times
        h, c = (each[d, segment.number][None] for each in self._saved)
        this = segment.entered((h, c))
        kept = this.saved(this.recur(keep=True))
        dy, dcells = map(segment.given, (self._grads.output, self._grads.cells))
        grads = GradOutputs(dy, *arrived, dcells)
        found = this.gradients(grads, segment.of(self._output), kept, self._wanted)
        if self.dx is not None and found.input is not None:
            dx = self.dx[segment.place]
            if d == 0:
                dx.copy_(found.input)
            else:
                dx += found.input
        if self.norms is not None and found.norms is not None:
            self.norms[:, d, times] = found.norms[:, 0]
        if self.gates is not None:
            self._count(segment, this.statistics(kept[0], this.flat.ours(self._sampled)))
        assert found.h_0 is not None
        assert found.c_0 is not None
        return (found.h_0, found.c_0), found.weights[0]

    def _count(self, segment: _Segment, found: GateStatistics) -> None:
        """Enters a segment's statistics of gates into those of all steps."""
        d, times, gates = segment.direction, segment.times, self.gates
        assert gates is not None
        gates.sums[:, d, times] = found.sums[:, 0]
        gates.counts[:, d, times] = found.counts[:, 0]
        gates.log_forget[d] += found.log_forget[0]
        gates.rows[times] = found.rows

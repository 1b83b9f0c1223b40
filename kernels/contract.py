"""The types that a caller and a backend exchange; the package's docstring says how they work together.

T time, B batch, N tokens: (step, row) pairs, I input, H hidden, P projection (H without one), D directions.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from .rows import Rows

GATES = 4  # i, f, g, o
__all__ = [
    "GATES", "Call", "Forward", "GateStatistics", "GradOutputs", "Gradients", "Kernels", "Layer", "Needs", "Rows",
    "WeightGradients", "Weights", "state_dtype",
]  # fmt: skip


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the cell state and of every accumulation for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Weights(NamedTuple):
    """The parameters of one direction of one layer."""

    weight_ih: Tensor  # (4H, I)
    weight_hh: Tensor  # (4H, P)
    bias_ih: Tensor | None = None  # (4H,)
    bias_hh: Tensor | None = None  # (4H,)
    weight_hr: Tensor | None = None  # (P, H)

    @staticmethod
    def by_direction(params: Sequence[Tensor], directions: int) -> tuple[Weights, ...]:
        """Groups a layer's flat list of parameters by direction.

        They are in the order of the fields.  Their number per direction says which there are: two, three with
        ``weight_hr``, four with the biases, five with both.
        """
        fields = len(params) // directions
        result = []
        for at in range(0, len(params), fields):
            weight_ih, weight_hh, *rest = params[at : at + fields]
            no_biases = (None, None) if fields == 3 else ()
            result.append(Weights(weight_ih, weight_hh, *no_biases, *rest))
        return tuple(result)


class WeightGradients(NamedTuple):
    """The gradients of :class:`Weights`, field by field; None if not requested, or if there is no such weight."""

    weight_ih: Tensor | None = None
    weight_hh: Tensor | None = None
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    weight_hr: Tensor | None = None


class Layer(NamedTuple):
    """The sizes of a call of one layer, which decide the backend and its kernels; no tensor, no pointer."""

    device: torch.device
    dtype: torch.dtype
    steps: int  # T
    batch: int  # B
    input_size: int  # I
    hidden_size: int  # H
    proj_size: int = 0  # 0: none
    directions: int = 1
    bias: bool = True
    ragged: bool = False
    training: bool = False  # gradients will be needed
    segment: int = 0  # steps that backward computes again at a time; 0: forward saves what backward needs of all

    @staticmethod
    def of(
        input: Tensor, weights: Sequence[Weights], steps: int, batch: int, ragged: bool = False, training: bool = False,
        segment: int = 0,
    ) -> Layer:  # fmt: skip
        """The sizes that these weights have, for an input of these steps and rows."""
        weight_ih, weight_hh, bias, _, weight_hr = weights[0]
        return Layer(
            input.device, input.dtype, steps, batch, weight_ih.shape[1], weight_hh.shape[0] // GATES,
            0 if weight_hr is None else weight_hr.shape[0], len(weights), bias is not None, ragged, training,
            segment,
        )  # fmt: skip

    @property
    def projected(self) -> bool:
        return self.proj_size > 0

    @property
    def width(self) -> int:
        """P: features of h_t in one direction."""
        return self.proj_size or self.hidden_size

    @property
    def gates(self) -> int:
        """4H: the gates of all units."""
        return GATES * self.hidden_size

    @property
    def segments(self) -> int:
        """How many segments the steps have; 0 if backward computes nothing again."""
        return -(-self.steps // self.segment) if self.segment else 0

    @property
    def weight_names(self) -> tuple[str, ...]:
        """The fields of :class:`Weights` that the layer has."""
        every = Weights._fields
        return (*every[:2], *every[2:4] * self.bias, *every[4:] * self.projected)

    @property
    def weight_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the weights of one direction, in the order of ``weight_names``."""
        biases = ((self.gates,),) * 2 if self.bias else ()
        projection = ((self.width, self.hidden_size),) if self.projected else ()
        return ((self.gates, self.input_size), (self.gates, self.width), *biases, *projection)

    @property
    def h_shape(self) -> tuple[int, int, int]:
        """(D, B, P), of h_0 and h_n."""
        return self.directions, self.batch, self.width

    @property
    def c_shape(self) -> tuple[int, int, int]:
        """(D, B, H), of c_0 and c_n."""
        return self.directions, self.batch, self.hidden_size

    def as_called(self, ragged: bool, training: bool, segment: int = 0) -> Layer:
        """The same sizes for a call that may be ragged or trained; this one is neither."""
        return Layer(*self[:-3], ragged, training, segment * training) if ragged or training else self

    def after(self) -> Layer:
        """The next layer of a stack, whose input is the output of this one."""
        return self._replace(input_size=self.directions * self.width)


class Call(NamedTuple):
    """One layer over a batch: the arguments of forward, which backward gets again."""

    layer: Layer
    rows: Rows
    input: Tensor  # rows.shape + (I,)
    h_0: Tensor | None  # (D, B, P); None for zeros
    c_0: Tensor | None  # (D, B, H); None for zeros
    weights: tuple[Weights, ...]  # D of them
    reset: Tensor | None = None  # rows.shape, bool

    @staticmethod
    def of(
        input: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        weights: tuple[Weights, ...],
        rows: Rows,
        reset: Tensor | None = None,
        training: bool = False,
        segment: int = 0,
    ) -> Call:
        """A call of these tensors, which must fit each other."""
        layer = Layer.of(input, weights, rows.steps, rows.batch, rows.ragged, training, segment)
        return Call(layer, rows, input, h_0, c_0, weights, reset)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """reset, input, h_0, c_0, then the weights field by field; None for an absent one."""
        return (self.reset, self.input, self.h_0, self.c_0, *chain.from_iterable(self.weights))

    @staticmethod
    def with_tensors(layer: Layer, rows: Rows, tensors: Sequence[Tensor | None]) -> Call:
        """The inverse of :attr:`tensors`."""
        reset, input, h_0, c_0, *fields = tensors
        width = len(Weights._fields)
        weights = tuple(Weights(*fields[at : at + width]) for at in range(0, len(fields), width))  # type: ignore[arg-type]
        return Call(layer, rows, input, h_0, c_0, weights, reset)  # type: ignore[arg-type]


class Kernels(NamedTuple):
    """What a check of the kernels that a layer runs has to know of them."""

    identity: Hashable  # equal for layers that run the same compiled kernels
    rounding: float  # the largest relative error of one rounding, of an operand of a product or of a result


class Needs(NamedTuple):
    """What a backward has to produce: which gradients, and what a recording wants."""

    input: bool = True
    h_0: bool = True
    c_0: bool = True
    weights: bool = True
    norms: bool = False
    gate_rows: int = 0  # rows whose gates the statistics are taken of; 0: no statistics


class Forward(NamedTuple):
    """What forward returns."""

    output: Tensor  # rows.shape + (D * P,)
    h_n: Tensor  # (D, B, P)
    c_n: Tensor  # (D, B, H)
    cells: Tensor | None  # rows.shape + (D * H,), state dtype; if requested
    saved: tuple[Tensor, ...]  # for backward; empty without save


class GradOutputs(NamedTuple):
    """The gradients of what forward returned, of the same shapes; None for a result that was not used."""

    output: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None
    cells: Tensor | None = None


class GateStatistics(NamedTuple):
    """The activations of the gates i, f, o over a sample of rows and all units."""

    sums: Tensor  # (3, D, T) float64
    counts: Tensor  # (3, D, T, 10) int32: activations in [0, 0.1), [0.1, 0.2), ... [0.9, 1]
    log_forget: Tensor  # (D, H) float64: sum of ln f of each unit
    rows: Tensor  # (T,) int64: sampled rows active at each step


class Gradients(NamedTuple):
    """What backward returns; None for what was not requested."""

    input: Tensor | None
    h_0: Tensor | None  # (D, B, P)
    c_0: Tensor | None  # (D, B, H)
    weights: tuple[WeightGradients, ...]  # one per direction
    norms: Tensor | None = None  # (2, D, T, B), state dtype
    gates: GateStatistics | None = None

    def of(self, weights: Sequence[Weights]) -> list[Tensor | None]:
        """The gradients of ``weights``, a flat list in the order of ``Weights.by_direction`` without absent fields."""
        pairs = zip(chain.from_iterable(self.weights), chain.from_iterable(weights), strict=True)
        return [grad for grad, weight in pairs if weight is not None]

"""The Jacobian of one step of a recurrent layer: what a gradient is multiplied with on its way back through time.

The LSTM's cell is c_t = f_t ⊙ c_{t-1} + i_t ⊙ g_t, its gates read h_{t-1} = o_{t-1} ⊙ tanh(c_{t-1}) (through W_hr if
there is a projection).  With D_{t-1} = diag(o_{t-1} (1 - tanh² c_{t-1})), and W^k the rows of gate k in W_hh (in
W_hh W_hr), the Jacobian ∂c_t / ∂c_{t-1} is exactly the sum of four terms, because o_{t-1} does not depend on c_{t-1}:

    A_t = diag(c_{t-1} ⊙ f_t (1 - f_t)) W^f D_{t-1}    through the forget gate
    B_t = diag(f_t)                                    along the cell: the direct, additive path
    C_t = diag(g_t ⊙ i_t (1 - i_t)) W^i D_{t-1}        through the input gate
    E_t = diag(i_t ⊙ (1 - g_t²)) W^g D_{t-1}           through the candidate

Direction 1 runs backwards: read t + 1 for t - 1.  A direction starts from c_0 and h_0, which are given: h_0 was not
computed from c_0, so D is zero at the first step, and the Jacobian with respect to c_0 is B alone.

A product of these Jacobians over several steps acts on the gradient on its way along the cells, with every output gate
held fixed.  It is not all of dc_t / dc_{t-k} from k = 2 on: it lacks c_{t-2} → h_{t-2} → o_{t-1} → h_{t-1} → c_t,
which goes from h to h through the output gate, past the cell.

The plain network's h_t = σ(z_t), z_t = W_ih x_t + W_hh h_{t-1} + b, has one term, diag(σ'(z_t)) W_hh, and a product of
those is all of dh_t / dh_{t-k}.  Its norm is at most (γ ‖W_hh‖₂)^k, γ the largest σ' (Pascanu et al. 2013).

T time, B batch, I input, H hidden, P projection (H without one), L layers, D directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence

from lstmcore import checks, functional
from lstmcore.flow.operators import Diagonal, Jacobian, Operators, Scaled
from lstmcore.flow.rnn import NONLINEARITIES, rnn


class Terms(NamedTuple):
    """The four paths from c_{t-1} to c_t; (B, H, H), or (T', B, H, H)."""

    A: Tensor  # through the forget gate
    B: Tensor  # along the cell
    C: Tensor  # through the input gate
    E: Tensor  # through the candidate


class CellJacobian(Jacobian):
    """∂c_t / ∂c_{t-1} of one layer and direction of an LSTM, for every step and row, in float64.

    The docstring of :mod:`lstmcore.flow.jacobian` has the equations.  The batch has one row if the input was unbatched.
    """

    def __init__(
        self,
        forget: Tensor,  # (T, B, H): f
        scales: Tensor,  # (T, B, 3, H): the diagonals before W in A, C and E
        weight: Tensor,  # (3H, H): W^f, W^i, W^g
        cell: Tensor,  # (T, B, H): the diagonal of D_{t-1}
        direction: int,
    ) -> None:
        self.direction = direction
        self.shape, self.device = tuple(forget.shape), forget.device  # type: ignore[assignment]
        self._forget, self._scales, self._weight, self._cell = forget, scales, weight, cell
        left, each = scales.unbind(-2), weight.chunk(3)
        self.by_term: dict[str, Operators] = {
            "A": Scaled(left[0], each[0], cell),
            "B": Diagonal(forget),
            "C": Scaled(left[1], each[1], cell),
            "E": Scaled(left[2], each[2], cell),
        }

    def jvp(self, t: int | slice, v: Tensor) -> Tensor:
        z = linear(self._cell[t] * v, self._weight).unflatten(-1, (3, -1))  # one product for the three gates
        return self._forget[t] * v + (self._scales[t] * z).sum(-2)

    def vjp(self, t: int | slice, u: Tensor) -> Tensor:
        z = (self._scales[t] * u[..., None, :]).flatten(-2)
        return self._forget[t] * u + z @ self._weight * self._cell[t]

    def terms(self, t: int | slice) -> Terms:
        """The four terms of a step, or of a slice of them; errors as :meth:`matrix`."""
        return Terms(*(term.matrix(t) for term in self.by_term.values()))

    def matrix(self, t: int | slice) -> Tensor:
        A, B, C, E = self.terms(t)
        return A + B + C + E

    def norms(self, ord: int | str = 2) -> dict[str, Tensor]:
        return {name: term.norm(ord) for name, term in self.by_term.items()} | {"sum": self.norm(ord)}

    def frobenius(self) -> Tensor:
        """The squares of B + K, K = A + C + E, added up: B², then 2 B K on the diagonal, then K² term by term."""
        scales, weights, cell = self._scales.unbind(-2), self._weight.chunk(3), self._cell.square()
        on_diagonal = sum(scale * weight.diagonal() for scale, weight in zip(scales, weights, strict=True)) * self._cell
        square = (self._forget * (self._forget + 2 * on_diagonal)).sum(-1)
        for p, q in product(range(3), repeat=2):
            square += ((scales[p] * scales[q]) @ (weights[p] * weights[q]) * cell).sum(-1)
        return square.clamp(min=0).sqrt()


class RNNJacobian(Scaled, Jacobian):
    """∂h_t / ∂h_{t-1} of one layer of a plain recurrent network, for every step and row, in float64.

    The batch has one row if the input was unbatched.
    """

    def __init__(self, derivative: Tensor, weight: Tensor, slope: float) -> None:  # (T, B, H), (H, H)
        super().__init__(derivative, weight, torch.ones_like(derivative[:1, :1]).expand_as(derivative))
        self.slope = slope

    @property
    def bound(self) -> float:
        """γ ‖W_hh‖₂, γ = 1/4 for sigmoid, 1 for tanh and relu: no Jacobian has a larger norm (Pascanu et al. 2013)."""
        return self.slope * torch.linalg.matrix_norm(self.weight, 2).item()

    def log_bound(self, lag: int) -> float:
        """The natural logarithm of ``bound`` ** ``lag``, which no product over ``lag`` steps exceeds."""
        if lag < 0:
            raise ValueError(f"lag {lag}: expected 0 or more")
        return 0.0 if lag == 0 else lag * (math.log(self.bound) if self.bound else -math.inf)


@torch.no_grad()
def cell_jacobian(
    module: nn.RNNBase,
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None = None,
    layer: int = 0,
    direction: int = 0,
) -> CellJacobian:
    """The Jacobians ∂c_t / ∂c_{t-1} of one layer and direction of an LSTM, run on ``input`` without dropout.

    Args:
        module: an ``lstmcore.LSTM`` or ``torch.nn.LSTM``; computed in float64, regardless of its dtype.
        input: (T, B, I), (B, T, I) when batch_first, (T, I) unbatched; of any floating dtype.
        hx: the initial states, (L * D, B, P) and (L * D, B, H), without B when unbatched; None for zeros.
        layer: which layer, from 0 on.
        direction: 1 runs from the last step to the first.

    Raises:
        TypeError: another module.
        IndexError: a layer or direction that the module does not have.
        ValueError: a ``PackedSequence``; input of a wrong rank or dtype; input, states or parameters that are not
            finite.
        RuntimeError: sizes that do not fit, T = 0.

    Examples:
        >>> jacobian = lstmcore.cell_jacobian(lstmcore.LSTM(8, 32), torch.randn(100, 4, 8))
        >>> sorted(jacobian.norms())
        ['A', 'B', 'C', 'E', 'sum']
        >>> jacobian.product_norm(lag=50).shape
        torch.Size([4])
    """
    if getattr(module, "mode", None) != "LSTM":
        raise TypeError(f"expected an lstmcore.LSTM or torch.nn.LSTM, got {_class_name(module)}")
    if isinstance(hx, Tensor) or (hx is not None and len(hx) != 2):
        raise RuntimeError("an LSTM expects two hidden states: hx must be a tuple (h_0, c_0)")
    directions = 2 if module.bidirectional else 1
    _check_index("layer", layer, module.num_layers)
    _check_index("direction", direction, directions)
    x, (h_0, c_0) = _arguments(module, input, hx, (module.proj_size or module.hidden_size, module.hidden_size))
    params = _parameters(module)

    def run(x: Tensor, first: int, last: int, cells: bool) -> Any:
        """The layers from ``first`` to ``last - 1``."""
        states, per_layer = slice(first * directions, last * directions), len(params) // module.num_layers
        return functional.lstm(
            x,
            (h_0[states], c_0[states]),
            list(params.values())[first * per_layer : last * per_layer],
            module.bias,
            last - first,
            bidirectional=module.bidirectional,
            return_cells=cells,
            backend="reference",
        )

    if layer:
        x = run(x, 0, layer, cells=False)[0]
        _check_finite(x, f"the output of layer {layer - 1}")
    output, _, _, cells = run(x, layer, layer + 1, cells=True)
    h, c = output.chunk(directions, -1)[direction], cells.chunk(directions, -1)[direction]
    _check_finite(c, f"the cell state of layer {layer}", direction)

    name = f"l{layer}" + ("_reverse" if direction else "")
    w_ih, w_hh, w_hr = params[f"weight_ih_{name}"], params[f"weight_hh_{name}"], params.get(f"weight_hr_{name}")
    state = layer * directions + direction
    h_prev, c_prev = _previous(h, h_0[state], direction), _previous(c, c_0[state], direction)
    z = linear(x, w_ih, params.get(f"bias_ih_{name}")) + linear(h_prev, w_hh, params.get(f"bias_hh_{name}"))
    i, f, g, o = z.chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    scales = torch.stack([c_prev * f * (1 - f), g * i * (1 - i), i * (1 - g * g)], -2)
    cell = o * (1 - c.tanh().square())
    recurrent = w_hh if w_hr is None else w_hh @ w_hr  # (4H, H)
    w_i, w_f, w_g, _ = recurrent.chunk(4)
    cell_prev = _previous(cell, torch.zeros_like(cell[0]), direction)  # h_0 is given: it depends on nothing
    return CellJacobian(f, scales, torch.cat([w_f, w_i, w_g]), cell_prev, direction)


@torch.no_grad()
def rnn_jacobian(
    module: nn.RNNBase,
    input: Tensor,
    hx: Tensor | None = None,
    layer: int = 0,
) -> RNNJacobian:
    """The Jacobians ∂h_t / ∂h_{t-1} of one layer of a plain recurrent network, run on ``input`` without dropout.

    ``module`` is an ``lstmcore.RNN`` or a ``torch.nn.RNN`` in one direction; everything else, and the errors, as in
    :func:`cell_jacobian`.  ValueError for a bidirectional module.
    """
    if not isinstance(module, nn.RNNBase) or getattr(module, "nonlinearity", None) not in NONLINEARITIES:
        raise TypeError(f"expected an lstmcore.RNN or torch.nn.RNN, got {_class_name(module)}")
    if module.bidirectional:
        raise ValueError("expected an RNN in one direction, got a bidirectional one")
    _check_index("layer", layer, module.num_layers)
    x, (h_0,) = _arguments(module, input, None if hx is None else (hx,), (module.hidden_size,))
    params = _parameters(module)
    below = list(params.values())[: (layer + 1) * len(params) // module.num_layers]
    sigma = NONLINEARITIES[module.nonlinearity]  # type: ignore[index]
    output, _ = rnn(x, h_0[: layer + 1], below, module.nonlinearity, module.bias)  # type: ignore[arg-type]
    _check_finite(output, f"the hidden state of layer {layer}")
    return RNNJacobian(sigma.derivative(output), params[f"weight_hh_l{layer}"], sigma.slope)


def _class_name(module: Any) -> str:
    return type(module).__name__


def _check_index(what: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        expected = f"0 to {count - 1}" if count > 1 else "0"
        raise IndexError(f"{what} {index} of a module that has {count}: expected {expected}")


def _arguments(
    module: nn.RNNBase, input: Tensor, hx: Sequence[Tensor] | None, widths: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """The input (T, B, I) and the initial states (L * D, B, ·) of these widths, checked, in float64."""
    if isinstance(input, PackedSequence):
        raise ValueError(
            "a PackedSequence has rows of different lengths: pass one row, cut to its length and unbatched, "
            "input[:length, row]"
        )
    x, batched = checks.time_first(_class_name(module), input, module.batch_first)
    if not input.is_floating_point():
        raise ValueError(f"expected input of a floating-point dtype, got {input.dtype}")
    checks.features(x, module.input_size)
    checks.some_steps(len(x))
    x = x.to(torch.float64)
    _check_finite(x, "the input")
    count = module.num_layers * (2 if module.bidirectional else 1)
    states = []
    for index, width in enumerate(widths):
        shape = (count, x.shape[1], width)
        if hx is None:
            states.append(x.new_zeros(shape))
            continue
        expected = shape if batched else (count, width)
        if hx[index].shape != expected:
            raise RuntimeError(f"Expected hidden[{index}] size {expected}, got {list(hx[index].shape)}")
        if not hx[index].isfinite().all():
            raise ValueError(f"hidden[{index}] of hx is not finite: it holds NaN or infinity")
        states.append(hx[index].to(torch.float64).view(shape))
    return x, states


def _parameters(module: nn.RNNBase) -> dict[str, Tensor]:
    """The parameters in float64, by name, in the order of the flat list."""
    params = {name: getattr(module, name).to(torch.float64) for name in module._flat_weights_names}
    for name, value in params.items():
        if not value.isfinite().all():
            raise ValueError(
                f"{name} is not finite: training has diverged; go back to a checkpoint, "
                "clip gradients or lower the learning rate"
            )
    return params


def _check_finite(values: Tensor, what: str, direction: int = 0) -> None:  # (T, B, ·)
    """ValueError with the first step, in the order of the direction, at which ``values`` are not finite."""
    bad = (~values.isfinite()).flatten(1).any(1).nonzero()[:, 0].tolist()
    if bad:
        hint = "check where it comes from for NaN, infinity and overflow"
        if what != "the input":
            hint = "the values grow beyond all bounds; clip gradients or lower the learning rate, or scale the input"
        raise ValueError(f"{what} is not finite from step {bad[-1 if direction else 0]} on: {hint}")


def _previous(states: Tensor, first: Tensor, direction: int) -> Tensor:
    """(T, B, ·): the state before each step, ``first`` (B, ·) at the first one."""
    return torch.cat([states[1:], first[None]] if direction else [first[None], states[:-1]])

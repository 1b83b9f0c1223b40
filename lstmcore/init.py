"""Initialisations that let an LSTM remember: forget biases of one, and chrono.

With torch's default the forget gates start near one half, so their product, which scales a gradient on its way through
the sequence, halves with every step.  H hidden units.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from lstmcore.kernels.contract import GATES

_NO_BIASES = "the module has no biases to initialise; build it with bias=True"


def forget_bias_(module: nn.RNNBase, value: float = 1.0) -> nn.RNNBase:
    """Sets the forget gates' bias of every layer and direction to ``value``, in place (Jozefowicz et al. 2015).

    A gate starts at sigmoid(value): 0.73 for 1, 0.95 for 3, which keep half of a gradient for 2 and 14 steps.

    Args:
        module: an ``lstmcore.LSTM`` or ``torch.nn.LSTM``.
        value: what ``bias_ih`` and ``bias_hh`` of the forget gates add up to; ``bias_hh`` becomes 0.

    Returns:
        ``module``.

    Raises:
        ValueError: a module without the biases of an LSTM or with computed ones; a ``value`` that is not finite.
        TypeError: a ``value`` that is no number.

    Examples:
        >>> lstm = lstmcore.init.forget_bias_(torch.nn.LSTM(8, 32), 1.0)
        >>> lstm.bias_ih_l0[32:64].unique().item()
        1.0
    """
    check_options(value, None)
    with torch.no_grad():
        for ih, hh in biases(module):
            _set(ih, {1: float(value)})
            _set(hh, {1: 0.0})
    return module


def chrono_(module: nn.RNNBase, max_lag: int, generator: torch.Generator | None = None) -> nn.RNNBase:
    """Chrono initialisation for dependencies of up to ``max_lag`` steps, in place (Tallec & Ollivier 2018).

    In every layer and direction b_f = ln(u), u uniform in [1, max_lag - 1], and b_i = -b_f: unit by unit the forget
    gates start with time constants spread over all lags up to ``max_lag``, and the input gates with 1 - f.  The other
    biases stay as they are.

    Args:
        module: an ``lstmcore.LSTM`` or ``torch.nn.LSTM``.
        max_lag: the longest lag, in steps, that the memory has to span; 3 or more.
        generator: of the random numbers; None for torch's default one.

    Returns:
        ``module``.

    Raises:
        ValueError: a module without the biases of an LSTM or with computed ones; ``max_lag`` below 3.
        TypeError: a ``max_lag`` that is no integer.
    """
    check_options(None, max_lag)
    device = "cpu" if generator is None else generator.device  # not the default device
    with torch.no_grad():
        for ih, hh in biases(module):
            if ih.is_meta:
                continue  # nothing to set, so nothing is drawn, as in torch's initialisations
            lags = torch.empty(len(ih) // GATES, dtype=torch.float64, device=device)
            lags.uniform_(1, int(max_lag) - 1, generator=generator)
            _set(ih, {0: -lags.log(), 1: lags.log()})
            _set(hh, {0: 0.0, 1: 0.0})
    return module


def check_options(forget_bias: float | None, chrono: int | None, bias: bool = True) -> None:
    """Raises ValueError or TypeError for what ``lstmcore.LSTM`` cannot take as its arguments of these names."""
    if bias is False and not (forget_bias is None and chrono is None):
        raise ValueError(_NO_BIASES)
    if forget_bias is not None and chrono is not None:
        raise ValueError("forget_bias and chrono exclude each other: both set the forget gates' biases; give one")
    if forget_bias is not None:
        if not isinstance(forget_bias, Real) or isinstance(forget_bias, bool):
            raise TypeError(f"the forget bias should be of type float, got: {type(forget_bias).__name__}")
        if not math.isfinite(forget_bias):
            raise ValueError(f"expected a finite forget bias, got {forget_bias}")
    if chrono is not None:
        if not isinstance(chrono, Integral) or isinstance(chrono, bool):
            raise TypeError(f"max_lag, the argument of chrono, should be of type int, got: {type(chrono).__name__}")
        if chrono < 3:
            raise ValueError(f"chrono spreads lags from 1 to max_lag - 1: expected max_lag >= 3, got {chrono}")


def biases(module: nn.RNNBase) -> list[tuple[Tensor, Tensor]]:
    """(bias_ih, bias_hh) of every layer and direction; ValueError if there are none that can be set."""
    if getattr(module, "mode", None) != "LSTM":
        raise ValueError(f"expected an lstmcore.LSTM or torch.nn.LSTM, got {type(module).__name__}")
    if not module.bias:
        raise ValueError(_NO_BIASES)
    ends = ("", "_reverse") if module.bidirectional else ("",)
    names = [f"l{layer}{end}" for layer in range(module.num_layers) for end in ends]
    return [(_own(module, f"bias_ih_{name}"), _own(module, f"bias_hh_{name}")) for name in names]


def _own(module: nn.Module, name: str) -> Tensor:
    """The module's own tensor ``name``; one that is computed from others at each access could not be set."""
    for own in (module._parameters, module._buffers):
        tensor = own.get(name)
        if tensor is not None:
            return tensor
    raise ValueError(
        f"{name} is no parameter of the module but computed from others (parametrized, weight-normed or pruned), and "
        "cannot be set; initialise the biases before that"
    )


def _set(bias: Tensor, gates: dict[int, Tensor | float]) -> None:
    """Writes the bias (4H,) of some of the gates i, f, g, o: ``gates`` has values by the gate's index."""
    sharded: Any = bias if hasattr(bias, "full_tensor") else None  # a DTensor, whose slices are not views
    whole = bias if sharded is None else sharded.full_tensor()
    gates_of_bias = whole.chunk(GATES)
    for index, value in gates.items():
        if isinstance(value, Tensor):
            gates_of_bias[index].copy_(value)
        else:
            gates_of_bias[index].fill_(value)
    if sharded is not None:
        from torch.distributed.tensor import distribute_tensor

        sharded.copy_(distribute_tensor(whole, sharded.device_mesh, sharded.placements))  # the values of rank 0

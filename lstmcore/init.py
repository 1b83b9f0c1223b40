"""Initialisations that let an LSTM remember: forget biases of one, and chrono.

With torch's default the forget gates start near one half, so the product of them, which is what a gradient crosses the
sequence on, halves with every step.  H hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def forget_bias_(module: nn.RNNBase, value: float = 1.0) -> nn.RNNBase:
    """Sets the forget gates' bias of every layer and direction to ``value``, in place (Jozefowicz et al. 2015).

    A gate starts at sigmoid(value): 0.73 for 1, 0.95 for 3, which keep half of a gradient for 2 and 14 steps.

    Raises ValueError for a module without the biases of an LSTM.
    """
    with torch.no_grad():
        for ih, hh in _biases(module):
            _gate(ih, 1).fill_(value)
            _gate(hh, 1).zero_()
    return module


def chrono_(module: nn.RNNBase, max_lag: int, generator: torch.Generator | None = None) -> nn.RNNBase:
    """Chrono initialisation for dependencies of up to ``max_lag`` steps, in place (Tallec & Ollivier 2018).

    In every layer and direction b_f = ln(u), u uniform in [1, max_lag - 1], and b_i = -b_f: unit by unit the forget
    gates start with time constants spread over all lags up to ``max_lag``, and input gates that let in as little as
    that leaves room for.  The other biases stay as they are.

    Raises ValueError for a module without the biases of an LSTM, or ``max_lag`` below 3.
    """
    if max_lag < 3:
        raise ValueError(f"chrono_ spreads time constants from 1 to max_lag - 1: expected max_lag >= 3, got {max_lag}")
    with torch.no_grad():
        for ih, hh in _biases(module):
            lags = torch.empty(len(ih) // 4, dtype=torch.float64).uniform_(1, max_lag - 1, generator=generator)
            _gate(ih, 1).copy_(lags.log())
            _gate(ih, 0).copy_(-lags.log())
            _gate(hh, 1).zero_()
            _gate(hh, 0).zero_()
    return module


def _gate(bias: Tensor, index: int) -> Tensor:
    """The part of a bias (4H,) that belongs to gate ``index`` of i, f, g, o."""
    size = len(bias) // 4
    return bias[index * size : (index + 1) * size]


def _biases(module: nn.RNNBase) -> list[tuple[Tensor, Tensor]]:
    """(bias_ih, bias_hh) of every layer and direction."""
    if getattr(module, "mode", None) != "LSTM":
        raise ValueError(f"expected an lstmcore.LSTM or torch.nn.LSTM, got {type(module).__name__}")
    if not module.bias:
        raise ValueError("the module has no biases to initialise; build it with bias=True")
    ends = ("", "_reverse") if module.bidirectional else ("",)
    names = [f"l{layer}{end}" for layer in range(module.num_layers) for end in ends]
    return [(getattr(module, f"bias_ih_{name}"), getattr(module, f"bias_hh_{name}")) for name in names]

"""Models written for ``torch.nn.LSTM``, with all that may hang on its modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

I, H = 5, 17


class Doubled(nn.LSTM):
    """A forward of its own over torch's, with another argument."""

    def __init__(self, *args, factor: float = 2.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.factor = factor

    def forward(self, input, hx=None, scale=None):
        output, states = super().forward(input, hx)
        return output * (self.factor if scale is None else scale), states


class Mixin:
    def forward(self, input, hx=None):
        output, states = super().forward(input, hx)
        return output + 1, states


class Mixed(Mixin, nn.LSTM):
    """The forward comes from another base."""


class Base(ABC, nn.RNNBase):
    def forward(self, input, hx=None):
        output, states = super().forward(input, hx)
        return output + 1, states

    @abstractmethod
    def kind(self) -> str: ...


class Concrete(Base, nn.LSTM):
    """As pytorch-forecasting's: an abstract base, whose class has no ``__dict__`` of its own, before torch's."""

    def kind(self) -> str:
        return "LSTM"


class Initialised(nn.LSTM):
    """Only its parameters are drawn in another way."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.3, 0.3)


class Replaced(nn.LSTM):
    """A forward that does not reach torch's."""

    def forward(self, input, hx=None):
        return input.new_ones(*input.shape[:2], self.hidden_size), None


class ByName(nn.LSTM):
    def forward(self, input, hx=None):
        return nn.LSTM.forward(self, input, hx)


class Permuting(nn.LSTM):
    """A helper of torch's forward is replaced, which ours does not call."""

    def permute_hidden(self, hx, permutation):
        return super().permute_hidden((hx[1], hx[0]), permutation)


class WeightDropout(nn.Module):
    """As fastai's: before a call the weight is put in the place of the parameter."""

    def __init__(self, module: nn.LSTM) -> None:
        super().__init__()
        self.module = module
        self.weight_hh_l0_raw = nn.Parameter(module.weight_hh_l0.detach().clone())
        module._parameters["weight_hh_l0"] = nn.functional.dropout(self.weight_hh_l0_raw, 0.5, False)

    def forward(self, *args):
        self.module._parameters["weight_hh_l0"] = nn.functional.dropout(self.weight_hh_l0_raw, 0.5, self.training)
        return self.module(*args)


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(I, H)

    def forward(self, x: Tensor) -> Tensor:
        states = None
        for step in x:
            states = self.cell(step, states)
        return states[0]


class Model(nn.Module):
    """An LSTM under two names, outside of the modules, and between others."""

    def __init__(self, make: Callable[[], nn.Module] = lambda: nn.LSTM(I, H)) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"lstm": make()})
        self.alias = self.encoder["lstm"]
        self.hidden = [self.alias]  # where named_modules() does not look
        self.norm = nn.BatchNorm1d(H)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(H, 1)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.encoder["lstm"](x)
        return self.head(self.dropout(self.norm(output[-1])))


def _hooked() -> nn.LSTM:
    lstm = nn.LSTM(I, H)
    lstm.register_forward_hook(lambda module, args, result: (result[0] * 3, result[1]))
    lstm.register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    return lstm


@dataclass(frozen=True)
class Kind:
    """A kind of LSTM that moves."""

    name: str
    make: Callable[[], nn.Module]
    derived: bool = False  # from torch's class

    def __str__(self) -> str:
        return self.name


MOVES = (
    Kind("plain", lambda: nn.LSTM(I, H)),
    Kind("all options", lambda: nn.LSTM(I, H, 2, bias=False, batch_first=True, bidirectional=True, proj_size=4)),
    Kind("subclass", lambda: Doubled(I, H), derived=True),
    Kind("mixed in", lambda: Mixed(I, H), derived=True),
    Kind("abstract base", lambda: Concrete(I, H), derived=True),
    Kind("initialised", lambda: Initialised(I, H), derived=True),
    Kind("hooks", _hooked),
    Kind("old weight_norm", lambda: nn.utils.weight_norm(nn.LSTM(I, H), "weight_hh_l0")),
    Kind("weight_norm", lambda: parametrizations.weight_norm(nn.LSTM(I, H), "weight_hh_l0")),
    Kind("two parametrizations", lambda: _parametrized(nn.LSTM(I, H))),
    Kind("parametrized subclass", lambda: _parametrized(Doubled(I, H)), derived=True),
    Kind("pruned", lambda: prune.l1_unstructured(nn.LSTM(I, H), "weight_hh_l0", 0.5)),
    Kind("WeightDropout", lambda: WeightDropout(nn.LSTM(I, H))),
    Kind("Sequential", lambda: nn.Sequential(nn.LSTM(I, H))),
)


def _parametrized(module: nn.LSTM) -> nn.LSTM:
    parametrizations.spectral_norm(module, "weight_ih_l0")
    return parametrizations.weight_norm(module, "weight_hh_l0")


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of a call; random numbers and inner state are as they were before."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        x = x.detach().requires_grad_()
        found = module(x)
        output = found[0] if isinstance(found, tuple) else found
        parameters = [p for p in module.parameters() if p.requires_grad]
        return [output, *torch.autograd.grad(output.square().sum(), [x, *parameters])]

"""The LSTMs of a model: where they are, and whose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lstmcore import stock
from lstmcore.models.report import Row, State
from lstmcore.module import LSTM, LSTMCell


@dataclass(frozen=True)
class Found:
    """An LSTM in a model."""

    module: nn.Module
    names: tuple[str, ...]

    @property
    def state(self) -> State:
        """OURS, TORCHS or OTHER."""
        if isinstance(self.module, (LSTM, LSTMCell)):
            return State.OURS
        return State.TORCHS if isinstance(self.module, stock.BOTH) else State.OTHER

    def row(self, state: State, why: str = "") -> Row:
        """Its line in a report."""
        extra = self.module.extra_repr() if self.state is not State.OTHER else ""
        return Row(self.names, f"{type(self.module).__name__}({' '.join(extra.split())})", state, why)


def find(model: nn.Module) -> list[Found]:
    """The LSTMs of a model, each once, with every name it has.

    Raises TypeError if ``model`` is not a ``torch.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a torch.nn.Module, got {type(model).__module__}.{type(model).__qualname__}: "
            "pass the module that it trains or holds"
        )
    names: dict[int, list[str]] = {}
    _name(model, "", names, ())
    lstms = [each for each in model.modules() if _is_lstm(each) or (_is_named_so(each) and _holds_none(each))]
    return [Found(module, tuple(names[id(module)])) for module in lstms]


def _name(module: nn.Module, name: str, names: dict[int, list[str]], above: tuple[int, ...]) -> None:
    """Adds every name of ``module`` and those in it, by their ids; ``above`` are the ids of those that hold it."""
    names.setdefault(id(module), []).append(name)
    for child_name, child in module._modules.items():
        if child is not None and id(child) not in (id(module), *above):  # not round and round
            _name(child, f"{name}.{child_name}" if name else child_name, names, (id(module), *above))


def _is_lstm(module: nn.Module) -> bool:
    return isinstance(module, (LSTM, LSTMCell, *stock.BOTH))


def _is_named_so(module: nn.Module) -> bool:
    scripted = isinstance(module, torch.jit.ScriptModule)  # which has the name of its first class
    name: Any = module.original_name if scripted else type(module).__name__
    return name.endswith(stock.NAMES)


def _holds_none(module: nn.Module) -> bool:
    """Whether no LSTM is inside of it: then it is one itself, not what holds some."""
    return not any(_is_lstm(each) or _is_named_so(each) for each in module.modules() if each is not module)

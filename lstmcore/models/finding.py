"""The LSTMs of a model: where they are, and whose."""

from __future__ import annotations

from dataclasses import dataclass

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
        return Row(self.names, f"{type(self.module).__name__}({extra})", state, why)


def find(model: nn.Module) -> list[Found]:
    """The LSTMs of a model, each once, with every name it has.

    Raises TypeError if ``model`` is not a ``torch.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a torch.nn.Module, got {type(model).__module__}.{type(model).__qualname__}: "
            "pass the module that it trains or holds"
        )
    names: dict[int, list[str]] = {id(model): [""]}
    for prefix, parent in model.named_modules():
        for name, child in parent._modules.items():
            if child is not None:
                names.setdefault(id(child), []).append(f"{prefix}.{name}" if prefix else name)
    return [Found(module, tuple(names[id(module)])) for module in model.modules() if _is_lstm(module)]


def _is_lstm(module: nn.Module) -> bool:
    if isinstance(module, (LSTM, LSTMCell, *stock.BOTH)):
        return True
    name = getattr(module, "original_name", type(module).__name__)  # a scripted module has its first class's
    inside = (each for each in module.modules() if each is not module)
    return name.endswith(("LSTM", "LSTMCell")) and not any(map(_is_lstm, inside))

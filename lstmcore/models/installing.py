"""``install``: for code that builds its models itself, ``torch.nn.LSTM`` and ``LSTMCell`` are ours."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from lstmcore import frames, stock
from lstmcore import module as own
from lstmcore.models import classes

_PLACES: tuple[Any, ...] = (nn, nn.modules, nn.modules.rnn)  # where torch's names of them are


def install(*, subclass: bool = False) -> None:
    """From now on ``torch.nn.LSTM`` and ``torch.nn.LSTMCell`` are :class:`lstmcore.LSTM` and ``LSTMCell``.

    What code builds by these names then is ours, ``isinstance(x, torch.nn.LSTM)`` is true for it, and a pickled model
    is loaded as ours.  It is for the whole process, until :func:`uninstall`.

    Names that were taken before escape it: ``from torch.nn import LSTM``, a table of classes, a class derived from
    torch's.  A warning names those that it finds.  Such models move once they are built: :func:`lstmcore.patch`.

    Args:
        subclass: what is built derives from torch's class as well, so that ``isinstance`` is true for it ever after,
            and in modules that hold the name.

    ``torch.compile`` breaks the graph at instances of ``torch.nn.LSTM``: as long as this holds, and with ``subclass``
    ever after, unless ``torch._dynamo.config.allow_rnn`` is true.
    """
    _install(subclass, caller=3)


def uninstall() -> None:
    """Undoes :func:`install`: ``torch.nn.LSTM`` and ``LSTMCell`` are torch's.  What was built stays as it is."""
    _put([stock.BOTH] * len(_PLACES))


@contextlib.contextmanager
def installed(*, subclass: bool = False) -> Iterator[None]:
    """:func:`install` for a ``with`` block; then the names are what they were before it."""
    entered = _Entered([tuple(getattr(place, name) for name in stock.NAMES) for place in _PLACES])
    _install(subclass, caller=4)  # contextlib's between
    _all_entered.append(entered)
    try:
        yield
    finally:
        later = _all_entered[_all_entered.index(entered) + 1 :]
        _all_entered.remove(entered)
        if later:  # of another thread, and still in there: it puts back what was before both
            later[0].before = entered.before
        else:
            _put(entered.before)


@dataclass(eq=False)
class _Entered:
    """A ``with installed()`` that is not left yet."""

    before: list[tuple[Any, ...]]  # the names at each place


_all_entered: list[_Entered] = []


def _install(subclass: bool, caller: int) -> None:
    if holders := list(_holders()):
        warnings.warn(
            f"these have torch's class already and go on building it: {', '.join(holders)}; call lstmcore.install() "
            "before they are imported, or lstmcore.patch(model) once the model is built",
            stacklevel=caller,
        )
    _put([(classes.LSTM, classes.LSTMCell) if subclass else (own.LSTM, own.LSTMCell)] * len(_PLACES))


def _put(pairs: list[Any]) -> None:
    for place, pair in zip(_PLACES, pairs, strict=True):
        for name, cls in zip(stock.NAMES, pair, strict=True):
            setattr(place, name, cls)
    frames.eager(own.LSTM.forward, nn.LSTM is own.LSTM)  # then it is what torch.compile breaks the graph at


def _holders() -> Iterator[str]:
    """Where torch's classes are held outside of torch: names and tables of modules, and classes derived from them."""
    for module_name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and not _inside(module_name) and module.__name__ == module_name:
            for name, value in list(vars(module).items()):
                if _holds(value):
                    yield f"{module_name}.{name}"
    for torchs in stock.BOTH:
        for cls in torchs.__subclasses__():
            if not _inside(cls.__module__) and not issubclass(cls, (own.LSTM, own.LSTMCell)):
                yield f"{cls.__module__}.{cls.__qualname__} (derived from it)"


def _inside(name: str) -> bool:
    return name.split(".")[0] in ("torch", "lstmcore")


def _holds(value: Any, depth: int = 3) -> bool:
    """Whether it is one of torch's classes, or a table that has one in it, at most so many tables deep."""
    if type(value) is dict:
        value = [each for pair in list(value.items()) for each in pair]
    if type(value) in (list, tuple, set, frozenset):
        return depth > 0 and any(_holds(each, depth - 1) for each in list(value))
    return any(value is torchs for torchs in stock.BOTH)

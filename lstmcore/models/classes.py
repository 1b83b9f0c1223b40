"""Which class an LSTM gets when it moves over, and which it had: modules move by their class, in place.

A subclass of torch's keeps its code.  The class made for it derives from it and, behind it, from a class that puts ours
before torch's: in the order in which Python looks for a method, ours is found where its ``super()`` calls torch's.
"""

from __future__ import annotations

import copyreg
import functools
import types
import weakref
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lstmcore import frames, scripting, stock
from lstmcore import module as own


class LSTM(own.LSTM, stock.LSTM):
    """:class:`lstmcore.LSTM`, and a ``torch.nn.LSTM`` as well, for code that asks ``isinstance``.

    ``torch.compile`` breaks the graph at every instance of ``torch.nn.LSTM``, and so at this one.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return own.LSTM.forward(self, *args, **kwargs)

    frames.eager(forward)  # torch.compile would go on in it frame by frame

    def __prepare_scriptable__(self) -> nn.Module:
        return scripting.stand_in(self, LSTM, stock.LSTM)


class LSTMCell(own.LSTMCell, stock.LSTMCell):
    """:class:`lstmcore.LSTMCell`, and a ``torch.nn.LSTMCell`` as well, for code that asks ``isinstance``."""


_OURS = dict(zip(stock.BOTH, (own.LSTM, own.LSTMCell), strict=True))
_BOTH = dict(zip(stock.BOTH, (LSTM, LSTMCell), strict=True))
_TORCHS = {ours: torchs for classes in (_OURS, _BOTH) for torchs, ours in classes.items()}
_made: weakref.WeakValueDictionary[type, type] = weakref.WeakValueDictionary()  # by the class each derives from
_origins: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()  # by the class made of each
_former: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()  # of those made for parametrized modules


class _Quiet:
    """First base of a class made here from one with an ``__init_subclass__``, which that is not to be told of.

    Not of others: Python lays an instance out by the first base, and would not give some modules a class with another.
    """

    def __init_subclass__(cls) -> None:
        pass


def turn(module: nn.Module, cls: type[nn.Module]) -> None:
    """Gives ``module`` the class ``cls``, past a ``__setattr__`` of its own; TypeError if Python cannot."""
    object.__setattr__(module, "__class__", cls)


def moved(module: nn.Module, subclass: bool) -> type[nn.Module]:
    """The class that ``module``, one of torch's or of a class derived from it, has of ours.

    ``subclass``: it is a class of torch's as well; one made for a subclass always is.

    Raises TypeError if Python cannot make it, with its message.
    """
    return _moved(type(module), subclass, parametrize.is_parametrized(module))


def _moved(cls: type, subclass: bool, parametrized: bool) -> type[nn.Module]:
    if parametrized:
        return _on(cls, _moved(cls.__bases__[0], subclass, False))
    if cls in stock.BOTH:
        return (_BOTH if subclass else _OURS)[cls]
    return _derived(cls)


def derived(module: nn.Module) -> bool:
    """Whether a module is of a class that was made here for a subclass, which only what moved has, and copies of it."""
    return any(cls in _origins for cls in type(module).__mro__)


def back(module: nn.Module) -> type[nn.Module] | None:
    """The class that a module which :func:`moved` had before; None if it is not of a class of these."""
    return _back(type(module), parametrize.is_parametrized(module))


def _back(cls: type, parametrized: bool) -> type[nn.Module] | None:
    if parametrized:
        base = _back(cls.__bases__[0], False)
        return None if base is None else _on(cls, base)
    return _origins.get(cls, _TORCHS.get(cls))


def _on(parametrized: type, base: type) -> type[nn.Module]:
    """A class like the one that torch makes for a parametrized module, on another base.

    It takes that base back from it when the last parametrization goes.  It is the one from which ``parametrized`` was
    made, if that still is like it.
    """
    contents = _contents(parametrized)
    former = _former.get(parametrized)
    if former is not None and former.__bases__ == (base,) and _contents(former) == contents:
        return former
    made = type(f"Parametrized{base.__name__}", (base,), contents)
    _former[made] = parametrized
    return made


def _contents(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}


def _derived(cls: type) -> type[nn.Module]:
    """The class of ``cls`` and ours, the same one as long as it is in use."""
    if (found := _made.get(cls)) is None:
        both = next(both for torchs, both in _BOTH.items() if issubclass(cls, torchs))
        contents = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "__reduce_ex__": functools.partialmethod(_reduce, cls),
        }
        bases = (_Quiet, cls, both) if _told_of_subclasses(cls) else (cls, both)
        found = _made[cls] = types.new_class(cls.__name__, bases, exec_body=lambda body: body.update(contents))
        _origins[found] = cls
    return found


def _told_of_subclasses(cls: type) -> bool:
    """Whether code of a class runs when another derives from it; typing's does nothing that matters."""
    return any(
        "__init_subclass__" in vars(base) for base in cls.__mro__ if base.__module__ not in ("builtins", "typing")
    )


def _reduce(self: Any, cls: type, protocol: int) -> tuple[Any, ...]:
    """For pickle and copy: the class was made here, and is found again by the one it was made of."""
    reduced: Any = cls.__reduce_ex__(self, max(protocol, 2))  # type: ignore[call-arg]
    make, arguments, *rest = reduced
    if make is copyreg.__newobj__ and arguments[0] is type(self):  # type: ignore[attr-defined]
        make, arguments = _new, (cls, *arguments[1:])
    elif make is type(self):  # by a __reduce__ of its own
        make, arguments = _build, (cls, *arguments)
    return make, arguments, *rest


def _new(cls: type, *arguments: Any) -> nn.Module:
    made = _derived(cls)
    return made.__new__(made, *arguments)


def _build(cls: type, *arguments: Any) -> nn.Module:
    return _derived(cls)(*arguments)

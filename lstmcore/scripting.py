"""``torch.jit.script`` and ``torch.fx`` support: they see of a module what they see of torch's own."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx.proxy import TraceError


def leaf(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A node ``call_module`` in the graph of the ``torch.fx`` tracer of the proxies in ``args``, instead of a call.

    ``kwargs`` that are None or False are left out.  Raises TraceError if ``module`` is the traced model itself, or of a
    subclass with a forward: the node would be a call of all of that, in the middle of it.
    """
    whose: Any = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    if not whose.__module__.startswith("lstmcore."):
        raise TraceError(
            f"the forward of {whose.__module__}.{whose.__qualname__} cannot be traced through the LSTM in it: "
            "use a torch.fx.Tracer whose is_leaf_module is true for it"
        )
    while args and args[-1] is None:
        args = args[:-1]
    passed = {name: value for name, value in kwargs.items() if value is not None and value is not False}
    tracer = args[0].tracer
    path = tracer.path_of_module(module)
    if not path:
        raise TraceError(f"{type(module).__name__} is a leaf for torch.fx: trace a module that holds it")
    return tracer.create_proxy("call_module", path, args, passed)


def stand_in(module: nn.Module, own: type[nn.Module], stock: type[nn.Module]) -> nn.Module:
    """``module``, an ``own``, for ``torch.jit.script`` to compile: with the code of ``stock``, over the same state.

    ``torch.jit.script`` leaves it in the place of ``module`` in the model.  So it shares all state of ``module``, and
    turns back into its class when it is called or copied.  A subclass of ``own`` with a forward of its own is
    returned as it is.
    """
    cls: Any = type(module)
    if cls.forward is not own.forward:
        return module

    def back(self: Any) -> Any:
        self.__class__ = cls
        return self

    disguise: Any = type(
        stock.__name__,
        (cls,),
        {name: value for name, value in vars(stock).items() if callable(value) and not name.startswith("__")}
        | {
            # where the compiler finds the source, and the overloads in it
            **{name: value for name, value in vars(stock).items() if name == "__firstlineno__"},  # from Python 3.13 on
            "__module__": stock.__module__,
            "__qualname__": stock.__qualname__,
            "__annotations__": next(filter(None, (vars(base).get("__annotations__") for base in stock.__mro__)), {}),
            "__prepare_scriptable__": lambda self: self,
            "__call__": lambda self, *args, **kwargs: back(self)(*args, **kwargs),
            "__reduce_ex__": lambda self, protocol: back(self).__reduce_ex__(protocol),
        },
    )
    result = object.__new__(disguise)
    result.__dict__ = module.__dict__
    return result

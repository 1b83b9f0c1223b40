"""Why an LSTM of a model cannot move over, in one sentence."""

from __future__ import annotations

import dis
import inspect
import itertools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lstmcore import stock

# Replaced, they change what torch's forward does; ours does not call them.
_HELPERS = ("check_input", "check_hidden_size", "check_forward_args", "permute_hidden", "get_expected_hidden_size",
            "get_expected_cell_size")  # fmt: skip
_WEIGHTS = "_flat_weights"  # what torch's forward multiplies with, and every instance has; ours reads the parameters
_NOT_CALLED = "which torch's forward uses and lstmcore's does not"
OPTIONS = ("backend", "recompute", "memory_budget", "forget_bias", "chrono")


def foreign(module: nn.Module) -> bool:
    """Whether an LSTM was never torch's: another implementation."""
    return not isinstance(module, (torch.jit.ScriptModule, *stock.BOTH)) and not _quantised(module)


def _quantised(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.ao.", "torchao."))


def why_not(module: nn.Module) -> str | None:
    """One sentence on why an LSTM that is not ours cannot move; None if it can."""
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by torch.jit.script: patch the model before it is scripted"
    if _quantised(module):
        return "quantised, for which lstmcore has no kernels"
    if foreign(module):
        return f"code of its own: {cls.__module__}.{cls.__qualname__} does not derive from torch.nn.LSTM"
    if "forward" in vars(module):
        return "its forward was replaced on the instance, by a hook or a wrapper: patch the model before that"
    if any(base.__module__.startswith("torch.distributed") for base in cls.__mro__):
        return "sharded: patch the model before it is"
    if taken := [name for name in OPTIONS if hasattr(module, name)]:
        return f"it has {_listed(taken)} of its own, a name that lstmcore's module uses"
    if replaced := [name for name in _HELPERS if name in vars(module)]:
        return f"its {_listed(replaced)} was replaced on the instance, {_NOT_CALLED}"
    return _of_class(cls)


def _of_class(cls: type) -> str | None:
    """Why the instances of a class derived from torch's cannot move."""
    torchs = next(each for each in stock.BOTH if issubclass(cls, each))
    before = cls.__mro__[: cls.__mro__.index(torchs)]
    if replaced := [name for name in (*_HELPERS, _WEIGHTS) if any(name in vars(base) for base in before)]:
        return f"its class replaces {_listed(replaced)}, {_NOT_CALLED}"
    for base in before:
        for name, method in vars(base).items():
            if (reason := _why_not(name, method, f"{base.__module__}.{base.__qualname__}")) is not None:
                return reason
    return None


def kept_forwards(model: nn.Module) -> dict[int, str]:
    """By the id of an LSTM, which attribute of a module in ``model`` keeps torch's forward of it: it stays."""
    torchs = [cls.forward for cls in stock.BOTH]
    return {
        id(value.__self__): f"{holder or 'the model'} keeps its forward as {name}, which stays torch's: call the module"
        for holder, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, types.MethodType) and value.__func__ in torchs
    }


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _why_not(name: str, method: Any, cls: str) -> str | None:
    """Why a method of a subclass cannot go on over ours; a forward has to reach torch's by ``super()``."""
    code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
    codes = [] if code is None else list(_codes(code))
    names = {each for code in codes for each in code.co_names}
    whose = f"the {name} of {cls}"
    if name != "__init__" and any(map(_of_its_instance, codes)):
        return f"{whose} calls super() of its instance's class, which changes: write super().{name}(...)"
    if name == "__call__" and "forward" not in names and not {"super", "__call__"} <= names:
        return f"{whose} replaces torch's: it does not call super().__call__"
    if name != "forward":
        return None
    if code is None:
        return f"{whose} is not a Python function"
    if any(map(_calls_by_class, codes)):
        return f"{whose} calls torch's by its class: write super().forward(...)"
    if "_VF" in names or "super" not in names or not names & {"forward", "__call__"}:
        return f"{whose} replaces torch's: it does not call super().forward, or not alone"
    return None


def _of_its_instance(code: types.CodeType) -> bool:
    """Whether a function uses ``super(self.__class__, ...)`` or ``super(type(self), ...)``."""
    loads = _loads(code)
    return any(
        first == ("LOAD_GLOBAL", "super") and (second == ("LOAD_GLOBAL", "type") or third == ("LOAD_ATTR", "__class__"))
        for first, second, third in zip(loads, loads[1:], loads[2:], strict=False)
    )


def _calls_by_class(code: types.CodeType) -> bool:
    """Whether a function uses ``LSTM.forward`` or ``LSTMCell.forward``, of whatever module."""
    return any(cls in stock.NAMES and name == "forward" for (_, cls), (_, name) in itertools.pairwise(_loads(code)))


def _loads(code: types.CodeType) -> list[tuple[str, Any]]:
    """What the instructions of a function load, one after another."""
    return [(each.opname, each.argval) for each in dis.get_instructions(code) if each.opname.startswith("LOAD")]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function, and of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)

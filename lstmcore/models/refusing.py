"""Why an LSTM of a model cannot move over, in one sentence."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lstmcore import stock

# Replaced in a subclass, they change what torch's forward does; ours does not call them.
_HELPERS = ("check_input", "check_hidden_size", "check_forward_args", "permute_hidden", "get_expected_hidden_size",
            "get_expected_cell_size")  # fmt: skip
OPTIONS = ("backend", "recompute", "memory_budget", "forget_bias", "chrono")


def _whose(module: nn.Module) -> str:
    """One sentence on an LSTM that is neither torch's nor ours."""
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by torch.jit.script: patch the model before it is scripted"
    cls = type(module)
    if cls.__module__.startswith(("torch.ao.", "torchao.")):
        return "quantised, for which lstmcore has no kernels"
    return f"code of its own: {cls.__module__}.{cls.__qualname__} does not derive from torch.nn.LSTM"


def why_not(module: nn.Module) -> str | None:
    """One sentence on why an LSTM that is not ours cannot move; None if it can."""
    cls = type(module)
    if not isinstance(module, stock.BOTH):
        return _whose(module)
    if "forward" in vars(module):
        return "its forward was replaced on the instance, by a hook or a wrapper: patch the model before that"
    if any(base.__module__.startswith("torch.distributed") for base in cls.__mro__):
        return "sharded: patch the model before it is"
    if taken := [name for name in OPTIONS if hasattr(module, name)]:
        return f"it has {_listed(taken)} of its own, which mean something else to lstmcore: rename"
    if cls in stock.BOTH:
        return None
    torchs = next(each for each in stock.BOTH if issubclass(cls, each))
    before = cls.__mro__[: cls.__mro__.index(torchs)]
    if replaced := [name for name in _HELPERS if any(name in vars(base) for base in before)]:
        return f"its class replaces {_listed(replaced)}, which torch's forward calls and lstmcore's does not"
    for base in before:
        if (forward := vars(base).get("forward")) is not None and (reason := _why_not(forward, base)) is not None:
            return reason
    return None


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _why_not(forward: Any, cls: type) -> str | None:
    """Why a forward cannot run over ours: it has to reach torch's by ``super()``."""
    whose = f"the forward of {cls.__module__}.{cls.__qualname__}"
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None:
        return f"{whose} is not a Python function"
    names = set(_names(code))
    if "_VF" in names or "super" not in names or not names & {"forward", "__call__"}:
        if {"LSTM", "forward"} <= names or {"LSTMCell", "forward"} <= names:
            return f"{whose} calls torch's by its class: write super().forward(...)"
        return f"{whose} replaces torch's"
    return None


def _names(code: types.CodeType) -> Iterator[str]:
    """The names that a function and the functions in it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)

"""How a call is executed: most run the kernels directly; others are traced, transformed or differentiated forward."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_PLAIN = frozenset((Tensor, Parameter, type(None)))
# looked up once: every call uses them
_transforming = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state


class Way(enum.Enum):
    """How the layers of a call are computed."""

    EAGER = enum.auto()  # by an autograd Function on kernels, or by ATen
    GRAPH = enum.auto()  # by the operators of ops.py, for a compiler, an export or a dispatch mode
    TRANSFORMED = enum.auto()  # by the same operators, under torch.func's vmap, grad, vjp, jacrev
    FORWARD_MODE = enum.auto()  # by the reference's torch operations, which have tangents
    OPERATIONS = enum.auto()  # by torch operations, for torch.jit's tracer or a subclass's __torch_function__


def way(tensors: Sequence[Tensor | None], fused: bool) -> Way:
    """The way of an eager call with these tensors; ``fused``: the backend does not consist of torch operations.

    Raises TypeError for a subclass of Tensor that holds its values elsewhere: kernels would read invalid memory.
    """
    if _transforming():
        transforms = {interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or ()}
        return Way.FORWARD_MODE if torch._C._functorch.TransformType.Jvp in transforms else Way.TRANSFORMED
    if forward_ad._current_level >= 0 and any(_has_tangent(each) for each in tensors if each is not None):
        return Way.FORWARD_MODE
    if _tracing() is not None:
        return Way.OPERATIONS
    if _PLAIN.issuperset(map(type, tensors)):
        return Way.EAGER
    odd: set[Any] = set(map(type, tensors)) - _PLAIN
    from torch._subclasses import FakeTensor  # slow to import, and rarely needed

    if any(issubclass(cls, FakeTensor) for cls in odd):
        return Way.GRAPH
    for cls in odd:
        elsewhere = cls.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl
        if elsewhere and fused:
            raise TypeError(
                f"LSTM: tensors of type {cls.__name__} do not enter the kernels: expected torch.Tensor or Parameter. "
                "Convert them to plain tensors (nested ones to padded, with lengths=), or use backend='reference'"
            )
    return Way.OPERATIONS


def undisturbed() -> bool:
    """Whether no transform, tracer or forward-mode AD is on: then a call of plain tensors is ``Way.EAGER``."""
    return not _transforming() and forward_ad._current_level < 0 and _tracing() is None


def has_values(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` can be read here without becoming constants of a torch.jit trace."""
    return type(tensor) is Tensor and _tracing() is None


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None

"""What the LSTMs of a model are called with when the model runs."""

from __future__ import annotations

import contextlib
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lstmcore import explaining, stock
from lstmcore.backends import Choice
from lstmcore.models.finding import Found
from lstmcore.models.report import Called, Row
from lstmcore.module import LSTM, LSTMCell

Seen: TypeAlias = "dict[int, list[tuple[str, Choice]]]"  # by the id of a module, its calls


def with_calls(model: nn.Module, input: Any, found: Iterable[Found], rows: Iterable[Row]) -> Iterator[Row]:
    """The rows with the calls that the LSTMs get when the model runs once on ``input``."""
    seen = _watch(model, input, [each.module for each in found])
    for each, row in zip(found, rows, strict=True):
        kinds = Counter(seen[id(each.module)])
        yield replace(row, calls=tuple(Called(shape, times, choice) for (shape, choice), times in kinds.items()))


def _watch(model: nn.Module, input: Any, modules: Iterable[nn.Module]) -> Seen:
    """What each of ``modules`` is called with in ``model(input)``, and the backend of ours for it."""
    args = input if isinstance(input, tuple) and not isinstance(input, PackedSequence) else (input,)
    kwargs: Mapping[str, Any] = {}
    if isinstance(input, Mapping):
        args, kwargs = (), input
    seen: Seen = {id(module): [] for module in modules}

    def note(module: nn.Module, given: Tensor | PackedSequence, options: dict[str, Any]) -> None:
        extended = any(value is not None and value is not False for value in options.values())
        seen[id(module)].append((_shape(given), explaining.choose(module, given, extended=extended)))

    with contextlib.ExitStack() as stack:
        stack.enter_context(_unchanged(model))
        for module in modules:
            stack.enter_context(_observed(module, note))
        if "torch._dynamo" in sys.modules:  # what it compiled for the usual classes would be compiled again
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        model(*args, **kwargs)
    return seen


def _shape(input: Tensor | PackedSequence) -> str:
    dtype = str(input.data.dtype).removeprefix("torch.")
    if isinstance(input, PackedSequence):
        rows = int(input.batch_sizes[0])
        return f"packed, {rows} rows of up to {len(input.batch_sizes)}, {input.data.shape[1]} {dtype}"
    return f"({', '.join(map(str, input.shape))}) {dtype}"


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Puts the buffers and the random numbers back that a run changes."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng([device.index for device in devices]):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


@contextlib.contextmanager
def _observed(module: nn.Module, note: Callable[..., None]) -> Iterator[None]:
    """Has ``note(module, input, options)`` called at each call of the forward of torch's class or ours.

    For that time the module is of a class below its own: arguments are seen behind a forward that a subclass puts
    before that one, and with other arguments.
    """
    cls = type(module)
    base: Any = next((each for each in cls.__mro__ if each in (LSTM, LSTMCell, *stock.BOTH)), None)
    if base is None:
        yield
        return

    def forward(self: nn.Module, input: Any, hx: Any = None, **options: Any) -> Any:
        note(self, input, options)
        return base.forward(self, input, hx, **options)

    observer: Any = type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})
    below = observer if cls is base else types.new_class(cls.__name__, (cls, observer))
    module.__class__ = below
    try:
        yield
    finally:
        module.__class__ = cls

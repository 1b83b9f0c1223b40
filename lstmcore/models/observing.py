"""What the LSTMs of a model are called with when the model runs."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from lstmcore import explaining, stock
from lstmcore.backends import Choice
from lstmcore.models.finding import Found
from lstmcore.models.report import Called, Row
from lstmcore.module import LSTM, LSTMCell

Seen: TypeAlias = "dict[int, list[tuple[str, Choice, bool]]]"  # by the id of a module, its calls: see Called
_one_at_a_time = threading.RLock()  # the forwards of the whole process are observed


def with_calls(model: nn.Module, input: Any, found: Iterable[Found], rows: Iterable[Row]) -> Iterator[Row]:
    """The rows with the calls that the LSTMs get when the model runs once on ``input``."""
    seen = _watch(model, input, [each.module for each in found])
    for each, row in zip(found, rows, strict=True):
        kinds = Counter(seen[id(each.module)])
        yield replace(row, calls=tuple(Called(shape, n, choice, ours) for (shape, choice, ours), n in kinds.items()))


def _watch(model: nn.Module, input: Any, modules: Iterable[nn.Module]) -> Seen:
    """What each of ``modules`` is called with in ``model(input)``, and the backend of ours for it."""
    args = input if isinstance(input, tuple) and not isinstance(input, PackedSequence) else (input,)
    kwargs: Mapping[str, Any] = {}
    if isinstance(input, Mapping):
        args, kwargs = (), input
    seen: Seen = {id(module): [] for module in modules}

    def note(cls: type, module: nn.Module, given: Tensor | PackedSequence, options: dict[str, Any]) -> None:
        if (calls := seen.get(id(module))) is not None:  # not of another model, or a copy that the run makes
            extended = any(value is not None and value is not False for value in options.values())
            choice = explaining.choose(module, given, extended=extended)
            calls.append((_shape(given), choice, cls not in stock.BOTH))

    with contextlib.ExitStack() as stack:
        stack.enter_context(_one_at_a_time)
        stack.enter_context(_unchanged(model))
        for cls in (LSTM, LSTMCell, *stock.BOTH):
            stack.enter_context(_observed(cls, note))
        if "torch._dynamo" in sys.modules:  # what it compiled would be compiled again
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
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    held = [(module._buffers, dict(module._buffers)) for module in modules]  # a script's cannot be bound anew
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if _writable(buffer)]
    try:
        with torch.random.fork_rng([device.index for device in devices]):
            yield
    finally:
        for buffers, before in held:
            buffers.update(before)
        with torch.inference_mode():  # where buffers may be written that were made in it
            for buffer, values in kept:
                buffer.copy_(values)


def _writable(buffer: Tensor) -> bool:
    """Whether it has values, in memory of their own: torch does not write into an expanded tensor, nor does a run."""
    if is_lazy(buffer):
        return False
    if buffer.layout is not torch.strided or buffer.is_nested:
        return True
    return all(stride or size < 2 for size, stride in zip(buffer.shape, buffer.stride(), strict=True))


@contextlib.contextmanager
def _observed(cls: Any, note: Callable[..., None]) -> Iterator[None]:
    """Has ``note(cls, module, input, options)`` called at each call of the forward of ``cls``, one of torch's or ours.

    There arguments are seen behind a forward that a subclass puts before that one, and with other arguments.
    """
    before = cls.forward

    @functools.wraps(before)
    def forward(self: nn.Module, input: Any, hx: Any = None, **options: Any) -> Any:
        note(cls, self, input, options)
        return before(self, input, hx, **options)

    cls.forward = forward
    try:
        yield
    finally:
        cls.forward = before

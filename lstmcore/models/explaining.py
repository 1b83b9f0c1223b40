"""``lstmcore.explain``: which backend runs a call of a module, or the calls of every LSTM in a model, and why.

T time, B batch, I input.
"""

from __future__ import annotations

from typing import Any, overload

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lstmcore import explaining, stock
from lstmcore.backends import Choice
from lstmcore.models import finding, observing, refusing
from lstmcore.models.report import Report, State
from lstmcore.module import LSTM, LSTMCell


@overload
def explain(module: nn.RNNBase | nn.RNNCellBase, input: Tensor | PackedSequence, *, extended: bool = ...) -> Choice: ...


@overload
def explain(module: nn.Module, input: Any) -> Report: ...


def explain(module: nn.Module, input: Any, *, extended: bool = False) -> Choice | Report:
    """Which backend ``module(input)`` runs, and why; print the result.

    An LSTM itself is not run.  Any other model is run once, to see what reaches the LSTMs inside: on ``input``, in the
    mode it is in, with its hooks.  Its buffers and torch's random numbers are put back afterwards.

    Args:
        module: an :class:`lstmcore.LSTM` or ``LSTMCell``, one of ``torch.nn`` (taken as ``backend="auto"``), or a model
            that holds some.
        input: what it would be called with.  For an LSTM ``(T, B, I)``, ``(B, T, I)`` when batch_first, ``(T, I)``, or
            packed; ``(B, I)`` or ``(I,)`` of a cell.  For a model its input, a tuple of them, or a dict of keyword
            arguments.
        extended: the call would pass ``lengths``, ``reset`` or ``return_cells``, or be recorded; of an LSTM only, in a
            model the calls show it.

    Returns:
        For an LSTM its :class:`~lstmcore.backends.Choice`; for a model a :class:`~lstmcore.models.Report`, a table
        of every LSTM in it: whose class it is, what it is called with, which backend runs that, and why.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
        RuntimeError: a module names a backend that cannot run the call.
        ValueError, RuntimeError: as the call itself, if the input does not fit the module.
    """
    if isinstance(module, (LSTM, LSTMCell, *stock.BOTH)):
        return explaining.choose(module, input, extended=extended)
    found = finding.find(module)
    rows = [each.row(each.state, _why(each)) for each in found]
    ours = sum(each.state is State.OURS for each in found)
    title = f"{ours} of {len(found)} LSTMs are lstmcore's" if found else "there is no LSTM in this model"
    return Report(title, tuple(observing.with_calls(module, input, found, rows)))


def _why(each: finding.Found) -> str:
    if each.state is State.OURS:
        return ""
    return refusing.why_not(each.module) or "torch's class, which lstmcore.patch moves"

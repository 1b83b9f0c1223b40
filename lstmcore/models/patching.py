"""``patch`` and ``unpatch``: a model that is there moves over, in place, and back."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from lstmcore import backends, stock
from lstmcore import recompute as recomputing
from lstmcore.models import classes, finding, observing, refusing
from lstmcore.models.finding import Found
from lstmcore.models.report import Report, Row, State
from lstmcore.module import LSTM

_MARK = "_moved"  # in the __dict__ of a module that moved


def patch(
    model: nn.Module,
    *,
    only: str | Iterable[str] | None = None,
    strict: bool = False,
    dry_run: bool = False,
    input: Any = None,
    subclass: bool = False,
    backend: str = "auto",
    recompute: int | Literal["auto"] | None = None,
    memory_budget: int | None = None,
) -> Report:
    """Moves every ``torch.nn.LSTM`` and ``LSTMCell`` in a model over to ours, in place; print the result.

    A module changes its class and stays the object that it is: parameters, hooks, optimizers, other names of it,
    weight_norm, pruning and parametrizations go on.  A subclass runs its own code over our forward, if that calls
    torch's by ``super()``.

    Args:
        model: may be an LSTM itself.
        only: names or patterns (``"encoder.*"``, as :mod:`fnmatch` has them) of those to move; None: all.
        strict: raise where one would be left, and change nothing.
        dry_run: report, and change nothing.
        input: run the model on it once, moved, and show which backend runs the calls of each; as for
            :func:`lstmcore.explain`.  If the run fails, nothing has moved.
        subclass: they stay instances of ``torch.nn.LSTM`` as well, for code that asks; ``torch.compile`` then breaks
            the graph at them, as it does at torch's.  A subclass stays one in any case.
        backend: of those that move, as the argument of :class:`lstmcore.LSTM`; so ``recompute`` and ``memory_budget``,
            which cells do not have.

    Returns:
        A :class:`~lstmcore.models.Report`: ``moved`` has the names, ``left`` the reasons of those that were left.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: ``only`` matches no LSTM; options as of :class:`lstmcore.LSTM`.
        RuntimeError: with ``strict``, something is left.
    """
    backends.check_name(backend)
    recomputing.asked(recompute, memory_budget)
    options = {"backend": backend, "recompute": recompute, "memory_budget": memory_budget}
    found = _selected(finding.find(model), only)
    plan = [(each, *_planned(each, subclass)) for each in found]
    rows = [each.row(_state(each, cls), why) for each, cls, why in plan]
    moving = [(each.module, cls) for each, cls, _ in plan if cls is not None]
    left = [row for row in rows if row.state is State.LEFT]
    if strict and left:
        lines = "".join(f"\n  {row.name or '(the model)'}, {row.module}: {row.why}" for row in left)
        raise RuntimeError(f"{len(left)} of {len(rows)} LSTMs cannot move, and strict=True asks for all:{lines}")

    if input is not None:
        with _for_a_while(moving, options):
            rows = list(observing.with_calls(model, input, found, rows))
    if dry_run:
        rows = [replace(row, state=State.WOULD) if row.state is State.MOVED else row for row in rows]
    else:
        for module, cls in moving:
            _move(module, cls, options)
    return Report(_title(rows), tuple(rows))


def unpatch(model: nn.Module) -> Report:
    """Undoes :func:`patch`: every LSTM that it moved is of its former class again; print the result.

    Those that were built as :class:`lstmcore.LSTM` stay: a ``state_dict`` takes their weights over.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    rows = []
    for each in finding.find(model):
        cls = classes.back(each.module) if _MARK in vars(each.module) else None
        if cls is not None:
            _move_back(each.module, cls)
            rows.append(each.row(State.BACK))
        elif each.state is State.OURS:
            rows.append(each.row(State.LEFT, f"built as {type(each.module).__name__} of lstmcore, not moved by patch"))
        else:
            rows.append(each.row(each.state))
    return Report(_title(rows), tuple(rows))


def _selected(found: list[Found], only: str | Iterable[str] | None) -> list[Found]:
    if only is None:
        return found
    patterns = [only] if isinstance(only, str) else list(only)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for each in found for name in each.names):
            names = ", ".join(repr(name) for each in found for name in each.names) or "none"
            raise ValueError(f"only={pattern!r} matches no LSTM of this model: there are {names}")
    return [each for each in found if any(fnmatch.fnmatchcase(n, p) for n in each.names for p in patterns)]


def _planned(each: Found, subclass: bool) -> tuple[type[nn.Module] | None, str]:
    """The class that an LSTM moves to and what to know of it, or None and why it stays."""
    module = each.module
    if each.state is State.OURS:
        plain = subclass and not isinstance(module, stock.BOTH)
        return None, "no torch.nn.LSTM: build it under lstmcore.installed(subclass=True)" if plain else ""
    if (reason := refusing.why_not(module)) is not None:
        return None, reason
    try:
        cls = classes.moved(module, subclass)
    except TypeError as error:
        return None, f"Python cannot make a class of its own and lstmcore's: {error}"
    return cls, ""


def _state(each: Found, cls: type[nn.Module] | None) -> State:
    if each.state is State.OURS:
        return State.OURS
    return State.LEFT if cls is None else State.MOVED


def _move(module: nn.Module, cls: type[nn.Module], options: dict[str, Any]) -> None:
    module.__class__ = cls
    given = {name: value for name, value in options.items() if value != getattr(LSTM, name) and hasattr(cls, name)}
    vars(module).update(given, **{_MARK: True})


def _move_back(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls
    for name in (_MARK, *refusing.OPTIONS):  # set by patch, or since
        vars(module).pop(name, None)


@contextlib.contextmanager
def _for_a_while(moving: list[tuple[nn.Module, type[nn.Module]]], options: dict[str, Any]) -> Iterator[None]:
    before = [type(module) for module, _ in moving]
    try:
        for module, cls in moving:
            _move(module, cls, options)
        yield
    finally:
        for (module, _), cls in zip(moving, before, strict=True):
            _move_back(module, cls)


def _title(rows: list[Row]) -> str:
    if not rows:
        return "there is no LSTM in this model"
    count = sum(row.state in (State.MOVED, State.WOULD, State.BACK) for row in rows)
    verb = next((row.state.value for row in rows if row.state in (State.WOULD, State.BACK)), "moved")
    return f"{count} of {len(rows)} LSTMs {verb}"

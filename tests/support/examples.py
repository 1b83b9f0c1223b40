"""What the tests of the examples that train share: a run in this process, Ctrl-C in it, and checkpoints compared."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

Main = Callable[[Sequence[str]], int]
CLOCK = {"seconds"}  # entries of a checkpoint that hold times


def same(one: Any, other: Any) -> bool:
    """Whether two parts of checkpoints are equal to the bit, their clocks apart; NaN is equal to NaN."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(same(one[key], other[key]) for key in one.keys() - CLOCK)
        )
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and one == other


def state_of(checkpoint: Path) -> Any:
    return torch.load(checkpoint, weights_only=True)


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, at: int) -> None:
    """Presses Ctrl-C while the method runs for the ``at``-th time from now."""
    original, calls = getattr(owner, method), 0

    def pressed(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, method, pressed)


def refused(main: Main, arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a program that cannot run with these arguments; returns what it says about that."""
    try:
        status = main(arguments)
    except SystemExit as end:  # argparse's way
        status = end.code
    assert status == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told

"""The loop around a training: which iterations it runs, when it saves, and how it stops."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import pytest
from rich.console import Console

from loop import repeat


class Saves:
    """In place of a checkpoint: what was saved."""

    path = Path("somewhere.pt")

    def __init__(self) -> None:
        self.saved: list[int] = []

    def save(self, state: dict[str, int]) -> None:
        self.saved.append(state["iterations"])


def run(
    done: int, iterations: int, press_at: int | None = None, save_every: int = 3
) -> tuple[bool, list[int], list[int]]:
    """Whether it came to the end, the iterations that ran, and how many had been done at each save."""
    checkpoint, ran = Saves(), []

    def iterate(iteration: int) -> str:
        ran.append(iteration)
        if iteration == press_at:
            signal.raise_signal(signal.SIGINT)
        return f"number {iteration}"

    options = argparse.Namespace(iterations=iterations, save_every=save_every)
    finished = repeat(iterate, done, checkpoint, lambda: {"iterations": done + len(ran)}, options, Console())
    return finished, ran, checkpoint.saved


def test_from_the_start(capsys):
    assert run(0, 7) == (True, [*range(7)], [3, 6, 7])
    assert run(0, 6) == (True, [*range(6)], [3, 6])
    assert "stopped" not in capsys.readouterr().out


def test_from_a_checkpoint():
    assert run(4, 7) == (True, [4, 5, 6], [6, 7])
    assert run(7, 7) == (True, [], [7])
    assert run(9, 7) == (True, [], [9]), "longer than asked for is no reason to do it again"


def test_ctrl_c_is_granted_between_two_iterations(capsys):
    before = signal.getsignal(signal.SIGINT)
    assert run(0, 7, press_at=1) == (False, [0, 1], [2])
    assert "stopped after iteration 2; go on with --resume (somewhere.pt)" in capsys.readouterr().out
    assert run(0, 7, press_at=6) == (True, [*range(7)], [3, 6, 7]), "it was done anyway"
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_goes_through():
    def iterate(_: int) -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        repeat(iterate, 0, Saves(), dict, argparse.Namespace(iterations=2, save_every=1), Console())

"""What the examples share: their options, Ctrl-C between two steps, checkpoints, and the arithmetic of small models."""

from __future__ import annotations

import argparse
import errno
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any

import torch


class CannotRun(Exception):
    """What was asked for is not possible here; the message says why and what would help."""


def reported(main: Callable[..., int]) -> Callable[..., int]:
    """For the main function of an example: a reason why it cannot run goes to the error stream, and the status is 2."""

    @wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        try:
            return main(arguments)
        except (CannotRun, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run


@contextmanager
def brought_by(extra: str) -> Iterator[None]:
    """Around imports: a package that is missing ends the program, with the extra of lstmcore that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        print(f"error: this example needs {error.name}; pip install -e '.[{extra}]'", file=sys.stderr)
        raise SystemExit(2) from error


# ------------------------------------------------------------------------------------------------------------- options


def positive(text: str) -> int:
    """For argparse: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text}")
    return value


def above_zero(kind: Callable[[str], float]) -> Callable[[str], float]:
    """For argparse: a number of this kind that is positive and finite."""

    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


def fraction(text: str) -> float:
    """For argparse: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return value


def device(text: str) -> torch.device:
    """For argparse: the CPU or a CUDA device, where this machine has it."""
    here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    if text not in (*here, *(["cuda"] if here[1:] else [])):
        build = "" if torch.version.cuda else ", and this torch is built without CUDA"
        raise argparse.ArgumentTypeError(f"there is no {text} on this machine{build}; pass --device {here[-1]}")
    return torch.device(text)


def add_options(parser: argparse.ArgumentParser, out: str, save_every: int) -> None:
    """Those that every example that trains has."""
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of every random choice")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of the picture and the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--save-every", type=positive, default=save_every, help="steps between checkpoints")


# ------------------------------------------------------------------------------------------------------------ training


class Interrupt:
    """Turns the first Ctrl-C, or other of ``signals``, into a wish to stop, granted between two steps.

    One that comes ``patience`` seconds later, or after that, acts as always.  (torchrun passes on a Ctrl-C that its
    processes have got already.)
    """

    def __init__(self, *signals: signal.Signals, patience: float = 0.0) -> None:
        self.wanted = False
        self._signals, self._patience = signals or (signal.SIGINT,), patience

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.wanted:
            self.wanted, self._since = True, time.monotonic()
        elif time.monotonic() - self._since >= self._patience:
            self.__exit__()
            signal.raise_signal(number)

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._handle) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextmanager
def fast_arithmetic() -> Iterator[None]:
    """One thread, without denormal numbers: a vanishing gradient meets them, and a CPU is many times slower with them.

    torch leaves them out in the calling thread only; and a second one gains nothing where products are this small.
    """
    threads = torch.get_num_threads()
    flushed = not torch.tensor(torch.finfo(torch.float32).tiny).mul(0.5).item()  # torch has no other way to ask
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)
        torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """A file from which a training goes on as if it had never stopped.

    ``settings`` are what has to be the same for that, in numbers, strings and None: the example's name, sizes, seed,
    and a checksum where the data may change.  How many steps there will be is none of them: that may grow.
    """

    path: Path
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        """An OSError at once where nothing can be written: minutes later, it would cost them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(self.path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "cannot write into this folder", str(self.path.parent))

    def save(self, state: dict[str, Any]) -> None:
        """Writes ``state``, all that the next step depends on, and the random number generators'.

        In one move: whenever it is interrupted, there is the old file or the new one.
        """
        content = {"settings": self.settings, "state": state, "rng": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            content["cuda_rng"] = torch.cuda.get_rng_state_all()
        unfinished = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            torch.save(content, unfinished)
            unfinished.replace(self.path)
        finally:
            unfinished.unlink(missing_ok=True)

    def load(self) -> dict[str, Any]:
        """The ``state`` that was saved, its tensors on the CPU; the generators go on from where they were.

        Raises:
            CannotRun: there is no such file, it is damaged or something else, or of a training with other settings.
        """
        content = self._read()
        saved = content["settings"]
        differing = [name for name in {**self.settings, **saved} if saved.get(name) != self.settings.get(name)]
        if differing:
            told = ", ".join(f"{name} {saved.get(name)} (now {self.settings.get(name)})" for name in differing)
            raise CannotRun(
                f"cannot resume: {self.path} was trained with other settings: {told}; "
                "pass the same ones, or another --out"
            )
        torch.set_rng_state(content["rng"])
        if "cuda_rng" in content and torch.cuda.device_count() == len(content["cuda_rng"]):
            torch.cuda.set_rng_state_all(content["cuda_rng"])
        return content["state"]

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            raise CannotRun(f"cannot resume: there is no checkpoint at {self.path}; run without --resume first")
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # whatever the unpickler stumbles on, a KeyError or an EOFError for example
            reason = f"{type(error).__name__} {str(error).partition('. ')[0]}".strip()
            raise CannotRun(
                f"cannot resume: {self.path} is damaged, or no checkpoint ({reason}); "
                "delete it and run without --resume"
            ) from error
        if not (isinstance(content, dict) and {"settings", "state", "rng"} <= content.keys()):
            raise CannotRun(
                f"cannot resume: {self.path} holds something else than a checkpoint of an example; pass another --out"
            )
        return content

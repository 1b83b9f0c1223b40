"""One model that learns: a loss a step, validation, the best weights kept, and all of it in a checkpoint."""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from common import Checkpoint, above_zero, brought_by
from loop import repeat

with brought_by("examples"):
    from rich.console import Console

WARM_UP = 0.05  # share of the steps in which the learning rate rises
Loss = Callable[[nn.Module], Tensor]  # of a batch that it draws
# What has to be the same to go on, beside what an example adds: the schedule depends on all steps.
SETTINGS = ("seed", "iterations", "batch", "hidden_size", "learning_rate", "validate_every")


def add_training_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Those of ``Learner.train``; the defaults are the example's."""
    for name, kind, help in (
        ("iterations", int, "training steps"),
        ("batch", int, "B"),
        ("hidden_size", int, "H"),
        ("learning_rate", float, "the highest; it rises at first and falls to zero with the last step"),
        ("validate_every", int, "steps between validations; the best weights are kept"),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=above_zero(kind), default=defaults[name], help=help)


def schedule(step: int, steps: int) -> float:
    """The share of the highest learning rate: it rises in a line, then falls as a cosine does."""
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / max(1, steps - rising))


@dataclass
class Learner:
    """A model, and all that training changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)  # one a step
    seconds: list[float] = field(default_factory=list)  # one a step
    validations: list[tuple[int, float]] = field(default_factory=list)  # steps done, and the error then
    best: dict[str, Tensor] = field(default_factory=dict)  # weights at the lowest of these errors

    def step(self, loss: Loss, learning_rate: float) -> None:
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        value = loss(self.model)
        self.optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(value.item())
        self.seconds.append(time.perf_counter() - start)

    def validate(self, error: Callable[[nn.Module], float]) -> None:
        """Notes the error of the model as it is, and its weights where it is the lowest so far."""
        value = measured(self.model, error)
        if all(value < before for _, before in self.validations):
            self.best = copy.deepcopy(self.model.state_dict())
        self.validations.append((len(self.losses), value))

    def take_best(self) -> None:
        self.model.load_state_dict(self.best)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
            "validations": self.validations,
            "best": self.best,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.losses, self.seconds = saved["losses"], saved["seconds"]
        self.validations, self.best = saved["validations"], saved["best"]

    def train(
        self,
        loss: Loss,
        error: Callable[[nn.Module], float],
        checkpoint: Checkpoint,
        options: argparse.Namespace,
        console: Console,
    ) -> bool:
        """Up to ``options.iterations``; returns False when interrupted.  Saves in either case."""
        steps = options.iterations

        def iterate(step: int) -> str:
            self.step(loss, options.learning_rate * schedule(step, steps))
            if (step + 1) % options.validate_every == 0 or step + 1 == steps:
                self.validate(error)
            told = f"loss {self.losses[-1]:.3f}"
            return told + (f", validation {self.validations[-1][1]:.3f}" if self.validations else "")

        return repeat(iterate, len(self.losses), checkpoint, self.state_dict, options, console)


@torch.no_grad()
def measured(model: nn.Module, error: Callable[[nn.Module], float]) -> float:
    """The error without gradients, without dropout; the model is as it was afterwards."""
    training = model.training
    model.eval()
    try:
        return error(model)
    finally:
        model.train(training)


def compare_steps(model: nn.Module, peer: nn.Module, loss: Loss, repeats: int = 5) -> tuple[float, float]:
    """Seconds of a training step of each, without the optimizer's: the medians, after a first one, in turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for each, taken in zip((model, peer), seconds, strict=True):
            state = torch.get_rng_state()
            start = time.perf_counter()
            loss(each).backward()
            if next(each.parameters()).is_cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
            if each is model:
                torch.set_rng_state(state)  # the peer reads the same batch
        if turn == 0:  # it compiles
            for taken in seconds:
                taken.clear()
    return statistics.median(seconds[0]), statistics.median(seconds[1])

"""Problems whose answer lies far back, with the loss that a model reaches which remembers nothing.

Each problem draws its batches from a generator, and each batch is new: what is learned cannot be what was seen.

T steps, B rows of the batch, K symbols, S of them to copy.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLOSE = 0.1  # an answer to the adding problem this near counts as right; chance: about 19 in 100


def adding(steps: int, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """The adding problem: input (T, B, 2), target (B,).

    The first feature is uniform in [0, 1], the second marks two steps with 1, one in each half of the sequence; the
    target is the sum of the two marked numbers.
    """
    if steps < 2:
        raise ValueError(f"the adding problem marks two steps: expected steps >= 2, got {steps}")
    half = steps // 2
    numbers = torch.rand(steps, batch, generator=generator)
    first = torch.randint(half, (batch,), generator=generator)
    second = torch.randint(half, steps, (batch,), generator=generator)
    rows = torch.arange(batch)
    marks = torch.zeros(steps, batch)
    marks[first, rows] = marks[second, rows] = 1
    return torch.stack((numbers, marks), -1), numbers[first, rows] + numbers[second, rows]


def copy(
    delay: int, batch: int, symbols: int = 8, length: int = 10, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """The copy problem, also called delayed recall: one-hot input (T + 2S, B, K + 2), targets (T + 2S, B).

    S = ``length`` of K = ``symbols`` symbols, then blanks (symbol K) for T = ``delay`` steps, the last of which is the
    signal (symbol K + 1) to repeat the symbols, in their order; until then, a blank is the answer.
    """
    if delay < 1 or length < 1:
        raise ValueError(f"expected a delay and a length of at least 1, got {delay} and {length}")
    word = torch.randint(symbols, (length, batch), generator=generator)
    read = torch.full((delay + 2 * length, batch), symbols)
    target = read.clone()
    read[:length] = word
    read[length + delay - 1] = symbols + 1
    target[length + delay :] = word
    return F.one_hot(read, symbols + 2).to(torch.get_default_dtype()), target


def recall(steps: int, batch: int, classes: int = 8, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Name the first symbol at the end: one-hot input (T, B, 2K), target (B,).

    The first symbol is one of K = ``classes``; all that follow are noise, drawn from K other symbols.
    """
    if steps < 1:
        raise ValueError(f"expected steps >= 1, got {steps}")
    target = torch.randint(classes, (batch,), generator=generator)
    read = torch.randint(classes, 2 * classes, (steps, batch), generator=generator)
    read[0] = target
    return F.one_hot(read, 2 * classes).to(torch.get_default_dtype()), target


class Task(ABC):
    """A problem at one length: what a model reads and answers, and how good an answer is."""

    name: ClassVar[str]
    at_end: ClassVar[bool] = True  # one answer, after the last step; otherwise one at every step
    length: int  # by which the problem is called: T, or the delay

    @property
    @abstractmethod
    def inputs(self) -> int:
        """Features of a step."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Features of an answer."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """T of the input."""

    @property
    @abstractmethod
    def lag(self) -> int:
        """The longest way from what has to be remembered to the answer, in steps."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """The loss of the best answer that does not depend on the input."""

    @abstractmethod
    def draw(self, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """A new batch: input (T, B, inputs) and target."""

    def loss(self, answer: Tensor, target: Tensor) -> Tensor:
        """The mean loss of a model's answer: (B, outputs), or (T, B, outputs) where every step has one."""
        return F.cross_entropy(answer.flatten(0, -2), target.flatten())

    def memory_loss(self, answer: Tensor, target: Tensor) -> Tensor:
        """The loss of those answers alone that need memory; its gradient enters at the end, and has far to go."""
        return self.loss(answer, target)

    def accuracy(self, answer: Tensor, target: Tensor) -> float:
        """The share of right answers, of those that need memory."""
        return (answer.argmax(-1) == target).double().mean().item()


@dataclass(frozen=True)
class Adding(Task):
    """Add the two marked numbers (Hochreiter & Schmidhuber 1997, experiment 4; in the form of Arjovsky et al. 2016).

    The chance-level loss is the variance of the sum of two independent uniform numbers, 2/12: the mean squared error
    of answering 1 always.
    """

    length: int
    name: ClassVar[str] = "adding"

    @property
    def inputs(self) -> int:
        return 2

    @property
    def outputs(self) -> int:
        return 1

    @property
    def chance(self) -> float:
        return 1 / 6

    @property
    def steps(self) -> int:
        return self.length

    @property
    def lag(self) -> int:
        return self.length - 1

    def draw(self, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return adding(self.length, batch, generator)

    def loss(self, answer: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(answer.squeeze(-1), target)

    def accuracy(self, answer: Tensor, target: Tensor) -> float:
        """The share of answers within ``CLOSE`` of the sum."""
        return ((answer.squeeze(-1) - target).abs() < CLOSE).double().mean().item()


@dataclass(frozen=True)
class Copy(Task):
    """Repeat S symbols after a delay (Hochreiter & Schmidhuber 1997; in the form of Arjovsky et al. 2016).

    Who counts the steps but forgets the symbols answers the T + S blanks without loss and the S symbols uniformly: the
    chance-level loss, a mean over all T + 2S steps, is S ln K / (T + 2S).  Tallec & Ollivier (2018) compare the
    initialisations of an LSTM on it.
    """

    length: int  # T, the delay
    word: int = 10  # S
    symbols: int = 8  # K
    name: ClassVar[str] = "copy"
    at_end: ClassVar[bool] = False

    @property
    def inputs(self) -> int:
        return self.symbols + 2

    @property
    def outputs(self) -> int:
        return self.symbols + 1

    @property
    def steps(self) -> int:
        return self.length + 2 * self.word

    @property
    def lag(self) -> int:
        return self.length + self.word

    @property
    def chance(self) -> float:
        return self.word * math.log(self.symbols) / self.steps

    def draw(self, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return copy(self.length, batch, self.symbols, self.word, generator)

    def memory_loss(self, answer: Tensor, target: Tensor) -> Tensor:
        return self.loss(answer[-self.word :], target[-self.word :])

    def accuracy(self, answer: Tensor, target: Tensor) -> float:
        """The share of the S symbols that are repeated; blanks do not count."""
        return super().accuracy(answer[-self.word :], target[-self.word :])


@dataclass(frozen=True)
class Recall(Task):
    """Name the first of many symbols at the end (after Hochreiter & Schmidhuber 1997, experiment 2c).

    The chance-level loss is that of the uniform distribution over the K classes, ln K.
    """

    length: int
    symbols: int = 8  # K
    name: ClassVar[str] = "recall"

    @property
    def inputs(self) -> int:
        return 2 * self.symbols

    @property
    def outputs(self) -> int:
        return self.symbols

    @property
    def steps(self) -> int:
        return self.length

    @property
    def lag(self) -> int:
        return self.length - 1

    @property
    def chance(self) -> float:
        return math.log(self.symbols)

    def draw(self, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return recall(self.length, batch, self.symbols, generator)


class Model(nn.Module):
    """A recurrent module and a linear readout of its output, of the last step or of all."""

    def __init__(self, recurrent: nn.RNNBase, outputs: int, at_end: bool = True) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.readout = nn.Linear(recurrent.hidden_size, outputs)
        self.at_end = at_end

    def forward(self, input: Tensor) -> Tensor:
        """(T, B, inputs) to (B, outputs), or (T, B, outputs) where every step is read out."""
        output = self.recurrent(input)[0]
        return self.readout(output[-1] if self.at_end else output)

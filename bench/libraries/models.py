"""The model of those libraries that bring none: a regression on the last output of an LSTM, and its batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """I input, H hidden, L layers; batches of B rows of T steps."""

    input_size: int
    hidden_size: int
    num_layers: int
    batch: int
    steps: int
    batches: int

    def __str__(self) -> str:
        sizes = f"I {self.input_size}, H {self.hidden_size}" + (f", L {self.num_layers}" if self.num_layers > 1 else "")
        return f"{self.batches} batches of {self.batch} × {self.steps} steps, {sizes}"


SMALL = Size(input_size=6, hidden_size=16, num_layers=2, batch=4, steps=24, batches=3)
USUAL = Size(input_size=32, hidden_size=128, num_layers=2, batch=32, steps=200, batches=4)


class Regressor(nn.Module):
    """(B, T, I) to (B, 1)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.lstm = nn.LSTM(size.input_size, size.hidden_size, size.num_layers, batch_first=True)
        self.head = nn.Linear(size.hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def data(size: Size) -> tuple[Tensor, Tensor]:
    """Inputs (N, T, I) and targets (N, 1) of all batches: sums of what has been seen."""
    x = torch.randn(size.batches * size.batch, size.steps, size.input_size)
    return x, x[..., :1].mean(1) * size.steps**0.5

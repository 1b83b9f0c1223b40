"""accelerate: a loop of one's own around what Accelerator.prepare gives back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lstmcore
from bench.libraries.models import SMALL, USUAL, Regressor, data
from bench.libraries.pipeline import Job, Pipeline


def build(small: bool, moved: bool) -> Job:
    size = SMALL if small else USUAL
    model, (x, y) = Regressor(size), data(size)
    if moved:
        lstmcore.patch(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2 if small else 1)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.Adam(model.parameters(), lr=1e-3), DataLoader(TensorDataset(x, y), size.batch)
    )

    def train() -> Sequence[float]:
        losses = []
        model.train()
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                loss = torch.nn.functional.mse_loss(model(inputs), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                losses.append(loss.item())
        return losses

    def outputs() -> Tensor:
        with torch.no_grad():
            return model.eval()(x)

    return Job(train, outputs)


PIPELINES = (
    Pipeline(
        name="accelerate",
        distribution="accelerate",
        how="lstmcore.patch(model); accelerator.prepare(model, ...)",
        timed=f"an epoch of {USUAL}",
        build=build,
    ),
)

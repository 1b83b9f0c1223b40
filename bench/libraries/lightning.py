"""Lightning: a LightningModule with an LSTM inside, and Trainer.fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lstmcore
from bench.libraries.models import SMALL, USUAL, Regressor, Size, data
from bench.libraries.pipeline import Job, Pipeline

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Model(LightningModule):
    """A regressor that keeps its losses."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.model, self.losses = Regressor(size), list[float]()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss = torch.nn.functional.mse_loss(self(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def build(small: bool, moved: bool) -> Job:
    size = SMALL if small else USUAL
    model, (x, y) = Model(size), data(size)
    if moved:
        lstmcore.patch(model)
    loader = DataLoader(TensorDataset(x, y), size.batch)

    def train() -> Sequence[float]:
        model.losses.clear()
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, loader)
        return model.losses

    def outputs() -> Tensor:
        with torch.no_grad():
            return model.eval()(x)

    return Job(train, outputs)


PIPELINES = (
    Pipeline(
        name="Lightning",
        distribution="lightning",
        how="lstmcore.patch(model)",
        timed=f"`trainer.fit`, an epoch of {USUAL}",
        build=build,
    ),
)

"""skorch: a net of scikit-learn's kind around an instance of a module, and fitted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from skorch import NeuralNetRegressor
from torch import Tensor

import lstmcore
from bench.libraries.models import SMALL, USUAL, Regressor, data
from bench.libraries.pipeline import Job, Pipeline


def build(small: bool, moved: bool) -> Job:
    size = SMALL if small else USUAL
    model, (x, y) = Regressor(size), data(size)
    if moved:
        lstmcore.patch(model)
    net = NeuralNetRegressor(
        model,
        optimizer=torch.optim.Adam,
        lr=1e-3,
        batch_size=size.batch,
        max_epochs=1,
        train_split=None,
        warm_start=True,
        verbose=0,
    ).initialize()

    def train() -> Sequence[float]:
        net.fit(x, y)
        return [batch["train_loss"] for batch in net.history[-1]["batches"]]

    def outputs() -> Tensor:
        return torch.from_numpy(net.predict(x))

    return Job(train, outputs)


PIPELINES = (
    Pipeline(
        name="skorch NeuralNetRegressor",
        distribution="skorch",
        how="lstmcore.patch(module); NeuralNetRegressor(module)",
        timed=f"`net.fit`, an epoch of {USUAL}",
        build=build,
    ),
)

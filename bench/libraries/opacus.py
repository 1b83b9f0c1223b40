"""opacus: training with differential privacy, on gradients of each sample.

Its hooks cannot see into a fused LSTM, torch's or ours: with torch's class it trains a DPLSTM in its place, a loop over
the steps.  Moved over, torch.func computes the gradients of each sample, and the rest is opacus' own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from opacus import GradSampleModule
from opacus.layers import DPLSTM
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from torch import Tensor, nn

import lstmcore
from bench.libraries import pages
from bench.libraries.models import SMALL, USUAL, Regressor, Size, data
from bench.libraries.pipeline import SEED, Job, Pipeline

per_sample_gradients = pages.run("opacus")["per_sample_gradients"]  # the recipe as it stands there


def private(model: nn.Module, size: Size) -> DPOptimizer:
    """SGD on clipped and noisy gradients; of parameters by name, for a DPLSTM has them in another order."""
    parameters = [parameter for _, parameter in sorted(model.named_parameters())]
    return DPOptimizer(
        torch.optim.SGD(parameters, lr=0.1),
        noise_multiplier=0.5,
        max_grad_norm=1.0,
        expected_batch_size=size.batch,
        generator=torch.Generator().manual_seed(SEED),
    )


def with_hooks(model: nn.Module, optimizer: DPOptimizer) -> Callable[[Tensor, Tensor], float]:
    """A step of opacus' own."""

    def step(x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def with_func(model: nn.Module, optimizer: DPOptimizer) -> Callable[[Tensor, Tensor], float]:
    """A step moved over."""

    def step(x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        loss = per_sample_gradients(model, nn.functional.mse_loss, x, y)
        optimizer.step()
        return loss.item()

    return step


def build(small: bool, moved: bool) -> Job:
    size = SMALL if small else USUAL
    model, (x, y) = Regressor(size), data(size)
    if moved:
        lstmcore.patch(model)
        step = with_func(model, private(model, size))
    else:
        model = GradSampleModule(ModuleValidator.fix(model))
        step = with_hooks(model, private(model, size))
    batches = list(zip(x.split(size.batch), y.split(size.batch), strict=True))

    def train() -> Sequence[float]:
        model.train()
        return [step(*batch) for batch in batches]

    def outputs() -> Tensor:
        with torch.no_grad():
            return model.eval()(x)

    return Job(train, outputs)


PIPELINES = (
    Pipeline(
        name="opacus",
        distribution="opacus",
        how="per_sample_gradients(model, loss, x, y)",
        timed=f"an epoch of {USUAL}",
        build=build,
        stock=DPLSTM,
    ),
)

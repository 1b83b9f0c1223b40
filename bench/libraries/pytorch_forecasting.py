"""pytorch-forecasting: a Temporal Fusion Transformer and a DeepAR, fitted by Lightning's Trainer.

Both run a class that pytorch-forecasting derives from torch's LSTM, on packed sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback, Trainer
from pytorch_forecasting import (
    DeepAR,
    NormalDistributionLoss,
    QuantileLoss,
    TemporalFusionTransformer,
    TimeSeriesDataSet,
)
from pytorch_forecasting.models.nn.rnn import LSTM
from torch import Tensor

import lstmcore
from bench.libraries.forecasts import QUIET, losses_of, waves
from bench.libraries.pipeline import Job, Pipeline

SMALL = {"encoder": 24, "horizon": 6, "hidden": 8, "rows": 4, "steps": 3}
USUAL = {"encoder": 168, "horizon": 24, "hidden": 64, "rows": 64, "steps": 5}


def dataset(encoder: int, horizon: int) -> TimeSeriesDataSet:
    """Windows over a few series: histories of half the length of ``encoder`` up to all of it."""
    values = waves(4, 3 * encoder + horizon)
    rows = pd.DataFrame(values).stack().rename("value").rename_axis(["series", "hour"]).reset_index()
    rows["series"] = rows["series"].astype(str)
    rows["of_day"] = (rows["hour"] % 24).astype(float)
    return TimeSeriesDataSet(
        rows,
        time_idx="hour",
        target="value",
        group_ids=["series"],
        min_encoder_length=encoder // 2,
        max_encoder_length=encoder,
        max_prediction_length=horizon,
        randomize_length=True,
        static_categoricals=["series"],
        time_varying_known_reals=["hour", "of_day"],
        time_varying_unknown_reals=["value"],
    )


def build(small: bool, moved: bool, make: Any, loss: Any, **options: Any) -> Job:
    size = SMALL if small else USUAL
    data = dataset(size["encoder"], size["horizon"])
    model = make.from_dataset(data, hidden_size=size["hidden"], learning_rate=1e-3, loss=loss(), **options)
    if moved:
        lstmcore.patch(model)
    loader = data.to_dataloader(train=True, batch_size=size["rows"])
    batch, _ = next(iter(loader))

    def train() -> Sequence[float]:
        losses = losses_of(Callback)
        Trainer(max_steps=size["steps"], gradient_clip_val=0.1, callbacks=[losses], **QUIET).fit(model, loader)
        return losses.found

    def outputs() -> Tensor:
        torch.manual_seed(0)  # DeepAR draws
        model.eval()
        with torch.no_grad():
            prediction = model(batch)["prediction"]
        model.train()
        return prediction

    return Job(train, outputs)


TIMED = f"`trainer.fit`, {USUAL['steps']} steps on {USUAL['rows']} histories of up to {USUAL['encoder']} hours"

PIPELINES = (
    Pipeline(
        name="pytorch-forecasting TemporalFusionTransformer",
        distribution="pytorch-forecasting",
        how="lstmcore.patch(model)",
        timed=f"{TIMED}, hidden size {USUAL['hidden']}",
        build=partial(build, make=TemporalFusionTransformer, loss=QuantileLoss),
        stock=LSTM,
        float64=False,  # a TimeSeriesDataSet is of float32
    ),
    Pipeline(
        name="pytorch-forecasting DeepAR",
        distribution="pytorch-forecasting",
        how="lstmcore.patch(model)",
        timed=f"{TIMED}, two layers of {USUAL['hidden']}",
        build=partial(build, make=DeepAR, loss=NormalDistributionLoss, rnn_layers=2),
        stock=LSTM,
        float64=False,  # a TimeSeriesDataSet is of float32
    ),
)

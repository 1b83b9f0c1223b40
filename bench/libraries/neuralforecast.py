"""neuralforecast: its LSTM and its TFT, fitted by NeuralForecast."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from neuralforecast import NeuralForecast
from neuralforecast.models import LSTM, TFT
from torch import Tensor

import lstmcore
from bench.libraries.forecasts import QUIET, waves
from bench.libraries.pipeline import SEED, Job, Pipeline

SMALL = {"input": 64, "horizon": 6, "hidden": 16, "windows": 4, "steps": 3}
USUAL = {"input": 168, "horizon": 24, "hidden": 128, "windows": 128, "steps": 10}


def table(series: int, steps: int) -> pd.DataFrame:
    """One row an hour and series."""
    hours = pd.date_range("2024-01-01", periods=steps, freq="h")
    return pd.DataFrame(
        {
            "unique_id": np.repeat(np.arange(series), steps),
            "ds": np.tile(hours, series),
            "y": waves(series, steps).ravel(),
        }
    )


def build(small: bool, moved: bool, make: Any, hidden: str, **options: Any) -> Job:
    size = SMALL if small else USUAL
    model = make(
        h=size["horizon"],
        input_size=size["input"],
        max_steps=size["steps"],
        windows_batch_size=size["windows"],
        random_seed=SEED,
        **{hidden: size["hidden"]},
        **options,
        **QUIET,
    )
    if moved:
        lstmcore.patch(model)
    forecast, data = NeuralForecast(models=[model], freq="h"), table(4, 4 * size["input"])
    history = {"insample_y": torch.randn(3, size["input"], 1), "futr_exog": None, "hist_exog": None, "stat_exog": None}

    def train() -> Sequence[float]:
        forecast.fit(data)
        return [loss for _, loss in forecast.models[0].train_trajectories[-size["steps"] :]]

    def outputs() -> Tensor:
        module = forecast.models[0].eval()
        with torch.no_grad():
            prediction = module(dict(history))
        module.train()
        return prediction

    return Job(train, outputs)


TIMED = f"`forecast.fit`, {USUAL['steps']} steps on {USUAL['windows']} windows of {USUAL['input']} hours"

PIPELINES = (
    Pipeline(
        name="neuralforecast LSTM",
        distribution="neuralforecast",
        how="lstmcore.patch(model); NeuralForecast([model], freq)",
        timed=f"{TIMED}, two layers of {USUAL['hidden']}",
        build=partial(build, make=LSTM, hidden="encoder_hidden_size", encoder_n_layers=2),
        float64=False,  # its data sets are of float32
    ),
    Pipeline(
        name="neuralforecast TFT",
        distribution="neuralforecast",
        how="lstmcore.patch(model); NeuralForecast([model], freq)",
        timed=f"{TIMED}, hidden size {USUAL['hidden']}",
        build=partial(build, make=TFT, hidden="hidden_size"),
        float64=False,
    ),
)

"""neuralforecast's LSTM and TFT."""

from __future__ import annotations

import pytest

pytest.importorskip("neuralforecast", reason="neuralforecast is not installed here: make test-libraries")

import pathlib

from neuralforecast import NeuralForecast
from neuralforecast.models import LSTM
from torch import nn

import lstmcore
from bench.libraries import neuralforecast, parity
from bench.libraries.forecasts import QUIET
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", neuralforecast.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)


def test_what_a_saved_forecast_restores(tmp_path: pathlib.Path):
    """It copies the models that it is given, and builds them anew when it loads them."""
    model = LSTM(h=4, input_size=16, encoder_hidden_size=8, max_steps=1, **QUIET)
    assert lstmcore.patch(model).moved == ["hist_encoder"]
    forecast = NeuralForecast(models=[model], freq="h")
    forecast.fit(neuralforecast.table(2, 64))
    assert type(forecast.models[0].hist_encoder) is lstmcore.LSTM
    forecast.save(str(tmp_path), save_dataset=False, overwrite=True)
    assert type(NeuralForecast.load(str(tmp_path)).models[0].hist_encoder) is nn.LSTM
    with lstmcore.installed():
        assert type(NeuralForecast.load(str(tmp_path)).models[0].hist_encoder) is lstmcore.LSTM

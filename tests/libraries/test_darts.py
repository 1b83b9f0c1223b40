"""darts' BlockRNNModel and TFTModel, which build their modules when they are fitted."""

from __future__ import annotations

import pytest

pytest.importorskip("darts", reason="darts is not installed here: make test-libraries")

import pathlib

import numpy as np
from darts import TimeSeries
from darts.models import BlockRNNModel, TFTModel
from torch import nn

import lstmcore
from bench.libraries import darts, pages, parity
from bench.libraries.forecasts import QUIET
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", darts.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)


SERIES = TimeSeries.from_values(np.sin(np.arange(60, dtype=np.float32)))
SIZES = {"input_chunk_length": 16, "output_chunk_length": 4, "n_epochs": 1, "pl_trainer_kwargs": QUIET}


def test_a_name_taken_at_import_escapes_install():
    """Why TFTModel takes the callback; the warning names what escapes."""
    model = TFTModel(hidden_size=4, num_attention_heads=1, add_relative_index=True, **SIZES)
    with pytest.warns(UserWarning, match=r"darts\.models\.forecasting\.tft_model\._LSTM"), lstmcore.installed():
        model.fit(SERIES)
    assert type(model.model.lstm_encoder) is nn.LSTM


@pytest.mark.filterwarnings("ignore:these have torch's class already")
def test_what_a_saved_model_restores(tmp_path: pathlib.Path):
    model = BlockRNNModel(model="LSTM", hidden_dim=8, **SIZES)
    with lstmcore.installed():
        model.fit(SERIES)
    assert type(model.model.rnn) is lstmcore.LSTM
    path = str(tmp_path / "model.pt")
    model.save(path)
    loaded = BlockRNNModel.load(path)
    assert type(loaded.model.rnn) is nn.LSTM
    assert lstmcore.patch(loaded.model).moved == ["rnn"]
    np.testing.assert_allclose(loaded.predict(4, SERIES).values(), model.predict(4, SERIES).values(), rtol=1e-5)


def test_the_page_moves_it_over():
    options = SIZES | {"pl_trainer_kwargs": QUIET | pages.run("darts")["trainer_options"]}
    model = TFTModel(hidden_size=4, num_attention_heads=1, add_relative_index=True, **options)
    model.fit(SERIES)
    assert type(model.model.lstm_encoder) is type(model.model.lstm_decoder) is lstmcore.LSTM

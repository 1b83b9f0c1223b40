"""pytorch-forecasting's Temporal Fusion Transformer and DeepAR, whose LSTM derives from torch's."""

from __future__ import annotations

import pytest

pytest.importorskip("pytorch_forecasting", reason="pytorch-forecasting is not installed here: make test-libraries")

import torch
from pytorch_forecasting.models.nn.rnn import LSTM
from torch import nn

import lstmcore
from bench.libraries import parity, pytorch_forecasting
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", pytorch_forecasting.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)


def test_its_own_code_runs_over_our_forward():
    """Rows of no steps, which torch's LSTM refuses: the class derived from it leaves their states at zero."""
    torch.manual_seed(0)
    module = LSTM(3, 8, batch_first=True)
    x, lengths = torch.randn(3, 20, 3), torch.tensor([20, 12, 0])
    expected = module(x, lengths=lengths)
    assert lstmcore.patch(module, backend="numba").moved == [""]
    assert isinstance(module, LSTM)
    assert isinstance(module, lstmcore.LSTM)
    output, states = module(x, lengths=lengths)
    torch.testing.assert_close((output, states), expected)
    assert all(torch.equal(state[:, 2], torch.zeros(1, 8)) for state in states)


def test_install_does_not_reach_a_class_that_is_derived_already():
    """Why the page says to patch."""
    with pytest.warns(UserWarning, match=r"pytorch_forecasting\.models\.nn\.rnn\.LSTM"), lstmcore.installed():
        assert not isinstance(LSTM(3, 8), lstmcore.LSTM)
    assert isinstance(LSTM(3, 8), nn.LSTM)

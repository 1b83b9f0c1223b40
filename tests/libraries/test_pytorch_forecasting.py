"""pytorch-forecasting's Temporal Fusion Transformer and DeepAR, whose LSTM derives from torch's."""

from __future__ import annotations

import pytest

pytest.importorskip("pytorch_forecasting", reason="pytorch-forecasting is not installed here: make test-libraries")

from bench.libraries import parity, pytorch_forecasting
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", pytorch_forecasting.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)

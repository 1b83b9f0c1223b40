"""neuralforecast's LSTM and TFT."""

from __future__ import annotations

import pytest

pytest.importorskip("neuralforecast", reason="neuralforecast is not installed here: make test-libraries")

from bench.libraries import neuralforecast, parity
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", neuralforecast.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)

"""a module instance in skorch's NeuralNetRegressor."""

from __future__ import annotations

import pytest

pytest.importorskip("skorch", reason="skorch is not installed here: make test-libraries")

from bench.libraries import parity, skorch
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", skorch.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)

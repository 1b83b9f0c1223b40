"""darts' BlockRNNModel and TFTModel, which build their modules when they are fitted."""

from __future__ import annotations

import pytest

pytest.importorskip("darts", reason="darts is not installed here: make test-libraries")

from bench.libraries import darts, parity
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", darts.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)

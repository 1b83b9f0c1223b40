"""opacus: per-sample gradients by torch.func beside those of its DPLSTM."""

from __future__ import annotations

import pytest

pytest.importorskip("opacus", reason="opacus is not installed here: make test-libraries")

from bench.libraries import opacus, parity
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", opacus.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)

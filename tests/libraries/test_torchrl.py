"""torchrl's LSTMModule on rollouts in which trajectories begin."""

from __future__ import annotations

import pytest

pytest.importorskip("torchrl", reason="torchrl is not installed here: make test-libraries")

from bench.libraries import parity, torchrl
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", torchrl.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)

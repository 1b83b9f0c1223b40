"""Lightning's Trainer."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning", reason="lightning is not installed here: make test-libraries")

from bench.libraries import lightning, parity
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", lightning.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)

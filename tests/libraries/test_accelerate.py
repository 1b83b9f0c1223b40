"""accelerate's prepare and accumulate."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed here: make test-libraries")

from bench.libraries import accelerate, parity
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", accelerate.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)

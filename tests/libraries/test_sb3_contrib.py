"""sb3-contrib's RecurrentPPO, moved over by class, and with the recipe of docs/libraries.md."""

from __future__ import annotations

import pytest

pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed here: make test-libraries")

from bench.libraries import parity, sb3_contrib
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", sb3_contrib.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)

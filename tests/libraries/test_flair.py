"""flair's SequenceTagger."""

from __future__ import annotations

import pytest

pytest.importorskip("flair", reason="flair is not installed here: make test-libraries")

from bench.libraries import flair, parity
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", flair.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)

"""SpeechBrain's Brain on its LSTM with lengths and on a CRDNN."""

from __future__ import annotations

import pytest

pytest.importorskip("speechbrain", reason="SpeechBrain is not installed here: make test-libraries")

from bench.libraries import parity, speechbrain
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", speechbrain.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)

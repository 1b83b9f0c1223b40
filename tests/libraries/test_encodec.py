"""EnCodec of transformers."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="transformers is not installed here: make test-libraries")

from bench.libraries import encodec, parity
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", encodec.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)

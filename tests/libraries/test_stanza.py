"""stanza's tagger of parts of speech."""

from __future__ import annotations

import pytest

pytest.importorskip("stanza", reason="stanza is not installed here: make test-libraries")

from bench.libraries import parity, stanza
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", stanza.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)

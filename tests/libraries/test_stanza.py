"""stanza's tagger of parts of speech."""

from __future__ import annotations

import pytest

pytest.importorskip("stanza", reason="stanza is not installed here: make test-libraries")

from stanza.models.common.hlstm import HighwayLSTM
from stanza.models.common.packed_lstm import PackedLSTM

import lstmcore
from bench.libraries import parity, stanza
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", stanza.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)


def test_install_reaches_what_it_builds():
    """Its modules ask torch.nn for the class when they are built; with recurrent dropout they build cells."""
    with lstmcore.installed():
        highway = HighwayLSTM(4, 8, num_layers=2, bidirectional=True)
        cells = PackedLSTM(4, 8, 1, rec_dropout=0.5)
    assert [type(layer.lstm) for layer in highway.lstm] == [lstmcore.LSTM] * 2
    assert [type(cell) for cell in cells.lstm.cells] == [lstmcore.LSTMCell]

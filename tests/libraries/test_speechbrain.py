"""SpeechBrain's Brain on its LSTM with lengths and on a CRDNN."""

from __future__ import annotations

import pytest

pytest.importorskip("speechbrain", reason="SpeechBrain is not installed here: make test-libraries")

import pathlib

import torch
from speechbrain.nnet.RNN import LSTM
from speechbrain.utils.checkpoints import Checkpointer

import lstmcore
from bench.libraries import parity, speechbrain
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", speechbrain.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)


def test_a_checkpoint_is_loaded_into_the_module_that_is_there(tmp_path: pathlib.Path):
    saved, loaded = (LSTM(8, input_size=3, re_init=True) for _ in range(2))
    for each in (saved, loaded):
        assert lstmcore.patch(each).moved == ["rnn"]
    Checkpointer(tmp_path, {"model": saved}).save_checkpoint()
    Checkpointer(tmp_path, {"model": loaded}).recover_if_possible()
    assert type(loaded.rnn) is lstmcore.LSTM
    assert torch.equal(loaded.rnn.weight_hh_l0, saved.rnn.weight_hh_l0)

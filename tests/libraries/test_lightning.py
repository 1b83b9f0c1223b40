"""Lightning's Trainer, and what its checkpoints restore."""

from __future__ import annotations

import pathlib

import pytest

pytest.importorskip("lightning", reason="lightning is not installed here: make test-libraries")

import torch
from lightning.pytorch import Trainer
from torch import nn

import lstmcore
from bench.libraries import lightning, pages, parity
from bench.libraries.lightning import Model
from bench.libraries.models import SMALL, data
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", lightning.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)


def test_the_page_moves_it_over():
    assert pages.run("Lightning")["report"].moved == ["lstm"]


def test_what_a_checkpoint_restores(tmp_path: pathlib.Path):
    """The model is built anew: torch's LSTM, unless ours is installed or the model patched after."""
    model, (x, _), path = Model(SMALL), data(SMALL), tmp_path / "model.ckpt"
    lstmcore.patch(model)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    plain = Model.load_from_checkpoint(path, size=SMALL, weights_only=True)
    assert type(plain.model.lstm) is nn.LSTM
    with lstmcore.installed():
        ours = Model.load_from_checkpoint(path, size=SMALL, weights_only=True)
    assert type(ours.model.lstm) is lstmcore.LSTM
    lstmcore.patch(plain)
    for each in (ours, plain):
        torch.testing.assert_close(each(x), model(x), rtol=0, atol=0)

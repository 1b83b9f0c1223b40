"""accelerate's prepare and accumulate, and a model that it has wrapped."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed here: make test-libraries")

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

import lstmcore
from bench.libraries import accelerate, pages, parity
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", accelerate.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)


def test_the_page_moves_it_over():
    assert pages.run("accelerate")["report"].moved == ["0"]


def test_an_lstm_with_a_wrapped_forward_is_left_with_a_reason():
    """Why the page says to patch first: mixed precision replaces the forward of what it prepares, and of that alone."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    alone, inside = accelerator.prepare(nn.LSTM(4, 8), nn.Sequential(nn.LSTM(4, 8)))
    ((_, why),) = lstmcore.patch(alone).left.items()
    assert "patch the model before" in why
    assert type(alone) is nn.LSTM
    assert list(lstmcore.patch(inside).moved) == ["0"]

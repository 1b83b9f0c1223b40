"""EnCodec of transformers."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="transformers is not installed here: make test-libraries")

from torch import nn

import lstmcore
from bench.libraries import encodec, parity
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", encodec.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)


def model() -> encodec.EncodecModel:
    sizes = {"num_filters": 4, "hidden_size": 16, "codebook_dim": 16, "upsampling_ratios": [4, 2]}
    return encodec.EncodecModel(encodec.EncodecConfig(**sizes))


@pytest.mark.parametrize("subclass", [False, True])
def test_only_a_subclass_is_initialised_again(subclass: bool):
    """transformers asks isinstance(module, nn.LSTM) before it sets the biases to zero."""
    built = model()
    moved = lstmcore.patch(built, subclass=subclass).moved
    lstm = built.get_submodule(moved[0])
    nn.init.ones_(lstm.bias_ih_l0)
    built._init_weights(lstm)
    assert bool((lstm.bias_ih_l0 == 0).all()) is subclass


def test_under_install_a_model_is_drawn_as_torchs():
    encodec.torch.manual_seed(3)
    expected = model().state_dict()
    encodec.torch.manual_seed(3)
    with lstmcore.installed():
        built = model()
    assert any(type(module) is lstmcore.LSTM for module in built.modules())
    for name, value in built.state_dict().items():
        assert encodec.torch.equal(value, expected[name]), name

"""sb3-contrib's RecurrentPPO, moved over by class, and with the recipe of docs/libraries.md."""

from __future__ import annotations

import pathlib

import pytest

pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed here: make test-libraries")

from sb3_contrib import RecurrentPPO
from torch import nn

import lstmcore
from bench.libraries import parity, sb3_contrib
from bench.libraries.pipeline import Pipeline
from bench.libraries.sb3_contrib import LSTMPolicy

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", sb3_contrib.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)


@pytest.mark.parametrize(
    ("saved", "custom", "restored"),
    [
        ("MlpLstmPolicy", None, nn.LSTM),
        ("MlpLstmPolicy", {"policy_class": LSTMPolicy}, lstmcore.LSTM),
        (LSTMPolicy, None, lstmcore.LSTM),
    ],
)
def test_what_a_checkpoint_restores(tmp_path: pathlib.Path, saved, custom, restored):
    model = sb3_contrib.agent(True, saved)
    model.save(tmp_path / "model")
    again = RecurrentPPO.load(tmp_path / "model", env=model.env, custom_objects=custom)
    assert type(again.policy.lstm_actor) is type(again.policy.lstm_critic) is restored
    observation = model.env.reset()
    (action, _), (expected, _) = (each.predict(observation, deterministic=True) for each in (again, model))
    assert (action == expected).all()
    again.learn(1)

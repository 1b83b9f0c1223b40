"""One model that learns: its schedule, the best weights, and two models timed on the same batches."""

from __future__ import annotations

import argparse
import math

import pytest
import torch
from torch import nn

pytest.importorskip("rich", reason="needs rich")

from learner import Learner, above_zero, compare_steps, measured, schedule


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1000])
def test_schedule(steps):
    rates = [schedule(step, steps) for step in range(steps)]
    assert max(rates) == 1
    assert min(rates) > 0, "no step is for nothing"
    top = rates.index(1)
    assert top <= 0.05 * steps
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert steps < 100 or rates[-1] < 0.01


def weighed(weight: float) -> Learner:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, weight)
    return Learner(model, torch.optim.SGD(model.parameters()))


def test_the_best_weights_are_kept():
    learner = weighed(0.0)
    for weight in (3.0, 1.0, 2.0, math.nan):
        nn.init.constant_(learner.model.weight, weight)
        learner.losses.append(0.0)
        learner.validate(lambda model: model.weight.item())
    assert [step for step, _ in learner.validations] == [1, 2, 3, 4]
    learner.take_best()
    assert learner.model.weight.item() == 1


def test_a_step_takes_the_rate_it_is_given():
    learner = weighed(1.0)
    learner.step(lambda model: model.weight.sum() * 0.5, learning_rate=0.1)
    assert learner.model.weight.item() == pytest.approx(1 - 0.1 * 0.5)
    assert learner.losses == [0.5]
    assert len(learner.seconds) == 1


def test_measuring_leaves_the_model_as_it_was():
    model = nn.Dropout(0.5)
    for mode in (True, False):
        model.train(mode)
        assert measured(model, lambda model: float(model.training or torch.is_grad_enabled())) == 0
        assert model.training is mode
        with pytest.raises(ZeroDivisionError):
            measured(model, lambda model: 1 / 0)
        assert model.training is mode


def test_both_are_timed_on_the_same_batches():
    models, drawn = (nn.Linear(1, 1), nn.Linear(1, 1)), []

    def loss(model):
        drawn.append((models.index(model), torch.rand(()).item()))
        return model(torch.ones(1)).sum()

    seconds = compare_steps(*models, loss, repeats=2)
    assert all(each > 0 for each in seconds)
    assert [which for which, _ in drawn] == [0, 1] * 3
    batches = [value for _, value in drawn]
    assert batches[::2] == batches[1::2]
    assert len(set(batches)) == 3


@pytest.mark.parametrize(("kind", "text"), [(int, "0"), (int, "-3"), (float, "nan"), (float, "inf"), (float, "0")])
def test_numbers_above_zero(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"above 0, got {text}"):
        above_zero(kind)(text)
    assert above_zero(kind)("3") == 3

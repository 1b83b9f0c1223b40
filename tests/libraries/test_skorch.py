"""skorch's nets around a module that moved over, and around a class that they build themselves."""

from __future__ import annotations

import pytest

pytest.importorskip("skorch", reason="skorch is not installed here: make test-libraries")

from sklearn.base import clone
from skorch import NeuralNetRegressor
from torch import nn

import lstmcore
from bench.libraries import pages, parity, skorch
from bench.libraries.models import SMALL, Regressor, data
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow
QUIET = {"max_epochs": 1, "verbose": 0, "train_split": None}


@pytest.mark.parametrize("pipeline", skorch.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)


def test_the_page_moves_it_over():
    assert pages.run("skorch")["report"].moved == ["lstm"]


def test_an_instance_stays_ours_through_fit_and_clone():
    model = Regressor(SMALL)
    lstmcore.patch(model)
    net = NeuralNetRegressor(model, **QUIET)
    for each in (net, clone(net)):
        each.fit(*data(SMALL))
        assert type(each.module_.lstm) is lstmcore.LSTM


def test_of_a_class_each_fit_builds_a_module():
    """Why the page says to hand over an instance, or to install ours."""
    net = NeuralNetRegressor(Regressor, module__size=SMALL, **QUIET).initialize()
    lstmcore.patch(net.module_)
    net.fit(*data(SMALL))
    assert type(net.module_.lstm) is nn.LSTM
    with lstmcore.installed():
        net.fit(*data(SMALL))
    assert type(net.module_.lstm) is lstmcore.LSTM

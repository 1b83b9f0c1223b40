"""opacus: per-sample gradients by torch.func beside those of its DPLSTM; its hooks say that they do not see ours."""

from __future__ import annotations

import pytest

pytest.importorskip("opacus", reason="opacus is not installed here: make test-libraries")

import torch
from opacus import PrivacyEngine
from opacus.layers import DPLSTM
from opacus.validators import ModuleValidator
from opacus.validators.errors import UnsupportedModuleError
from torch.utils.data import DataLoader, TensorDataset

import lstmcore
from bench.libraries import opacus, parity
from bench.libraries.models import SMALL, Regressor, data
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", opacus.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)


def test_its_engine_refuses_and_its_fix_still_works():
    model = Regressor(SMALL)
    lstmcore.patch(model)

    def private(module: torch.nn.Module) -> None:
        loader = DataLoader(TensorDataset(*data(SMALL)), SMALL.batch)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        PrivacyEngine().make_private(
            module=module, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
        )

    with pytest.raises(UnsupportedModuleError, match=r"ModuleValidator\.fix\(model\) puts a DPLSTM"):
        private(model)
    fixed = ModuleValidator.fix(model)
    assert type(fixed.lstm) is DPLSTM
    private(fixed)

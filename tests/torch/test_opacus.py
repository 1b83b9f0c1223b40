"""Opacus, which computes the gradient of each sample by hooks: it refuses ours in a sentence, and has a replacement."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

import lstmcore

from ..support.modules import close

opacus = pytest.importorskip("opacus", reason="opacus is not installed")
validators = pytest.importorskip("opacus.validators", reason="opacus is not installed")

T, B, I, H = 6, 4, 3, 8
F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:Secure RNG turned off", "ignore:Full backward hook is firing")


class Classifier(nn.Module):
    def __init__(self, cls: type[nn.Module] = lstmcore.LSTM, **options) -> None:
        super().__init__()
        self.lstm = cls(I, H, batch_first=True, **options)
        self.linear = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:  # of what the hooks see, and of what they do not
        output, (h_n, _) = self.lstm(x)
        return self.linear(output.mean(1) + h_n[-1])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, T, I, dtype=F64)


def loss_of(scores: Tensor) -> Tensor:
    return scores.square().sum()


def one_by_one(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradient of each sample, by as many backward passes."""
    each = [torch.autograd.grad(loss_of(model(row[None])), list(model.parameters())) for row in x]
    return [torch.stack(grads) for grads in zip(*each, strict=True)]


def private(model: nn.Module, x: Tensor):
    return opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x), batch_size=2),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )


def test_it_is_refused_before_anything_else(x):
    """In one sentence, that says what to do; torch.nn.LSTM is refused at the same place."""
    refused = validators.errors.UnsupportedModuleError
    for cls in (lstmcore.LSTM, nn.LSTM):
        (found,) = validators.ModuleValidator.validate(Classifier(cls))
        assert isinstance(found, validators.errors.ShouldReplaceModuleError)
        with pytest.raises(refused, match="LSTM"):
            private(Classifier(cls), x)
    with pytest.raises(refused, match=r"lstmcore\.LSTM.*ModuleValidator\.fix\(model\)"):
        private(Classifier(), x)


def test_the_replacement(x):
    """DPLSTM, with the weights and the results of ours, and gradients for each sample."""
    ours, x = Classifier(num_layers=2, backend="numba"), x.float()  # opacus makes it in float32
    fixed = validators.ModuleValidator.fix_and_validate(ours)
    assert type(fixed.lstm) is opacus.layers.DPLSTM
    close(fixed(x), ours(x))
    hooked = opacus.GradSampleModule(fixed, loss_reduction="sum")
    loss_of(hooked(x)).backward()
    found = {name: parameter.grad_sample for name, parameter in fixed.named_parameters()}
    for (name, _), expected in zip(ours.named_parameters(), one_by_one(ours, x), strict=True):
        close(found[name], expected)


def test_ours_with_opacus_optimizer(x):
    """What the refusal says of those who want to keep it: torch.func computes the gradients, DPOptimizer takes them."""
    model = Classifier(num_layers=2, backend="numba").to(F64)
    optimizer = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=0.1, expected_batch_size=B
    )
    parameters, before = dict(model.named_parameters()), [p.detach().clone() for p in model.parameters()]
    per_sample = one_by_one(model, x)

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return loss_of(functional_call(model, parameters, (row[None],)))

    for name, each in vmap(grad(loss), in_dims=(None, 0))(parameters, x).items():
        parameters[name].grad_sample = each
    optimizer.step()

    norms = torch.stack([each.flatten(1).norm(dim=1) for each in per_sample]).norm(dim=0)
    factors = (0.1 / (norms + 1e-6)).clamp(max=1.0)
    assert (factors < 1).any()
    for parameter, old, each in zip(model.parameters(), before, per_sample, strict=True):
        step = torch.einsum("b,b...->...", factors, each) / B
        assert torch.allclose(parameter, old - step, rtol=1e-9, atol=1e-12)


def test_cells():
    model = nn.Sequential(lstmcore.LSTMCell(I, H))
    (error,) = validators.ModuleValidator.validate(model)
    assert "nor does torch.nn.LSTMCell" in str(error)
    assert isinstance(error, validators.errors.UnsupportedModuleError)


def test_what_is_not_trained_may_stay(x):
    """Opacus asks only about modules with parameters that are trained."""
    model = Classifier()
    model.lstm.requires_grad_(False)
    assert not validators.ModuleValidator.validate(model)
    assert type(validators.ModuleValidator.fix(model).lstm) is lstmcore.LSTM

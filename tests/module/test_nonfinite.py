"""NaN and Inf go where they go in float64 nn.LSTM, in outputs and gradients; nothing hangs (see the watchdog)."""

import math

import pytest
import torch

import lstmcore

from ..support.modules import OPTIONS, check_goes_where_torchs_goes
from ..support.tolerances import assert_same

PLACES = ["input", "h_0", "c_0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "grad"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("options", OPTIONS)
def test_goes_where_torchs_goes(options, place, value, dtype, backend):
    check_goes_where_torchs_goes(options, place, value, dtype, backend)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_stays_in_its_row(value, backend):
    """The other rows of the batch do not notice: the bits of their outputs and input gradients stay."""
    module = lstmcore.LSTM(4, 17, backend=backend)
    clean = torch.randn(5, 33, 4)
    spoilt = clean.clone()
    spoilt[2, 20] = value
    others = torch.arange(33) != 20
    results = []
    for x in (clean, spoilt):
        x = x.clone().requires_grad_()
        output, _ = module(x)
        (grad,) = torch.autograd.grad(output, x, torch.ones_like(output))
        results.append((output[:, others], grad[:, others]))
    for got, expected in zip(*results, strict=True):
        assert_same(got, expected, backend)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_saturated_but_finite(scale, backend):
    """Gates driven far out give exactly 0 and 1, not NaN."""
    module = lstmcore.LSTM(4, 17, backend=backend)
    x = (torch.randn(5, 3, 4) * scale).requires_grad_()
    output, (_, c_n) = module(x)
    output.sum().backward()
    assert output.isfinite().all()
    assert c_n.isfinite().all()
    assert x.grad.isfinite().all()
    expected, _ = module.double().to(torch.float64)(x.detach().double())
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)

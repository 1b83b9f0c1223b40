"""NaN and Inf go where they go in float64 nn.LSTM, in outputs and gradients; nothing hangs (see the watchdog)."""

import math

import pytest
import torch
from torch import nn

import lstmcore

from .tolerances import assert_same

PLACES = ["input", "h_0", "c_0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "grad"]
OPTIONS = {
    "h17": {"hidden_size": 17},
    "h1": {"hidden_size": 1},
    "h33_bidirectional": {"hidden_size": 33, "bidirectional": True},
    "proj": {"hidden_size": 17, "proj_size": 5},
}


def results_of(module: nn.Module, given: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    leaves = {name: given[name].to(dtype).requires_grad_() for name in ("input", "h_0", "c_0")}
    output, (h_n, c_n) = module(leaves["input"], (leaves["h_0"], leaves["c_0"]))
    leaves |= dict(module.named_parameters())
    grads = torch.autograd.grad(
        (output, h_n, c_n), list(leaves.values()), [given[k].to(dtype) for k in ("g", "gh", "gc")]
    )
    return {"output": output, "h_n": h_n, "c_n": c_n} | {f"grad of {k}": g for k, g in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("options", OPTIONS)
def test_goes_where_torchs_goes(options, place, value, dtype, backend):
    options = OPTIONS[options]
    T, B, H, D = 5, 3, options["hidden_size"], 2 if "bidirectional" in options else 1
    P = options.get("proj_size", H)
    shapes = {
        "input": (T, B, 4),
        "h_0": (D, B, P),
        "c_0": (D, B, H),
        "g": (T, B, D * P),
        "gh": (D, B, P),
        "gc": (D, B, H),
    }
    given = {name: torch.randn(shape).bfloat16().double() for name, shape in shapes.items()}
    theirs = nn.LSTM(4, **options, dtype=torch.float64)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.bfloat16())
        target = dict(theirs.named_parameters()).get(place, given.get("g" if place == "grad" else place))
        if place in ("input", "grad"):
            target[2, 1, -1] = value
        elif place in given:
            target[0, 1, -1] = value
        else:
            target[-1].fill_(value) if target.dim() == 1 else target[-1, -1].fill_(value)
    ours = lstmcore.LSTM(4, **options, dtype=dtype, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    expected, got = results_of(theirs, given, torch.float64), results_of(ours, given, dtype)
    if math.isnan(value):  # an infinite bias saturates its gate, and everything stays finite: that is compared as well
        assert any(v.isnan().any() for v in expected.values()), "the test feeds nothing that shows"
    for name, wanted in expected.items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(got[name]), kind(wanted)), f"{kind.__name__} of {name}"


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

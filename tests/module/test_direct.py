"""Calls that are known to go to ATen: what they return, and what sends them another way all the same.

T time, B batch, I input, H hidden, P projection, L layers, D directions.
"""

from __future__ import annotations

import functools

import pytest
import torch
from lstmcore.kernels.cpu import process
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

import lstmcore
from lstmcore import direct, functional

X = torch.randn(1, 2, 3)  # one step: ATen's
KINDS = {
    "plain": {},
    "no_bias": {"bias": False},
    "batch_first": {"batch_first": True},
    "layers_bidirectional": {"num_layers": 2, "bidirectional": True},
    "proj": {"proj_size": 2},
    "dropout": {"num_layers": 2, "dropout": 0.5},
    "torch": {"backend": "torch"},
}


@pytest.fixture(autouse=True)
def _nothing_known():
    direct._known.clear()
    yield
    direct._known.clear()


@pytest.fixture
def looked_at(monkeypatch):
    """How many calls were looked at in full so far."""
    calls = []
    full = functional.lstm

    @functools.wraps(full)
    def counted(*arguments, **options):
        calls.append(arguments)
        return full(*arguments, **options)

    monkeypatch.setattr(functional, "lstm", counted)
    return calls


def pair(**options) -> tuple[lstmcore.LSTM, nn.LSTM]:
    module = lstmcore.LSTM(3, 4, **options)
    peer = nn.LSTM(3, 4, **{name: value for name, value in options.items() if name != "backend"})
    peer.load_state_dict(module.state_dict())
    return module, peer


def states(module: lstmcore.LSTM, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    count = module.num_layers * (2 if module.bidirectional else 1)
    return torch.randn(count, batch, module.proj_size or 4), torch.randn(count, batch, 4)


def flat(results) -> list[torch.Tensor]:
    return [results[0], *results[1]]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["", "hx"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_second_call_returns_what_torch_does(kind, given, training, looked_at):
    module, peer = pair(**KINDS[kind])
    x = X.transpose(0, 1).contiguous() if module.batch_first else X
    hx = states(module) if given else None
    with torch.set_grad_enabled(training):
        module(x, hx)
        assert len(looked_at) == 1
        torch.manual_seed(1)
        got = flat(module(x, hx))
        assert len(looked_at) == 1
        torch.manual_seed(1)
        expected = flat(peer(x, hx))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
        assert one.requires_grad == training
    if training:
        sums = [sum(each.sum() for each in results) for results in (got, expected)]
        for one, other in zip(
            torch.autograd.grad(sums[0], list(module.parameters())),
            torch.autograd.grad(sums[1], list(peer.parameters())),
            strict=True,
        ):
            assert torch.equal(one, other)


def test_other_modules_of_the_same_sizes_are_known(looked_at):
    for seed in range(3):
        torch.manual_seed(seed)
        module, peer = pair()
        assert torch.equal(module(X)[0], peer(X)[0])
    assert len(looked_at) == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda m: m(torch.randn(2, 2, 3)),
        lambda m: m(torch.randn(1, 5, 3)),
        lambda m: m(torch.randn(1, 3)),
        lambda m: m(X, states(m)),
        lambda m: m(X, list(states(m))),
        lambda m: m(X, lengths=[1, 0]),
        lambda m: m(X, reset=torch.ones(1, 2, dtype=torch.bool)),
        lambda m: m(X, return_cells=True),
        lambda m: m(nn.Parameter(X)),
        lambda m: torch.no_grad()(m)(X),
        lambda m: m.requires_grad_(False)(X),
        lambda m: torch.func.vmap(m)(X[None]),
        lambda m: torch.jit.trace(m, X),
        lambda m: torch.autocast("cpu", torch.bfloat16)(m)(X),
    ],
)
def test_another_call_is_looked_at(other, looked_at):
    module, _ = pair()
    module(X)
    module(X)
    assert len(looked_at) == 1
    other(module)
    assert len(looked_at) > 1


def test_what_may_change_is_asked_every_time(looked_at, monkeypatch):
    module, _ = pair()
    module(X)
    with lstmcore.record_gradient_flow(module) as flow:
        module(X)[0].sum().backward()
    assert len(flow.records) == 1
    assert len(looked_at) == 2
    with forward_ad.dual_level():
        output, _ = module(forward_ad.make_dual(X, torch.ones_like(X)))
        assert forward_ad.unpack_dual(output).tangent is not None
    assert len(looked_at) == 3
    monkeypatch.setattr(process, "torch_would_hang", lambda: True)  # as in a forked child
    module(X)
    assert len(looked_at) == 4


def test_mistakes_are_told_as_before():
    module, peer = pair()
    module(X)
    module(X)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        module(torch.randn(1, 2, 5))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
        module(X, (torch.zeros(1, 1, 4), torch.zeros(1, 2, 4)))
    with pytest.raises(ValueError, match="does not match weight dtype"):
        module(X.double())
    module.weight_hh_l0 = nn.Parameter(torch.randn(16, 3))
    with pytest.raises(RuntimeError, match=r"Expected a parameter of shape \(16, 4\)"):
        module(X)
    module.weight_hh_l0 = nn.Parameter(peer.weight_hh_l0.detach().double())
    with pytest.raises(RuntimeError, match="float64"):
        module(X)
    module.weight_hh_l0 = peer.weight_hh_l0
    assert torch.equal(module(X)[0], peer(X)[0])


def test_what_went_to_kernels_is_not_known(looked_at):
    module = lstmcore.LSTM(3, 4, backend="numba")
    for _ in range(2):
        module(X)
    assert len(looked_at) == 2
    assert not direct._known


def test_not_everything_is_remembered(monkeypatch):
    monkeypatch.setattr(direct, "MOST", 3)
    module, peer = pair()
    for batch in range(1, 9):
        x = torch.randn(1, batch, 3)
        for _ in range(2):
            assert torch.equal(module(x)[0], peer(x)[0])
        assert 0 < len(direct._known) <= 3


def test_a_compiled_graph_does_not_depend_on_what_is_known():
    module, _ = pair()
    counter = CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    with torch.no_grad():
        first = compiled(X)[0]
        module(X)
        module(X)
        assert direct._known
        assert torch.equal(compiled(X)[0], first)
    assert counter.frame_count == 1

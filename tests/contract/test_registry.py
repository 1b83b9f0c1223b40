"""A new backend is one module and one entry in the registry: everything else works with it at once.

T time, B batch, I input, H hidden.
"""

from __future__ import annotations

import importlib
import sys
import types

import numba
import pytest
import torch
from torch import nn

import lstmcore
from lstmcore import backends
from lstmcore.backends import Backend, Verdict, reference

from ..support.tolerances import ORDER_OF_SUMS, error

T, B, I, H = 6, 4, 3, 5
F64 = torch.float64


@pytest.fixture
def toy(monkeypatch, fresh_choices):
    """The arithmetic of the reference as a fused backend, first in the registry; a list of what was called."""
    module = types.ModuleType("toy_backend")
    module.calls = []

    def forward(call, *, save=False, cells=False):
        module.calls.append("forward")
        with torch.no_grad():
            result = reference.forward(call, cells=cells)
        return result._replace(saved=(call.input.new_zeros(call.rows.room),) if save else ())

    def backward(call, grads, output, saved, needs):
        module.calls.append("backward")
        assert len(saved) == 1
        return reference.backward(call, grads, output, saved, needs)

    module.supports = lambda layer: None if layer.hidden_size < 100 else "it is a toy: no more than 99 units"
    module.saves = lambda layer, room: [((room,), layer.dtype)]
    module.forward, module.backward, module.prewarm = forward, backward, lambda layer, *, training: None
    monkeypatch.setitem(sys.modules, "toy_backend", module)

    def faster(layer, situation):
        return Verdict(layer.steps >= 3, "" if layer.steps >= 3 else "short")

    entry = Backend("toy", "toy_backend", "the toy covers this call", faster=faster)
    everything = {"toy": entry, **backends.REGISTRY}
    backends.REGISTRY.clear()
    backends.REGISTRY.update(everything)
    yield module
    del backends.REGISTRY["toy"]


def pair(**options) -> tuple[lstmcore.LSTM, nn.LSTM]:
    ours = lstmcore.LSTM(I, H, **options, dtype=F64)
    theirs = nn.LSTM(I, H, **{name: value for name, value in options.items() if name != "backend"}, dtype=F64)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"proj_size": 2, "bias": False}],
    ids=str,
)
def test_by_name_and_by_auto(toy, options):
    for name in ("toy", "auto"):
        ours, theirs = pair(**options, backend=name)
        x = torch.randn(T, B, I, dtype=F64)
        results = []
        for module in (ours, theirs):
            leaf = x.clone().requires_grad_()
            output, states = module(leaf)
            loss = output.square().sum() + sum(state.sum() for state in states)
            results.append([output, *states, *torch.autograd.grad(loss, [leaf, *module.parameters()])])
        layers = options.get("num_layers", 1)
        assert toy.calls == ["forward"] * layers + ["backward"] * layers
        toy.calls.clear()
        for got, expected in zip(*results, strict=True):
            assert error(got, expected) <= ORDER_OF_SUMS * max(1.0, expected.abs().max().item())


def test_what_torch_does_not_have(toy):
    module = lstmcore.LSTM(I, H, backend="toy", dtype=F64)
    x, reset = torch.randn(T, B, I, dtype=F64), torch.rand(T, B) < 0.3
    given = {"lengths": torch.tensor([3, 6, 0, 2]), "reset": reset, "return_cells": True}
    got = module(x, **given)
    module.backend = "reference"
    for one, other in zip(got[::2], module(x, **given)[::2], strict=True):
        assert torch.equal(one, other)
    assert toy.calls == ["forward"]


@pytest.mark.slow
def test_recorded_compiled_and_transformed(toy):
    module = lstmcore.LSTM(I, H, backend="toy", dtype=F64)
    x = torch.randn(T, B, I, dtype=F64)
    with lstmcore.record_gradient_flow(module) as flow:
        module(x)[0].sum().backward()
    assert len(flow.records) == 1
    expected = module(x)[0]
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x)[0], expected)
    assert torch.equal(torch.vmap(lambda row: module(row)[0], 1, 1)(x), expected)
    assert torch.autograd.gradcheck(lambda x: module(x)[0], x.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], x)


def test_explained(toy):
    module = lstmcore.LSTM(I, H)
    choice = lstmcore.explain(module, torch.randn(T, B, I))
    assert choice.name == "toy"
    assert "the toy covers this call" in str(choice)
    short = lstmcore.explain(module, torch.randn(2, B, I))
    assert short.name != "toy"
    assert dict(short.reasons)["toy"] == "short"


def test_refused(toy):
    with pytest.raises(RuntimeError, match="backend 'toy' cannot run this call: it is a toy: no more than 99 units"):
        lstmcore.LSTM(I, 100, backend="toy")(torch.randn(T, B, I))
    with pytest.raises(ValueError, match="unknown backend 'toys': expected one of 'auto', 'toy', 'triton'"):
        lstmcore.LSTM(I, H, backend="toys")


@pytest.mark.parametrize("found", ["0.61.2", "0.9.0"])
def test_numba_too_old(found, fresh_choices, monkeypatch):
    """By name an error with the command that helps; "auto" goes on."""
    monkeypatch.setattr(numba, "__version__", found)
    module, x = lstmcore.LSTM(3, 4, backend="numba"), torch.randn(40, 2, 3)
    with pytest.raises(RuntimeError, match=rf"Numba 0\.62 or newer, found {found}; pip install 'numba>=0\.62'"):
        module(x)
    assert lstmcore.explain(lstmcore.LSTM(3, 4), x).name == "torch"


def test_numba_is_new_enough(fresh_choices, monkeypatch):
    """Versions are numbers: 0.100 is newer than 0.62."""
    for found in ("0.62.0", "0.100.0", "1.0.0rc1"):
        monkeypatch.setattr(numba, "__version__", found)
        backends.load.cache_clear()
        assert backends.load("numba").forward


def test_a_library_that_cannot_be_opened(fresh_choices, monkeypatch):
    """llvmlite opens LLVM by path: an OSError of it is no reason for "auto" to fail."""
    real = importlib.import_module

    def fail(name):
        if name == "numba":
            raise OSError("libllvmlite.so: cannot open shared object file")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", fail)
    assert lstmcore.LSTM(3, 4)(torch.randn(40, 2, 3))[0].shape == (40, 2, 4)
    with pytest.raises(RuntimeError, match=r"cannot be opened: libllvmlite\.so"):
        lstmcore.LSTM(3, 4, backend="numba")(torch.randn(40, 2, 3))

"""Layers that run at once, as a wavefront over time: the bits of one layer after the other.

T time, B batch, I input, H hidden, L layers.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lstmcore
from lstmcore import backends

from ..support.modules import results
from ..support.tolerances import ORDER_OF_SUMS, error

T, B, I, H, L = 75, 3, 5, 17, 3


@pytest.fixture
def waves(monkeypatch, threads):
    """Counts wavefronts; every stack that can be one is one, on two threads or as many as the test asks for."""
    from lstmcore.kernels.cpu import tiling, wavefront

    run, ran = wavefront._Wavefront.run, []
    monkeypatch.setattr(wavefront._Wavefront, "run", lambda *args: (ran.append(1), run(*args)))
    monkeypatch.setattr(wavefront, "GAIN", 1e9)
    monkeypatch.setattr(tiling, "WORTH_A_THREAD", 1)
    wavefront._worth.cache_clear()
    threads(2)
    yield ran
    wavefront._worth.cache_clear()


class Slowly(nn.Module):
    """A module whose layers run one after the other, because all their cells are wanted."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs, return_cells="all")[:2]


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"proj_size": 6}, {"bias": False}, {"num_layers": 2}, {"num_layers": 5}],
    ids=str,
)
def test_the_same_bits(options, dtype, count, waves, threads):
    threads(count)
    options = {"num_layers": L} | options
    module = lstmcore.LSTM(I, H, **options, dtype=dtype, backend="numba")
    layers, P = options["num_layers"], options.get("proj_size", H)
    x = torch.randn(T, B, I, dtype=dtype)
    given = (x.transpose(0, 1) if "batch_first" in options else x), torch.randn(layers, B, P, dtype=dtype)
    given = (*given, torch.randn(layers, B, H, dtype=dtype))
    got = results(module, *given)
    assert len(waves) == 2
    expected = results(Slowly(module), *given)
    assert len(waves) == 2
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (300, 1, 64, 64), (40, 9, 33, 64), (17, 2, 1, 129)], ids=str)
def test_sizes(sizes, waves):
    steps, rows, inputs, hidden = sizes
    module = lstmcore.LSTM(inputs, hidden, 4, backend="numba")
    x = torch.randn(steps, rows, inputs)
    for one, other in zip(results(module, x), results(Slowly(module), x), strict=True):
        assert torch.equal(one, other)
    assert waves


def test_resets(waves):
    module = lstmcore.LSTM(I, H, L, backend="numba")
    x, reset = torch.randn(T, B, I), torch.rand(T, B) < 0.2
    for one, other in zip(results(module, x, reset=reset), results(Slowly(module), x, reset=reset), strict=True):
        assert torch.equal(one, other)
    assert len(waves) == 2


def test_against_torch(waves):
    theirs = nn.LSTM(I, H, L, dtype=torch.float64)
    ours = lstmcore.LSTM(I, H, L, dtype=torch.float64, backend="numba")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, I, dtype=torch.float64)
    for got, expected in zip(results(ours, x), results(theirs, x), strict=True):
        assert error(got, expected) <= ORDER_OF_SUMS * max(1.0, expected.abs().max().item())
    assert len(waves) == 2


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"bidirectional": True}, {}),
        ({"dropout": 0.5}, {}),
        ({"recompute": 9}, {}),
        ({}, {"lengths": torch.tensor([75, 2, 9])}),
        ({}, {"return_cells": True}),
        ({"num_layers": 1}, {}),
        ({"backend": "reference"}, {}),
    ],
    ids=str,
)
def test_not_what_needs_each_layer(options, given, waves):
    module = lstmcore.LSTM(I, H, **({"num_layers": L, "backend": "numba"} | options))
    module(torch.randn(T, B, I), **given)[0].sum().backward()
    assert not waves


def test_dropout_that_is_off(waves):
    module = lstmcore.LSTM(I, H, L, dropout=0.5, backend="numba").eval()
    module(torch.randn(T, B, I))
    assert waves


def test_some_gradients(waves):
    """Whatever is frozen: the others are as they were."""
    module = lstmcore.LSTM(I, H, L, backend="numba")
    x = torch.randn(T, B, I, requires_grad=True)
    module(x)[0].sum().backward()
    expected = {name: p.grad for name, p in module.named_parameters()}
    for name, parameter in module.named_parameters():
        parameter.grad = None
        parameter.requires_grad_("l1" in name)
    output, (h_n, _) = module(x)
    (output.sum() + 0 * h_n[0].sum()).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is None if "l1" not in name else torch.equal(parameter.grad, expected[name])
    assert len(waves) == 4


def test_frozen_layers_below_keep_nothing(waves):
    """As layer by layer: no gates of layers that need no gradient, and no backward through them."""
    module = lstmcore.LSTM(I, H, L, backend="numba")
    x = torch.randn(T, B, I)
    (expected,) = torch.autograd.grad(module(x)[0].sum(), [module.weight_hh_l2])
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("l2" in name)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        output = module(x)[0]
    assert sum(size > T * B * H for size in sizes) == 2  # gates and padded cells of one layer
    assert torch.equal(torch.autograd.grad(output.sum(), [module.weight_hh_l2])[0], expected)


def test_checkpoints_with_another_number_of_threads(waves, threads):
    """What is kept depends on the sizes of a call only: a checkpoint computes the same tensors again."""
    module = lstmcore.LSTM(I, H, L, backend="numba")
    x = torch.randn(T, B, I)
    expected = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    for before, after in ((2, 1), (1, 2)):
        threads(before)
        output = checkpoint(lambda x: module(x)[0], x, use_reentrant=False)
        threads(after)
        for one, other in zip(torch.autograd.grad(output.sum(), list(module.parameters())), expected, strict=True):
            assert torch.equal(one, other)


def test_stacks_of_many_layers(waves):
    """More layers than a wavefront has room for run one after the other."""
    module = lstmcore.LSTM(1, 1, 400, backend="numba")
    x = torch.randn(3, 1, 1)
    for one, other in zip(results(module, x), results(Slowly(module), x), strict=True):
        assert torch.equal(one, other)
    assert not waves


def test_only_the_states_of_a_layer(waves):
    module = lstmcore.LSTM(I, H, L, backend="numba")
    x = torch.randn(T, B, I)
    grads = [torch.autograd.grad(m(x)[1][1][1].sum(), list(module.parameters())) for m in (module, Slowly(module))]
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)
    assert waves


def test_differentiated_again(waves):
    module = lstmcore.LSTM(2, 3, 2, dtype=torch.float64, backend="numba")
    x = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x)[0], x, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], x)
    y = module(x)[0]
    basis = torch.eye(y.numel(), dtype=torch.float64).view(-1, *y.shape)
    (batched,) = torch.autograd.grad(y, x, basis, is_grads_batched=True, retain_graph=True)
    (mapped,) = torch.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True))(basis)
    for got in (batched, mapped):
        for row, seed in zip(got, basis, strict=True):
            assert error(row, torch.autograd.grad(y, x, seed, retain_graph=True)[0]) <= ORDER_OF_SUMS
    assert waves


def test_in_a_recording_every_layer_is_seen(waves):
    module = lstmcore.LSTM(I, H, L, backend="numba")
    with lstmcore.record_gradient_flow(module) as flow:
        module(torch.randn(T, B, I))[0].sum().backward()
    assert len(flow.records) == L
    assert not waves


@pytest.mark.parametrize("again", [False, True])
def test_a_recording_of_an_older_graph(again, waves):
    """Every layer is seen, as where the layers run one after the other, and the gradients are the same."""
    module = lstmcore.LSTM(I, H, L, backend="numba")
    x, seen, found = torch.randn(T, B, I), [], []
    for run in (module, Slowly(module)):
        loss = run(x)[0].square().sum()
        with lstmcore.record_gradient_flow(module) as flow:
            found.append(torch.autograd.grad(loss, list(module.parameters()), create_graph=again))
        assert len(flow.records) == L
        seen.append(flow.records)
    assert len(waves) == 1
    for one, other in zip(*found, strict=True):
        assert error(one.detach(), other.detach()) <= (1e-5 if again else 0) * other.detach().abs().max()
    for one, other in zip(*seen, strict=True):
        assert one.layer == other.layer
        for name, value in vars(one).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, getattr(other, name))


def test_what_was_kept_must_stay(waves):
    module = lstmcore.LSTM(I, H, L, backend="numba")
    output = module(torch.randn(T, B, I))[0]
    module.weight_hh_l1.data = torch.randn(4 * H, H + 1)
    with pytest.raises(RuntimeError, match="between forward and backward it must stay what it was"):
        output.sum().backward()


def test_out_of_memory_names_the_option(waves, monkeypatch):
    def forward(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(backends.load("numba"), "forward_stack", forward)
    with pytest.raises(RuntimeError, match=r"(?s)allocate 8 bytes.*recompute='auto'"):
        lstmcore.LSTM(I, H, L, backend="numba")(torch.randn(T, B, I))


def test_when_it_is_worth_it():
    from lstmcore.kernels.contract import Layer
    from lstmcore.kernels.cpu import wavefront

    def worth(steps, batch, hidden, layers=4, available=2, **more):
        layer = Layer(torch.device("cpu"), torch.float32, steps, batch, hidden, hidden, training=True, **more)
        return wavefront._worth(layer, layers, available, False)

    assert worth(1000, 1, 64)
    assert not worth(1000, 1, 64, available=1)
    assert not worth(1000, 1, 64, directions=2)
    assert not worth(1000, 1, 64, ragged=True)
    assert not worth(1000, 1, 64, segment=10)
    assert not worth(20, 1, 64)  # over before it has begun
    assert not worth(1000, 12, 64)  # rows enough for both threads


@pytest.mark.parametrize("options", [{}, {"proj_size": 6}, {"bias": False}], ids=str)
def test_a_counter_that_came_after_forward(options, waves):
    """A mode that watches operators sees one a layer, with the same bits."""
    module = lstmcore.LSTM(I, H, L, **options, backend="numba")
    x = torch.randn(T, B, I, requires_grad=True)
    leaves = [x, *module.parameters()]
    loss = module(x)[0].square().sum()
    assert len(waves) == 1
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert len(waves) == 2
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert len(waves) == 2
    for leaf, grad in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, grad)
    forward = sum(2 * T * B * parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)
    to_h_0 = sum(2 * B * parameter.numel() for name, parameter in module.named_parameters() if "weight_hh" in name)
    assert counter.get_total_flops() == 2 * forward - to_h_0

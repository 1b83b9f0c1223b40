"""Denormal numbers: zero inside of the CPU kernels, as they were outside.

A vanishing gradient passes through them, at a hundred times the cost of other numbers: the benchmark's group "last".
"""

import threading

import pytest
import torch

import lstmcore

SMALLEST = torch.finfo(torch.float32).tiny  # the smallest normal number


def computes_denormals() -> bool:
    """Whether this thread does: a product just below the smallest normal number."""
    return (torch.tensor([SMALLEST]) * torch.tensor([0.5])).item() > 0


@pytest.mark.parametrize("training", [False, True])
def test_the_threads_mode_is_left_as_it_was(training, threads):
    threads(2)
    module = lstmcore.LSTM(3, 20, backend="numba")
    before = computes_denormals()
    seen = []

    def run() -> None:
        output, _ = module(torch.randn(30, 8, 3))
        if training:
            output[-1].sum().backward()
        seen.append(computes_denormals())

    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert before
    assert seen == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_no_denormal_comes_out_of_a_vanishing_gradient(count, threads):
    """What float64 finds below the smallest normal number is zero; what it finds above is right."""
    threads(count)
    module = lstmcore.LSTM(2, 20, backend="numba")
    oracle = torch.nn.LSTM(2, 20, dtype=torch.float64)
    oracle.load_state_dict(module.state_dict())
    grads = []
    data = torch.randn(400, 8, 2)
    for each in (module, oracle):
        x = data.to(each.weight_ih_l0.dtype, copy=True).requires_grad_()
        each(x)[0][-1].sum().backward()
        grads.append(x.grad)
    got, expected = grads
    sizes = got.abs()
    assert not ((sizes > 0) & (sizes < SMALLEST)).any()
    assert (sizes[0] == 0).all()
    assert (expected[0] != 0).all()
    torch.testing.assert_close(got.double()[-100:], expected[-100:], rtol=1e-3, atol=1e-30)

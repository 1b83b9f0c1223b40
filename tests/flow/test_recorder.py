"""``record_gradient_flow``: that what it records is what autograd computes, that it sees every kind of call, and costs
nothing when off.
"""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import lstmcore
from lstmcore import recording

from ..support.flow_calls import CALLS, F64, B, H, I, T, check_norms_are_autograds, check_vanishing_norms_are_exact
from ..support.tolerances import assert_same


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_norms_are_autograds(call, dtype, backend):
    check_norms_are_autograds(call, dtype, backend)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
def test_vanishing_norms_are_exact(dtype, backend):
    check_vanishing_norms_are_exact(dtype, backend)


def test_lags_count_back_along_each_rows_own_walk(backend):
    module = lstmcore.LSTM(I, H, bidirectional=True, backend=backend, dtype=F64)
    lengths = torch.tensor([3, 7, 0, 7, 1])
    with lstmcore.record_gradient_flow(module, rows=True) as flow:
        module(torch.randn(T, B, I, dtype=F64), lengths=lengths)[0].sum().backward()
    forward, reverse = flow.records
    for b, length in enumerate(lengths.tolist()):
        if length:
            assert forward.h.rows[length - 1, b] > 0
    at_ends = torch.stack([forward.h.rows[n - 1, b] for b, n in enumerate(lengths.tolist()) if n])
    torch.testing.assert_close(forward.h.mean_by_lag[0], at_ends.mean())
    torch.testing.assert_close(forward.h.quantiles_by_lag[2, 0], at_ends.quantile(0.5))
    torch.testing.assert_close(reverse.h.mean_by_lag, reverse.h.mean)
    torch.testing.assert_close(reverse.h.mean[0], reverse.h.rows[0].nanmean())


def test_where_the_loss_enters(backend):
    module = lstmcore.LSTM(I, H, backend=backend, dtype=F64)
    weights = torch.randn(H, dtype=F64)
    with lstmcore.record_gradient_flow(module) as flow:
        output, (h_n, _) = module(torch.randn(T, B, I, dtype=F64))
        (output[2] * weights).sum().backward(retain_graph=True)
        (h_n[0] * weights).sum().backward()
    first, second = flow.records
    size = weights.norm()
    torch.testing.assert_close(first.entering, torch.zeros(T, dtype=F64).index_fill(0, torch.tensor(2), size))
    torch.testing.assert_close(second.entering, torch.zeros(T, dtype=F64).index_fill(0, torch.tensor(T - 1), size))


@pytest.mark.parametrize("packed", [False, True], ids=["lengths", "packed"])
def test_where_the_loss_enters_rows_that_end_early(packed, backend):
    module = lstmcore.LSTM(I, H, bidirectional=True, backend=backend, dtype=F64)
    x, lengths = torch.randn(T, B, I, dtype=F64), torch.tensor([3, 7, 2, 7, 1])
    weights = torch.randn(H, dtype=F64)
    with lstmcore.record_gradient_flow(module) as flow:
        if packed:
            output, (h_n, _) = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
            (output.data[0] * torch.cat([weights, weights])).sum().backward(retain_graph=True)
        else:
            output, (h_n, _) = module(x, lengths=lengths)
            (output[0, 1] * torch.cat([weights, weights])).sum().backward(retain_graph=True)
        (h_n * weights).sum().backward()
    for record in flow.select(iteration=0):
        assert record.entering.nonzero().tolist() == [[0]]
    for record in flow.select(iteration=1):
        assert record.entering_by_lag[0] == pytest.approx(float(weights.norm()))
        assert not record.entering_by_lag[1:].any()


def test_a_loss_of_the_cells_alone(backend):
    module = lstmcore.LSTM(I, H, backend=backend)
    with lstmcore.record_gradient_flow(module) as flow:
        module(torch.randn(T, B, I), return_cells=True)[2].sum().backward()
    (record,) = flow.records
    assert (record.c.mean > 0).all()
    assert (record.h.mean[:-1] > 0).all()
    assert record.h.mean[-1] == 0


def test_gates_and_horizon(backend):
    """Gates that are constants: their means, histograms, and the half-life of 0.9 ** k."""
    module = lstmcore.LSTM(I, H, backend=backend, dtype=F64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        i, f, g, o = module.bias_ih_l0.chunk(4)
        i.fill_(torch.logit(torch.tensor(0.05, dtype=F64)))
        f.fill_(torch.logit(torch.tensor(0.93, dtype=F64)))
        g.fill_(1.0)
        o.fill_(torch.logit(torch.tensor(0.55, dtype=F64)))
    with lstmcore.record_gradient_flow(module, gate_rows=2) as flow:
        module(torch.randn(60, B, I, dtype=F64))[0].sum().backward()
    gates = flow.records[0].gates
    torch.testing.assert_close(gates.mean, torch.tensor([0.05, 0.93, 0.55], dtype=F64)[:, None].expand(3, 60))
    assert gates.histogram[0, :, 0].eq(1).all()
    assert gates.histogram[1, :, 9].eq(1).all()
    assert gates.histogram[2, :, 5].eq(1).all()
    assert gates.histogram.sum(-1).eq(1).all()
    assert gates.closed[0].eq(1).all()
    assert gates.open[1].eq(1).all()
    steps = torch.log(torch.tensor(0.5, dtype=F64)) / torch.log(torch.tensor(0.93, dtype=F64))
    torch.testing.assert_close(gates.horizon, steps.expand(H))
    with lstmcore.record_gradient_flow(module, gate_rows=0) as flow:
        module(torch.randn(60, B, I, dtype=F64))[0].sum().backward()
    assert flow.records[0].gates is None


class Model(nn.Module):
    """Two LSTMs, one of them called twice, and something in between."""

    def __init__(self, backend: str = "numba") -> None:
        super().__init__()
        self.encoder = lstmcore.LSTM(I, H, backend=backend)
        self.linear = nn.Linear(H, I)
        self.decoder = nn.ModuleDict({"lstm": lstmcore.LSTM(I, 4, num_layers=2, backend=backend)})

    def forward(self, x: Tensor) -> Tensor:
        once = self.linear(self.encoder(x)[0])
        twice = self.linear(self.encoder(once)[0])
        return self.decoder["lstm"](twice)[0]


def test_several_modules_and_calls(backend):
    model = Model(backend)
    with lstmcore.record_gradient_flow(model) as flow:
        for _ in range(2):
            model(torch.randn(T, B, I)).sum().backward()
    seen = [(r.iteration, r.module, r.call, r.layer) for r in flow.records]
    once = [("encoder", 0, 0), ("encoder", 1, 0), ("decoder.lstm", 0, 0), ("decoder.lstm", 0, 1)]
    assert seen == [(iteration, *each) for iteration in range(2) for each in once]
    assert flow.passes == 2
    # call 0 is the one that backward comes to first: the second in forward
    early, late = flow.select("encoder", iteration=0)[::-1]
    assert late.h.mean.sum() > early.h.mean.sum()
    assert [r.iteration for r in flow.select("decoder.lstm", layer=1, iteration=-1)] == [1]
    with pytest.raises(ValueError, match=r"no record of layer 7: recorded were layer 0, 1"):
        flow.select(layer=7)
    with pytest.raises(ValueError, match=r"module 'nobody': recorded were module 'decoder.lstm', 'encoder'"):
        flow.select("nobody")


def test_every(backend):
    module = lstmcore.LSTM(I, H, backend=backend)
    with lstmcore.record_gradient_flow(module, every=3) as flow:
        for _ in range(8):
            module(torch.randn(T, B, I))[0].sum().backward()
    assert [record.iteration for record in flow.records] == [0, 3, 6]
    assert flow.passes == 8


def test_the_forward_pass_may_come_before():
    """The kernels' nodes can be watched whenever they were made."""
    module = lstmcore.LSTM(I, H, backend="numba")
    loss = module(torch.randn(T, B, I))[0].sum()
    with lstmcore.record_gradient_flow(module) as flow:
        loss.backward()
    assert len(flow.records) == 1


def test_auto_runs_what_can_be_recorded():
    """ATen's LSTM, which auto takes for few steps, shows nothing: inside the context it takes another."""
    module = lstmcore.LSTM(I, H)
    assert lstmcore.explain(module, torch.randn(T, B, I)).name == "torch"
    with lstmcore.record_gradient_flow(module) as flow:
        output, _ = module(torch.randn(T, B, I))
        output.sum().backward()
    assert len(flow.records) == 1
    assert type(module(torch.randn(T, B, I))[0].grad_fn) is not type(output.grad_fn)


def test_results_are_the_same_bits(backend):
    module = lstmcore.LSTM(I, H, 2, bidirectional=True, backend=backend)
    x = torch.randn(T, B, I, requires_grad=True)

    def gradients() -> list[Tensor]:
        output, (h_n, c_n) = module(x)
        loss = (output * output).sum() + h_n.sum() + c_n.sum()
        return [output, *torch.autograd.grad(loss, [x, *module.parameters()])]

    alone = gradients()
    with lstmcore.record_gradient_flow(module):
        recorded = gradients()
    for one, other in zip(recorded, alone, strict=True):
        if backend == "numba":
            assert torch.equal(one, other)
        else:  # the reference computes forward once more, and adds gradients up in another order
            torch.testing.assert_close(one, other)


def test_nothing_is_asked_for_when_off(monkeypatch):
    from lstmcore.kernels.cpu import backend

    asked = []
    original = backend.backward

    def backward(call, grads, output, saved, needs):
        asked.append((needs.norms, needs.gate_rows))
        return original(call, grads, output, saved, needs)

    monkeypatch.setattr(backend, "backward", backward)
    module = lstmcore.LSTM(I, H, backend="numba")

    def train() -> None:
        module(torch.randn(T, B, I))[0].sum().backward()

    train()
    with lstmcore.record_gradient_flow(module, every=2, gate_rows=3):
        for _ in range(2):
            train()
    train()
    assert asked == [(False, 0), (True, 3), (False, 0), (False, 0)]
    assert not recording._watched


def test_autocast_keeps_the_scale_of_things():
    module = lstmcore.LSTM(I, H, backend="numba")
    x, weights = torch.randn(T, B, I), torch.randn(T, B, H)

    def record(**context) -> lstmcore.flow.record.Record:
        with lstmcore.record_gradient_flow(module) as flow, torch.autocast("cpu", torch.bfloat16, **context):
            output, _ = module(x)
            (output.float() * weights).sum().backward()
        return flow.records[0]

    full, half = record(enabled=False), record()
    torch.testing.assert_close(half.h.mean, full.h.mean, rtol=0.03, atol=0)


def test_the_loss_scale_is_divided_out():
    module = lstmcore.LSTM(I, H, backend="numba")
    x, scaler = torch.randn(T, B, I), torch.amp.GradScaler("cpu", init_scale=1024.0)
    with lstmcore.record_gradient_flow(module) as plain:
        module(x)[0].sum().backward()
    with lstmcore.record_gradient_flow(module, scaler=scaler) as scaled:
        scaler.scale(module(x)[0].sum()).backward()
    assert torch.equal(plain.records[0].h.mean, scaled.records[0].h.mean)
    assert torch.equal(plain.records[0].entering, scaled.records[0].entering)


def test_create_graph_and_gradients_of_gradients(backend):
    module = lstmcore.LSTM(I, H, backend=backend, dtype=F64)
    x = torch.randn(T, B, I, dtype=F64, requires_grad=True)
    with lstmcore.record_gradient_flow(module) as plain:
        module(x)[0].square().sum().backward()
    with lstmcore.record_gradient_flow(module) as flow:
        (grad,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        grad.square().sum().backward()
    assert flow.passes >= 1
    torch.testing.assert_close(flow.records[0].h.mean, plain.records[0].h.mean)


def test_checkpointing(backend):
    module = lstmcore.LSTM(I, H, backend=backend)
    x = torch.randn(T, B, I, requires_grad=True)
    with lstmcore.record_gradient_flow(module) as plain:
        module(x)[0].sum().backward()
    with lstmcore.record_gradient_flow(module) as flow:
        checkpoint(lambda x: module(x)[0], x, use_reentrant=False).sum().backward()
    got, expected = (torch.as_tensor(each.records[0].h.mean) for each in (flow, plain))
    assert_same(got, expected, backend, dtype=torch.float32)


def test_two_recordings_of_one_model():
    model = Model()
    with lstmcore.record_gradient_flow(model, gate_rows=5) as outer:
        with lstmcore.record_gradient_flow(model.encoder, gate_rows=1, rows=True) as inner:
            model(torch.randn(T, B, I)).sum().backward()
        model(torch.randn(T, B, I)).sum().backward()
    assert len(outer.records) == 8
    assert [record.module for record in inner.records] == ["", ""]
    assert inner.records[0].h.rows is not None
    assert outer.records[0].h.rows is None


def test_backward_passes_of_several_threads():
    module = lstmcore.LSTM(I, H, backend="numba")
    losses = [module(torch.randn(T, B, I))[0].sum() for _ in range(8)]
    with lstmcore.record_gradient_flow(module) as flow:
        threads = [threading.Thread(target=loss.backward) for loss in losses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(record.iteration for record in flow.records) == list(range(8))


def test_a_pass_that_fails_is_not_confused_with_the_next():
    module = lstmcore.LSTM(I, H, backend="numba")
    x = torch.randn(T, B, I, requires_grad=True)
    broken = x * 1

    def fail(grad: Tensor) -> None:
        raise ZeroDivisionError

    broken.register_hook(fail)
    with lstmcore.record_gradient_flow(module) as flow:
        with pytest.raises(ZeroDivisionError):
            module(broken)[0].sum().backward()
        module(x)[0].sum().backward()
    assert [record.iteration for record in flow.records] == [0, 1]


def test_what_is_recorded_survives_an_interruption():
    module = lstmcore.LSTM(I, H, backend="numba")
    flow = lstmcore.record_gradient_flow(module)
    with pytest.raises(KeyboardInterrupt), flow:  # noqa: PT012
        module(torch.randn(T, B, I))[0].sum().backward()
        raise KeyboardInterrupt
    assert len(flow.records) == 1
    assert not recording._watched


def test_the_module_stays_as_it_was():
    module = lstmcore.LSTM(I, H, backend="numba")
    before = set(vars(module))
    with lstmcore.record_gradient_flow(module):
        module(torch.randn(T, B, I))[0].sum().backward()
        copy.deepcopy(module)
        pickle.loads(pickle.dumps(module))
    assert set(vars(module)) == before


def test_logged_as_it_goes():
    module = lstmcore.LSTM(I, H, backend="numba")
    seen = []
    with lstmcore.record_gradient_flow(module, every=2, log=lambda numbers, step: seen.append((step, numbers))):
        for _ in range(3):
            module(torch.randn(T, B, I))[0].sum().backward()
            assert seen
    assert [step for step, _ in seen] == [0, 2]
    assert all(isinstance(value, float) for _, numbers in seen for value in numbers.values())


def test_many_passes_are_worked_up_on_the_way(monkeypatch):
    from lstmcore.flow import recorder

    monkeypatch.setattr(recorder, "PENDING", 1000)
    monkeypatch.setattr(recorder, "PENDING_ROWS", 1)
    module = lstmcore.LSTM(I, H, backend="numba")
    with lstmcore.record_gradient_flow(module) as flow:
        for _ in range(5):
            module(torch.randn(T, B, I))[0].sum().backward()
        assert len(flow._records) >= 3
    assert [record.iteration for record in flow.records] == list(range(5))


# Errors: each says what is wrong and what to do.


def test_a_model_without_an_lstm():
    model = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3))
    with pytest.raises(ValueError, match=r"Sequential has no lstmcore.LSTM inside; it has LSTM of torch's.*build it"):
        lstmcore.record_gradient_flow(model)
    with pytest.raises(ValueError, match=r"Linear has no lstmcore.LSTM inside: build it with lstmcore.LSTM"):
        lstmcore.record_gradient_flow(nn.Linear(3, 3))


def test_a_module_that_insists_on_aten():
    model = nn.ModuleDict({"a": lstmcore.LSTM(I, H, backend="torch")})
    with pytest.raises(ValueError, match=r"a has backend='torch'.*set its .backend to 'auto'"):
        lstmcore.record_gradient_flow(model)


def test_no_backward_inside():
    model = Model()
    message = r"nothing was recorded.*encoder, decoder.lstm.*Call loss.backward\(\)"
    with pytest.raises(RuntimeError, match=message), lstmcore.record_gradient_flow(model):
        loss = model(torch.randn(T, B, I)).sum()
    loss.backward()
    with pytest.raises(KeyError), lstmcore.record_gradient_flow(model):  # not hidden by ours
        raise KeyError
    assert not recording._watched


def test_the_forward_pass_before_ran_on_aten():
    module = lstmcore.LSTM(I, H)
    loss = module(torch.randn(T, B, I))[0].sum()
    message = "run the forward pass inside it too"
    with pytest.raises(RuntimeError, match=message), lstmcore.record_gradient_flow(module):
        loss.backward()


@pytest.mark.parametrize("arguments", [{"every": 0}, {"gate_rows": -1}], ids=str)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=rf"{next(iter(arguments))} is a number of .*got"):
        lstmcore.record_gradient_flow(lstmcore.LSTM(I, H), **arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite(value, backend):
    module = lstmcore.LSTM(I, H, backend=backend)
    message = r"not finite in layer 0, 2 steps before the end of the sequence.*backward pass 1.*clip gradients"

    def train() -> None:
        for scale in (1.0, value):
            output, _ = module(torch.randn(T, B, I))
            (output[T - 3] * scale).sum().backward()

    with pytest.warns(RuntimeWarning, match=message), lstmcore.record_gradient_flow(module) as flow:
        train()
    assert flow.records[1].h.mean[T - 3].isinf()
    assert flow.records[1].h.mean[T - 1] == 0
    with (
        pytest.raises(RuntimeError, match=message),
        lstmcore.record_gradient_flow(module, error_if_nonfinite=True) as flow,
    ):
        train()
    assert len(flow.records) == 2  # also what was raised for is there to be looked at


def test_only_the_cells_gradient_is_not_finite(backend):
    """Infinity that enters at the cells of the last step, which h does not see there."""
    module = lstmcore.LSTM(I, H, backend=backend)

    def train() -> None:
        cells = module(torch.randn(1, B, I), return_cells=True)[2]
        (cells * float("inf")).sum().backward()

    with pytest.warns(RuntimeWarning, match="layer 0, 0 steps before"), lstmcore.record_gradient_flow(module) as flow:
        train()
    assert flow.records[0].c.mean.isinf().all()
    assert flow.records[0].h.mean.isfinite().all()


def test_a_finite_recording_warns_of_nothing():
    module = lstmcore.LSTM(I, H)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with lstmcore.record_gradient_flow(module, error_if_nonfinite=True):
            module(torch.randn(T, B, I))[0].sum().backward()

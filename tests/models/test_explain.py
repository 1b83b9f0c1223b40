"""``lstmcore.explain`` of a whole model: every LSTM in it, with what reaches it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstmcore

from . import models
from .models import H, I, Model

X = torch.randn(7, 3, I)


class Several(nn.Module):
    """Ours and torch's, a subclass with arguments of its own, one that is not called, one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.ours = lstmcore.LSTM(I, H, backend="numba")
        self.theirs = nn.LSTM(H, H)
        self.derived = models.Doubled(H, H)
        self.idle = nn.LSTM(H, H)
        self.replaced = models.Replaced(H, H)
        self.cell = nn.LSTMCell(H, H)

    def forward(self, x, *, packed=False):
        x, _ = self.ours(x, lengths=[7, 5, 3])
        x, _ = self.derived(x, scale=0.5)
        fed = pack_padded_sequence(x, torch.tensor([7, 5, 3])) if packed else x
        for _ in range(2):
            self.theirs(fed)
        self.theirs(x[:3])
        return self.cell(self.replaced(x)[0][0])


def test_every_lstm_has_its_line():
    model = Several()
    report = lstmcore.explain(model, X)
    states = {row.name: row.state.value for row in report}
    assert states == {"ours": "lstmcore's", "theirs": "torch's", "derived": "torch's", "idle": "torch's",
                      "replaced": "torch's", "cell": "torch's"}  # fmt: skip
    assert report.title == "1 of 6 LSTMs are lstmcore's"
    calls = {row.name: [(call.shape, call.times, call.choice.name) for call in row.calls] for row in report}
    assert calls["ours"] == [(f"(7, 3, {I}) float32", 1, "numba")]
    assert [call[:2] for call in calls["theirs"]] == [(f"(7, 3, {H}) float32", 2), (f"(3, 3, {H}) float32", 1)]
    assert [call[:2] for call in calls["derived"]] == [(f"(7, 3, {H}) float32", 1)]
    assert calls["cell"] == [(f"(3, {H}) float32", 1, "torch")]
    assert calls["idle"] == calls["replaced"] == []
    text = str(report)
    assert text.count("torch.nn ") == 4  # of each kind of call of a module of torch's, that torch runs it
    assert "replaces torch's" in text
    assert "lstmcore.patch moves" in text


def test_arguments_of_the_model():
    model = Several()
    report = lstmcore.explain(model, {"x": X, "packed": True})
    assert report["theirs"].calls[0].shape == f"packed, 3 rows of up to 7, {H} float32"
    assert lstmcore.explain(model, (X,))["ours"].calls == lstmcore.explain(model, X)["ours"].calls


def test_a_packed_input_is_one_argument():
    model = nn.Sequential(nn.LSTM(I, H))
    report = lstmcore.explain(model, pack_padded_sequence(X, torch.tensor([7, 5, 3])))
    assert report["0"].calls[0].times == 1


def test_extended_calls_are_seen():
    model = Several()
    model.ours.backend = "auto"
    (call,) = lstmcore.explain(model, X)["ours"].calls
    assert "recompute" in dict(call.choice.reasons).get("torch", "recompute")
    assert call.choice.name == "numba"  # torch has no lengths, whatever is faster


@pytest.mark.parametrize("grad", [False, True])
def test_the_model_stays_as_it_was(grad):
    model = Model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(each) for each in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.set_grad_enabled(grad):
        lstmcore.explain(model, X)
    assert torch.equal(torch.rand(3), expected)
    assert [type(each) for each in model.modules()] == classes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_fails_stays_as_it_was():
    model = Several()
    classes = [type(each) for each in model.modules()]
    with pytest.raises(RuntimeError):
        lstmcore.explain(model, X[..., :2])
    assert [type(each) for each in model.modules()] == classes


def test_a_named_backend_that_cannot_run_raises():
    model = nn.Sequential(lstmcore.LSTM(I, H, backend="numba", dtype=torch.complex64))
    with pytest.raises(RuntimeError, match="backend 'numba' cannot run this call"):
        lstmcore.explain(model, X.to(torch.complex64))


def test_what_it_says_is_what_runs(monkeypatch):
    from lstmcore import backends

    kernels, calls = backends.load("numba"), []
    original = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    for backend in ("auto", "numba", "torch", "reference"):
        model = nn.Sequential(lstmcore.LSTM(I, H, backend=backend))
        said = lstmcore.explain(model, X)["0"].calls[0].choice.name
        calls.clear()
        model(X)
        assert bool(calls) == (said == "numba"), backend


def test_no_lstm():
    report = lstmcore.explain(nn.Linear(I, 1), X)
    assert str(report) == "there is no LSTM in this model"
    with pytest.raises(KeyError, match="there are none"):
        report["x"]


def test_only_modules():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got builtins\.list"):
        lstmcore.explain([nn.LSTM(I, H)], X)


def test_shared_modules_have_one_line_with_all_names():
    report = lstmcore.explain(Model().eval(), X)
    assert len(report) == 1
    assert report.rows[0].names == ("alias", "encoder.lstm")
    assert "alias, encoder.lstm" in str(report)
    assert repr(report) == str(report)

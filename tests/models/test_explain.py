"""``lstmcore.explain`` of a whole model: every LSTM in it, with what reaches it."""

from __future__ import annotations

import copy
import threading
from typing import ClassVar

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_it_says_under_autocast_is_what_runs(dtype, monkeypatch):
    """The input of the LSTM is float32, and cast by it."""
    from lstmcore import backends

    kernels, calls = backends.load("numba"), []
    original = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    model, x = nn.Sequential(lstmcore.LSTM(64, 128)), torch.randn(20, 8, 64)
    with torch.autocast("cpu", dtype):
        said = {lstmcore.explain(model, x)["0"].calls[0].choice.name, lstmcore.explain(model[0], x).name}
        calls.clear()
        model(x)
    assert said == {"numba" if calls else "torch"}


def test_no_lstm():
    report = lstmcore.explain(nn.Linear(I, 1), X)
    assert str(report) == "there is no LSTM in this model"
    with pytest.raises(KeyError, match="there are none"):
        report["x"]


def test_only_modules():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got builtins\.list"):
        lstmcore.explain([nn.LSTM(I, H)], X)


def test_ours_that_runs_torchs_forward():
    """As a class derived under installed() does, whose code has torch.nn.LSTM's name in it."""

    class Derived(lstmcore.LSTM):
        def forward(self, input, hx=None):
            return nn.LSTM.forward(self, input, hx)

    report = lstmcore.explain(nn.Sequential(Derived(I, H, backend="numba")), X)
    assert not report["0"].calls[0].ours
    assert "torch.nn  its code calls the forward of torch's class; lstmcore would run 'numba'" in str(report)


def test_a_description_of_several_lines():
    class Verbose(nn.LSTM):
        def extra_repr(self):
            return "first\nsecond"

    assert "Verbose(first second)" in str(lstmcore.explain(nn.Sequential(Verbose(I, H)), X))


def test_states_are_no_input_of_an_lstm():
    states = torch.zeros(1, 3, H), torch.zeros(1, 3, H)
    with pytest.raises(TypeError, match="expected a tensor or a PackedSequence as the input of an LSTM, got tuple"):
        lstmcore.explain(nn.LSTM(I, H), (X, states))
    assert lstmcore.explain(nn.Sequential(nn.LSTM(I, H)), X)["0"].calls[0].times == 1


def test_scripted_models_with_buffers():
    model = torch.jit.script(nn.Sequential(nn.BatchNorm1d(3), nn.LSTM(I, H)))
    assert "patch the model before it is scripted" in str(lstmcore.explain(model, X))
    assert not model.state_dict()["0.running_mean"].any()


def test_shared_modules_have_one_line_with_all_names():
    report = lstmcore.explain(Model().eval(), X)
    assert len(report) == 1
    assert report.rows[0].names == ("encoder.lstm", "alias")
    assert "encoder.lstm, alias" in str(report)
    assert repr(report) == str(report)


class WithBuffer(nn.Module):
    """What a forward does with a buffer, and an LSTM."""

    def __init__(self, buffer: torch.Tensor, use) -> None:
        super().__init__()
        self.lstm, self.use = nn.LSTM(I, H), use
        self.register_buffer("buffer", buffer)

    def forward(self, x):
        output, (h_n, _) = self.lstm(x)
        self.use(self, h_n)
        return output


def _bind(model, h_n):
    model.buffer = h_n.detach()


USES = {
    "in place": (torch.zeros(3), lambda model, _: model.buffer.add_(1)),
    "by data": (torch.zeros(3), lambda model, _: model.buffer.data.add_(1)),
    "another tensor": (torch.zeros(1, 3, H), _bind),
    "not a number": (torch.full((3,), torch.nan), lambda model, _: model.buffer.add_(1)),
    "expanded": (torch.zeros(1).expand(3), lambda model, _: model.buffer.sum()),
    "sparse": (torch.eye(3).to_sparse(), lambda model, _: model.buffer.sum()),
    "of no memory": (torch.zeros(3, device="meta"), lambda model, _: model.buffer.sum()),
}


@pytest.mark.parametrize("kind", USES)
def test_buffers_stay(kind):
    buffer, use = USES[kind]
    model, before = WithBuffer(buffer, use), buffer.clone()
    assert lstmcore.explain(model, X)["lstm"].calls[0].times == 1
    assert model.buffer is buffer
    if kind != "of no memory":
        torch.testing.assert_close(buffer, before, equal_nan=True, rtol=0, atol=0)


def test_buffers_of_inference_mode_stay():
    with torch.inference_mode():
        buffer = torch.zeros(3)

    def use(model, h_n):
        with torch.inference_mode():
            model.buffer.add_(1)

    model = WithBuffer(buffer, use)
    lstmcore.explain(model, X)
    assert model.buffer is buffer
    assert not buffer.any()


class Registered(nn.LSTM):
    """A class that knows those derived from it, and wants an argument of them."""

    known: ClassVar[list[str]] = []

    def __init_subclass__(cls, *, kind: str) -> None:
        Registered.known.append(kind)


class Kind(Registered, kind="a"):
    def forward(self, input, hx=None):
        return super().forward(input, hx)


class Explicit(nn.LSTM):
    """``super`` of the class that an instance has, not of this one."""

    def forward(self, input, hx=None):
        return super(self.__class__, self).forward(input, hx)


class Sealed(nn.LSTM):
    def __setattr__(self, name, value):
        if "sealed" in vars(self):
            raise AttributeError(f"sealed: {name}")
        super().__setattr__(name, value)


def sealed() -> nn.LSTM:
    module = Sealed(I, H)
    vars(module)["sealed"] = True
    return module


@pytest.mark.parametrize(
    "make", [lambda: Kind(I, H), lambda: Explicit(I, H), sealed, lambda: models.ByName(I, H)],
    ids=["registered", "explicit", "sealed", "by name"],
)  # fmt: skip
def test_nothing_is_done_to_a_class_to_see_its_calls(make):
    model = nn.Sequential(make())
    (call,) = lstmcore.explain(model, X)["0"].calls
    assert (call.times, call.shape) == (1, f"(7, 3, {I}) float32")
    assert Registered.known == ["a"]
    assert nn.LSTM.forward.__module__ == "torch.nn.modules.rnn"
    assert not hasattr(nn.LSTM.forward, "__wrapped__")
    assert not hasattr(lstmcore.LSTM.forward, "__wrapped__")


def test_a_copy_made_by_the_run_is_another_module():
    class Copying(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(I, H)

        def forward(self, x):
            return copy.deepcopy(self.lstm)(self.lstm(x)[0][..., :I])

    (call,) = lstmcore.explain(Copying(), X)["lstm"].calls
    assert call.times == 1


def test_several_threads():
    model, reports = nn.Sequential(nn.LSTM(I, H)), []
    threads = [
        threading.Thread(target=lambda: reports.extend(lstmcore.explain(model, X) for _ in range(10))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {report["0"].calls[0].times for report in reports} == {1}
    assert len(reports) == 40
    assert type(model[0]) is nn.LSTM
    assert not hasattr(nn.LSTM.forward, "__wrapped__")

"""``lstmcore.explain``: which backend would run a call, and why."""

import pytest
import torch
from lstmcore.kernels.contract import Layer
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstmcore
from lstmcore import backends
from lstmcore.backends import rules

X = torch.randn(5, 2, 3)


@pytest.mark.parametrize("name", ["numba", "torch", "reference"])
def test_a_named_backend_runs(name):
    choice = lstmcore.explain(lstmcore.LSTM(3, 17, backend=name), X)
    assert choice.name == name
    assert name in str(choice)
    assert "name" in dict(choice.reasons)[name]


@pytest.mark.parametrize(
    "given",
    [X, X[:, 0], X.bfloat16(), X.double(), pack_padded_sequence(X, torch.tensor([5, 2]))],
    ids=lambda x: type(x),
)
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"num_layers": 2, "bidirectional": True, "proj_size": 2}]
)
def test_auto_gives_a_reason_for_each_it_considered(given, options):
    data = given.data if isinstance(given, nn.utils.rnn.PackedSequence) else given
    choice = lstmcore.explain(lstmcore.LSTM(3, 17, **options, dtype=data.dtype), given)
    assert choice.name in ("numba", "torch")
    considered = [name for name, _ in choice.reasons]
    assert considered[-1] == choice.name
    assert "triton" in considered
    for name, reason in choice.reasons:
        assert reason
        assert f"{name}" in str(choice)
        assert reason in str(choice)


def test_it_tells_what_runs(monkeypatch):
    """The kernels are called when it says numba, and not when it says torch."""
    kernels, calls = backends.load("numba"), []
    original = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    for backend in ("auto", "numba", "torch", "reference"):
        module = lstmcore.LSTM(3, 17, backend=backend)
        said = lstmcore.explain(module, X).name
        calls.clear()
        module(X)
        assert bool(calls) == (said == "numba"), backend


@pytest.mark.parametrize("named", ["numba", "triton", "reference", "torch"])
def test_what_cannot_run_raises_the_reason(named):
    integer = X.to(torch.complex64)
    module = lstmcore.LSTM(3, 17, backend=named, dtype=torch.complex64)
    if named == "torch":
        assert lstmcore.explain(module, integer).name == "torch"
        return
    with pytest.raises(RuntimeError, match="complex64"):
        lstmcore.explain(module, integer)


def test_auto_falls_back_where_no_kernel_runs():
    """On a device without kernels of ours: torch's, and the reason of each that was passed over."""
    module = lstmcore.LSTM(3, 17, device="meta")
    choice = lstmcore.explain(module, X.to("meta"))
    assert choice.name == "torch"
    assert "meta" in dict(choice.reasons)["numba"]
    assert module(X.to("meta"))[0].shape == (5, 2, 17)


def test_extended_calls_never_go_to_torch():
    module = lstmcore.LSTM(3, 17)
    assert lstmcore.explain(module, X, extended=True).name == "numba"
    on_meta = lstmcore.explain(lstmcore.LSTM(3, 17, device="meta"), X.to("meta"), extended=True)
    assert on_meta.name == "reference"
    assert "lengths" in dict(on_meta.reasons)["torch"]


def test_a_module_of_torch_is_taken_as_auto():
    assert lstmcore.explain(nn.LSTM(3, 17), X) == lstmcore.explain(lstmcore.LSTM(3, 17), X)


@pytest.mark.parametrize("given", [X[0], X[0, 0]], ids=["batch", "row"])
@pytest.mark.parametrize("name", ["auto", "torch", "numba", "reference"])
def test_cells(name, given):
    choice = lstmcore.explain(lstmcore.LSTMCell(3, 17, backend=name), given)
    assert choice.name == ("torch" if name == "auto" else name)
    assert lstmcore.explain(nn.LSTMCell(3, 17), given).name == "torch"


@pytest.mark.gpu
def test_on_a_gpu_auto_runs_something():
    module = lstmcore.LSTM(3, 17, device="cuda")
    choice = lstmcore.explain(module, X.cuda())
    assert choice.name in ("triton", "torch")
    assert module(X.cuda())[0].is_cuda


def test_the_number_of_threads_decides_short_calls(threads):
    """The same call, in training: ours on several threads, ATen's on one; long ones are ours on any number."""
    module = lstmcore.LSTM(64, 64)
    for count, name in ((2, "numba"), (1, "torch"), (2, "numba")):
        threads(count)
        assert lstmcore.explain(module, torch.randn(12, 1, 64)).name == name
        assert lstmcore.explain(module, torch.randn(200, 1, 64)).name == "numba"


@pytest.mark.parametrize(
    ("steps", "batch", "hidden", "training", "expected"),
    [
        (9, 32, 64, False, "torch"),
        (10, 32, 64, False, "numba"),
        (16, 1, 128, False, "torch"),  # of 128 units and more from 20 steps on, in inference
        (20, 1, 128, False, "numba"),
        (10, 8, 256, False, "torch"),
        (20, 8, 256, False, "numba"),
        (10, 1, 512, False, "numba"),  # but one row of many units
        (10, 8, 512, False, "torch"),
        (10, 8, 128, True, "numba"),
        (4, 1, 256, True, "numba"),
        (1, 1, 16, True, "torch"),
    ],
)
def test_auto_by_class_on_the_cpu(steps, batch, hidden, training, expected):
    """As the measurements say that ``rules.faster_than_aten`` tells of, with several threads."""
    layer = Layer(torch.device("cpu"), torch.float32, steps, batch, hidden, hidden, training=training)
    assert backends.choose("auto", (layer,)).name == expected


@pytest.mark.parametrize(
    ("instruction", "steps", "batch", "hidden", "training", "expected"),
    [
        ("tdpbf16ps", 20, 32, 256, False, "torch"),  # of 128 units and more from 30 steps on, in inference
        ("tdpbf16ps", 30, 32, 256, False, "numba"),
        ("tdpbf16ps", 10, 32, 64, False, "numba"),
        ("tdpbf16ps", 400, 1, 512, False, "numba"),
        ("tdpbf16ps", 10, 8, 128, True, "numba"),
        ("tdpbf16ps", 400, 1, 512, True, "numba"),
        ("tdpbf16ps", 4, 8, 64, True, "torch"),
        ("dpbf16ps", 30, 8, 128, False, "numba"),
        ("dpbf16ps", 20, 24, 80, False, "torch"),  # from 30 steps on, in inference; with few units from 100 on
        ("dpbf16ps", 30, 32, 64, False, "torch"),
        ("dpbf16ps", 50, 16, 32, False, "torch"),
        ("dpbf16ps", 400, 8, 16, False, "numba"),
        ("dpbf16ps", 400, 1, 1024, False, "torch"),  # one row reads its weights as fast as memory gives them
        ("dpbf16ps", 400, 8, 1024, False, "numba"),
        ("dpbf16ps", 20, 24, 80, True, "torch"),
        ("dpbf16ps", 20, 24, 128, True, "numba"),
        ("dpbf16ps", 400, 8, 128, True, "numba"),
        ("fma", 400, 8, 128, True, "torch"),
    ],
)
def test_auto_in_bfloat16_by_instruction(instruction, steps, batch, hidden, training, expected, monkeypatch):
    """On processors that multiply bfloat16, in oneDNN at least."""
    monkeypatch.setattr(rules, "_bfloat16_hardware", lambda: True)
    monkeypatch.setattr(rules.products, "this_machines", lambda dtype, isa: rules.products.Products(instruction))
    layer = Layer(torch.device("cpu"), torch.bfloat16, steps, batch, hidden, hidden, training=training)
    assert rules.faster_than_aten(layer) == (expected == "numba")

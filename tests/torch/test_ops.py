"""The torch.library operators: torch's own checks of them, and torch.compile of what holds the module.

T time, B batch, I input, H hidden, P projection, D directions.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import lstmcore

from ..support.tolerances import ORDER_OF_SUMS, ORDER_OF_SUMS_F32, assert_library, error
from ..support.toolchain import needs_cpp

T, B, I = 4, 3, 2


def layer_arguments(
    H: int = 32,
    D: int = 1,
    P: int = 0,
    *,
    rows: int = B,
    bias: bool = True,
    lengths: list[int] | None = None,
    reset: bool = False,
    states: bool = True,
    packed: list[int] | None = None,
    batch_first: bool = False,
    cells: bool = False,
    save: bool = False,
    backend: str = "numba",
    dtype: torch.dtype = torch.float32,
    grad: bool = True,
) -> tuple:
    """Arguments of ``torch.ops.lstmcore.layer``.

    With ``save`` only sizes that leave no padding among what is saved: torch compares it, and padding holds anything.
    """
    module = nn.LSTM(I, H, bidirectional=D == 2, proj_size=P, bias=bias, dtype=dtype).requires_grad_(grad)
    x = torch.randn(rows, T, I, dtype=dtype).transpose(0, 1) if batch_first else torch.randn(T, rows, I, dtype=dtype)
    if packed is not None:
        x = x.reshape(-1, I)[: sum(packed)]
    h_0, c_0 = (torch.randn(D, rows, width, dtype=dtype).requires_grad_(grad) for width in (P or H, H))
    return (
        x.detach().requires_grad_(grad),
        h_0 if states else None,
        c_0 if states else None,
        torch.rand(x.shape[:-1]) < 0.3 if reset else None,
        None if packed is None else torch.tensor(packed),
        None if lengths is None else torch.tensor(lengths),
        list(module.parameters()),
        rows,
        D,
        batch_first,
        cells,
        save,
        backend,
    )


OPCHECKS = {
    "plain": {},
    "saved": {"save": True},
    "no gradient": {"grad": False},
    "both directions": {"D": 2, "batch_first": True, "cells": True, "save": True},
    "odd sizes": {"H": 17, "D": 2, "P": 3},
    "projection": {"P": 16, "D": 2, "save": True},
    "no bias, no states": {"bias": False, "states": False},
    "lengths": {"lengths": [4, 0, 2], "H": 5},
    "lengths, saved": {"lengths": [4, 4, 4], "save": True},
    "resets": {"reset": True, "batch_first": True, "H": 7},
    "packed": {"packed": [3, 3, 1], "reset": True, "D": 2},
    "no rows": {"rows": 0, "H": 5},
    "bfloat16": {"dtype": torch.bfloat16, "save": True},
    "float64": {"dtype": torch.float64, "save": True, "cells": True},
    "auto": {"backend": "auto", "save": True},
    "reference": {"backend": "reference", "reset": True, "save": True, "D": 2},
    "torch": {"backend": "torch", "save": True, "D": 2},
    "torch, packed": {"backend": "torch", "packed": [3, 2], "bias": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck_of_the_layer(name):
    arguments = layer_arguments(**OPCHECKS[name])
    assert set(torch.library.opcheck(torch.ops.lstmcore.layer.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("name", ["both directions", "lengths", "reference", "torch"])
def test_opcheck_of_its_backward(name, kept):
    options = OPCHECKS[name] | {"dtype": torch.float64, "save": kept, "grad": False}
    if kept:
        options["H"] = 16
    check_backward(layer_arguments(**options), kept, grad=False)


@pytest.mark.slow
def test_opcheck_of_the_derivative_of_its_backward():
    """Which unrolls the steps, as the reference does."""
    options = {"H": 3, "rows": 2, "reset": True, "dtype": torch.float64}
    check_backward(layer_arguments(**options), kept=False, grad=True)


def check_backward(arguments: tuple, kept: bool, grad: bool) -> None:
    with torch.no_grad():
        output, h_n, c_n, extra = torch.ops.lstmcore.layer(*arguments)
    cells = extra.pop(0) if arguments[10] else None
    grads = [
        None if each is None else torch.randn_like(each).requires_grad_(grad) for each in (output, h_n, c_n, cells)
    ]
    arguments = (*grads, [True] * 4, [output, *extra] if kept else [], *arguments)
    assert set(torch.library.opcheck(torch.ops.lstmcore.layer_backward.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.slow
def test_the_triton_kernels_as_an_operator(triton_kernels):
    for options in ({"H": 8, "save": True}, {"H": 8, "lengths": [4, 0, 2]}, {"H": 8, "D": 2, "P": 2, "reset": True}):
        arguments = layer_arguments(**options, backend="triton")
        assert set(torch.library.opcheck(torch.ops.lstmcore.layer.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.slow
def test_double_backward_of_the_operator():
    """Through a graph that holds the operators themselves."""
    arguments = layer_arguments(H=2, D=2, rows=2, reset=True, dtype=torch.float64)
    leaves = [*arguments[:3], *arguments[6]]

    def run(*given):
        return torch.ops.lstmcore.layer(*given[:3], *arguments[3:6], list(given[3:]), *arguments[7:])[:3]

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


class Model(nn.Module):
    """A model as people write them, around our module."""

    def __init__(self, backend: str = "numba", **options) -> None:
        super().__init__()
        self.embed = nn.Linear(I, 6)
        self.lstm = lstmcore.LSTM(6, 17, **options, backend=backend)
        self.head = nn.Linear(17 * (2 if self.lstm.bidirectional else 1), 2)

    def forward(self, x, hx=None, **control):
        output, states, *cells = self.lstm(self.embed(x).relu(), hx, **control)
        return self.head(output), states, *cells


def same(got, expected) -> None:
    """Two runs of a model, whose linear layers are torch's."""
    for one, other in zip(got, expected, strict=True):
        assert_library(one, other)


def results(model, *args, **kwargs) -> list[torch.Tensor]:
    """Outputs, then the gradients of the parameters."""
    torch.manual_seed(0)
    outputs = torch.utils._pytree.tree_leaves(model(*args, **kwargs))
    loss = sum(out.square().sum() for out in outputs)
    return [*outputs, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=needs_cpp)])
def compiler(request, fresh_compiler) -> str:
    return request.param


CONTROL = {
    "dense": {},
    "states": {"hx": True},
    "lengths": {"lengths": torch.tensor([3, 5, 0, 1])},
    "resets": {"reset": True},
    "cells": {"return_cells": True, "lengths": torch.tensor([3, 5, 0, 1])},
    "all cells": {"return_cells": "all", "reset": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTROL)
def test_compiled_is_eager(name, fresh_compiler):
    """A whole graph, forward and backward: the operator runs the kernels that an eager call runs."""
    model = Model(num_layers=2, bidirectional=True, batch_first=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, control = torch.randn(4, 5, I), dict(CONTROL[name])
    if control.pop("hx", None):
        control["hx"] = tuple(torch.randn(4, 4, 17) for _ in range(2))
    if control.get("reset"):
        control["reset"] = torch.rand(4, 5) < 0.3
    got, wanted = (results(each, x, **control) for each in (compiled, model))
    same(got, wanted)
    with torch.no_grad():
        same(*(torch.utils._pytree.tree_leaves(m(x, **control)) for m in (compiled, model)))


@pytest.mark.slow
def test_steps_and_batch_are_dynamic(compiler):
    """The second shape makes a graph for all: no third one, however T and B change."""
    model = Model(num_layers=2, dropout=0.3)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for steps, batch in ((5, 4), (7, 6), (9, 6), (2, 3), (40, 11)):
        x = torch.randn(steps, batch, I)
        # inductor's own code around it, and its random numbers for dropout, are not eager's
        if compiler == "aot_eager":
            same(results(compiled, x), results(model, x))
        else:
            model.lstm.dropout = 0.0
            for got, wanted in zip(results(compiled, x), results(model, x), strict=True):
                assert error(got, wanted) <= ORDER_OF_SUMS_F32 * max(1.0, wanted.abs().max().item())
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
def test_no_second_graph_where_shapes_are_marked(fresh_compiler):
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for steps, batch in ((5, 4), (7, 4), (9, 6)):
        lengths = torch.randint(0, steps + 1, (batch,))
        x = torch.randn(steps, batch, I)
        same(results(compiled, x, lengths=lengths), results(model, x, lengths=lengths))
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_auto_takes_the_kernels_whatever_the_steps(fresh_compiler):
    """Eager calls of few steps go to ATen, graphs are for any number: they agree to rounding."""
    model = Model("auto")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 4, I)
    for got, wanted in zip(*(results(each, x) for each in (compiled, model)), strict=True):
        assert error(got, wanted) <= ORDER_OF_SUMS_F32 * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize("name", ["auto", "numba", "torch", "reference"])
def test_compiled_autocast(name, fresh_compiler):
    model = Model(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 4, I)
    got = []
    for each in (compiled, model):
        with torch.autocast("cpu", torch.bfloat16):
            output, (h_n, _) = each(x)
        (gradient,) = torch.autograd.grad(output.float().square().sum(), [model.lstm.weight_hh_l0])
        got.append((output, h_n, gradient))
    for one, other in zip(*got, strict=True):
        assert one.dtype == other.dtype
        assert error(one.float(), other.float()) <= 4 * torch.finfo(torch.bfloat16).eps * max(
            1.0, other.abs().max().item()
        )


def test_the_operator_under_autocast():
    """Called directly, it casts as torch.lstm does; float64 stays."""
    arguments = layer_arguments(grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n, c_n, _ = torch.ops.lstmcore.layer(*arguments)
        double = torch.ops.lstmcore.layer(*layer_arguments(grad=False, dtype=torch.float64))[0]
    assert {each.dtype for each in (output, h_n, c_n)} == {torch.bfloat16}
    assert double.dtype == torch.float64


def test_packed_input_breaks_the_graph_and_works(fresh_compiler):
    model = lstmcore.LSTM(I, 5, backend="numba")
    compiled = torch.compile(model, backend="aot_eager")
    packed = pack_padded_sequence(torch.randn(5, 3, I), torch.tensor([5, 2, 1]))
    assert torch.equal(compiled(packed)[0].data, model(packed)[0].data)


def test_packed_input_made_inside_of_a_graph(fresh_compiler):
    """torch.compile hands on a PackedSequence of no fields where ``_replace`` made it: the error says what to write."""

    class Doubled(lstmcore.LSTM):
        def forward(self, packed: PackedSequence):
            return super().forward(PackedSequence(2 * packed.data, *packed[1:]))

    packed = pack_padded_sequence(torch.randn(5, 3, I), torch.tensor([2, 5, 1]), enforce_sorted=False)
    model = Doubled(I, 5, backend="numba")
    assert torch.equal(torch.compile(model, backend="aot_eager")(packed)[0].data, model(packed)[0].data)
    with pytest.raises(RuntimeError, match=re.escape("write PackedSequence(data, *packed[1:])")):
        lstmcore.LSTM(I, 5)(tuple.__new__(PackedSequence))


@pytest.mark.slow
def test_a_compiled_model_can_be_recorded(fresh_compiler):
    """A recording needs nodes of its own: the graph breaks there while it lasts, and is whole again after."""
    model = Model(batch_first=True)
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(4, 5, I)
    before = results(compiled, x)
    with lstmcore.record_gradient_flow(model) as flow:
        within = results(compiled, x)
    assert len(flow.records) == 1
    for each in (within, results(compiled, x)):
        same(before, each)


WRONG = {
    "too long": (torch.tensor([6, 1, 1, 1]), "from 0 to 5"),
    "negative": (torch.tensor([3, -1, 1, 1]), "from 0 to 5"),
}


@pytest.mark.parametrize("name", WRONG)
def test_values_are_checked_when_a_graph_runs(name, fresh_compiler):
    lengths, message = WRONG[name]
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 4, I)
    compiled(x, lengths=torch.tensor([5, 5, 0, 1]))
    with pytest.raises(ValueError, match=message):
        compiled(x, lengths=lengths)


@pytest.mark.parametrize("transform", ["vmap", "gradients of a vmap"])
def test_compiled_transforms(transform, fresh_compiler):
    module = lstmcore.LSTM(I, 5, backend="numba", dtype=torch.float64)
    compiled = torch.compile(torch.func.vmap(lambda x: module(x)[0]), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, T, B, I, dtype=torch.float64)
    if transform == "vmap":
        assert (
            error(compiled(x).detach(), torch.stack([module(each)[0] for each in x]).detach()) < ORDER_OF_SUMS / 10
        )  # no gradient, and values below one
        return
    losses = (compiled(x).square().sum(), sum(module(each)[0].square().sum() for each in x))
    grads = [torch.autograd.grad(loss, list(module.parameters())) for loss in losses]
    for got, wanted in zip(*grads, strict=True):
        assert error(got, wanted) < ORDER_OF_SUMS


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operator():
    """And what is traced with make_fx holds it, not the values of the call that was traced."""
    module = lstmcore.LSTM(I, 5, backend="numba")
    x = torch.randn(T, B, I)
    with Names() as names:
        within = module(x)[0]
        within.sum().backward()
    assert torch.equal(within, module(x)[0])
    assert {"lstmcore::layer", "lstmcore::layer_backward"} <= set(names.seen)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x: module(x)[0])(x)
    other = torch.randn(T, B, I)
    assert torch.equal(traced(other), module(other)[0])


def test_fake_tensors():
    """Shapes without values."""
    with torch._subclasses.FakeTensorMode():
        module = lstmcore.LSTM(I, 5, 2, bidirectional=True, batch_first=True)
        output, (h_n, c_n), cells = module(
            torch.randn(B, T, I), lengths=torch.ones(B, dtype=torch.int64), return_cells=True
        )
    assert isinstance(output, torch._subclasses.FakeTensor)
    assert [each.shape for each in (output, h_n, c_n, cells)] == [(B, T, 10), (4, B, 5), (4, B, 5), (B, T, 10)]

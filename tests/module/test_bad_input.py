"""Bad input, one row a mistake: the exception type of torch.nn on the same call, and a message that helps.

The type is never written down here: torch's own module is given the same mistake first.
"""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstmcore

from ..support.mistakes import assert_same_mistake, raised_by
from ..support.tolerances import assert_library

CONSTRUCTOR = [
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": -1}, "hidden_size"),
    ({"hidden_size": 2.5}, "hidden_size", "float"),
    ({"input_size": 0}, "input_size"),
    ({"input_size": "3"}, "input_size", "str"),
    ({"num_layers": 0}, "num_layers"),
    ({"num_layers": -2}, "num_layers"),
    ({"num_layers": 1.5}, "float"),
    ({"proj_size": -1}, "proj_size"),
    ({"proj_size": 4}, "proj_size", "hidden_size"),
    ({"proj_size": 9}, "proj_size", "hidden_size"),
    ({"dropout": 1.5}, "dropout", "[0, 1]"),
    ({"dropout": -0.1}, "dropout", "[0, 1]"),
    ({"dropout": True}, "dropout", "[0, 1]"),
    ({"dropout": "x"}, "x"),
    ({"dropout": None}, "NoneType"),
    ({"bias": 1}, "bias", "int"),
    ({"batch_first": None}, "batch_first", "NoneType"),
    ({"dtype": torch.int32}, "floating point"),
    ({"dtype": "float32"}, "dtype"),
    ({"device": "nonsense"}, "nonsense"),
    ({"nonsense": 1}, "nonsense"),
]


def packed(features: int, dtype: torch.dtype = torch.float32) -> PackedSequence:
    return pack_padded_sequence(torch.randn(5, 2, features, dtype=dtype), torch.tensor([5, 2]))


def states(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple:
    return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)


X = torch.randn(5, 2, 3)
GOOD = (1, 2, 4)
CALLS = {  # arguments of LSTM(3, 4), then what our message has to name: expected and got
    "rank 0": ((torch.randn(()),), "0D"),
    "rank 1": ((torch.randn(3),), "2D or 3D", "1D"),
    "rank 4": ((torch.randn(1, 5, 2, 3),), "2D or 3D", "4D"),
    "features": ((torch.randn(5, 2, 6),), "3", "6"),
    "features, unbatched": ((torch.randn(5, 6),), "3", "6"),
    "float64": ((X.double(),), "torch.float32", "torch.float64"),
    "int64": ((X.long(),), "torch.float32", "torch.int64"),
    "complex": ((X + 0j,), "torch.float32", "torch.complex64"),
    "meta": ((X.to("meta"),), "meta", "cpu"),
    "numpy": ((X.numpy(),), "dim"),
    "list": (([1.0],), "dim"),
    "None": ((None,), "dim"),
    "no steps": ((torch.randn(0, 2, 3),), "length", "0"),
    "no steps, unbatched": ((torch.randn(0, 3),), "length", "0"),
    "h_0 batch": ((X, states((1, 3, 4), (1, 3, 4))), "(1, 2, 4)", "[1, 3, 4]"),
    "h_0 features": ((X, states((1, 2, 5), GOOD)), "(1, 2, 4)", "[1, 2, 5]"),
    "c_0 features": ((X, states(GOOD, (1, 2, 7))), "(1, 2, 4)", "[1, 2, 7]"),
    "h_0 layers": ((X, states((2, 2, 4), (2, 2, 4))), "(1, 2, 4)", "[2, 2, 4]"),
    "states of rank 2": ((X, states((2, 4), (2, 4))), "3-D", "2-D"),
    "c_0 of rank 2": ((X, states(GOOD, (2, 4))), "3-D", "2-D"),
    "states of rank 3, unbatched": ((X[:, 0], states((1, 1, 4), (1, 1, 4))), "2-D", "3-D"),
    "h_0 features, unbatched": ((X[:, 0], states((1, 5), (1, 5))), "(1, 1, 4)", "[1, 1, 5]"),
    "states, a tensor": ((X, torch.zeros(GOOD)), "(h_0, c_0)", "(1, 2, 4)"),
    "states, one": ((X, states(GOOD)), "two", "1"),
    "states, none of them": ((X, ()), "two", "0"),
    "states, three": ((X, states(GOOD, GOOD, GOOD)), "two hidden states", "3"),
    "states, of None": ((X, (None, None)), "dim"),
    "states, float64": ((X, states(GOOD, GOOD, dtype=torch.float64)), "torch.float32", "torch.float64"),
    "states, meta": ((X, states(GOOD, GOOD, device="meta")), "cpu", "meta"),
    "packed, features": ((packed(6),), "3", "6"),
    "packed, float64": ((packed(3, torch.float64),), "torch.float32", "torch.float64"),
    "packed, rank 3": ((PackedSequence(torch.randn(2, 2, 3), torch.tensor([2])),), "2", "3"),
    "packed, h_0 batch": ((packed(3), states((1, 3, 4), (1, 3, 4))), "(1, 2, 4)", "[1, 3, 4]"),
    "packed, h_0 features": ((packed(3), states((1, 2, 5), GOOD)), "(1, 2, 4)", "[1, 2, 5]"),
}
CELL = {  # arguments of LSTMCell(3, 4)
    "rank 3": ((torch.randn(1, 2, 3),), "1D or 2D", "3D"),
    "rank 0": ((torch.randn(()),), "1D or 2D", "0D"),
    "features": ((torch.randn(2, 5),), "3", "5"),
    "h_0 features": ((torch.randn(2, 3), states((2, 5), (2, 5))), "4", "5"),
    "c_0 features": ((torch.randn(2, 3), states((2, 4), (2, 5))), "4", "5"),
    "h_0 batch": ((torch.randn(2, 3), states((3, 4), (3, 4))), "2", "3"),
    "h_0 rank": ((torch.randn(2, 3), states((1, 2, 4), (1, 2, 4))), "1D or 2D", "3D"),
    "float64": ((torch.randn(2, 3).double(),), "Double", "Float"),
    "states, a tensor": ((torch.randn(2, 3), torch.randn(2, 4)), "tuple"),
    "states, one": ((torch.randn(2, 3), states((2, 4))), "two hidden states"),
}


@pytest.mark.parametrize("row", CONSTRUCTOR, ids=lambda row: str(row[0]))
def test_constructor(row):
    arguments = {"input_size": 3, "hidden_size": 4} | row[0]
    assert_same_mistake(raised_by(lstmcore.LSTM, **arguments), raised_by(nn.LSTM, **arguments), row[1:])


@pytest.mark.parametrize("arguments", [(), (3,)], ids=str)
def test_missing_arguments(arguments):
    assert_same_mistake(raised_by(lstmcore.LSTM, *arguments), raised_by(nn.LSTM, *arguments), ("hidden_size",))


@pytest.mark.parametrize("name", CALLS)
def test_call(name, backend):
    arguments, *named = CALLS[name]
    theirs = raised_by(nn.LSTM(3, 4), *arguments)
    if name.startswith("states, of"):
        named = ()  # torch's AttributeError, and ours, speak of None
    assert_same_mistake(raised_by(lstmcore.LSTM(3, 4, backend=backend), *arguments), theirs, tuple(named))


@pytest.mark.parametrize("name", CELL)
def test_cell(name):
    arguments, *named = CELL[name]
    assert_same_mistake(
        raised_by(lstmcore.LSTMCell(3, 4), *arguments), raised_by(nn.LSTMCell(3, 4), *arguments), tuple(named)
    )


def test_dropout_on_one_layer_warns():
    for cls in (nn.LSTM, lstmcore.LSTM):
        with pytest.warns(UserWarning, match=r"num_layers greater than 1, but got dropout=0\.5"):
            cls(3, 4, dropout=0.5)


@pytest.mark.parametrize("name", ["cuda", "Numba", "", "none"])
def test_unknown_backend(name):
    for make in (lstmcore.LSTM, lstmcore.LSTMCell):
        with pytest.raises(ValueError, match="unknown backend") as caught:
            make(3, 4, backend=name)
        for text in (repr(name), "auto", "triton", "numba", "torch", "reference"):
            assert text in str(caught.value)


@pytest.mark.parametrize(
    "call", [{"lengths": [5, 5]}, {"reset": torch.zeros(5, 2, dtype=torch.bool)}, {"return_cells": True}]
)
def test_a_named_backend_that_cannot_says_why(call):
    with pytest.raises(RuntimeError, match=r"backend 'torch' cannot.*auto"):
        lstmcore.LSTM(3, 4, backend="torch")(X, **call)


EXTENDED = {  # what torch does not have: the type is ours to choose, and documented in functional.lstm
    "lengths too long": (ValueError, {"lengths": torch.tensor([6, 2])}, "from 0 to 5", "6"),
    "lengths negative": (ValueError, {"lengths": torch.tensor([3, -1])}, "from 0 to 5", "-1"),
    "lengths of floats": (TypeError, {"lengths": torch.tensor([3.0, 1.0])}, "integer", "float32"),
    "lengths of bools": (TypeError, {"lengths": torch.tensor([True, True])}, "integer", "bool"),
    "lengths, too many": (RuntimeError, {"lengths": torch.tensor([3, 1, 2])}, "(2,)", "[3]"),
    "lengths, rank": (RuntimeError, {"lengths": torch.tensor([[3, 1]])}, "(2,)", "[1, 2]"),
    "reset of ints": (TypeError, {"reset": torch.zeros(5, 2, dtype=torch.int64)}, "torch.bool", "torch.int64"),
    "reset transposed": (RuntimeError, {"reset": torch.zeros(2, 5, dtype=torch.bool)}, "(5, 2)", "[2, 5]"),
    "reset of rank 1": (RuntimeError, {"reset": torch.zeros(5, dtype=torch.bool)}, "(5, 2)", "[5]"),
    "lengths, none": (RuntimeError, {"lengths": []}, "(2,)", "[0]"),
    "lengths, a number": (RuntimeError, {"lengths": 5}, "(2,)", "[]"),
    "lengths, complex": (TypeError, {"lengths": torch.tensor([1j, 1j])}, "integer", "complex64"),
    "lengths, meta": (RuntimeError, {"lengths": torch.ones(2, dtype=torch.int64, device="meta")}, "CPU", "meta"),
    "reset, a list": (TypeError, {"reset": [[True, False]] * 5}, "torch.bool", "list"),
    "reset too short": (RuntimeError, {"reset": torch.zeros(4, 2, dtype=torch.bool)}, "(5, 2)", "[4, 2]"),
    "reset of floats": (TypeError, {"reset": torch.zeros(5, 2)}, "torch.bool", "torch.float32"),
    "cells, a number": (ValueError, {"return_cells": 2}, "'all'", "2"),
    "cells, a name": (ValueError, {"return_cells": "last"}, "'all'", "'last'"),
    "reset, meta": (RuntimeError, {"reset": torch.zeros(5, 2, dtype=torch.bool, device="meta")}, "cpu", "meta"),
}


@pytest.mark.parametrize("name", EXTENDED)
def test_extended_arguments(name, backend):
    expected, call, *named = EXTENDED[name]
    with pytest.raises(expected) as caught:
        lstmcore.LSTM(3, 4, backend=backend)(X, **call)
    for text in named:
        assert text in str(caught.value), str(caught.value)


def test_lengths_with_packed_input(backend):
    with pytest.raises(ValueError, match="PackedSequence"):
        lstmcore.LSTM(3, 4, backend=backend)(packed(3), lengths=[5, 2])


LAYOUTS = {  # resets of the wrong shape for how the input lies
    "batch first": ({"batch_first": True}, (torch.randn(2, 5, 3),), (5, 2), "(2, 5)"),
    "unbatched": ({}, (torch.randn(5, 3),), (5, 1), "(5,)"),
    "packed": ({}, (packed(3),), (5, 2), "(7,)"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_resets_follow_the_input(name, backend):
    options, arguments, shape, expected = LAYOUTS[name]
    with pytest.raises(RuntimeError) as caught:
        lstmcore.LSTM(3, 4, **options, backend=backend)(*arguments, reset=torch.zeros(shape, dtype=torch.bool))
    assert expected in str(caught.value)
    assert str(list(shape)) in str(caught.value)


class Elsewhere(torch.Tensor):
    """A subclass whose values lie in a tensor of its own, as those of quantized, sharded or nested tensors do."""

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> torch.Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values: torch.Tensor) -> None:
        self.values_of = values

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda each: each.values_of, (args, kwargs or {}))
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["auto", "numba"])
@pytest.mark.parametrize("where", ["input", "h_0", "weight", "bias"])
def test_subclasses_that_hold_their_values_elsewhere(where, name):
    """Not a wrong number, not a crash; by the reference's torch operations they compute."""
    module = lstmcore.LSTM(3, 4, backend=name).requires_grad_(False)
    params, given = dict(module.named_parameters()), {"input": X, "h_0": torch.zeros(GOOD)}
    chosen = {"weight": "weight_hh_l0", "bias": "bias_ih_l0"}.get(where)
    if chosen:
        params[chosen] = Elsewhere(params[chosen])
    else:
        given[where] = Elsewhere(given[where])
    arguments = (given["input"], (given["h_0"], torch.zeros(GOOD)))
    with pytest.raises(TypeError, match=r"Elsewhere do not enter the kernels.*plain tensors"):
        torch.func.functional_call(module, params, arguments)
    module.backend = "reference"
    output = torch.func.functional_call(module, params, arguments)[0]
    assert_library(output, module(X, (torch.zeros(GOOD), torch.zeros(GOOD)))[0])


def nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*prototype")  # torch's, about nested tensors of the older layout
        return torch.nested.nested_tensor([torch.randn(4, 3), torch.randn(2, 3)], layout=layout)


STRANGE = {  # a tensor of this shape whose values are not in strided memory, and what helps
    "nested": (lambda *shape: nested(torch.strided), TypeError, r"plain tensor.*to_padded_tensor.*lengths="),
    "jagged": (lambda *shape: nested(torch.jagged), TypeError, r"plain tensor.*to_padded_tensor.*lengths="),
    "sparse": (lambda *shape: torch.ones(shape).to_sparse(), RuntimeError, r"dense.*sparse_coo.*to_dense"),
    "mkldnn": (lambda *shape: torch.ones(shape).to_mkldnn(), RuntimeError, r"dense.*mkldnn.*to_dense"),
}


@pytest.mark.parametrize("name", ["auto", "numba", "torch", "reference"])
@pytest.mark.parametrize("layout", STRANGE)
def test_layouts_without_strides(layout, name):
    """Each as input and as a state, and behind a call that is remembered."""
    strange, error, text = STRANGE[layout]
    module = lstmcore.LSTM(3, 4, backend=name)
    module(X)  # a short call goes to ATen, the second time by the fast path
    state = torch.zeros(1, 2, 4)
    for call in (
        lambda: module(strange(5, 2, 3)),
        lambda: module(X, (strange(1, 2, 4), state)),
        lambda: module(X, (state, strange(1, 2, 4))),
    ):
        with pytest.raises(error, match=text):
            call()


@pytest.mark.parametrize("name", ["auto", "numba"])
@pytest.mark.parametrize("layout", ["sparse", "mkldnn"])  # nested ones have three dimensions
def test_layouts_without_strides_in_a_cell(layout, name):
    strange, error, text = STRANGE[layout]
    cell, row = lstmcore.LSTMCell(3, 4, backend=name), torch.zeros(2, 4)
    for call in (lambda: cell(strange(2, 3)), lambda: cell(X[0], (row, strange(2, 4)))):
        with pytest.raises(error, match=text):
            call()


class Named(torch.Tensor):
    """A subclass that changes nothing about where the values are."""


@pytest.mark.parametrize("call", [{}, {"lengths": [5, 2]}], ids=str)
def test_subclasses_with_their_own_memory(call):
    """Torch operations compute them, as those of torch.nn.LSTM do, and keep the type; kernels refuse by name."""
    module = lstmcore.LSTM(3, 4)
    output, _ = module(X.as_subclass(Named), **call)
    assert type(output) is Named
    plain = module(X, **call)[0]  # maybe by another backend: a few roundings of values below one
    assert torch.allclose(output.as_subclass(torch.Tensor), plain, atol=1e-6)
    module.backend = "numba"
    with pytest.raises(RuntimeError, match=r"subclasses do not enter kernels.*use plain tensors"):
        module(X.as_subclass(Named), **call)


PARAMETERS = {  # lstmcore.lstm: a wrong flat list of parameters
    "too few": (lambda p: p[:3], "4", "3"),
    "shape": (lambda p: [p[0], p[1][:, :3], *p[2:]], "(16, 4)", "(16, 3)"),
    "dtype": (lambda p: [p[0], p[1].double(), *p[2:]], "torch.float32", "torch.float64"),
    "device": (lambda p: [p[0], p[1].to("meta"), *p[2:]], "cpu", "meta"),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_functional_parameters(name, backend):
    spoil, *named = PARAMETERS[name]
    params = [p.detach() for p in lstmcore.LSTM(3, 4).parameters()]
    with pytest.raises(RuntimeError) as caught:
        lstmcore.lstm(X, None, spoil(params), backend=backend)
    for text in named:
        assert text in str(caught.value), str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_states_of_another_dtype_under_another_device_s_autocast(dtype):
    """What autocast of another device does not convert is not read as if it were of the input's dtype."""
    ours, theirs = lstmcore.LSTM(3, 4, backend="numba"), nn.LSTM(3, 4)
    with torch.no_grad(), torch.autocast("xpu", dtype=torch.float16):
        assert torch._C._is_any_autocast_enabled(), "the test shows nothing"
        for module in (theirs, ours):
            with pytest.raises(RuntimeError):
                module(X, states(GOOD, GOOD, dtype=dtype))

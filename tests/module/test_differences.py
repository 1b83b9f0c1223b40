"""The differences from torch.nn.LSTM that docs/migrating.md lists, each seen on both.

A row whose difference is gone fails here: then the page can lose it.  T time, B batch, I input, H hidden.
"""

import inspect
import pathlib
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lstmcore

T, B, I, H = 20, 3, 4, 6
X = torch.randn(T, B, I)
OURS = lstmcore.LSTM


def made(kind: type, *sizes: int, **options) -> nn.Module:
    """With the kernels, whatever the size."""
    module = kind(*(sizes or (I, H)), **options)
    if kind is OURS:
        module.backend = "numba"
    return module


def error_of(call) -> type | None:
    try:
        call()
    except Exception as error:
        return type(error)
    return None


def skip_init(kind):
    return error_of(lambda: nn.utils.skip_init(kind, I, H))


def contiguous(kind):
    return made(kind, batch_first=True)(X.transpose(0, 1).contiguous())[0].is_contiguous()


def warned(kind):
    """In a process torch warns once: only that ours does not is seen here."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        made(kind, proj_size=2)(X)
    return kind is OURS and bool(found)


def flat_weights_are_read(kind):
    module = made(kind)
    module._flat_weights = [torch.zeros_like(weight) for weight in module._flat_weights]
    return not module(X)[0].detach().any()


def only_in_flat_weights(kind):
    module = made(kind)
    del module._parameters["weight_hh_l0"]
    return error_of(lambda: module(X))


def overridden(kind):
    class Own(kind):
        def check_forward_args(self, *arguments):
            raise KeyError

    return error_of(lambda: Own(I, H)(X))


def size_changed(name, value):
    def change(kind):
        module = made(kind)
        setattr(module, name, value)
        return error_of(lambda: module(X)) is None

    return change


def one_half_bias(kind):
    module = made(kind)
    module.bias_hh_l0.data = module.bias_hh_l0.data.half()
    return error_of(lambda: module(X)) is None


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.add(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


def seen_by(mode, name):
    def see(kind):
        module = made(kind)
        with torch.no_grad(), mode() as seen:
            module(X)
        return name in seen.seen

    return see


def traced(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on its own checks
        return error_of(lambda: torch.jit.trace(made(kind).eval(), (X,)))


def packed_states(kind):
    states = (torch.zeros(B, H), torch.zeros(B, H))
    return error_of(lambda: made(kind)(pack_padded_sequence(X, [T, 3, 2]), states))


def uninitialized(kind):
    module = made(kind)
    module.weight_ih_l0 = nn.UninitializedParameter()
    return error_of(lambda: module(X))


def vmapped(kind):
    module = made(kind)
    return error_of(lambda: torch.vmap(lambda x: module(x)[0])(torch.stack([X, X])))


DIFFERENCES = {  # what is asked of a class: what torch's answers, and ours
    "is an nn.LSTM": (lambda kind: isinstance(made(kind), nn.LSTM), True, False),
    "is an RNNBase": (lambda kind: isinstance(made(kind), nn.RNNBase), True, True),
    "signature": (lambda kind: "input_size" in inspect.signature(kind).parameters, False, True),
    "skip_init": (skip_init, RuntimeError, None),
    "contiguous": (contiguous, False, True),
    "warns of projections": (warned, False, False),
    "_flat_weights": (flat_weights_are_read, True, False),
    "only in _flat_weights": (only_in_flat_weights, None, AttributeError),
    "methods of a subclass": (overridden, KeyError, None),
    "input_size changed": (size_changed("input_size", I + 1), False, True),
    "num_layers changed": (size_changed("num_layers", 2), False, False),
    "bias changed": (size_changed("bias", False), True, False),
    "dtypes": (one_half_bias, True, False),
    "lstm in a function mode": (seen_by(Functions, "lstm"), True, False),
    "layer in a dispatch mode": (seen_by(Operators, "lstmcore.layer.default"), False, True),
    "grad_fn": (lambda kind: "_Layer" in type(made(kind)(X)[0].grad_fn).__name__, False, True),
    "trace of a named backend": (traced, None, RuntimeError),
    "packed states": (packed_states, IndexError, RuntimeError),
    "uninitialized": (uninitialized, ValueError, RuntimeError),
    "vmap": (vmapped, RuntimeError, None),
}
BY_PROCESSOR = ("dtypes",)  # torch's answer is oneDNN's


@pytest.mark.parametrize("name", DIFFERENCES)
def test_difference(name):
    asked, theirs, ours = DIFFERENCES[name]
    assert asked(OURS) == ours
    if name not in BY_PROCESSOR:
        assert asked(nn.LSTM) == theirs


def test_no_attribute_is_missing():
    """Public or not: what code finds in torch's it finds in ours."""
    assert not set(dir(nn.LSTM)) - set(dir(OURS))
    assert not set(dir(nn.LSTMCell)) - set(dir(lstmcore.LSTMCell))
    theirs, ours = vars(nn.LSTM(I, H)), vars(OURS(I, H))
    assert not set(theirs) - set(ours)


def test_module_files_of_old_versions_load():
    """As torch's: before 1.8 there was no ``proj_size``, before 1.4 no names of weights."""
    for kind in (nn.LSTM, OURS):
        module = kind(I, H)
        state = dict(module.__getstate__())
        del state["proj_size"]
        old = kind.__new__(kind)
        old.__setstate__(state)
        assert old.proj_size == 0
        assert torch.equal(old(X)[0], module(X)[0])
        for name in ("_all_weights", "_flat_weights_names", "_flat_weights"):
            state.pop(name)
        state["all_weights"] = [[getattr(module, name) for name in module._flat_weights_names]]
        older = kind.__new__(kind)
        older.__setstate__(state)
        assert torch.equal(older(X)[0], module(X)[0])


def test_the_page_names_this_file():
    page = pathlib.Path(__file__).parents[2] / "docs" / "migrating.md"
    if not page.exists():
        pytest.skip(f"the tests are run without the pages of the checkout: there is no {page}")
    assert "tests/module/test_differences.py" in page.read_text()

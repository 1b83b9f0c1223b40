"""The plain recurrent network: parity with float64 torch.nn.RNN, and the gradient norms that it shows.

T time, B batch, I input, H hidden, L layers.
"""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from lstmcore import recording
from lstmcore.flow.rnn import RNN, rnn

from ..support.tolerances import GRADCHECK, ORDER_OF_SUMS, assert_library

ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}


class Watcher:
    """Keeps whatever it is shown."""

    gate_rows = 0

    def __init__(self, wanted: bool = True) -> None:
        self.wanted, self.seen = wanted, []

    def wants(self) -> bool:
        return self.wanted

    def observe(self, observation: recording.Observation) -> None:
        self.seen.append(observation)


@pytest.fixture
def watch():
    """Watches modules until the end of the test."""
    watchers = []

    def start(*modules: nn.Module, wanted: bool = True) -> Watcher:
        watchers.append(Watcher(wanted))
        recording.watch(modules, watchers[-1])
        return watchers[-1]

    yield start
    for watcher in watchers:
        recording.unwatch(watcher)
    assert not recording._watched


def by_hand(module: RNN, x, hx=None):
    """``output, h_n`` of a time-major module, one cell after the other, every h_t (B, H) of every layer kept."""
    sigma = ACTIVATIONS[module.nonlinearity]
    kept, ends = [], []
    steps = list(x)
    for layer, weights in enumerate(module.all_weights):
        w_ih, w_hh, *biases = weights
        h = x.new_zeros(x.shape[1], module.hidden_size) if hx is None else hx[layer]
        for t, step in enumerate(steps):
            h = sigma(step @ w_ih.T + h @ w_hh.T + sum(biases))
            if h.requires_grad:
                h.retain_grad()
            steps[t] = h
        kept.append(list(steps))
        ends.append(h)
    return torch.stack(steps), torch.stack(ends), kept


def results(module, x, hx, weights):
    """Outputs, and the gradients of a loss that weighs each of them."""
    x = x.clone().requires_grad_()
    hx = None if hx is None else hx.clone().requires_grad_()
    output, h_n = module(x, hx)
    leaves = [x, *([hx] if hx is not None else []), *module.parameters()]
    return [output, h_n, *torch.autograd.grad((output * weights[0]).sum() + (h_n * weights[1]).sum(), leaves)]


@pytest.mark.parametrize("hx", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize(
    ("T", "B", "I", "H", "options"),
    [
        (7, 3, 4, 5, {}),
        (7, 3, 4, 5, {"num_layers": 2}),
        (7, 3, 4, 5, {"num_layers": 2, "batch_first": True, "bias": False}),
        (6, None, 4, 5, {"batch_first": True}),
        (6, None, 4, 5, {"num_layers": 2}),
        (1, 3, 2, 17, {}),
        (5, 1, 3, 4, {"batch_first": True}),
        (5, 2, 1, 1, {"num_layers": 2}),
        (40, 8, 16, 32, {}),
    ],
)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_parity_in_float64(nonlinearity, T, B, I, H, options, hx):
    made = []
    for cls in (RNN, nn.RNN):
        torch.manual_seed(3)
        made.append(cls(I, H, nonlinearity=nonlinearity, dtype=torch.float64, **options))
    shape = (T, I) if B is None else (B, T, I) if options.get("batch_first") else (T, B, I)
    states = (options.get("num_layers", 1), *([] if B is None else [B]), H)
    x = torch.randn(shape, dtype=torch.float64)
    h_0 = torch.randn(states, dtype=torch.float64) if hx else None
    weights = torch.randn(*shape[:-1], H, dtype=torch.float64), torch.randn(states, dtype=torch.float64)
    for got, expected in zip(*(results(module, x, h_0, weights) for module in made), strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=ORDER_OF_SUMS, atol=ORDER_OF_SUMS)
    with torch.no_grad():
        for got, expected in zip(made[0](x, h_0), made[1](x, h_0), strict=True):
            torch.testing.assert_close(got, expected, rtol=ORDER_OF_SUMS, atol=ORDER_OF_SUMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_near_float64(dtype):
    module, x = RNN(3, 8, 2), torch.randn(20, 4, 3)
    twin = copy.deepcopy(module).double()
    got, expected = module.to(dtype)(x.to(dtype)), twin(x.double())
    tolerance = 20 * torch.finfo(dtype).eps
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_sigmoid_is_the_loop_by_hand():
    module = RNN(3, 5, 2, "sigmoid", dtype=torch.float64)
    x, hx = torch.randn(6, 2, 3, dtype=torch.float64), torch.randn(2, 2, 5, dtype=torch.float64)
    weights = torch.randn(6, 2, 5, dtype=torch.float64), torch.randn(2, 2, 5, dtype=torch.float64)
    got = results(module, x, hx, weights)
    x.requires_grad_()
    hx.requires_grad_()
    output, h_n, _ = by_hand(module, x, hx)
    loss = (output * weights[0]).sum() + (h_n * weights[1]).sum()
    expected = [output, h_n, *torch.autograd.grad(loss, [x, hx, *module.parameters()])]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=ORDER_OF_SUMS, atol=ORDER_OF_SUMS)


@pytest.mark.parametrize("nonlinearity", list(ACTIVATIONS))
@pytest.mark.parametrize("has_biases", [True, False])
def test_the_function_is_the_module(nonlinearity, has_biases):
    module = RNN(3, 5, 2, nonlinearity, bias=has_biases, dtype=torch.float64)
    x, hx = torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(2, 2, 5, dtype=torch.float64)
    for states in (None, hx):
        got = rnn(x, states, list(module.parameters()), nonlinearity, has_biases)
        for a, b in zip(got, module(x, states), strict=True):
            torch.testing.assert_close(a, b, rtol=ORDER_OF_SUMS, atol=ORDER_OF_SUMS)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bias": False, "batch_first": True}])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_parameters_are_torchs(nonlinearity, options):
    made = []
    for cls in (RNN, nn.RNN):
        torch.manual_seed(5)
        made.append((cls(3, 7, nonlinearity=nonlinearity, **options), torch.rand(3)))
    (ours, a), (theirs, b) = made
    assert torch.equal(a, b), "construction drew a different number of random values"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
    for source, target in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            for p in target.parameters():
                p.fill_(7.0)
        assert target.load_state_dict(source.state_dict(), strict=True) == ([], [])
        assert all(torch.equal(p, q) for p, q in zip(target.parameters(), source.parameters(), strict=True))


def test_copies_and_changed_weights():
    module, x = RNN(3, 5, 2, "sigmoid"), torch.randn(4, 2, 3)
    module(x)[0].sum().backward()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_library(twin(x)[0], module(x)[0])
        assert repr(twin) == repr(module) == "RNN(3, 5, num_layers=2, nonlinearity='sigmoid')"
    weights = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    got = torch.func.functional_call(module, weights, (x,))[0]
    module.load_state_dict(weights)
    assert_library(got, module(x)[0])
    module.weight_ih_l0 = nn.Parameter(torch.zeros(5, 3))
    assert not torch.equal(got, module(x)[0])
    assert module.flatten_parameters() is None


@pytest.mark.parametrize(
    ("nonlinearity", "T", "L", "hx"), [("tanh", 3, 2, True), ("sigmoid", 3, 1, False), ("relu", 2, 1, True)]
)
def test_gradcheck_and_gradgradcheck(nonlinearity, T, L, hx):
    module = RNN(2, 3, L, nonlinearity, dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]
    leaves = [torch.randn(T, 2, 2, dtype=torch.float64), *(p.detach().clone() for p in module.parameters())]
    if hx:
        leaves.append(torch.randn(L, 2, 3, dtype=torch.float64))

    def function(x, *rest):
        parameters = dict(zip(names, rest, strict=False))
        return torch.func.functional_call(module, parameters, (x, rest[len(names)] if hx else None))

    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(function, leaves, **GRADCHECK)
    assert torch.autograd.gradgradcheck(function, leaves, **GRADCHECK)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("used", ["output", "h_n", "both"])
@pytest.mark.parametrize("nonlinearity", list(ACTIVATIONS))
def test_norms_are_those_of_autograd(nonlinearity, used, create_graph, watch):
    module = RNN(3, 5, 2, nonlinearity, dtype=torch.float64)
    x, weights = torch.randn(6, 4, 3, dtype=torch.float64), torch.randn(6, 4, 5, dtype=torch.float64)

    def loss(output, h_n):
        return (used != "h_n") * (output * weights).sum() + (used != "output") * h_n.pow(2).sum()

    watcher = watch(module)
    got = torch.autograd.grad(loss(*module(x)), list(module.parameters()), create_graph=create_graph)
    output, h_n, kept = by_hand(module, x)
    loss(output, h_n).backward()
    for a, p in zip(got, module.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), p.grad)
    assert [seen.source.layer for seen in watcher.seen] == [1, 0]  # in the order of the backward pass
    for seen in watcher.seen:
        assert seen.source.module() is module
        assert seen.lengths is None
        assert seen.gates is None
        expected = torch.stack([h.grad.norm(dim=-1) for h in kept[seen.source.layer]])  # (T, B)
        assert seen.norms.dtype == torch.float64
        assert not seen.norms.requires_grad
        torch.testing.assert_close(seen.norms, expected[None, None], rtol=1e-10, atol=1e-10)
        assert seen.entering.shape[:2] == (1, 6)


def test_tiny_gradients_have_norms(watch):
    """Squares of 1e-30 are zero in float32."""
    module = RNN(3, 5)
    watcher = watch(module)
    (module(torch.randn(4, 2, 3))[0].sum() * 1e-30).backward()
    (seen,) = watcher.seen
    assert (seen.norms > 1e-31).all()
    assert (seen.norms < 1e-28).all()


def test_only_who_wants_is_shown(watch):
    module, other = RNN(3, 5), RNN(3, 5)
    x = torch.randn(4, 2, 3)
    result = module(x)[0].sum() + other(x)[0].sum()  # a graph from before anybody watched
    eager, idle = watch(module), watch(module, wanted=False)
    result.backward()
    assert len(eager.seen) == 1
    assert not idle.seen
    with torch.no_grad():
        module(x)
    recording.unwatch(eager)
    module(x)[0].sum().backward()
    assert len(eager.seen) == 1


def test_watching_changes_no_gradient(watch):
    module, x = RNN(3, 5, 2), torch.randn(9, 4, 3)
    before = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    watch(module)
    after = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    for a, b in zip(before, after, strict=True):
        assert_library(a, b)


def test_only_what_is_needed_has_a_gradient():
    module = RNN(3, 5)
    module.weight_hh_l0.requires_grad_(False)
    x = torch.randn(4, 2, 3, requires_grad=True)
    module(x)[1].sum().backward()
    assert x.grad is not None
    assert module.weight_hh_l0.grad is None
    assert module.bias_ih_l0.grad is not module.bias_hh_l0.grad
    assert torch.equal(module.bias_ih_l0.grad, module.bias_hh_l0.grad)


def test_autocast_computes_in_the_parameters_dtype():
    module, x = RNN(3, 5), torch.randn(4, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = module(x.bfloat16(), torch.zeros(1, 2, 5))
        output.sum().backward()
    assert output.dtype == torch.float32
    assert_library(output, module(x.bfloat16().float())[0])


def wrong_calls():
    x = torch.randn(4, 2, 3)
    cases = {
        "rank": (lambda m: m(torch.randn(3)), ValueError),
        "rank 4": (lambda m: m(torch.randn(1, 4, 2, 3)), ValueError),
        "features": (lambda m: m(torch.randn(4, 2, 7)), RuntimeError),
        "dtype": (lambda m: m(x.double()), ValueError),
        "hx size": (lambda m: m(x, torch.zeros(1, 3, 5)), RuntimeError),
        "hx layers": (lambda m: m(x, torch.zeros(2, 2, 5)), RuntimeError),
        "hx rank": (lambda m: m(x, torch.zeros(2, 5)), RuntimeError),
        "hx rank unbatched": (lambda m: m(x[:, 0], torch.zeros(1, 1, 5)), RuntimeError),
        "hx dtype": (lambda m: m(x, torch.zeros(1, 2, 5, dtype=torch.float64)), RuntimeError),
        "no steps": (lambda m: m(x[:0]), RuntimeError),
    }
    return [pytest.param(*case, id=name) for name, case in cases.items()]


@pytest.mark.parametrize(("call", "error"), wrong_calls())
def test_errors_are_of_torchs_types(call, error):
    for module in (RNN(3, 5), nn.RNN(3, 5)):
        with pytest.raises(error):
            call(module)


def test_messages():
    with pytest.raises(ValueError, match=r"Unknown nonlinearity 'gelu'\. Select from 'sigmoid', 'tanh' or 'relu'"):
        RNN(3, 5, nonlinearity="gelu")
    with pytest.raises(ValueError, match="Unknown nonlinearity 'gelu'"):
        rnn(torch.randn(4, 2, 3), None, list(RNN(3, 5).parameters()), "gelu")
    with pytest.raises(TypeError, match="bidirectional"):
        RNN(3, 5, bidirectional=True)
    with pytest.raises(TypeError, match="got a PackedSequence; pass padded rows"):
        RNN(3, 5)(pack_sequence([torch.randn(4, 3)]))
    with pytest.raises(RuntimeError, match=r"each layer has 4, got 3 in all"):
        rnn(torch.randn(4, 2, 3), None, list(RNN(3, 5).parameters())[:3])
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 2, 5\), got \[2, 2, 5\]"):
        rnn(torch.randn(4, 2, 3), torch.zeros(2, 2, 5), list(RNN(3, 5).parameters()))

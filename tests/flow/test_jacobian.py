"""The Jacobians of one step, their products and exponents, against autograd through steps written out here.

T time, B batch, I input, H hidden, P projection, L layers, D directions.
"""

import math

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian as differentiate
from torch.nn.utils.rnn import pack_sequence

import lstmcore
from lstmcore.flow import operators
from lstmcore.flow.jacobian import CellJacobian, cell_jacobian, rnn_jacobian
from lstmcore.flow.rnn import RNN

from ..support.oracle import RowByRow

CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # float64; sums of a few terms of order one, in another order
NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
SIGMAS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}


class Truth:
    """One layer and direction of an LSTM: ∂c_t / ∂c_{t-1}, by autograd, path by path; x (T, B, I) and hx float64."""

    def __init__(self, module, x, hx, layer, direction) -> None:
        D = 1 + module.bidirectional
        self.direction, self.steps = direction, len(x)
        for l in range(layer + 1):
            weights = [
                {
                    name: getattr(module, key).detach().double()
                    for name in NAMES
                    if hasattr(module, key := f"{name}_l{l}" + "_reverse" * d)
                }
                for d in range(D)
            ]
            h_0, c_0 = (state[l * D : (l + 1) * D] for state in hx)
            run = RowByRow(x, h_0, c_0, weights)
            self.x, x = x, run.output
        self.w = weights[direction]
        self.first = lambda b: (h_0[direction, b], c_0[direction, b])
        self.state = lambda t, b: run.states[direction, t, b] if 0 <= t < self.steps else self.first(b)

    def before(self, t):
        return t + 1 if self.direction else t - 1

    def z(self, t, b, h):
        w = self.w
        z = w["weight_ih"] @ self.x[t, b] + w["weight_hh"] @ h
        return (z + w["bias_ih"] + w["bias_hh"] if "bias_ih" in w else z).chunk(4)

    def h(self, t, b, c, o=None):
        """h_t of this c_t, with the output gate that it had, or with ``o``; at a walk's start it is what it is."""
        if not 0 <= t < self.steps:
            return self.first(b)[0]
        if o is None:
            o = self.z(t, b, self.state(self.before(t), b)[0])[3].sigmoid()
        h = o * c.tanh()
        return self.w["weight_hr"] @ h if "weight_hr" in self.w else h

    def cell(self, t, b, c_f, c_b, c_i, c_g):
        """c_t of a c_{t-1} that goes to the forget gate, along the cell, to the input gate and to the candidate."""
        z_i, z_f, z_g = (self.z(t, b, self.h(self.before(t), b, c))[k] for k, c in enumerate((c_i, c_f, c_g)))
        return z_f.sigmoid() * c_b + z_i.sigmoid() * z_g.tanh()

    def terms(self, t, b):
        c = self.state(self.before(t), b)[1]
        return differentiate(lambda *four: self.cell(t, b, *four), (c,) * 4)

    def matrix(self, t, b):
        return differentiate(lambda c: self.cell(t, b, c, c, c, c), self.state(self.before(t), b)[1])


def example(cls=lstmcore.LSTM, T=4, B=2, I=3, H=5, scale=1.0, **options):
    """A module with weights worth the name, an input (T, B, I) and initial states."""
    module = cls(I, H, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(scale * torch.randn_like(p))
    count = module.num_layers * (1 + module.bidirectional)
    hx = torch.randn(count, B, module.proj_size or H).double(), torch.randn(count, B, H).double()
    return module, torch.randn(T, B, I), hx


CASES = {
    "h1": ({"H": 1}, 0, 0),
    "h5": ({"cls": nn.LSTM}, 0, 0),
    "h17": ({"H": 17, "bias": False, "B": 1}, 0, 0),
    "double": ({"dtype": torch.float64}, 0, 0),
    "one_step": ({"T": 1}, 0, 0),
    "projected": ({"proj_size": 2}, 0, 0),
    "reverse": ({"bidirectional": True}, 0, 1),
    "layer_1": ({"num_layers": 3, "dropout": 0.5}, 1, 0),
    "all": ({"cls": nn.LSTM, "num_layers": 2, "bidirectional": True, "proj_size": 3, "batch_first": True}, 1, 1),
}


@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize(("options", "layer", "direction"), CASES.values(), ids=CASES)
def test_terms_and_their_sum(options, layer, direction, given):
    module, x, hx = example(**options)
    x = x.to(module.weight_ih_l0.dtype)
    states = hx if given else tuple(map(torch.zeros_like, hx))
    truth = Truth(module, x.double(), states, layer, direction)
    arguments = (x.transpose(0, 1) if module.batch_first else x), (hx if given else None)
    found = cell_jacobian(module, *arguments, layer=layer, direction=direction)
    T, B, _ = x.shape
    assert found.shape == (T, B, module.hidden_size)
    for t in range(T):
        terms, matrix = found.terms(t), found.matrix(t)
        for b in range(B):
            for got, expected in zip(terms, truth.terms(t, b), strict=True):
                torch.testing.assert_close(got[b], expected, **CLOSE)
            torch.testing.assert_close(matrix[b], truth.matrix(t, b), **CLOSE)
    torch.testing.assert_close(found.matrix(slice(None))[-1], found.matrix(-1), **CLOSE)
    assert found.terms(slice(1, 3)).A.shape == (min(T, 3) - 1, B, module.hidden_size, module.hidden_size)
    first = found.terms(T - 1 if direction else 0)
    assert not first.A.any()  # h_0 is given; only the direct path leads to c_0
    assert not first.C.any()
    assert not first.E.any()
    assert first.B.any()


def test_unbatched_is_a_batch_of_one():
    module, x, hx = example(bidirectional=True, batch_first=True)
    row = [state[:, 1] for state in hx]
    one = cell_jacobian(module, x[:, 1], row, direction=1)
    all_rows = cell_jacobian(module, x.transpose(0, 1), hx, direction=1)
    torch.testing.assert_close(one.matrix(slice(None))[:, 0], all_rows.matrix(slice(None))[:, 1], **CLOSE)


def test_dropout_and_gradients_stay_out():
    module, x, hx = example(num_layers=2, dropout=0.9)
    module.train()
    found = cell_jacobian(module, x.requires_grad_(), hx, layer=1)
    assert not found.matrix(1).requires_grad
    torch.testing.assert_close(found.matrix(1), cell_jacobian(module.eval(), x, hx, layer=1).matrix(1), **CLOSE)
    assert x.grad is None


@pytest.mark.parametrize("direction", [0, 1])
def test_products_are_those_of_autograd_with_output_gates_held(direction):
    module, x, hx = example(T=6, bidirectional=True)
    truth = Truth(module, x.double(), hx, 0, direction)
    found = cell_jacobian(module, x, hx, direction=direction)
    walk = list(range(6))[:: -1 if direction else 1]
    for end in (5, 3):  # in the walk
        steps = walk[: end + 1]
        logs = found.log_product_norms(None if end == 5 else steps[-1])
        assert logs.shape == (end + 2, 2)
        for lag in range(end + 2):
            norm = found.product_norm(lag, steps[-1])
            torch.testing.assert_close(norm.log(), logs[lag], **CLOSE)
            chain = steps[len(steps) - lag :]
            for b in range(2):

                def run(c, chain=chain, b=b):
                    for t in chain:
                        c = truth.cell(t, b, c, c, c, c)
                    return c

                start = truth.state(truth.before(chain[0]), b)[1] if chain else torch.zeros(5).double()
                expected = torch.linalg.matrix_norm(differentiate(run, start), 2)
                torch.testing.assert_close(norm[b], expected, **CLOSE)


def test_the_product_leaves_out_the_path_through_the_output_gate():
    """Let go of the output gate, and the derivative over two steps is another one, as the documentation says."""
    module, x, hx = example()
    truth = Truth(module, x.double(), hx, 0, 0)

    def two_steps(c_1, held):
        h_1 = truth.h(1, 0, c_1)
        c_2 = truth.cell(2, 0, *[c_1] * 4)
        h_2 = truth.h(2, 0, c_2, truth.z(2, 0, h_1.detach() if held else h_1)[3].sigmoid())
        z_i, z_f, z_g, _ = truth.z(3, 0, h_2)
        return z_f.sigmoid() * c_2 + z_i.sigmoid() * z_g.tanh()

    found = cell_jacobian(module, x, hx)
    over_two = (found.matrix(3) @ found.matrix(2))[0]
    start = truth.state(1, 0)[1]
    torch.testing.assert_close(over_two, differentiate(lambda c: two_steps(c, True), start), **CLOSE)
    whole = differentiate(lambda c: two_steps(c, False), start)
    assert (over_two - whole).abs().max() > 1e-3 * whole.abs().max()


@pytest.fixture
def matrix_free(monkeypatch):
    """Switches forming matrices off."""
    return lambda: monkeypatch.setattr(operators, "EXACT", 0)


def made(kind, H=12, T=30, scale=0.8):
    if kind == "lstm":
        module, x, hx = example(T=T, H=H, scale=scale, bidirectional=True)
        return cell_jacobian(module, x, hx, direction=1)
    module = RNN(3, H, nonlinearity=kind)
    with torch.no_grad():
        module.weight_hh_l0.copy_(torch.randn(H, H) * 1.2 / math.sqrt(H))
    return rnn_jacobian(module, torch.randn(T, 2, 3))


@pytest.mark.parametrize("kind", ["lstm", "tanh", "relu"])
def test_matrix_free_is_exact_enough(kind, matrix_free):
    found = made(kind)
    walk = found._walk(None)
    lags = [0, 1, 2, 7, 30]
    expected = found.norms(2), [found.log_product_norm(lag) for lag in lags], found.log_product_norms(walk[20])
    matrix_free()
    got = found.norms(2), [found.log_product_norm(lag) for lag in lags], found.log_product_norms(walk[20])
    for name, value in expected[0].items():
        torch.testing.assert_close(got[0][name], value, rtol=1e-6, atol=1e-12)
    for a, b in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[2], expected[2], rtol=1e-6, atol=1e-6)


def test_the_iteration_finds_values_that_lie_close(matrix_free):
    """Random matrices of 150 units have singular values a percent apart near the largest."""
    found = made("relu", H=150, T=12)
    exact = torch.stack([torch.linalg.matrix_norm(found.matrix(t), 2) for t in range(12)])
    torch.testing.assert_close(found.norms(2)["sum"], exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.log_product_norms()[1], exact[-1].log(), rtol=0, atol=1e-6)


def test_large_modules_form_no_stack(monkeypatch):
    """Norms and products of H beyond EXACT never ask for a matrix."""
    module, x, hx = example(T=5, H=80, scale=0.1)
    found = cell_jacobian(module, x, hx)
    expected = torch.linalg.matrix_norm(found.matrix(4) @ found.matrix(3), 2)
    for cls in (operators.Scaled, operators.Diagonal, CellJacobian):
        monkeypatch.setattr(cls, "matrix", None)
    found.norms(2)
    found.norms("fro")
    torch.testing.assert_close(found.product_norm(2), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.log_product_norms()[2], expected.log(), rtol=0, atol=1e-6)
    assert found.lyapunov_exponents(2).shape == (2, 2)


@pytest.mark.parametrize("kind", ["lstm", "tanh"])
def test_norms_are_those_of_the_matrices(kind):
    found = made(kind, T=5)
    for ord in (2, "fro"):
        norms = found.norms(ord)
        assert list(norms) == (["A", "B", "C", "E", "sum"] if kind == "lstm" else ["sum"])
        for t in range(5):
            matrices = {**(found.terms(t)._asdict() if kind == "lstm" else {}), "sum": found.matrix(t)}
            for name, matrix in matrices.items():
                torch.testing.assert_close(norms[name][t], torch.linalg.matrix_norm(matrix, ord), **CLOSE)
            if kind == "lstm" and ord == 2:
                torch.testing.assert_close(norms["B"][t], matrices["B"].diagonal(dim1=1, dim2=2).amax(-1), **CLOSE)


def test_chunks_do_not_show(monkeypatch):
    found = made("lstm", T=11)
    whole = found.norms(2)
    monkeypatch.setattr(operators, "AT_ONCE", 700)  # two steps
    for name, value in found.norms(2).items():
        torch.testing.assert_close(value, whole[name], **CLOSE)


def test_long_products_do_not_underflow(matrix_free):
    T = 3000
    module = lstmcore.LSTM(2, 3)
    with torch.no_grad():
        module.bias_ih_l0[3:6] -= 4  # forget gates that are all but closed
    found = cell_jacobian(module, torch.randn(T, 2, 2))
    logs = found.log_product_norms()
    assert logs.shape == (T + 1, 2)
    assert logs.isfinite().all()
    assert not logs[0].any()
    assert logs[-1].max() < math.log(5e-324)
    assert found.product_norm(T).max() == 0
    torch.testing.assert_close(found.log_product_norm(T), logs[-1], **CLOSE)
    matrix_free()
    lag = 600
    assert logs[lag].max() < math.log(5e-324)
    torch.testing.assert_close(found.log_product_norm(lag), logs[lag], **CLOSE)


def constant(forget: torch.Tensor, **options):
    """An LSTM whose forget gates are these whatever happens: no weights, only biases."""
    module = lstmcore.LSTM(2, len(forget), dtype=torch.float64, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        module.bias_ih_l0.view(4, -1)[1] = torch.logit(forget)
    return module


def test_constant_gates():
    forget = torch.tensor([0.5, 0.99, 0.2, 0.9, 1e-3], dtype=torch.float64)
    found = cell_jacobian(constant(forget), torch.randn(150, 2, 2), (torch.randn(1, 2, 5), torch.randn(1, 2, 5)))
    torch.testing.assert_close(found.matrix(3)[0], forget.diag(), **CLOSE)
    torch.testing.assert_close(found.spectral_radius(3), torch.full((2,), 0.99, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(
        found.product_norm(100), torch.full((2,), 0.99**100, dtype=torch.float64), rtol=1e-9, atol=0
    )
    logs = forget.log().sort(descending=True).values
    for k in (2, 5):
        torch.testing.assert_close(found.lyapunov_exponents(k), logs[:k, None].expand(k, 2), rtol=1e-9, atol=1e-9)
    norms = found.norms()
    assert not norms["A"].any()
    torch.testing.assert_close(norms["sum"], norms["B"], **CLOSE)


@pytest.mark.parametrize("kind", ["lstm", "tanh"])
def test_lyapunov_exponents(kind):
    found = made(kind, T=40, H=5)
    exponents = found.lyapunov_exponents()
    assert exponents.shape == (5, 2)
    assert (exponents[:-1] >= exponents[1:]).all()
    volume = torch.linalg.slogdet(found.matrix(slice(None))).logabsdet.mean(0)
    torch.testing.assert_close(exponents.sum(0), volume, rtol=1e-9, atol=1e-9)
    # the longest axis grows as fast as the norm of the product does
    torch.testing.assert_close(exponents[0], found.log_product_norm(40) / 40, rtol=0, atol=1e-2)
    torch.testing.assert_close(found.lyapunov_exponents(2), exponents[:2], rtol=0, atol=1e-2)


@pytest.mark.parametrize("kind", ["lstm", "relu"])
def test_spectral_radius(kind):
    found = made(kind, T=4)
    expected = torch.linalg.eigvals(found.matrix(2)).abs().amax(-1)
    torch.testing.assert_close(found.spectral_radius(2), expected, **CLOSE)
    torch.testing.assert_close(found.spectral_radius(slice(1, 3))[1], expected, **CLOSE)
    assert (found.spectral_radius(2) <= found.norms()["sum"][2] * (1 + 1e-12)).all()


@pytest.mark.parametrize(
    ("cls", "nonlinearity"), [(RNN, "sigmoid"), (RNN, "tanh"), (RNN, "relu"), (nn.RNN, "tanh"), (nn.RNN, "relu")]
)
def test_rnn_jacobian(cls, nonlinearity):
    module = cls(3, 5, 2, nonlinearity, batch_first=True)
    inputs, hx = torch.randn(2, 6, 3), torch.randn(2, 2, 5)
    found = [rnn_jacobian(module, inputs, hx, layer) for layer in (0, 1)]
    one = rnn_jacobian(module, inputs[1], hx[:, 1], 1)  # unbatched
    for b in range(2):
        steps = list(inputs[b].double())
        for layer in (0, 1):
            w_ih, w_hh, b_ih, b_hh = (p.detach().double() for p in module.all_weights[layer])

            def step(x, h, w_ih=w_ih, w_hh=w_hh, bias=b_ih + b_hh):
                return SIGMAS[nonlinearity](w_ih @ x + w_hh @ h + bias)

            h = hx[layer, b].double()
            for t, x in enumerate(steps):
                _, expected = differentiate(step, (x, h))
                torch.testing.assert_close(found[layer].matrix(t)[b], expected, **CLOSE)
                steps[t] = h = step(x, h)
    torch.testing.assert_close(one.matrix(slice(None))[:, 0], found[1].matrix(slice(None))[:, 1], **CLOSE)


@pytest.mark.parametrize("nonlinearity", ["sigmoid", "tanh", "relu"])
def test_no_product_exceeds_the_bound(nonlinearity):
    module = RNN(3, 12, nonlinearity=nonlinearity, dtype=torch.float64)
    found = rnn_jacobian(module, torch.randn(50, 4, 3).double())
    slope = 0.25 if nonlinearity == "sigmoid" else 1.0
    assert found.bound == pytest.approx(slope * torch.linalg.matrix_norm(module.weight_hh_l0, 2).item())
    logs = found.log_product_norms()
    for lag in range(51):
        assert (logs[lag] <= found.log_bound(lag) + 1e-12).all(), lag
    assert found.log_bound(3000) == pytest.approx(3000 * math.log(found.bound))
    assert logs[1].max() > found.log_bound(1) - 2  # it is a bound that says something
    with pytest.raises(ValueError, match="lag -1: expected 0 or more"):
        found.log_bound(-1)


def test_dead_units_have_no_gradient(matrix_free):
    """Zero products are minus infinity, not NaN."""
    module = RNN(1, 3, nonlinearity="relu")
    with torch.no_grad():
        module.bias_ih_l0.fill_(-100)
    found = rnn_jacobian(module, torch.randn(5, 2, 1))
    for _ in range(2):
        assert (found.log_product_norms()[1:] == -math.inf).all()
        assert (found.log_product_norm(3) == -math.inf).all()
        assert (found.product_norm(3) == 0).all()
        assert (found.norms()["sum"] == 0).all()
        matrix_free()
    assert (found.lyapunov_exponents() == -math.inf).all()


def test_other_modules_are_refused():
    x = torch.randn(4, 2, 3)
    with pytest.raises(TypeError, match=r"expected an lstmcore.LSTM or torch.nn.LSTM, got GRU"):
        cell_jacobian(nn.GRU(3, 5), x)
    with pytest.raises(TypeError, match="got Linear"):
        cell_jacobian(nn.Linear(3, 5), x)
    with pytest.raises(TypeError, match=r"expected an lstmcore.RNN or torch.nn.RNN, got LSTM"):
        rnn_jacobian(nn.LSTM(3, 5), x)
    with pytest.raises(ValueError, match="in one direction"):
        rnn_jacobian(nn.RNN(3, 5, bidirectional=True), x)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer": 3}, IndexError, "layer 3 of a module that has 2: expected 0 to 1"),
        ({"layer": -1}, IndexError, "layer -1 of a module that has 2: expected 0 to 1"),
        ({"direction": 1}, IndexError, "direction 1 of a module that has 1: expected 0"),
        ({"input": pack_sequence([torch.randn(4, 3)])}, ValueError, r"pass one row, .*input\[:length, row\]"),
        ({"input": torch.randn(3)}, ValueError, "Expected input to be 2D or 3D, got 1D"),
        ({"input": torch.ones(4, 2, 3).int()}, ValueError, "floating-point dtype, got torch.int32"),
        ({"input": torch.randn(4, 2, 7)}, RuntimeError, "Expected 3, got 7"),
        ({"input": torch.randn(0, 2, 3)}, RuntimeError, "Expected sequence length to be larger than 0"),
        ({"hx": torch.zeros(2, 2, 5)}, RuntimeError, r"hx must be a tuple \(h_0, c_0\)"),
        ({"hx": (torch.zeros(2, 2, 5), torch.zeros(2, 3, 5))}, RuntimeError, r"hidden\[1\] size \(2, 2, 5\), got"),
        ({"hx": (torch.zeros(2, 2, 5), torch.zeros(2, 2, 5) / 0)}, ValueError, r"hidden\[1\] of hx is not finite"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        cell_jacobian(lstmcore.LSTM(3, 5, 2), **({"input": torch.randn(4, 2, 3)} | arguments))


def test_what_is_not_finite_is_named():
    module, x = lstmcore.LSTM(3, 5, 2), torch.randn(6, 2, 3)
    bad = x.clone()
    bad[3, 1, 0] = math.inf
    with pytest.raises(ValueError, match="the input is not finite from step 3 on: check where it comes from"):
        cell_jacobian(module, bad)
    with torch.no_grad():
        module.weight_hh_l1[2, 1] = math.nan
    with pytest.raises(ValueError, match=r"weight_hh_l1 is not finite: .* clip gradients or lower the learning rate"):
        cell_jacobian(module, x)
    growing = RNN(1, 1, nonlinearity="relu", dtype=torch.float64)
    with torch.no_grad():
        for p in growing.parameters():
            p.fill_(1e100)
    with pytest.raises(ValueError, match=r"the hidden state of layer 0 is not finite from step 3 on: .* clip"):
        rnn_jacobian(growing, torch.ones(6, 1, 1))


def test_wrong_questions(monkeypatch):
    found = made("lstm", T=6)  # walks from step 5 to 0
    with pytest.raises(IndexError, match="step 6 of a sequence of 6: expected -6 to 5"):
        found.matrix(6)
    with pytest.raises(IndexError, match="step -7 of"):
        found.log_product_norms(-7)
    with pytest.raises(ValueError, match="lag 4 at step 3: expected 0 to 3, the steps up to there"):
        found.product_norm(4, 3)
    with pytest.raises(ValueError, match="norms are known for ord=2 and ord='fro', got 1"):
        found.norms(1)
    with pytest.raises(ValueError, match="k = 13 Lyapunov exponents of 12 units: expected 1 to 12"):
        found.lyapunov_exponents(13)
    monkeypatch.setattr(operators, "STACK", 1000)
    with pytest.raises(ValueError, match="6 steps of 2 rows of 12 × 12 matrices have 1728 entries, more than 1000"):
        found.matrix(slice(None))
    assert found.matrix(slice(0, 3)).shape == (3, 2, 12, 12)

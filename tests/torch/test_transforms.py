"""torch.func, forward-mode AD and derivatives of derivatives, against the same of ``torch.nn.LSTM`` in float64.

Nothing of these is in ``torch.nn.LSTM``'s fused implementations; its plain float64 loop on the CPU, which autograd
differentiates any number of times, is the oracle.  V members of a vmap, T time, B batch.
"""

import functools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstmcore
from lstmcore import backends, ops
from lstmcore.backends import aten
from lstmcore.checks import Options

from ..support.tolerances import ORDER_OF_SUMS, ORDER_OF_SUMS_F32, assert_same, error

OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"proj_size": 2, "bidirectional": True, "bias": False},
]
V, T, B, I, H = 5, 4, 2, 3, 5
F64 = torch.float64
SECOND = 1e-11  # second derivatives: sums of the order of a thousand terms, twice


@pytest.fixture(params=["numba", "reference", "auto"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


class Pair:
    """Ours and torch's with the same weights, as functions of them."""

    def __init__(self, options: dict, backend: str) -> None:
        self.theirs = nn.LSTM(I, H, **options, dtype=F64)
        self.ours = lstmcore.LSTM(I, H, **options, dtype=F64, backend=backend)
        self.ours.load_state_dict(self.theirs.state_dict())
        self.params = {name: value.detach() for name, value in self.theirs.named_parameters()}
        self.first = options.get("batch_first", False)
        states = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
        self.hx = (
            torch.randn(V, states, B, options.get("proj_size", H), dtype=F64),
            torch.randn(V, states, B, H, dtype=F64),
        )

    def call(self, params, x, *rest, **kwargs):
        return functional_call(self.ours, params, (x, *rest), kwargs)

    def call_theirs(self, params, x, *rest):
        return functional_call(self.theirs, params, (x, *rest))

    def loss(self, params, x):
        return self.call(params, x)[0].square().sum()

    def loss_theirs(self, params, x):
        return self.call_theirs(params, x)[0].square().sum()

    def input(self, *leading: int, steps: int = T) -> torch.Tensor:
        return torch.randn(*leading, *((B, steps) if self.first else (steps, B)), I, dtype=F64)


@pytest.fixture(params=OPTIONS, ids=str)
def pair(request, backend) -> Pair:
    return Pair(request.param, backend)


def flat(results) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(results)


def assert_close(got, expected, tolerance: float = ORDER_OF_SUMS) -> None:
    for one, other in zip(flat(got), flat(expected), strict=True):
        assert error(one, other) <= tolerance * max(1.0, other.abs().max().item())


def stacked(results) -> list[torch.Tensor]:
    return [torch.stack(each) for each in zip(*map(flat, results), strict=True)]


def test_vmap_over_inputs(pair):
    x = pair.input(V)
    assert_close(vmap(lambda each: pair.ours(each))(x), stacked(pair.theirs(each) for each in x))
    assert_close(vmap(pair.ours, 2, 1)(x.movedim(0, 2))[0], torch.stack([pair.theirs(each)[0] for each in x], 1))


@pytest.mark.parametrize("dims", [(0, 0, 0), (0, 0, None), (None, 0, None), (0, None, None)], ids=str)
def test_vmap_over_inputs_and_states(dims, pair):
    given = [value if dim == 0 else value[0] for value, dim in zip((pair.input(V), *pair.hx), dims, strict=True)]
    got = vmap(lambda x, h, c: pair.ours(x, (h, c)), dims)(*given)
    members = [[value[v] if dim == 0 else value for value, dim in zip(given, dims, strict=True)] for v in range(V)]
    assert_close(got, stacked(pair.theirs(x, (h, c)) for x, h, c in members))


def test_vmap_is_one_call_of_the_kernels(monkeypatch):
    """Members of a vmap over inputs are rows of one batch."""
    pair, seen = Pair({}, "numba"), []
    kernels = backends.load("numba")
    forward = kernels.forward
    monkeypatch.setattr(
        kernels, "forward", lambda *args, **kwargs: seen.append(args[0].input.shape) or forward(*args, **kwargs)
    )
    vmap(pair.ours)(pair.input(V))
    assert seen == [(T, B * V, I)]
    vmap(vmap(pair.ours))(pair.input(3, V))
    assert seen[1:] == [(T, B * V * 3, I)]


def test_vmap_over_lengths_and_resets(pair):
    x, most = pair.input(V), T
    lengths = torch.randint(0, most + 1, (V, B))
    reset = torch.rand(V, *((B, T) if pair.first else (T, B))) < 0.3
    plain = Pair.__new__(Pair)
    plain.ours = lstmcore.LSTM(**arguments(pair.ours), backend="reference")
    plain.ours.load_state_dict(pair.ours.state_dict())
    got = vmap(lambda x, n, r: pair.ours(x, lengths=n, reset=r, return_cells=True))(x, lengths, reset)
    wanted = (
        plain.ours(*each[:1], lengths=each[1], reset=each[2], return_cells=True)
        for each in zip(x, lengths, reset, strict=True)
    )
    assert_close(got, stacked(wanted))


def arguments(module: nn.RNNBase) -> dict:
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional", "proj_size")
    return {name: getattr(module, name) for name in names} | {"dtype": module.weight_hh_l0.dtype}


def test_vmap_over_packed_data():
    """The data of packed sequences of the same lengths."""
    pair = Pair({"bidirectional": True}, "numba")
    packed = pack_padded_sequence(pair.input(), torch.tensor([4, 2]))
    data = torch.randn(V, *packed.data.shape, dtype=F64)

    def of(module):
        def run(each):
            output, states = module(PackedSequence(each, packed.batch_sizes))
            return output.data, *states

        return run

    assert_close(vmap(of(pair.ours))(data), stacked(map(of(pair.theirs), data)))
    ours, theirs = of(pair.ours), of(pair.theirs)
    got = vmap(grad(lambda each: sum(result.square().sum() for result in ours(each))))(data)
    data.requires_grad_()
    loss = sum(result.square().sum() for each in data for result in theirs(each))
    assert_close(got, torch.autograd.grad(loss, data)[0])


def test_ensemble_of_weights(pair):
    members = [nn.LSTM(**arguments(pair.theirs)) for _ in range(3)]
    params, _ = stack_module_state(members)
    x = pair.input(3)
    assert_close(vmap(pair.call)(params, x), stacked(m(each) for m, each in zip(members, x, strict=True)))
    got = vmap(grad(pair.loss), (0, None))(params, x[0])
    each = [dict(m.named_parameters()) for m in members]
    assert_close(got, stacked(grad(pair.loss_theirs)(params, x[0]) for params in each))


def test_per_sample_gradients(pair):
    x = pair.input(V)
    got = vmap(grad(pair.loss), (None, 0))(pair.params, x)
    assert_close(got, stacked(grad(pair.loss_theirs)(pair.params, each) for each in x))
    nested = vmap(vmap(grad(pair.loss), (None, 0)), (0, None))({n: p[None] for n, p in pair.params.items()}, x)
    assert_close(nested, {name: each[None] for name, each in got.items()})


def test_vjp_of_any_output(pair):
    x, given = pair.input(), tuple(state[0] for state in pair.hx)
    for used in (slice(0, 1), slice(1, 2), slice(2, 3), slice(0, 3)):
        results = []
        for call in (pair.call, pair.call_theirs):
            outputs, pull = vjp(lambda *args, call=call, used=used: flat(call(*args))[used], pair.params, x, given)
            results.append(pull([out.cos() for out in outputs]))
        assert_close(*results)


def test_jacobians(pair):
    x = pair.input()
    wanted = torch.autograd.functional.jacobian(lambda x: pair.theirs(x)[0], x)
    for transform in (jacrev, jacfwd):
        assert_close(transform(lambda x: pair.ours(x)[0])(x), wanted)
    assert_close(torch.autograd.functional.jacobian(lambda x: pair.ours(x)[0], x, vectorize=True), wanted)
    name = "weight_hh_l0"
    results = [
        jacrev(lambda w, call=call: call(pair.params | {name: w}, x)[0])(pair.params[name])
        for call in (pair.call, pair.call_theirs)
    ]
    assert_close(*results)


def test_hessians(pair):
    x = pair.input(steps=3)
    wanted = torch.autograd.functional.hessian(lambda x: pair.loss_theirs(pair.params, x), x)
    for transform in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(grad(f)), lambda f: jacfwd(grad(f))):
        assert_close(transform(lambda x: pair.loss(pair.params, x))(x), wanted, SECOND)


def test_third_derivative():
    pair = Pair({}, "numba")
    x, name = pair.input(steps=2), "weight_hh_l0"

    def third(loss):
        def inner(w):
            return grad(lambda w: loss(pair.params | {name: w}, x))(w).square().sum()

        return grad(lambda w: grad(inner)(w).square().sum())(pair.params[name])

    assert_close(third(pair.loss), third(pair.loss_theirs), SECOND)


def test_forward_mode(pair):
    """Tangents of input, states and weights at once, by torch.func.jvp and by dual numbers."""
    x, given = pair.input(), tuple(state[0] for state in pair.hx)
    primals = (pair.params, x, given)
    tangents = torch.utils._pytree.tree_map(torch.randn_like, primals)
    wanted = jvp(pair.call_theirs, primals, tangents)
    assert_close(jvp(pair.call, primals, tangents), wanted)
    with forward_ad.dual_level():
        dual = torch.utils._pytree.tree_map(forward_ad.make_dual, primals, tangents)
        got = [forward_ad.unpack_dual(each) for each in flat(pair.call(*dual))]
        beside = pair.ours(x)[0]  # without tangents: an ordinary call
    assert_close([each.tangent for each in got], wanted[1])
    assert_same(beside, pair.ours(x)[0], pair.ours.backend)


def test_forward_over_reverse_with_lengths_and_resets(pair):
    """A Hessian-vector product, by forward mode over reverse mode and by reverse over reverse."""
    x, direction = pair.input(), pair.input()
    control = {"lengths": torch.tensor([3, 4][:B]), "reset": torch.rand(*((B, T) if pair.first else (T, B))) < 0.3}

    def gradient(x):
        return grad(lambda x: pair.call(pair.params, x, **control)[0].square().sum())(x)

    _, forward = jvp(gradient, (x,), (direction,))
    _, pull = vjp(gradient, x)
    assert_close(forward, pull(direction)[0], SECOND)


class Cudnn(torch.autograd.Function):
    """A node with the inputs and outputs of cuDNN's: computes with ATen, and is differentiable once."""

    @staticmethod
    def forward(ctx, options, input, *rest):
        ctx.save_for_backward(input, *rest)
        ctx.options = options
        return aten.run(input, None, rest[-2:], rest[:-2], options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        with torch.enable_grad():
            leaves = [each.detach().requires_grad_() for each in ctx.saved_tensors]
            return None, *torch.autograd.grad(Cudnn.forward(_Nothing(), ctx.options, *leaves), leaves, grads)


class _Nothing:
    def save_for_backward(self, *tensors) -> None:
        pass


@pytest.mark.parametrize("options", [OPTIONS[0], {"num_layers": 3, "bidirectional": True, "bias": False}], ids=str)
def test_a_gradient_like_cudnns_can_be_differentiated_again(options, monkeypatch):
    """The hook on its node.  tests/gpu/test_cuda.py has the same on cuDNN itself."""
    theirs = nn.LSTM(I, H, **options, dtype=F64)
    states = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    data = [torch.randn(T, B, I, dtype=F64), *torch.randn(2, states, B, H, dtype=F64)]
    flags = Options(theirs.bias, theirs.num_layers, 0.0, True, theirs.bidirectional)
    results = []
    for kind in ("plain", "hooked", "once"):
        leaves = [*(value.clone().requires_grad_() for value in data), *theirs.parameters()]
        x, h_0, c_0, *params = leaves
        if kind == "plain":
            outputs = aten.run(x, None, (h_0, c_0), params, flags)
        else:
            outputs = Cudnn.apply(flags, x, *params, h_0, c_0)
        if kind == "hooked":
            node = outputs[0].grad_fn
            node.register_hook(functools.partial(aten._again, x, None, (h_0, c_0), params, flags))
        loss = sum(out.square().sum() for out in outputs)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        if kind == "once":
            with pytest.raises(RuntimeError, match=r"once_differentiable|to not have been used"):
                torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        else:
            results.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)))
    assert_close(*results, SECOND)


def test_the_hook_leaves_dropout_alone():
    """cuDNN's masks are not known; its first gradient is right, and torch refuses the second."""
    x, states = torch.randn(T, B, I, requires_grad=True), tuple(torch.zeros(2, 2, B, H))
    assert torch.is_grad_enabled()
    assert aten._again(x, None, states, [], Options(True, 2, 0.5, True), (), ()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"num_layers": 3, "bidirectional": True, "batch_first": True, "dropout": 0.5}]
)
def test_double_backward_of_aten(options, dtype):
    """What few steps run with backend="auto": ATen's, whose gradient can be differentiated on the CPU."""
    ours = lstmcore.LSTM(I, H, **options, dtype=dtype)
    theirs = nn.LSTM(I, H, **options, dtype=F64)
    theirs.load_state_dict(ours.state_dict())
    states = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    data = [torch.randn(4, 4, I).to(dtype), *(torch.randn(states, 4, H).to(dtype) for _ in range(2))]
    assert lstmcore.explain(ours, data[0]).name == "torch"
    results = []
    for module, kind in ((ours, dtype), (theirs, F64)):
        x, *hx = (value.detach().to(kind).requires_grad_() for value in data)
        leaves = [x, *hx, *module.parameters()]
        torch.manual_seed(3)
        output, (h_n, c_n) = module(x, tuple(hx))
        loss = output.square().sum() + h_n.sum() + c_n.square().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        results.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)))
    for got, expected in zip(*results, strict=True):
        # a few roundings of the dtype in each of two passes
        tolerance = 2 * ORDER_OF_SUMS_F32 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        assert error(got.double(), expected) <= tolerance * max(1.0, expected.abs().max().item())


def test_a_backward_under_vmap():
    """vmap over the backward of a graph that was made outside of it: the rows of a Jacobian."""
    pair = Pair({"bidirectional": True}, "numba")
    x = pair.input().requires_grad_()
    output, _ = pair.ours(x, lengths=[4, 2])
    rows = torch.randn(V, *output.shape, dtype=F64)
    leaves = [x, *pair.ours.parameters()]
    got = vmap(lambda row: torch.autograd.grad(output, leaves, row, retain_graph=True))(rows)
    assert_close(got, stacked(torch.autograd.grad(output, leaves, row, retain_graph=True) for row in rows))


def test_functions_and_operators_agree_on_what_a_call_is():
    """Field by field, what ``ops`` takes apart by position."""
    schema = torch.ops.lstmcore.layer.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names == list(ops.Arguments._fields)
    backward = [argument.name for argument in torch.ops.lstmcore.layer_backward.default._schema.arguments]
    assert backward[6:] == names

"""What a caller can forge: an error, or the right result; never a crash, nor a number that nobody computed.

torch.nn.LSTM is asked first where it survives the same.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import lstmcore

from ..support.modules import close, pair
from ..support.tolerances import assert_same

T, B, I, H = 40, 3, 5, 7  # as many steps as send packed input to the kernels by "auto"
ROWS = 2 * T + 20
SIZES = torch.tensor([3] * 20 + [2] * 20)  # the sum is 100
names = pytest.mark.parametrize("name", ["auto", "numba", "torch", "reference"])


def sizes(**changes: int) -> Tensor:
    """The right ones, with some places changed: ``at5=4``."""
    result = SIZES.clone()
    for place, value in changes.items():
        result[int(place[2:])] = value
    return result


BATCH_SIZES = {  # what is wrong, and what the message has to name
    "too many rows": (torch.tensor([100_000] * 30), "3000000", "100"),
    "one row too many": (sizes(at20=3), "101", "100"),
    "a sum that wraps around": (torch.tensor([2**62] * 8), "100"),
    "rising": (sizes(at5=2), "rise", "3", "step 6"),
    "zero": (sizes(at39=0), "positive", "0", "step 39"),
    "negative": (sizes(at7=-1), "positive", "-1", "step 7"),
    "none": (SIZES[:0], "length"),
    "int32": (SIZES.int(), "int64", "int32"),
    "floats": (SIZES.double(), "int64", "float64"),
    "two dimensions": (SIZES[None], "1-D", "2-D"),
    "a number": (SIZES[0], "1-D", "0-D"),
    "no values": (SIZES.to("meta"), "CPU", "meta"),
}


@names
@pytest.mark.parametrize("wrong", BATCH_SIZES)
def test_batch_sizes(wrong, name):
    given, *texts = BATCH_SIZES[wrong]
    module, packed = lstmcore.LSTM(I, H, backend=name), PackedSequence(torch.randn(100, I), SIZES)
    module(packed)
    with pytest.raises(RuntimeError) as caught:
        module(packed._replace(batch_sizes=given))
    for text in texts:
        assert text in str(caught.value), str(caught.value)


@names
@pytest.mark.parametrize("indices", [[0, 1], [0, 1, 2, 2], [0, 1, 3], [0, 1, -1], []], ids=str)
def test_sorted_indices(indices, name):
    """Too few, too many, out of range."""
    states = (torch.zeros(1, B, H),) * 2
    indices = torch.tensor(indices, dtype=torch.int64)
    packed = PackedSequence(torch.randn(100, I), SIZES, indices, indices)
    for module in (nn.LSTM(I, H), lstmcore.LSTM(I, H, backend=name)):
        with pytest.raises(RuntimeError):
            module(packed, states)


@names
@pytest.mark.parametrize("extended", [False, True])
def test_spare_rows(name, extended):
    """Rows behind those that the sizes use are legal; their gradient is zero, and resets lie beside them.

    (torch's second direction begins at the last row of the data: so it is not asked here what it makes of spare ones.)
    """
    ours, theirs = pair(I, H, bidirectional=True, backend=name)
    data, results = torch.randn(120, I), []
    for module, rows in ((ours, 120), (theirs, 100)):
        x = data[:rows].clone().requires_grad_()
        more = {}
        if extended and module is ours and name != "torch":
            more = {"reset": torch.zeros(120, dtype=torch.bool), "return_cells": True}
            more["reset"][100:] = True
        output, (h_n, c_n), *_ = module(PackedSequence(x, SIZES), **more)
        assert output.data.shape[0] == 100
        grad, *grads = torch.autograd.grad(output.data.square().sum() + c_n.sum(), [x, *module.parameters()])
        assert not grad[100:].any()
        results.append((output.data, h_n, c_n, grad[:100], *grads))
    for got, expected in zip(*results, strict=True):
        close(got, expected)


def test_batch_sizes_changed_before_backward(backend):
    """The graph has its own."""
    module, given = lstmcore.LSTM(I, H, backend=backend), SIZES.clone()
    x = torch.randn(100, I, requires_grad=True)
    expected = torch.autograd.grad(module(PackedSequence(x, given))[0].data.sum(), x)[0]
    output = module(PackedSequence(x, given))[0].data
    given.fill_(2**40)
    assert_same(torch.autograd.grad(output.sum(), x)[0], expected, backend)


# Memory


def shrink(tensor: Tensor) -> None:
    """Frees what ``tensor`` lies in, as sharded training does."""
    tensor.untyped_storage().resize_(0)


def halve(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)


def swap(tensor: Tensor) -> None:
    tensor.data = tensor.data[..., :1].clone()


def swap_dtype(tensor: Tensor) -> None:
    tensor.data = tensor.data.double()


def swap_device(tensor: Tensor) -> None:
    tensor.data = tensor.data.to("meta")


SPOILT = [shrink, halve, swap, swap_dtype, swap_device]
PLACES = ["input", "h_0", "c_0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "weight_hr_l0", "output"]


def problem(name: str = "numba", **options) -> tuple[nn.Module, dict[str, Tensor]]:
    """A module, and all tensors of a call by name."""
    module = lstmcore.LSTM(I, H, proj_size=3, **options, backend=name)
    tensors = {"input": torch.randn(T, B, I), "h_0": torch.randn(1, B, 3), "c_0": torch.randn(1, B, H)}
    return module, {name: t.requires_grad_() for name, t in tensors.items()} | dict(module.named_parameters())


@pytest.mark.parametrize("spoil", [shrink, halve])
@pytest.mark.parametrize("place", PLACES[:-1])
def test_memory_that_is_gone_before_forward(place, spoil):
    module, tensors = problem()
    spoil(tensors[place])
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"memory of a tensor.*is gone"):
            module(tensors["input"], (tensors["h_0"], tensors["c_0"]))


@pytest.mark.parametrize("again", [False, True], ids=["", "create_graph"])
@pytest.mark.parametrize("spoil", SPOILT)
@pytest.mark.parametrize("place", PLACES)
def test_changed_between_forward_and_backward(place, spoil, again):
    module, tensors = problem()
    output = module(tensors["input"], (tensors["h_0"], tensors["c_0"]))[0]
    loss = output.sum()
    expected = torch.autograd.grad(loss, module.bias_hh_l0, retain_graph=True)[0]
    with torch.no_grad():
        spoilt = output if place == "output" else tensors[place]
        if spoil is swap_device:  # torch itself forbids it
            with pytest.raises(RuntimeError, match="incompatible tensor type"):
                spoil(spoilt)
            return
        spoil(spoilt)
    if place == "output" and spoil in (swap, swap_dtype):  # the graph has a tensor of its own, in the same memory
        assert torch.equal(torch.autograd.grad(loss, module.bias_hh_l0)[0], expected)
        return
    with pytest.raises(RuntimeError, match=r"is gone|Expected a tensor of shape"):
        torch.autograd.grad(loss, module.bias_hh_l0, create_graph=again)


def test_offloaded_and_brought_back(backend):
    """What sharded training does in between: the same values at another address."""
    module = lstmcore.LSTM(I, H, backend=backend)
    x = torch.randn(T, B, I)
    expected = torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))
    loss = module(x)[0].square().sum()
    for param in module.parameters():
        param.data = torch.cat([param.data, param.data])[: len(param)]
    for got, wanted in zip(torch.autograd.grad(loss, list(module.parameters())), expected, strict=True):
        assert_same(got, wanted, backend)


@pytest.mark.parametrize("spoil", [lambda t: t[:-1].clone(), lambda t: t.double(), lambda t: t[None]], ids=range(3))
def test_saved_tensors_hooks_that_bring_something_else(spoil):
    module, tensors = problem(bias=False)
    count = 0

    def run(chosen: int) -> None:
        nonlocal count
        count = 0

        def unpack(pair: tuple[int, Tensor]) -> Tensor:
            return spoil(pair[1]) if pair[0] == chosen and pair[1].numel() else pair[1]

        def pack(tensor: Tensor) -> tuple[int, Tensor]:
            nonlocal count
            count += 1
            return count, tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            output = module(tensors["input"], (tensors["h_0"], tensors["c_0"]))[0]
        torch.autograd.grad(output, module.weight_hh_l0, torch.ones_like(output))

    run(0)
    assert count >= 8  # input, two states, three weights, output, gates and cells
    for chosen in range(1, count + 1):
        with pytest.raises(RuntimeError, match="Expected a tensor"):
            run(chosen)


LAYOUTS = {
    "expanded": lambda t: t[:1].expand(t.shape) if (t == t[:1]).all() else t,
    "strided": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "negated": lambda t: negated(t) if t.is_floating_point() else t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_tensors_hooks_that_bring_other_layouts(layout, backend):
    """The same values in another place are the same values."""
    module = lstmcore.LSTM(I, H, backend=backend)
    with torch.no_grad():
        if layout == "expanded":  # gates and cells of zeros: one value serves for all of them
            for param in module.parameters():
                param.zero_()
    x, found = torch.randn(T, B, I, requires_grad=True), []
    for unpack in (lambda t: t, LAYOUTS[layout]):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), unpack):
            output = module(x)[0]
        found.append(torch.autograd.grad(output.square().sum() + output.sum(), [x, *module.parameters()]))
    for got, expected in zip(*found, strict=True):
        assert_same(got, expected, backend)


def test_a_node_called_by_hand():
    """With gradients of any shape and dtype, which torch looks at in some versions."""
    module, x = lstmcore.LSTM(I, H, backend="numba"), torch.randn(T, B, I)
    output, good = module(x)[0], torch.ones(T, B, H)
    node = output.grad_fn  # whose graph older versions of torch free with the output
    *_, expected, _ = node.apply(good, None, None, None)  # of the last bias; there is no weight_hr
    assert torch.equal(node.apply(good.double(), None, None, None)[-2], expected)
    for bad in (good[:1], good[0], good[..., :1]):
        with pytest.raises(RuntimeError, match=r"Expected a tensor|Mismatch in shape"):
            node.apply(bad, None, None, None)


# Views whose values are not what lies in memory


def negated(values: Tensor) -> Tensor:
    """A tensor of these values that keeps them with the other sign."""
    result = torch.complex(torch.zeros_like(values), -values).conj().imag
    assert result.is_neg()
    return result


def nothing(values: Tensor) -> Tensor:
    """Zeros that have no memory."""
    result = torch._efficientzerotensor(values.shape, dtype=values.dtype)
    assert result._is_zerotensor()
    return result


LAZY = ["input", "h_0", "c_0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
LAZY_SIZES = [*itertools.product(LAZY, (0, 3)), ("weight_hr_l0", 3)]


@pytest.mark.parametrize("lazy", [negated, nothing])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(("place", "proj_size"), LAZY_SIZES)
def test_lazy_views_come_in(place, lazy, trains, proj_size, backend):
    module = lstmcore.LSTM(I, H, proj_size=proj_size, backend=backend)
    given = {"input": torch.randn(T, B, I), "h_0": torch.randn(1, B, proj_size or H), "c_0": torch.randn(1, B, H)}
    given |= {name: param.detach() for name, param in module.named_parameters()}
    results = []
    for resolve in (False, True):
        tensors = dict(given)
        view = lazy(tensors[place])
        tensors[place] = torch.zeros_like(view) + view if resolve else view
        leaves = [t.requires_grad_(trains) for t in tensors.values()] if trains else []
        weights = {name: tensors[name] for name, _ in module.named_parameters()}
        output, states = torch.func.functional_call(
            module, weights, (tensors["input"], (tensors["h_0"], tensors["c_0"]))
        )
        grads = torch.autograd.grad(output.square().sum() + states[1].sum(), leaves) if trains else ()
        results.append((output, *states, *grads))
    for got, expected in zip(*results, strict=True):
        assert_same(got.resolve_neg(), expected.resolve_neg(), backend)


class Arriving(torch.autograd.Function):
    """Gives ``view`` of the gradient that arrives to what is before."""

    @staticmethod
    def forward(ctx, tensor, view):
        ctx.view = view
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return ctx.view(grad), None


@pytest.mark.parametrize("lazy", [negated, nothing])
@pytest.mark.parametrize("which", ["output", "h_n", "c_n", "cells"])
@pytest.mark.parametrize("proj_size", [0, 1])
def test_lazy_gradients_arrive(which, lazy, proj_size, backend):
    module = lstmcore.LSTM(I, H, proj_size=proj_size, backend=backend)
    x, found = torch.randn(T, B, I, requires_grad=True), []
    for view in (lazy, lambda grad: torch.zeros_like(grad) + lazy(grad)):
        output, (h_n, c_n), cells = module(x, return_cells=True)
        results = {"output": output, "h_n": h_n, "c_n": c_n, "cells": cells}
        results[which] = Arriving.apply(results[which], view)
        loss = sum((k + 1) * (result * result).sum() for k, result in enumerate(results.values()))
        found.append(torch.autograd.grad(loss, [x, *module.parameters()]))
    for got, expected in zip(*found, strict=True):
        assert_same(got, expected, backend)


def test_lazy_views_in_operators():
    """Those of torch.ops, which compilers and exported programs call."""
    module, x = lstmcore.LSTM(I, H, backend="numba"), torch.randn(T, B, I)
    params = [p.detach() for p in module.parameters()]

    def layer(input: Tensor, weights: list[Tensor]) -> Tensor:
        return torch.ops.lstmcore.layer(
            input, None, None, None, None, None, weights, B, 1, False, False, False, "numba"
        )[0]

    expected = layer(x, params)
    assert torch.equal(layer(negated(x), params), expected)
    assert torch.equal(layer(x, [params[0], negated(params[1]), *params[2:]]), expected)


# Operators, called by hand


def operands() -> dict[str, object]:
    weights = [p.detach() for p in lstmcore.LSTM(I, H).parameters()]
    return {
        "input": torch.randn(T, B, I), "h_0": torch.randn(1, B, H), "c_0": torch.randn(1, B, H),
        "reset": torch.zeros(T, B, dtype=torch.bool), "batch_sizes": None, "lengths": None, "weights": weights,
        "batch": B, "directions": 1, "batch_first": False, "cells": False, "save": True, "backend": "numba",
    }  # fmt: skip


WEIGHTS = operands()["weights"]
FORGED = {
    "h_0": {"h_0": torch.randn(1, 1, H)},
    "c_0": {"c_0": torch.randn(1, B, 1)},
    "reset": {"reset": torch.zeros(1, 1, dtype=torch.bool)},
    "reset of bytes": {"reset": torch.zeros(T, B, dtype=torch.uint8)},
    "weight_hh": {"weights": [WEIGHTS[0], WEIGHTS[1][:4], *WEIGHTS[2:]]},
    "weight_ih": {"weights": [WEIGHTS[0][:, :1], *WEIGHTS[1:]]},
    "bias": {"weights": [*WEIGHTS[:3], WEIGHTS[3][:1]]},
    "dtype": {"weights": [WEIGHTS[0].double(), *WEIGHTS[1:]]},
    "directions": {"directions": 2},
    "no directions": {"directions": 0},
    "one weight": {"weights": WEIGHTS[:1]},
    "width, no projection": {"weights": [WEIGHTS[0], WEIGHTS[1][:, :1], *WEIGHTS[2:]], "h_0": None},
    "wide, no projection": {"weights": [WEIGHTS[0], WEIGHTS[1].repeat(1, 2), *WEIGHTS[2:]], "h_0": None},
    "narrow, no biases": {"weights": [WEIGHTS[0], WEIGHTS[1][:, :1]], "h_0": None},
    "lengths": {"lengths": torch.tensor([T] * (B + 1))},
    "long lengths": {"lengths": torch.tensor([T + 1] * B)},
    "packed": {"input": torch.randn(100, I), "batch_sizes": sizes(at20=3), "reset": None},
    "packed, spare rows": {"input": torch.randn(101, I), "batch_sizes": SIZES, "reset": None},
    "batch": {"input": torch.randn(100, I), "batch_sizes": SIZES, "reset": None, "batch": 2},
}


@pytest.mark.parametrize("forged", FORGED)
def test_operators(forged):
    good = operands()
    torch.ops.lstmcore.layer(*good.values())
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        torch.ops.lstmcore.layer(*(good | FORGED[forged]).values())


@pytest.mark.parametrize("which", range(7))
def test_operators_backward(which):
    """The gradients that come in, and what forward has kept: one after the other is something else."""
    good = operands()
    output, h_n, c_n, kept = torch.ops.lstmcore.layer(*good.values())
    given = [output.clone(), h_n.clone(), c_n.clone(), torch.zeros(T, B, H), output, *kept]

    def run(given: list[Tensor]) -> None:
        torch.ops.lstmcore.layer_backward(*given[:4], [True] * 4, given[4:], *good.values())

    run(given)
    given[which] = given[which][..., :1].clone()
    with pytest.raises(RuntimeError, match="Expected a tensor"):
        run(given)


# Cells

CELLS = {
    "a batch of states for one row": ((I,), (B, H), (B, H)),
    "one row of a batch": ((I,), (1, H), (1, H)),
    "one state for a batch": ((B, I), (H,), (H,)),
    "ranks of two kinds": ((B, I), (B, H), (H,)),
    "batch": ((B, I), (B + 1, H), (B + 1, H)),
    "batch of c": ((B, I), (B, H), (B + 1, H)),
    "hidden size": ((B, I), (B, H + 1), (B, H + 1)),
    "hidden size of c": ((B, I), (B, H), (B, H + 1)),
    "hidden size of one row": ((I,), (H + 1,), (H + 1,)),
    "one row for all": ((B, I), (1, H), (1, H)),
}


@names
@pytest.mark.parametrize("wrong", CELLS)
def test_states_of_a_cell(wrong, name):
    input, *states = map(torch.randn, CELLS[wrong])
    cell = lstmcore.LSTMCell(I, H, backend=name)
    expected = (*input.shape[:-1], H)
    with pytest.raises(RuntimeError) as caught:
        cell(input, tuple(states))
    given = next(tuple(state.shape) for state in states if state.shape != expected)
    assert f"expected a state of shape {expected}, got {given}" in str(caught.value)
    if "for one row" not in wrong:  # that one ends the process
        with pytest.raises(RuntimeError):
            nn.LSTMCell(I, H)(input, tuple(states))


def test_copies_share_nothing_with_what_was_spoilt():
    """A model survives the errors above: nothing of it was lost."""
    module, tensors = problem()
    twin = copy.deepcopy(module)
    x = tensors["input"].detach()
    shrink(module.weight_hh_l0)
    with pytest.raises(RuntimeError, match="is gone"):
        module(x)
    assert twin(x)[0].isfinite().all()

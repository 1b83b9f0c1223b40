"""What torch.nn.LSTM does around the arithmetic: modes, dropout, subsets of gradients, graphs, packing, autocast."""

from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import lstmcore

from ..support.modules import (
    check_autocast,
    check_empty_batch,
    check_modes_without_gradients,
    check_packed_sequences,
    close,
    pair,
)
from ..support.tolerances import assert_same

DROPOUT = [
    {"num_layers": 2},
    {"num_layers": 3, "bidirectional": True},
    {"num_layers": 2, "batch_first": True},
    {"num_layers": 2, "proj_size": 3},
]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", DROPOUT, ids=str)
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropout_draws_torchs_bits(options, p, packed, backend):
    """The same mask from the same seed, no more and no fewer random numbers, and the same gradients through it."""
    ours, theirs = pair(3, 17, dropout=p, **options, backend=backend, dtype=torch.float64)
    x = torch.randn(4, 4, 3, dtype=torch.float64)
    fed = pack_padded_sequence(x, torch.tensor([4, 2, 4, 1]), enforce_sorted=False) if packed else x
    results = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        output, (h_n, _) = module(fed)
        after = torch.rand(2)
        data = output.data if packed else output
        grads = torch.autograd.grad((data * data).sum() + h_n.sum(), list(module.parameters()))
        results.append((data, h_n, after, *grads))
    for got, expected in zip(*results, strict=True):
        close(got, expected)
    assert torch.equal(results[0][2], results[1][2])


def test_eval_has_no_dropout(backend):
    ours, theirs = pair(3, 17, 2, dropout=0.5, backend=backend)
    x = torch.randn(4, 2, 3)
    state = torch.get_rng_state()
    close(ours.eval()(x)[0], theirs.eval()(x)[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(ours.train()(x)[0], theirs.eval()(x)[0])


LEAVES = ["input", "h_0", "c_0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_hr_l0"]


@pytest.mark.parametrize("frozen", [*combinations(LEAVES, 1), *combinations(LEAVES, 7), tuple(LEAVES[3:])], ids=str)
def test_gradients_of_any_subset(frozen, backend):
    ours, theirs = pair(3, 9, proj_size=4, backend=backend, dtype=torch.float64)
    shapes = {"input": (4, 2, 3), "h_0": (1, 2, 4), "c_0": (1, 2, 9)}
    given = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    results = []
    for module in (ours, theirs):
        leaves = {name: value.clone().requires_grad_() for name, value in given.items()} | dict(
            module.named_parameters()
        )
        for name in frozen:
            leaves[name].requires_grad_(False)
        output, (h_n, c_n) = module(leaves["input"], (leaves["h_0"], leaves["c_0"]))
        (output.square().sum() + h_n.sum() + c_n.square().sum()).backward()
        results.append({name: leaf.grad for name, leaf in leaves.items()})
    for name, expected in results[1].items():
        assert (expected is None) == (name in frozen)
        if expected is None:
            assert results[0][name] is None, name
        else:
            close(results[0][name], expected)


@pytest.mark.parametrize("used", [("output",), ("h_n",), ("c_n",), ("h_n", "c_n")], ids=str)
def test_gradients_from_any_subset_of_outputs(used, backend):
    ours, theirs = pair(3, 17, bidirectional=True, backend=backend, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        output, (h_n, c_n) = module(x)
        outputs = {"output": output, "h_n": h_n, "c_n": c_n}
        results.append(torch.autograd.grad(sum(outputs[name].square().sum() for name in used), module.parameters()))
    for got, expected in zip(*results, strict=True):
        close(got, expected)


GRADIENTS = {
    "expanded": lambda output: output.sum(),
    "sliced": lambda output: output[1::2, :, ::3].square().sum(),
    "transposed": lambda output: (output.transpose(0, 2) * torch.arange(4.0, dtype=torch.float64)[:, None].T).sum(),
    "last_step": lambda output: output[-1].square().sum(),
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("loss", GRADIENTS)
def test_layouts_of_incoming_gradients(loss, batch_first, backend):
    ours, theirs = pair(3, 17, batch_first=batch_first, backend=backend, dtype=torch.float64)
    x = torch.randn(4, 4, 3, dtype=torch.float64)
    grads = [torch.autograd.grad(GRADIENTS[loss](module(x)[0]), module.parameters()) for module in (ours, theirs)]
    for got, expected in zip(*grads, strict=True):
        close(got, expected)


@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"bidirectional": True, "num_layers": 2, "proj_size": 2}]
)
@pytest.mark.parametrize("grad", [False, True])
def test_empty_batch(options, grad, backend):
    check_empty_batch(options, grad, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_autocast(packed, dtype, backend):
    check_autocast(packed, dtype, backend)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode, backend):
    check_modes_without_gradients(mode, backend)


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "bidirectional": True, "num_layers": 2}], ids=str)
def test_packed_sequences(options, enforce_sorted, backend):
    check_packed_sequences(options, enforce_sorted, backend)


def test_packed_against_each_row_alone(backend):
    ours, _ = pair(3, 17, bidirectional=True, backend=backend, dtype=torch.float64)
    rows = [torch.randn(length, 3, dtype=torch.float64) for length in (3, 1, 5, 5, 2)]
    packed = pack_padded_sequence(pad_sequence(rows), torch.tensor([len(r) for r in rows]), enforce_sorted=False)
    output, (h_n, c_n) = ours(packed)
    padded, _ = pad_packed_sequence(output)
    for r, row in enumerate(rows):
        alone, (h, c) = ours(row)
        close(padded[: len(row), r], alone)
        close(h_n[:, r], h)
        close(c_n[:, r], c)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_double_backward(packed, backend):
    """A gradient penalty: create_graph gives torch's second derivatives."""
    ours, theirs = pair(2, 5, 2, bidirectional=True, backend=backend, dtype=torch.float64)
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        fed = pack_padded_sequence(leaf, torch.tensor([1, 4, 2]), enforce_sorted=False) if packed else leaf
        output, (h_n, c_n) = module(fed)
        data = output.data if packed else output
        (grad,) = torch.autograd.grad(data.square().sum() + h_n.sum() + c_n.square().sum(), leaf, create_graph=True)
        second = torch.autograd.grad(grad.square().sum(), [leaf, *module.parameters()])
        results.append((grad, *second))
    for got, expected in zip(*results, strict=True):
        close(got, expected, 1e-11)  # sums of the order of a thousand terms, twice


def test_backward_twice(backend):
    ours, _ = pair(3, 17, 2, backend=backend)
    loss = ours(torch.randn(4, 2, 3))[0].square().sum()
    first = torch.autograd.grad(loss, list(ours.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(ours.parameters()))
    for one, other in zip(first, second, strict=True):
        assert_same(one, other, backend)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, list(ours.parameters()))


@pytest.mark.parametrize("changed", ["input", "weight_ih_l0", "weight_hh_l0", "output", "h_0", "c_0"])
def test_in_place_changes_before_backward(changed, backend):
    """Either autograd refuses, or the gradient is that of the values which forward saw; never a silent wrong one."""
    ours, _ = pair(3, 17, backend=backend, dtype=torch.float64)
    x, h_0, c_0 = (torch.randn(shape, dtype=torch.float64) for shape in ((4, 2, 3), (1, 2, 17), (1, 2, 17)))
    expected = torch.autograd.grad(ours(x, (h_0, c_0))[0].sum(), list(ours.parameters()))
    output, _ = ours(x, (h_0, c_0))
    loss = output.sum()
    tensors = {"input": x, "output": output, "h_0": h_0, "c_0": c_0, **dict(ours.named_parameters())}
    with torch.no_grad():
        tensors[changed].mul_(3.0)
    if changed in ("input", "weight_hh_l0"):  # needed for the gradients of the weights
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, list(ours.parameters()))
        return
    refusal = None
    try:
        grads = torch.autograd.grad(loss, list(ours.parameters()))
    except RuntimeError as error:
        refusal = str(error)
    if refusal is None:
        for got, value in zip(grads, expected, strict=True):
            close(got, value)
    else:
        assert "modified by an inplace operation" in refusal


def test_training_follows_torch(backend):
    """Ten steps of Adam on a toy task from the same weights: the same losses."""
    ours, theirs = pair(2, 9, 2, backend=backend, dtype=torch.float64)
    x = torch.randn(6, 5, 2, dtype=torch.float64)
    losses = []
    for module in (ours, theirs):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for _ in range(10):
            optimizer.zero_grad()
            loss = (module(x)[0].mean(-1) - x.cumsum(0).mean(-1)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:10] == pytest.approx(losses[10:], rel=1e-9)
    assert losses[9] < losses[0]


def test_meta_device_and_default_dtype():
    module = lstmcore.LSTM(3, 4, device="meta")
    assert all(p.is_meta for p in module.parameters())
    assert not module.to_empty(device="cpu").weight_hh_l0.is_meta
    torch.set_default_dtype(torch.float64)
    try:
        assert lstmcore.LSTM(3, 4).weight_hh_l0.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_tied_weights(backend):
    """One Parameter in two places gets the sum of both gradients."""
    ours, theirs = pair(3, 17, bidirectional=True, backend=backend, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    for module in (ours, theirs):
        module.weight_hh_l0_reverse = module.weight_hh_l0
        module(x)[0].square().sum().backward()
    for (name, got), (_, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        close(got.grad, expected.grad)
        assert name != "weight_hh_l0_reverse"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hx", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (1, 3), (3,), (0, 3)], ids=str)
def test_lstm_cell(shape, hx, bias, dtype):
    ours, theirs = (cls(3, 17, bias=bias, dtype=dtype) for cls in (lstmcore.LSTMCell, nn.LSTMCell))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape, dtype=dtype)
    states = [torch.randn(*shape[:-1], 17, dtype=dtype) for _ in range(2)] if hx else []
    results = []
    for module in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in (x, *states)]
        h, c = module(leaves[0], tuple(leaves[1:]) or None)
        grads = torch.autograd.grad(h.square().sum() + c.square().sum(), [*leaves, *module.parameters()])
        results.append((h, c, *grads))
    for got, expected in zip(*results, strict=True):
        assert got.shape == expected.shape
        if got.numel():
            close(got, expected)

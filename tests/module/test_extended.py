"""What torch.nn.LSTM does not have: ``lengths``, ``reset``, ``return_cells``, and the functional form."""

import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lstmcore

from ..support.tolerances import GRADCHECK, ORDER_OF_SUMS, assert_library, assert_same, error

OPTIONS = [
    {},
    {"batch_first": True},
    {"bidirectional": True, "num_layers": 2},
    {"bidirectional": True, "num_layers": 2, "proj_size": 3, "batch_first": True},
]
T, B, I, H = 6, 5, 3, 17
F64 = torch.float64


def modules(options: dict, backend: str) -> tuple[lstmcore.LSTM, nn.LSTM]:
    theirs = nn.LSTM(I, H, **options, dtype=F64)
    ours = lstmcore.LSTM(I, H, **options, dtype=F64, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(options: dict) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    states = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    x = torch.randn(*((B, T) if options.get("batch_first") else (T, B)), I, dtype=F64, requires_grad=True)
    h_0 = torch.randn(states, B, options.get("proj_size", H), dtype=F64, requires_grad=True)
    return x, (h_0, torch.randn(states, B, H, dtype=F64, requires_grad=True))


def assert_close(got, expected) -> None:
    for one, other in zip(got, expected, strict=True):
        assert error(one, other) <= ORDER_OF_SUMS * max(1.0, other.abs().max().item())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_lengths_are_packing_without_packing(options, backend):
    ours, theirs = modules(options, backend)
    x, hx = inputs(options)
    lengths, first = torch.tensor([3, 6, 1, 6, 4]), options.get("batch_first", False)
    packed, expected_states = theirs(pack_padded_sequence(x, lengths, first, enforce_sorted=False), hx)
    expected, _ = pad_packed_sequence(packed, first)
    output, states = ours(x, hx, lengths=lengths)
    results, wanted = [output, *states], [expected, *expected_states]
    assert_close(results, wanted)
    grads = [
        torch.autograd.grad(sum((r * r).sum() for r in rs), [x, *hx, *m.parameters()])
        for rs, m in ((results, ours), (wanted, theirs))
    ]
    assert_close(*grads)
    assert_same(output, ours(x, hx, lengths=lengths.tolist())[0], backend)


@pytest.mark.parametrize("lengths", [[0, 6, 0, 2, 0], [0] * 5], ids=str)
def test_rows_of_length_zero_keep_their_state(lengths, backend):
    ours, _ = modules(OPTIONS[0], backend)
    x, hx = inputs(OPTIONS[0])
    output, (h_n, c_n) = ours(x, hx, lengths=lengths)
    empty = torch.tensor(lengths) == 0
    assert not output[:, empty].any()
    assert torch.equal(h_n[:, empty], hx[0][:, empty])
    assert torch.equal(c_n[:, empty], hx[1][:, empty])
    grads = torch.autograd.grad((output, h_n, c_n), (x, *hx), tuple(map(torch.ones_like, (output, h_n, c_n))))
    assert not grads[0][:, empty].any()
    assert (grads[1][:, empty] == 1).all()
    assert (grads[2][:, empty] == 1).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_reset_is_a_new_sequence(options, backend):
    """A reset before step 4 of every row makes two sequences of one: before step 4 in direction 0, after it in 1."""
    ours, theirs = modules(options | {"num_layers": 1}, backend)
    x, hx = inputs(options | {"num_layers": 1})
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[4] = True
    first, time = options.get("batch_first", False), 1 if options.get("batch_first") else 0
    output, (h_n, c_n) = ours(x, hx, reset=reset.T if first else reset)
    zeros = [torch.zeros_like(s) for s in hx]
    width = output.shape[-1] // (2 if ours.bidirectional else 1)

    def part(steps: slice, states) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        return theirs(x[:, steps] if first else x[steps], states)

    forward = torch.cat([part(slice(0, 4), hx)[0], part(slice(4, T), zeros)[0]], time)[..., :width]
    assert_close([output[..., :width]], [forward])
    assert_close([h_n[0], c_n[0]], [s[0] for s in part(slice(4, T), zeros)[1]])
    if ours.bidirectional:  # direction 1 walks T-1 … 5, is reset before it computes step 4, and goes on to 0
        backward = torch.cat([part(slice(0, 5), zeros)[0], part(slice(5, T), hx)[0]], time)[..., width:]
        assert_close([output[..., width:]], [backward])
        assert_close([h_n[1], c_n[1]], [s[1] for s in part(slice(0, 5), zeros)[1]])


def test_no_gradient_passes_a_reset(backend):
    ours, _ = modules(OPTIONS[0], backend)
    x, hx = inputs(OPTIONS[0])
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3, 1] = True
    output, _ = ours(x, hx, reset=reset)
    grads = torch.autograd.grad(output[3:].sum(), (x, *hx))
    assert not grads[0][:3, 1].any()
    assert grads[0][:3, 0].any()
    assert grads[0][3:, 1].any()
    for grad in grads[1:]:
        assert not grad[:, 1].any()
        assert grad[:, 0].any()


@pytest.mark.parametrize("kind", ["padded", "packed", "unbatched"])
def test_reset_follows_the_layout(kind, backend):
    """The same resets, given as the input is: padded, packed, unbatched; against the reference, row by row."""
    ours, _ = modules({"bidirectional": True, "num_layers": 2}, backend)
    x, _ = inputs({})
    reset = torch.rand(T, B) < 0.4
    lengths = torch.tensor([6, 5, 5, 2, 1])
    expected = [ours(x[:n, r], reset=reset[:n, r])[0] for r, n in enumerate(lengths.tolist())]
    if kind == "unbatched":
        single = torch.cat([ours(x[:n, r : r + 1], reset=reset[:n, r : r + 1])[0][:, 0] for r, n in enumerate(lengths)])
        assert_close([single], [torch.cat(expected)])
        return
    if kind == "packed":
        packed = ours(pack_padded_sequence(x, lengths), reset=pack_padded_sequence(reset, lengths).data)[0]
        output, _ = pad_packed_sequence(packed)
    else:
        output, _ = ours(x, reset=reset, lengths=lengths)
    for r, row in enumerate(expected):
        assert_close([output[: len(row), r]], [row])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cells(options, backend):
    """Every c_t of the last layer: the last one of each direction is c_n, and cutting the sequence gives the others."""
    ours, theirs = modules(options, backend)
    x, hx = inputs(options)
    output, (_, c_n), cells = ours(x, hx, return_cells=True)
    assert cells.shape == (*output.shape[:-1], H * (2 if ours.bidirectional else 1))
    time_major = cells.transpose(0, 1) if ours.batch_first else cells
    ends = [time_major[-1, :, :H], time_major[0, :, H:]] if ours.bidirectional else [time_major[-1]]
    assert_close(ends, list(c_n[-len(ends) :]))
    if ours.num_layers == 1:
        for t in range(T):
            _, (_, c_t) = theirs(x[:, : t + 1] if ours.batch_first else x[: t + 1], hx)
            assert_close([time_major[t]], [c_t[0]])
    peer = lstmcore.LSTM(I, H, **options, dtype=F64, backend="reference")
    peer.load_state_dict(ours.state_dict())
    wanted = peer(x, hx, return_cells=True)[2]
    leaves = [x, *hx]
    grads = [
        torch.autograd.grad(c.square().sum(), [*leaves, *m.parameters()]) for c, m in ((cells, ours), (wanted, peer))
    ]
    assert_close(*grads)


def test_cells_of_16_bit_inputs_are_float32(backend):
    module = lstmcore.LSTM(I, H, dtype=torch.bfloat16, backend=backend)
    output, (_, c_n), cells = module(torch.randn(T, B, I).bfloat16(), return_cells=True)
    assert (output.dtype, c_n.dtype, cells.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert torch.equal(cells[-1].bfloat16(), c_n[0])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_functional_is_torch_lstm(options, backend):
    """``lstmcore.lstm`` takes the flat list of parameters that ``torch.lstm`` takes, and gives what it gives."""
    ours, theirs = modules(options, backend)
    x, hx = inputs(options)
    flags = (True, ours.num_layers, 0.0, False, ours.bidirectional)
    expected = torch._VF.lstm(x, hx, list(theirs.parameters()), *flags, ours.batch_first)
    got = lstmcore.lstm(x, hx, list(ours.parameters()), *flags, batch_first=ours.batch_first, backend=backend)
    assert_close(got, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("control", ["", "lengths", "reset"])
def test_cells_of_every_layer(options, control, backend):
    """Those of a layer are what a module of the layers up to it returns as its last."""
    ours, _ = modules(options, backend)
    x, hx = inputs(options)
    given = {"lengths": {"lengths": [3, 6, 0, 6, 4]}, "reset": {"reset": torch.rand(x.shape[:2]) < 0.3}}.get(
        control, {}
    )
    output, _, cells = ours(x, hx, **given, return_cells="all")
    assert isinstance(cells, tuple)
    assert_same(output, ours(x, hx, **given)[0], backend)
    directions = 2 if ours.bidirectional else 1
    for index in range(ours.num_layers):
        part = lstmcore.LSTM(I, H, **options | {"num_layers": index + 1}, dtype=F64, backend=backend)
        part.load_state_dict({name: ours.state_dict()[name] for name in part.state_dict()})
        states = tuple(state[: directions * (index + 1)] for state in hx)
        assert_same(cells[index], part(x, states, **given, return_cells=True)[2], backend)
    grads = torch.autograd.grad(sum(c.square().sum() for c in cells), [x, *hx])
    each = [
        torch.autograd.grad(c.square().sum(), [x, *hx], allow_unused=True, retain_graph=True)
        for c in ours(x, hx, **given, return_cells="all")[2]
    ]
    assert_close(grads, [sum(g if g is not None else 0 for g in parts) for parts in zip(*each, strict=True)])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, list], ids=str)
def test_lengths_of_any_integers(dtype, backend):
    ours, _ = modules(OPTIONS[0], backend)
    x, hx = inputs(OPTIONS[0])
    lengths = [3, 0, 1, 6, 4]
    got = ours(x, hx, lengths=lengths if dtype is list else torch.tensor(lengths, dtype=dtype))[0]
    assert_same(got, ours(x, hx, lengths=torch.tensor(lengths))[0], backend)


def test_lengths_of_all_steps_are_no_lengths(backend):
    ours, _ = modules(OPTIONS[2], backend)
    x, hx = inputs(OPTIONS[2])
    assert_same(ours(x, hx, lengths=[T] * B)[0], ours(x, hx)[0], backend)


def test_what_lies_beyond_the_lengths_is_not_read(backend):
    """NaN in the padding of the input, and of the gradient that comes in, reaches nothing."""
    ours, _ = modules(OPTIONS[2], backend)
    x, hx = inputs(OPTIONS[2])
    lengths = torch.tensor([3, 6, 0, 6, 4])
    beyond = torch.arange(T)[:, None] >= lengths
    poisoned = x.detach().masked_fill(beyond[..., None], torch.nan).requires_grad_()
    results = []
    for fed, bad in ((x, 0.0), (poisoned, torch.nan)):
        output, states = ours(fed, hx, lengths=lengths)
        grad = torch.ones_like(output).masked_fill(beyond[..., None], bad)
        leaves = [fed, *hx, *ours.parameters()]
        results.append((output, *states, *torch.autograd.grad(output, leaves, grad)))
    for got, expected in zip(*results, strict=True):
        assert_same(got, expected, backend)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "proj_size": 3, "batch_first": True}], ids=str)
def test_a_rollout_is_its_episodes(options, dtype, backend):
    """To the bit: outputs, final states, and the gradients of inputs and initial states; of weights up to rounding.

    The reference's products are torch's, whose sums depend on how many rows there are.
    """
    steps, rows = 40, 7
    ours = lstmcore.LSTM(I, H, **options, dtype=dtype, backend=backend)
    done = torch.rand(steps, rows) < 0.1
    reset = torch.cat([torch.rand(1, rows) < 0.5, done[:-1]])
    x = torch.randn(steps, rows, I, dtype=dtype, requires_grad=True)
    hx = [torch.randn(ours.num_layers, rows, width, dtype=dtype) for width in (ours.proj_size or H, H)]
    leaves = [x, *(state.requires_grad_() for state in hx)]
    first = options.get("batch_first", False)
    output, ends = ours(x.transpose(0, 1) if first else x, tuple(hx), reset=reset.T if first else reset)
    output = output.transpose(0, 1) if first else output
    weight = torch.randn_like(output)
    got = torch.autograd.grad((output * weight).sum() + sum(s.sum() for s in ends), [*leaves, *ours.parameters()])
    loss = 0
    for row in range(rows):
        starts = [0, *(t for t in range(1, steps) if reset[t, row]), steps]
        for begin, end in itertools.pairwise(starts):
            fresh = begin > 0 or bool(reset[0, row])
            states = None if fresh else tuple(state[:, row] for state in hx)
            alone, last = ours(x[begin:end, row], states)
            assert_same(alone, output[begin:end, row], backend)
            loss = loss + (alone * weight[begin:end, row]).sum()
            if end == steps:
                for one, other in zip(last, ends, strict=True):
                    assert_same(one, other[:, row], backend)
                loss = loss + sum(state.sum() for state in last)
    wanted = torch.autograd.grad(loss, [*leaves, *ours.parameters()])
    for which, (one, other) in enumerate(zip(got, wanted, strict=True)):
        if which < len(leaves):
            assert_same(one, other, backend)
        else:  # sums over steps and rows, in another order
            assert_library(one, other)


CONTROL = [
    {"lengths": [2, 0, 3]},
    {"reset": [[0, 1, 0], [1, 0, 0], [0, 0, 1]]},
    {"lengths": [2, 3, 0], "reset": [[0, 1, 0], [1, 1, 0], [0, 1, 1]]},
]


@pytest.mark.slow
@pytest.mark.parametrize("control", CONTROL, ids=lambda c: "+".join(c))
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "proj_size": 1, "num_layers": 2}], ids=str)
def test_gradcheck_and_gradgradcheck(options, control, backend):
    """Lengths, resets and cells of every layer, against central differences of first and second derivatives."""
    module = lstmcore.LSTM(2, 2, **options, dtype=F64, backend=backend)
    given = {name: torch.tensor(v, dtype=torch.bool if name == "reset" else torch.int64) for name, v in control.items()}
    states = module.num_layers * (2 if module.bidirectional else 1)
    leaves = [torch.randn(3, 3, 2, dtype=F64), torch.randn(states, 3, module.proj_size or 2, dtype=F64)]
    leaves = [leaf.requires_grad_() for leaf in (*leaves, torch.randn(states, 3, 2, dtype=F64))]
    names = [name for name, _ in module.named_parameters()]

    def function(x, h_0, c_0, *params):
        params = dict(zip(names, params, strict=True))
        output, final, cells = functional_call(module, params, (x, (h_0, c_0)), {**given, "return_cells": "all"})
        return output, *final, *cells

    arguments = [*leaves, *(p.detach().clone().requires_grad_() for p in module.parameters())]
    assert torch.autograd.gradcheck(function, arguments, **GRADCHECK, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, **GRADCHECK, fast_mode=True)

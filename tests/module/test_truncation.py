"""Chunks of a sequence: the values of one call, and the gradients of a loop written by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstmcore

from ..support.modules import close

T, B, I, H = 11, 5, 3, 17
LENGTHS = [4, 11, 0, 7, 11]
OPTIONS = [{}, {"batch_first": True, "num_layers": 2}, {"proj_size": 5, "num_layers": 2}]
STEPS = [1, 4, 11, 20]
F64 = torch.float64


def problem(
    options: dict, dtype=torch.float32
) -> tuple[lstmcore.LSTM, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    module = lstmcore.LSTM(I, H, **options, dtype=dtype, backend="numba")
    x = torch.randn(*((B, T) if module.batch_first else (T, B)), I, dtype=dtype)
    layers = options.get("num_layers", 1)
    return (
        module,
        x,
        (torch.randn(layers, B, module.proj_size or H, dtype=dtype), torch.randn(layers, B, H, dtype=dtype)),
    )


def same(got, expected) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("given", ["dense", "lengths", "reset", "both"])
@pytest.mark.parametrize("start", [True, False])
def test_padded_values_are_those_of_one_call(options, given, start, steps):
    module, x, hx = problem(options)
    control = {}
    if given in ("lengths", "both"):
        control["lengths"] = LENGTHS
    if given in ("reset", "both"):
        control["reset"] = torch.rand(x.shape[:-1]) < 0.3
    expected, states = module(x, hx if start else None, **control)
    chunks = lstmcore.truncated(module, x, steps=steps, hx=hx if start else None, **control)
    outputs, covered = [], []
    for chunk in chunks:
        output, reached = chunk.run()
        outputs.append(output)
        covered += range(T)[chunk.steps]
        same([chunk.of(x)], [chunk.input])
        same(reached, chunks.state)
    assert covered == list(range(T))
    assert len(outputs) == len(chunks)
    same([torch.cat(outputs, int(module.batch_first)), *chunks.state], [expected, *states])


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("options", [{}, {"proj_size": 5, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("start", [True, False])
def test_packed_values_are_those_of_one_call(options, enforce_sorted, start, steps):
    module, x, hx = problem(options)
    lengths = torch.tensor([11, 11, 7, 4, 1] if enforce_sorted else [4, 11, 1, 7, 11])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    reset = torch.rand(len(packed.data)) < 0.3
    expected, states = module(packed, hx if start else None, reset=reset)
    chunks = lstmcore.truncated(module, packed, steps=steps, hx=hx if start else None, reset=reset)
    outputs = []
    for chunk in chunks:
        output, _ = chunk.run()
        outputs.append(output.data)
        same([chunk.of(packed).data, chunk.of(packed.data)], [chunk.input.data] * 2)
        assert chunk.hx is None or chunk.hx[0].shape[1] == packed.batch_sizes[chunk.steps.start]
    same([torch.cat(outputs), *chunks.state], [expected.data, *states])


def test_unbatched():
    module, x, _ = problem({})
    x = x[:, 0]
    chunks = lstmcore.truncated(module, x, steps=4)
    outputs = [chunk.run()[0] for chunk in chunks]
    expected, states = module(x)
    same([torch.cat(outputs), *chunks.state], [expected, *states])


def by_hand(module: nn.LSTM, x: torch.Tensor, hx, target: torch.Tensor, steps: int) -> torch.Tensor:
    """The gradients of all parameters and of h_0, one row at a time, by slices and detach()."""
    module.zero_grad()
    h_0 = hx[0].clone().requires_grad_()
    for row, length in enumerate(LENGTHS):
        state = h_0[:, row], hx[1][:, row]
        for begin in range(0, length, steps):
            end = min(begin + steps, length)
            output, state = module(x[begin:end, row], state)
            (output - target[begin:end, row]).square().sum().backward()
            state = state[0].detach(), state[1].detach()
    return torch.cat([p.grad.flatten() for p in (h_0, *module.parameters())])


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("packs", [True, False])
def test_gradients_are_those_of_a_loop_by_hand(packs, steps):
    theirs = nn.LSTM(I, H, 2, dtype=F64)
    module = lstmcore.LSTM(I, H, 2, dtype=F64, backend="numba")
    module.load_state_dict(theirs.state_dict())
    _, x, hx = problem({"num_layers": 2}, F64)
    target = torch.randn(T, B, H, dtype=F64)
    expected = by_hand(theirs, x, hx, target, steps)
    rows = [row for row, length in enumerate(LENGTHS) if length]
    h_0 = hx[0].clone().requires_grad_()
    if packs:
        lengths = torch.tensor(LENGTHS)[rows]
        given, wanted = (pack_padded_sequence(each[:, rows], lengths, enforce_sorted=False) for each in (x, target))
        chunks = lstmcore.truncated(module, given, steps=steps, hx=(h_0[:, rows], hx[1][:, rows]))
    else:
        wanted, chunks = target, lstmcore.truncated(module, x, steps=steps, hx=(h_0, hx[1]), lengths=LENGTHS)
    alive = torch.arange(T)[:, None] < torch.tensor(LENGTHS)
    for chunk in chunks:
        output, _ = chunk.run()
        error = output.data - chunk.of(wanted).data if packs else (output - chunk.of(wanted))[chunk.of(alive)]
        error.square().sum().backward()
    close(torch.cat([p.grad.flatten() for p in (h_0, *module.parameters())]), expected)


def test_torchs_module_and_any_model():
    theirs, (_, x, _) = nn.LSTM(I, H, batch_first=True), problem({"batch_first": True})

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = theirs, nn.Linear(H, 1)

        def forward(self, input, hx=None):
            output, states = self.lstm(input, hx)
            return self.head(output), states

    model = Model()
    expected, states = theirs(x)
    for module, head, given in ((theirs, nn.Identity(), {}), (model, model.head, {"batch_first": True})):
        chunks = lstmcore.truncated(module, x, steps=4, **given)
        outputs = torch.cat([chunk.run()[0] for chunk in chunks], 1)
        for one, other in zip((outputs, *chunks.state), (head(expected), *states), strict=True):
            close(one, other)


def test_rows_start_again_between_chunks():
    module, x, hx = problem({})
    chunks = lstmcore.truncated(module, x, steps=4, hx=hx)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[4, [1, 3]] = reset[8] = True
    expected, states = module(x, hx, reset=reset)
    outputs = []
    for chunk, rows in zip(chunks, ([1, 3], None, []), strict=True):
        outputs.append(chunk.run()[0])
        if rows != []:
            chunks.reset(rows)
    same([torch.cat(outputs), *chunks.state], [expected, *states])


def test_packed_rows_that_had_ended_before_a_reset_are_zero():
    module, x, hx = problem({})
    packed = pack_padded_sequence(x, torch.tensor([11, 2, 2, 1, 1]))
    chunks = lstmcore.truncated(module, packed, steps=4, hx=hx)
    for chunk in chunks:
        chunk.run()
        if chunk.steps.stop == 4:
            chunks.reset()
    assert not any(each[:, 1:].any() for each in chunks.state)
    same(chunks.state, (torch.cat([each, each.new_zeros(1, 4, H)], 1) for each in module(x[4:, :1])[1]))


def test_a_chunk_may_run_again():
    """As an optimizer's closure does: from the same state, and the last one counts."""
    module, x, _ = problem({})
    chunks = lstmcore.truncated(module, x, steps=6)
    first = next(chunks)
    once = first.run()[0]
    same([first.run()[0]], [once])
    with torch.no_grad():
        module.bias_ih_l0.add_(1)
    _, states = first.run()
    second = next(chunks)
    same(second.hx, (each.detach() for each in states))
    assert not second.hx[0].requires_grad
    with pytest.raises(RuntimeError, match="steps 6 to 11 was not run"):
        next(chunks)
    second.run()
    with pytest.raises(StopIteration):
        next(chunks)


MISTAKES = {
    "no steps": (lambda m, x: {"steps": 0}, ValueError, "steps should be at least 1, got 0"),
    "half a step": (lambda m, x: {"steps": 0.5}, TypeError, "steps should be an integer, got: 0.5"),
    "both directions": (
        lambda m, x: {"module": lstmcore.LSTM(I, H, bidirectional=True)}, ValueError, "starts at the end",
    ),
    "rank": (lambda m, x: {"input": x[None]}, ValueError, "to be 2D or 3D, got 4D"),
    "empty": (lambda m, x: {"input": x[:0]}, RuntimeError, "sequence length to be larger than 0"),
    "torch's lengths": (lambda m, x: {"module": nn.LSTM(I, H), "lengths": LENGTHS}, TypeError, "use lstmcore.LSTM"),
    "long": (lambda m, x: {"lengths": [12, 1, 1, 1, 1]}, ValueError, "lengths should be from 0 to 11"),
    "few": (lambda m, x: {"lengths": [1]}, RuntimeError, "Expected lengths size"),
    "floats": (lambda m, x: {"lengths": [1.0] * 5}, TypeError, "integer dtype"),
    "reset's dtype": (lambda m, x: {"reset": torch.zeros(T, B)}, TypeError, "torch.bool"),
    "reset's size": (lambda m, x: {"reset": torch.zeros(T, 1).bool()}, RuntimeError, "Expected reset size"),
    "packed lengths": (
        lambda m, x: {"input": pack_padded_sequence(x, torch.tensor([11] * 5)), "lengths": LENGTHS},
        ValueError, "carries its own",
    ),
    "torch's lengths as an array": (
        lambda m, x: {"module": nn.LSTM(I, H), "lengths": np.array(LENGTHS)}, TypeError, "use lstmcore.LSTM",
    ),
    "array": (lambda m, x: {"input": x.numpy()}, TypeError, "a PackedSequence, got: ndarray"),
    "no module": (lambda m, x: {"module": None}, TypeError, "model that is called like one"),
    "packed sizes": (
        lambda m, x: {"input": PackedSequence(x[0], torch.tensor([3, 4]))}, RuntimeError, "should never rise",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case):
    module, x, _ = problem({})
    change, error, words = MISTAKES[case]
    given = {"module": module, "input": x, "steps": 4} | change(module, x)
    with pytest.raises(error, match=words):
        lstmcore.truncated(given.pop("module"), given.pop("input"), **given)


def test_every_length_of_a_chunk():
    """Lengths end before, at and behind each border."""
    module, x, hx = problem({})
    for steps, shortest in itertools.product(range(1, T + 1), range(T + 1)):
        lengths = [shortest, T, min(T, shortest + 1), steps, max(0, shortest - 1)]
        chunks = lstmcore.truncated(module, x, steps=steps, hx=hx, lengths=lengths)
        with torch.no_grad():
            output = torch.cat([chunk.run()[0] for chunk in chunks])
            expected, states = module(x, hx, lengths=lengths)
        same([output, *chunks.state], [expected, *states])


def packed_problem() -> tuple[lstmcore.LSTM, PackedSequence]:
    module, x, _ = problem({})
    return module, pack_padded_sequence(x, torch.tensor([11, 4, 2, 7, 1]), enforce_sorted=False)


@pytest.mark.parametrize(
    ("hx", "words"),
    [
        (torch.zeros(2, B, H), r"hx must be a tuple \(h_0, c_0\), got a tensor"),
        ((torch.zeros(1, B, H),), r"hx must be a tuple \(h_0, c_0\), got 1"),
        ((torch.zeros(1, B + 1, H),) * 2, r"Expected hidden\[0\] of 5 rows, got \(1, 6, 17\)"),
        ((torch.zeros(1, B, H), torch.zeros(H)), r"Expected hidden\[1\] of 5 rows, got \(17,\)"),
    ],
)
def test_states_that_packed_rows_cannot_start_from(hx, words):
    module, packed = packed_problem()
    with pytest.raises((RuntimeError, IndexError), match=words):
        next(lstmcore.truncated(module, packed, steps=2, hx=hx))
    chunks = lstmcore.truncated(module, packed, steps=2)
    next(chunks).run()
    chunks.state = hx
    with pytest.raises((RuntimeError, IndexError), match=words):
        next(chunks)


def test_targets_that_are_not_laid_out_like_the_input():
    """They would be cut at other steps."""
    module, packed = packed_problem()
    chunk = next(lstmcore.truncated(module, packed, steps=2))
    for wrong in (torch.zeros(26, 2), torch.zeros(24), packed._replace(batch_sizes=torch.tensor([5] * 5))):
        with pytest.raises(RuntimeError, match="laid out like the input"):
            chunk.of(wrong)
    for options, wrong in (
        ({}, torch.zeros(T + 1, B)),
        ({"batch_first": True}, torch.zeros(T, B)),
        ({}, torch.zeros(B, T)),
    ):
        module, x, _ = problem(options)
        chunk = next(lstmcore.truncated(module, x, steps=2))
        with pytest.raises(RuntimeError, match="laid out like the input"):
            chunk.of(wrong)
    with pytest.raises(TypeError, match="Expected a tensor, got ndarray"):
        chunk.of(np.zeros((T, B)))


def test_rows_that_start_again_are_rows():
    """Whatever names them; also the only one of an unbatched sequence."""
    module, x, _ = problem({"num_layers": 2})
    for rows, zero in (([], []), (np.array([3, 1])[::-1], [1, 3]), ([-1], [4]), (torch.arange(B) == 2, [2])):
        chunks = lstmcore.truncated(module, x, steps=4)
        next(chunks).run()
        chunks.reset(rows)
        for state in chunks.state:
            assert (state == 0).all(2).all(0).nonzero()[:, 0].tolist() == zero
    for rows, error in (([B], IndexError), (torch.ones(B + 1, dtype=torch.bool), IndexError), ([0.5], TypeError)):
        with pytest.raises(error, match="rows"):
            chunks.reset(rows)
    chunks = lstmcore.truncated(module, x[:, 0], steps=4)
    next(chunks).run()
    with pytest.raises(IndexError, match="Expected rows from -1 to 0"):
        chunks.reset([3])
    chunks.reset([0])
    assert not any(state.any() for state in chunks.state)

"""Modules of ours beside torch's with the same weights, and what has to hold for every backend of ours."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import lstmcore

from .tolerances import ORDER_OF_SUMS, ORDER_OF_SUMS_F32, error


def pair(*args, backend: str, **kwargs) -> tuple[lstmcore.LSTM, nn.LSTM]:
    """Ours and torch's with the same weights."""
    theirs = nn.LSTM(*args, **kwargs)
    ours = lstmcore.LSTM(*args, **kwargs, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def close(got, expected, tolerance=None) -> None:
    assert got.dtype == expected.dtype
    tolerance = tolerance or (ORDER_OF_SUMS if got.dtype == torch.float64 else ORDER_OF_SUMS_F32)
    assert error(got, expected) <= tolerance * max(1.0, expected.abs().max().item())


def check_empty_batch(options, grad, backend):
    ours, theirs = pair(3, 5, **options, backend=backend)
    shape = (0, 4, 3) if options.get("batch_first") else (4, 0, 3)
    results = []
    for module in (ours, theirs):
        x = torch.randn(shape, requires_grad=grad)
        with torch.set_grad_enabled(grad):
            output, (h_n, c_n) = module(x)
        if grad:
            (output.sum() + h_n.sum() + c_n.sum()).backward()
        grads = (x.grad, *(p.grad for p in module.parameters())) if grad else ()
        results.append((output, h_n, c_n, *grads))
    for got, expected in zip(*results, strict=True):
        assert got.shape == expected.shape
        assert torch.equal(got, expected)


def check_autocast(packed, dtype, backend):
    """As nn.LSTM: outputs in the autocast dtype, gradients in the parameters' own."""
    ours, theirs = pair(3, 17, 2, backend=backend)
    x = torch.randn(4, 2, 3).to(dtype)
    results = []
    for module in (ours, theirs):
        if module is theirs and not packed:  # which autocast does next; but of float32 torch asks oneDNN for an LSTM
            x = x.bfloat16()  # in bfloat16, and raises where the processor has none
        fed = pack_padded_sequence(x, torch.tensor([4, 2])) if packed else x
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, (h_n, c_n) = module(fed)
        data = output.data if packed else output
        data.float().square().sum().backward()
        results.append((data, h_n, c_n, *(p.grad for p in module.parameters())))
    for got, expected in zip(*results, strict=True):
        close(got, expected, 4 * torch.finfo(torch.bfloat16).eps)


def check_modes_without_gradients(mode, backend):
    ours, theirs = pair(3, 17, bidirectional=True, backend=backend)
    x = torch.randn(4, 2, 3, requires_grad=True)
    with mode():
        output, (h_n, c_n) = ours(x)
        close(output, theirs(x)[0])
    for result in (output, h_n, c_n):
        assert not result.requires_grad
        assert result.grad_fn is None
        assert result.is_inference() == (mode is torch.inference_mode)
    ours.requires_grad_(False)
    assert not ours(x.detach())[0].requires_grad
    assert ours(x)[0].requires_grad


def check_packed_sequences(options, enforce_sorted, backend):
    """A PackedSequence comes out with the indices of the one that went in; padding it gives torch's tensor."""
    ours, theirs = pair(3, 17, **options, backend=backend)
    lengths = torch.tensor([6, 4, 4, 1] if enforce_sorted else [4, 1, 6, 4])
    packed = pack_padded_sequence(torch.randn(6, 4, 3), lengths, enforce_sorted=enforce_sorted)
    (got, states), (expected, expected_states) = ours(packed), theirs(packed)
    assert isinstance(got, PackedSequence)
    assert torch.equal(got.batch_sizes, expected.batch_sizes)
    for name in ("sorted_indices", "unsorted_indices"):
        indices = getattr(expected, name)
        assert getattr(got, name) is None if indices is None else torch.equal(getattr(got, name), indices)
    for one, other in zip(states, expected_states, strict=True):
        close(one, other)
    padded, got_lengths = pad_packed_sequence(got, padding_value=7.0)
    close(padded, pad_packed_sequence(expected, padding_value=7.0)[0])
    assert torch.equal(got_lengths, lengths)


OPTIONS = {
    "h17": {"hidden_size": 17},
    "h1": {"hidden_size": 1},
    "h33_bidirectional": {"hidden_size": 33, "bidirectional": True},
    "proj": {"hidden_size": 17, "proj_size": 5},
}


def results_of(module: nn.Module, given: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    leaves = {name: given[name].to(dtype).requires_grad_() for name in ("input", "h_0", "c_0")}
    output, (h_n, c_n) = module(leaves["input"], (leaves["h_0"], leaves["c_0"]))
    leaves |= dict(module.named_parameters())
    grads = torch.autograd.grad(
        (output, h_n, c_n), list(leaves.values()), [given[k].to(dtype) for k in ("g", "gh", "gc")]
    )
    return {"output": output, "h_n": h_n, "c_n": c_n} | {f"grad of {k}": g for k, g in zip(leaves, grads, strict=True)}


def check_goes_where_torchs_goes(options, place, value, dtype, backend):
    options = OPTIONS[options]
    T, B, H, D = 5, 3, options["hidden_size"], 2 if "bidirectional" in options else 1
    P = options.get("proj_size", H)
    shapes = {
        "input": (T, B, 4),
        "h_0": (D, B, P),
        "c_0": (D, B, H),
        "g": (T, B, D * P),
        "gh": (D, B, P),
        "gc": (D, B, H),
    }
    given = {name: torch.randn(shape).bfloat16().double() for name, shape in shapes.items()}
    theirs = nn.LSTM(4, **options, dtype=torch.float64)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.bfloat16())
        target = dict(theirs.named_parameters()).get(place, given.get("g" if place == "grad" else place))
        if place in ("input", "grad"):
            target[2, 1, -1] = value
        elif place in given:
            target[0, 1, -1] = value
        else:
            target[-1].fill_(value) if target.dim() == 1 else target[-1, -1].fill_(value)
    ours = lstmcore.LSTM(4, **options, dtype=dtype, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    expected, got = results_of(theirs, given, torch.float64), results_of(ours, given, dtype)
    if math.isnan(value):  # an infinite bias saturates its gate, and everything stays finite: that is compared as well
        assert any(v.isnan().any() for v in expected.values()), "the test feeds nothing that shows"
    for name, wanted in expected.items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(got[name]), kind(wanted)), f"{kind.__name__} of {name}"


def kept(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The output of a call, and the bytes that its graph keeps beside it, the input and the parameters."""
    stores: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        stores[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(x)[0]
    for tensor in (x, output, *module.parameters()):
        stores.pop(tensor.untyped_storage().data_ptr(), None)
    return output, sum(stores.values())


def results(module: nn.Module, *given: torch.Tensor, **options) -> list[torch.Tensor]:
    """Outputs, states and cells of a call, and the gradients of what it was given and of all parameters."""
    leaves = [each.clone().requires_grad_() for each in given]
    torch.manual_seed(5)  # for dropout
    output, (h_n, c_n), *rest = module(leaves[0], tuple(leaves[1:]) or None, **options)
    cells = [cells for each in rest for cells in (each if isinstance(each, tuple) else (each,))]
    every = [output, h_n, c_n, *cells]
    loss = sum((each.double() * torch.linspace(-1, 2, each.numel()).view(each.shape)).sum() for each in every)
    return [*every, *torch.autograd.grad(loss, [*leaves, *module.parameters()])]

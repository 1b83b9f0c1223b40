"""Whole steps of training, compiled or captured: forward, loss, backward, clipping and the optimizer together.

The parts one by one: autocast, the scaler, accumulation, optimizers in ``tests/torch/test_ecosystem.py``; the module
compiled, with dynamic shapes, in ``tests/torch/test_ops.py``; chunks in ``tests/module/test_truncation.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import lstmcore

from ..support.modules import close
from ..support.toolchain import needs_cpp

T, B, I, H = 30, 4, 5, 33


class Model(nn.Module):
    def __init__(self, lstm: type[nn.Module], **options) -> None:
        super().__init__()
        self.lstm = lstm(I, H, 2, **options)
        self.linear = nn.Linear(H, 1, **{name: options[name] for name in ("dtype", "device") if name in options})

    def forward(self, x: Tensor, **control) -> Tensor:
        return self.linear(self.lstm(x, **control)[0])


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., Tensor]:
    def step(x: Tensor, y: Tensor, **control) -> Tensor:
        loss = F.mse_loss(model(x, **control), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def batches(count: int, **options) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(T, B, I, **options), torch.randn(T, B, 1, **options)) for _ in range(count)]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=needs_cpp)])
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "lengths"])
def test_a_compiled_step(compiler, ragged, fresh_compiler):
    """It trains as the eager step; its graph breaks where torch wants it to, at backward and the optimizer, as of a
    model without an LSTM: never at the module.
    """
    results, given = [], batches(4)
    control = {"lengths": torch.tensor([30, 4, 17, 22])} if ragged else {}
    model = Model(lstmcore.LSTM, backend="numba")
    for compiled in (False, True):
        mine = copy.deepcopy(model)
        step = step_of(mine, torch.optim.SGD(mine.parameters(), lr=0.5))
        run = torch.compile(step, backend=compiler) if compiled else step
        results.append([*(run(x, y, **control) for x, y in given), *(p.detach() for p in mine.parameters())])
    for got, expected in zip(*results, strict=True):
        close(got, expected)
    breaks = dict(counters["graph_break"])
    assert breaks
    assert not [reason for reason in breaks if "lstmcore" in reason]

    torch._dynamo.reset()
    counters.clear()
    plain = nn.Sequential(nn.Linear(I, H), nn.Linear(H, 1))
    step = torch.compile(step_of(plain, torch.optim.SGD(plain.parameters(), lr=0.5)), backend=compiler)
    for x, y in given:
        step(x, y)
    assert sum(breaks.values()) == sum(counters["graph_break"].values())


@pytest.mark.slow
def test_the_compiled_part_is_one_graph(fresh_compiler):
    """Forward and loss with fullgraph=True; their gradients are one compiled graph, too."""
    model = Model(lstmcore.LSTM, backend="numba")
    ((x, y),) = batches(1)
    loss = torch.compile(lambda x, y: F.mse_loss(model(x), y), backend="aot_eager", fullgraph=True)
    got, expected = (
        torch.autograd.grad(f(x, y), list(model.parameters())) for f in (loss, loss._torchdynamo_orig_callable)
    )
    for one, other in zip(got, expected, strict=True):
        close(one, other)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clipping_and_accumulation_of_packed_parts(norm_type, backend):
    """A ragged batch in two parts, its gradients clipped: those of torch's module over the whole batch."""
    theirs = Model(nn.LSTM, dtype=torch.float64)
    ours = Model(lstmcore.LSTM, dtype=torch.float64, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    x, y = batches(1, dtype=torch.float64)[0]
    lengths = torch.tensor([11, 30, 3, 24])
    results = []
    for model, parts in ((ours, [[0, 1], [2, 3]]), (theirs, [[0, 1, 2, 3]])):
        for rows in parts:
            given, target = (
                pack_padded_sequence(each[:, rows], lengths[rows], enforce_sorted=False) for each in (x, y)
            )
            output = model.linear(model.lstm(given)[0].data)
            ((output - target.data).square().sum() / lengths.sum()).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3, norm_type)
        assert norm > 1e-3, "nothing was clipped"
        results.append([norm, *(p.grad for p in model.parameters())])
    for got, expected in zip(*results, strict=True):
        close(got, expected)


@pytest.mark.gpu
def test_a_captured_step():
    """A whole step as one CUDA graph, replayed on other data: the eager steps."""
    torch.manual_seed(0)
    model = Model(lstmcore.LSTM, backend="triton", device="cuda")
    eager = copy.deepcopy(model)
    given = batches(5, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, y = (each.clone() for each in given[0])

    def step() -> Tensor:
        loss = F.mse_loss(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return loss

    start = copy.deepcopy(model.state_dict())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and makes what a captured call finds
        for _ in range(3):
            optimizer.zero_grad()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    model.load_state_dict(start)
    losses = []
    for new in given:
        for there, value in zip((x, y), new, strict=True):
            there.copy_(value)
        for p in model.parameters():
            p.grad.zero_()
        graph.replay()
        losses.append(loss.item())
    run = step_of(eager, torch.optim.SGD(eager.parameters(), lr=0.5))
    assert losses == pytest.approx([run(*each).item() for each in given], rel=1e-5)


@pytest.mark.gpu
def test_a_scaled_step_on_a_gpu():
    """float16 with GradScaler: the losses of float64, up to what float16 can tell; the first scale overflows."""
    ours = Model(lstmcore.LSTM, device="cuda")
    theirs = Model(nn.LSTM, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    ((x, y),) = batches(1)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (ours, theirs)]
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, backoff_factor=2.0**-15)
    losses, skipped = [], 0
    for _ in range(6):
        optimizers[0].zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = F.mse_loss(ours(x.cuda()).float(), y.cuda())
        before = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizers[0])
        scaler.update()
        skipped += scaler.get_scale() < before
        losses += [loss.item()] * (scaler.get_scale() >= before)
    expected = []
    for _ in losses:
        optimizers[1].zero_grad()
        expected.append(F.mse_loss(theirs(x.double()), y.double()))
        expected[-1].backward()
        optimizers[1].step()
    assert 1 <= skipped <= 2
    assert losses == pytest.approx([each.item() for each in expected], rel=4 * torch.finfo(torch.float16).eps)

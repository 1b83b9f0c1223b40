"""How the module behaves with what surrounds it in PyTorch: each test is something that users do to an LSTM.

The oracle is torch.nn.LSTM in float64, treated the same way where it can be; where something must change nothing at all
(checkpoints, hooks on saved tensors, modes, logging) it is the same call without it, bit for bit.  T time, B batch.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import clip_grad_norm_, parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lstmcore

from ..support.modules import close, pair
from ..support.tolerances import ORDER_OF_SUMS, assert_same, error

F64 = torch.float64
T, B, I, H = 6, 4, 3, 17
CALLS = {
    "plain": {},
    "lengths": {"lengths": [3, 6, 1, 5]},
    "reset": {"reset": torch.arange(T)[:, None].expand(T, B) == 2},
    "cells": {"return_cells": True},
}
CALLS["all"] = {"lengths": torch.tensor([6, 0, 4, 5])} | CALLS["reset"] | CALLS["cells"]
DEEP = {"num_layers": 2, "bidirectional": True, "proj_size": 4}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.fixture(params=["numba", "reference", "auto"])
def any_backend(request: pytest.FixtureRequest) -> str:
    """The backends whose arithmetic is ours, and the default, which picks one or ATen by the call."""
    return request.param


@pytest.fixture
def x() -> Tensor:
    return torch.randn(T, B, I, dtype=F64)


def tensors(results) -> list[Tensor]:
    """Every floating-point tensor of what a module returned."""
    return [t for t in tree_leaves(results) if isinstance(t, Tensor) and t.is_floating_point()]


def loss_of(results) -> Tensor:
    return sum(t.double().square().mean() for t in tensors(results))


def gradients(module: nn.Module, *fed, **call) -> list[Tensor]:
    """Of all parameters, and of what is fed and wants one."""
    leaves = [t for t in (*module.parameters(), *tensors(fed)) if t.requires_grad]
    return list(torch.autograd.grad(loss_of(module(*fed, **call)), leaves))


def agree(got: Iterable[Tensor], expected: Iterable[Tensor], tolerance=None) -> None:
    for one, other in zip(got, expected, strict=True):
        close(one, other, tolerance)


def same(got: Iterable[Tensor], expected: Iterable[Tensor], backend: str = "numba") -> None:
    """Two runs by ``backend`` gave the same."""
    for one, other in zip(got, expected, strict=True):
        assert_same(one, other, backend)


def train(module: nn.Module, x: Tensor, steps: int = 3, optimizer=None, **call) -> list[Tensor]:
    """The losses of a few steps, then the parameters."""
    optimizer = optimizer or torch.optim.SGD(module.parameters(), lr=0.5)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(module(x, **call))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(p.detach() for p in module.parameters())]


# autocast, and the scaler that goes with it: mixed precision with the parameters in float32


def by_torch(module: nn.LSTM, x: Tensor, call: str) -> list[Tensor]:
    """What the extended calls of CALLS mean, by torch.nn.LSTM alone: output, h_n, c_n and perhaps cells."""
    if call == "lengths":
        packed = pack_padded_sequence(x, torch.tensor(CALLS[call]["lengths"]), enforce_sorted=False)
        output, states = module(packed)
        return [pad_packed_sequence(output)[0], *states]
    if call == "reset":
        before, (after, states) = module(x[:2])[0], module(x[2:])
        return [torch.cat([before, after]), *states]
    output, states = module(x)
    cells = [torch.stack([module(x[: t + 1])[1][1][-1] for t in range(T)])] if call == "cells" else []
    return [output, *states, *cells]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", ["plain", "lengths", "reset", "cells"])
def test_autocast(call, dtype, any_backend, x):
    """Results in the region's dtype, cells in float32, gradients in the parameters' own, wherever backward runs."""
    ours, theirs = lstmcore.LSTM(I, H, 2, backend=any_backend), nn.LSTM(I, H, 2, dtype=F64)
    theirs.load_state_dict(ours.state_dict())
    x = x.float().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    found = []
    for inside in (False, True):
        with torch.autocast("cpu", dtype=dtype):
            results = tensors(ours(x, **CALLS[call]))
            loss = loss_of(results)
            if inside:
                found.append(torch.autograd.grad(loss, [x, *ours.parameters()]))
        if not inside:
            found.append(torch.autograd.grad(loss, [x, *ours.parameters()]))
    expected = by_torch(theirs, x64, call)
    wanted = torch.autograd.grad(loss_of(expected), [x64, *theirs.parameters()])
    assert [t.dtype for t in results] == [dtype] * 3 + [torch.float32] * (call == "cells")
    if any_backend != "reference":  # the plain loop is torch's own operations, which backward casts inside of a region
        same(*found, any_backend)
    for got, value in zip((*results, *found[0], *found[1]), (*expected, *wanted, *wanted), strict=True):
        assert error(got.double(), value) <= 4 * torch.finfo(dtype).eps * max(1.0, value.abs().max().item())
    assert {grad.dtype for grads in found for grad in grads} == {torch.float32}


def test_autocast_regions(any_backend, x):
    """The innermost region counts; a disabled one is as if there were none, with its errors."""
    ours, x = lstmcore.LSTM(I, H, 2, backend=any_backend), x.float()
    expected = gradients(ours, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            output = ours(x)[0]
            same(gradients(ours, x), expected, any_backend)
            with pytest.raises(ValueError, match="does not match weight dtype"):
                ours(x.bfloat16())
        with torch.autocast("cpu", dtype=torch.float16):
            half = ours(x)[0]
        dtypes = [t.dtype for t in (output, half, ours(x)[0], ours(output.bfloat16()[..., :I])[0])]
    assert dtypes == [torch.float32, torch.float16, torch.bfloat16, torch.bfloat16]
    assert torch.equal(output, ours(x)[0])


def test_autocast_remembers_no_weights(any_backend, x):
    """Two calls in one region: the gradients of both add up, and the second sees what a step between them changed."""
    ours, x, y = lstmcore.LSTM(I, H, backend=any_backend), x.float(), torch.randn(T, B, I)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        apart = [gradients(ours, x), gradients(ours, y)]
        both = torch.autograd.grad(loss_of(ours(x)) + loss_of(ours(y)), list(ours.parameters()))
        agree(both, [a + b for a, b in zip(*apart, strict=True)])
        with torch.no_grad():
            ours.weight_hh_l0.mul_(3.0)
        changed = ours(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(x)[0], changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_float64_alone(dtype, any_backend, x):
    ours, theirs = pair(I, H, 2, backend=any_backend, dtype=F64)
    with torch.autocast("cpu", dtype=dtype):
        agree(tensors(ours(x)), tensors(theirs(x)))
        agree(gradients(ours, x), gradients(theirs, x))
        for module in (ours, theirs):
            with pytest.raises((RuntimeError, ValueError)):
                module(x.float())


def test_autocast_casts_states(any_backend, x):
    """States of another dtype than the region's are cast with the rest, and get gradients in their own."""
    ours, theirs = lstmcore.LSTM(I, H, backend=any_backend), nn.LSTM(I, H, dtype=F64)
    theirs.load_state_dict(ours.state_dict())
    hx = [torch.randn(1, B, H, requires_grad=True) for _ in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = ours(x.bfloat16(), tuple(hx))
    assert {t.dtype for t in tensors(results)} == {torch.bfloat16}
    hx64 = [t.detach().double().requires_grad_() for t in hx]
    grads = torch.autograd.grad(loss_of(results), hx)
    expected = torch.autograd.grad(loss_of(theirs(x.bfloat16().double(), tuple(hx64))), hx64)
    for got, value in zip(grads, expected, strict=True):
        assert got.dtype == torch.float32
        assert error(got.double(), value) <= 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("call", ["plain", "lengths"])
def test_autocast_with_a_graph_of_the_gradient(call, x):
    """A gradient penalty: where the gradient is taken, in the region or behind it, changes no bits of the second."""
    ours, x, found = lstmcore.LSTM(I, 5, backend="numba"), x.float().requires_grad_(), []
    for inside in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(ours(x, **CALLS[call]))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        found.append([grad, *torch.autograd.grad(grad.square().sum(), list(ours.parameters()))])
    same(*found)


def test_grad_scaler(any_backend, x):
    """float16 with a scaled loss trains as float64 does without; a step whose gradients overflow is left out."""
    ours, theirs = lstmcore.LSTM(I, H, 2, backend=any_backend), nn.LSTM(I, H, 2, dtype=F64)
    theirs.load_state_dict(ours.state_dict())
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-15, growth_interval=100)
    losses, skipped, before = [], [], copy.deepcopy(list(ours.parameters()))
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            output, _ = ours(x.float())
            loss = output.float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        finite = all(p.grad.isfinite().all() for p in ours.parameters())
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        assert (scaler.get_scale() == scale) == finite
        skipped.append(not finite)
        if not finite:
            same(ours.parameters(), before, any_backend)
        else:
            losses.append(loss.item())
    assert skipped[0], "a scale of 2^40 should not fit into float16"
    assert not any(skipped[2:]), "a scale of 2^10 should"
    optimizer, expected = torch.optim.SGD(theirs.parameters(), lr=0.5), []
    for _ in losses:
        optimizer.zero_grad()
        loss = theirs(x)[0].square().mean()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=4 * torch.finfo(torch.float16).eps)
    for got, value in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert error(got.double(), value) <= torch.finfo(torch.float16).eps


def test_float16_module_with_a_scaled_loss(backend, x):
    """Scaled, the gradients are the scaled ones; scaled too far, they are infinite or NaN, never wrong and finite."""
    ours, theirs = lstmcore.LSTM(I, H, 2, dtype=torch.float16, backend=backend), nn.LSTM(I, H, 2, dtype=F64)
    theirs.load_state_dict(ours.state_dict())
    x = x.half()
    expected = gradients(theirs, x.double())
    grads = torch.autograd.grad(loss_of(ours(x)) * 1024, list(ours.parameters()))
    for got, value in zip(grads, expected, strict=True):
        assert error(got.double() / 1024, value) <= 8 * torch.finfo(torch.float16).eps * value.abs().max()
    grads = torch.autograd.grad(loss_of(ours(x)) * 2.0**40, list(ours.parameters()))
    assert not any(grad.isfinite().all() for grad in grads)


# activation checkpointing: forward runs again in backward, with the same masks, and nothing else changes


def backward(function: Callable, x: Tensor, module: nn.Module) -> list[Tensor]:
    """What ``function(x)`` returns, the gradients of x and the parameters, and the state of the random numbers."""
    torch.manual_seed(3)
    x.grad = None
    module.zero_grad()
    results = tensors(function(x))
    state = torch.get_rng_state()
    loss_of(results).backward()
    return [*results, x.grad, *(p.grad for p in module.parameters()), state]


@pytest.mark.parametrize("use_reentrant", [False, True])
@each_call
def test_checkpoint(call, use_reentrant, any_backend, x):
    """With dropout: the same masks in the second run of forward, and the same random numbers after it."""
    ours, calls = lstmcore.LSTM(I, H, 3, dropout=0.5, dtype=F64, backend=any_backend), []
    ours.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    x.requires_grad_()

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(ours(x, **call)))

    expected = backward(run, x, ours)
    calls.clear()
    same(backward(lambda x: checkpoint(run, x, use_reentrant=use_reentrant), x, ours), expected, any_backend)
    assert calls == ([False, True] if use_reentrant else [True, True]), "nothing was computed again"


def checkpoint_takes_packed() -> bool:
    """torch 2.11's builds a PackedSequence anew, of nothing, to look at the devices in it."""
    packed = pack_padded_sequence(torch.ones(1, 1, 1, requires_grad=True), torch.tensor([1]))
    try:
        checkpoint(lambda given: given.data * 2, packed, use_reentrant=False)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("call", ["lengths", "packed"])
def test_checkpoint_takes_the_call_itself(call, any_backend, x):
    """Nested results and keyword arguments go through the kind that is not reentrant; packed input, too."""
    if call == "packed" and not checkpoint_takes_packed():
        pytest.skip("this torch's checkpoint takes no PackedSequence")
    ours = lstmcore.LSTM(I, H, **DEEP, dtype=F64, backend=any_backend)
    x.requires_grad_()

    def run(x: Tensor, wrap: Callable) -> Any:
        if call == "packed":
            return wrap(pack_padded_sequence(x, torch.tensor([6, 5, 5, 1])))
        return wrap(x, **CALLS["lengths"])

    expected = backward(lambda x: run(x, ours), x, ours)
    got = backward(lambda x: run(x, lambda *a, **k: checkpoint(ours, *a, use_reentrant=False, **k)), x, ours)
    same(got, expected, any_backend)


# hooks on what autograd saves: offloading, compression; and how much that is


def to_numpy(offset: int) -> tuple[Callable, Callable]:
    """Packs into NumPy's memory, contiguous, and ``offset`` values off any alignment."""

    def pack(t: Tensor):
        flat = torch.empty(t.numel() + offset, dtype=t.dtype)[offset:]
        flat.copy_(t.detach().reshape(-1))
        return flat.numpy().copy() if not offset else flat, t.shape

    def unpack(packed) -> Tensor:
        flat, shape = packed
        return torch.as_tensor(flat).view(shape)

    return pack, unpack


def to_disk(folder) -> tuple[Callable, Callable]:
    count = iter(range(10**6))

    def pack(t: Tensor):
        path = folder / str(next(count))
        torch.save(t, path)
        return path

    return pack, torch.load


@pytest.mark.parametrize("kind", ["copy", "numpy", "unaligned", "disk", "save_on_cpu"])
@each_call
def test_saved_tensors_hooks(kind, call, backend, x, tmp_path):
    """Wherever the saved tensors have been in the meantime, and however they lie after that: the same gradients."""
    ours = lstmcore.LSTM(I, H, **DEEP, batch_first=True, dtype=F64, backend=backend)
    x = x.transpose(0, 1).contiguous().requires_grad_()
    call = call | ({"reset": call["reset"].T} if "reset" in call else {})
    packed = []

    def count(pack: Callable, unpack: Callable):
        return torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or pack(t), unpack)

    hooks = {
        "copy": lambda: count(torch.clone, lambda t: t),
        "numpy": lambda: count(*to_numpy(0)),
        "unaligned": lambda: count(*to_numpy(1)),
        "disk": lambda: count(*to_disk(tmp_path)),
        "save_on_cpu": torch.autograd.graph.save_on_cpu,
    }
    expected = gradients(ours, x, **call)
    with hooks[kind]():
        loss = loss_of(ours(x, **call))
    grads = torch.autograd.grad(loss, [*ours.parameters(), x])
    same(grads, expected, backend)
    assert packed or kind == "save_on_cpu"


@pytest.mark.parametrize("call", ["plain", "lengths", "cells"])
@pytest.mark.parametrize("proj_size", [0, 4])
@pytest.mark.parametrize("directions", [1, 2])
def test_what_is_saved(directions, proj_size, call, x):
    """Gates, cells, output, input, parameters: each once, and no more (the kernels pad rows to whole vectors)."""
    ours = lstmcore.LSTM(I, H, bidirectional=directions == 2, proj_size=proj_size, dtype=F64, backend="numba")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = ours(x, **CALLS[call])[0]
    places = [t.data_ptr() for t in saved if t.numel()]
    assert len(places) == len(set(places)), "something is saved twice"
    lanes = -(-H // 16) * 16  # the widest vectors
    rows = sum(CALLS[call]["lengths"]) if call == "lengths" else T * B
    kept = directions * rows * 5 * lanes + x.numel() + output.numel() + sum(p.numel() for p in ours.parameters())
    assert sum(t.nbytes for t in saved) <= kept * 8 + 1024
    assert {x.data_ptr(), *(p.data_ptr() for p in (ours.weight_ih_l0, ours.weight_hh_l0))} <= set(places)


def test_no_saving_where_it_is_not_wanted(backend, x):
    """disable_saved_tensors_hooks is nothing that the module minds; hooks inside of it are refused by torch."""
    ours = lstmcore.LSTM(I, H, dtype=F64, backend=backend)
    expected = gradients(ours, x)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        same(gradients(ours, x), expected, backend)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), torch.no_grad():
        ours(x)
    assert not saved


def test_mutation_of_saved_tensors_where_it_is_allowed(x):
    """The kernels' node only: of the reference's, which saves views of the input, torch does not see the mutation."""
    ours = lstmcore.LSTM(I, H, dtype=F64, backend="numba")
    expected = gradients(ours, x)
    with torch.autograd.graph.allow_mutation_on_saved_tensors(), torch.no_grad():
        with torch.enable_grad():
            loss = loss_of(ours(x))
        x.zero_()
        ours.weight_hh_l0.zero_()
        same(torch.autograd.grad(loss, list(ours.parameters())), expected)


# hooks on modules, tensors and gradients


def test_module_hooks(backend, x):
    """Forward, pre- and backward hooks see what they see of torch.nn.LSTM, and may change it."""
    ours, theirs = pair(I, H, 2, backend=backend, dtype=F64)
    seen = []
    for module in (ours, theirs):
        notes: list[Tensor] = []
        module.register_forward_pre_hook(lambda m, args, kwargs: ((args[0] * 2, *args[1:]), kwargs), with_kwargs=True)
        module.register_forward_hook(lambda m, args, out, notes=notes: notes.append(args[0]) or (out[0] * 3, out[1]))
        module.register_full_backward_pre_hook(lambda m, grads: tuple(g if g is None else g / 2 for g in grads))
        module.register_full_backward_hook(lambda m, into, out, notes=notes: notes.extend(tensors((into, out))))
        leaf = x.clone().requires_grad_()
        output, states = module(leaf)
        loss_of((output, states)).backward()
        seen.append([output, *states, *notes, leaf.grad, *(p.grad for p in module.parameters())])
    assert len(seen[0]) > 4 + len(list(ours.parameters()))
    agree(*seen)


def test_tensor_hooks(backend, x):
    """On inputs, results, parameters: called once with the gradient, which they may replace; retain_grad keeps it."""
    ours, theirs = pair(I, H, backend=backend, dtype=F64)
    seen = []
    for module in (ours, theirs):
        leaf, notes = x.clone().requires_grad_(), []
        leaf.register_hook(lambda grad: grad * 3)
        module.weight_hh_l0.register_hook(lambda grad, notes=notes: notes.append(grad.clone()) or grad * 5)
        output, (h_n, c_n) = module(leaf)
        output.register_hook(lambda grad, notes=notes: notes.append(grad.clone()) or grad.clamp(-0.001, 0.001))
        for t in (output, h_n, c_n):
            t.retain_grad()
        loss_of((output, h_n, c_n)).backward()
        assert len(notes) == 2
        seen.append([*notes, leaf.grad, output.grad, h_n.grad, c_n.grad, *(p.grad for p in module.parameters())])
    agree(*seen)


def test_multi_grad_hooks(backend, x):
    ours = lstmcore.LSTM(I, H, dtype=F64, backend=backend)
    seen: dict[str, list] = {"all": [], "any": []}
    expected = gradients(ours, x)
    for mode in seen:
        torch.autograd.graph.register_multi_grad_hook(
            tuple(ours.parameters()), lambda grads, mode=mode: seen[mode].append(grads), mode=mode
        )
    for _ in range(2):
        loss_of(ours(x)).backward()
    assert [len(calls) for calls in seen.values()] == [2, 2]
    same(seen["all"][0], expected, backend)


@pytest.mark.parametrize("options", [{}, {"num_layers": 3, "bidirectional": True}], ids=str)
def test_optimizer_in_backward(options, backend, x):
    """A step for each parameter as soon as its gradient is there, which is then freed: as a step after backward."""
    ours, theirs = pair(I, H, **options, backend=backend, dtype=F64)
    optimizers = {p: torch.optim.Adam([p], lr=0.01) for p in ours.parameters()}

    def step(p: nn.Parameter) -> None:
        optimizers[p].step()
        p.grad = None

    for p in ours.parameters():
        p.register_post_accumulate_grad_hook(step)
    losses = []
    for _ in range(3):
        losses.append(loss_of(ours(x)))
        losses[-1].backward()
        assert all(p.grad is None for p in ours.parameters())
    expected = train(theirs, x, 3, torch.optim.Adam(theirs.parameters(), lr=0.01))
    agree([*losses, *ours.parameters()], expected, 1e-11)  # Adam divides by gradients: small ones lose digits


# weights that are computed from others: parametrizations, norms, pruning


class Squashed(nn.Module):
    """A parametrization of any shape, with an inverse, that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.tanh()

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.clamp(-0.99, 0.99).atanh()


def squash(module: nn.Module, name: str) -> None:
    parametrize.register_parametrization(module, name, Squashed())


COMPUTED: dict[str, list[tuple[Callable, str]]] = {
    "custom": [(squash, "weight_hh_l0"), (squash, "bias_ih_l1"), (squash, "weight_hr_l0_reverse")],
    "orthogonal": [(parametrizations.orthogonal, "weight_hh_l0"), (parametrizations.orthogonal, "weight_hr_l1")],
    "weight_norm": [
        (parametrizations.weight_norm, "weight_ih_l0"),
        (parametrizations.weight_norm, "weight_hh_l1_reverse"),
    ],
    "spectral_norm": [(parametrizations.spectral_norm, "weight_hh_l0"), (squash, "weight_hh_l0")],
    "old_weight_norm": [(nn.utils.weight_norm, "weight_hh_l0"), (nn.utils.weight_norm, "bias_hh_l1_reverse")],
    "old_spectral_norm": [(nn.utils.spectral_norm, "weight_hh_l0")],
    "pruned": [
        (lambda m, name: prune.l1_unstructured(m, name, 0.3), "weight_hh_l0"),
        (lambda m, name: prune.ln_structured(m, name, 0.5, 2, 0), "weight_ih_l1"),
    ],
    "everything": [(squash, name) for name in nn.LSTM(I, H, **DEEP)._flat_weights_names],
}


def computed(kind: str, cls=lstmcore.LSTM, **kwargs) -> nn.Module:
    torch.manual_seed(11)
    module = cls(I, H, **DEEP, dtype=F64, **kwargs)
    for change, name in COMPUTED[kind]:
        change(module, name)
    return module


class ByTorch(nn.Module):
    """A module's weights, computed as a call of it would, in a plain torch.nn.LSTM."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.plain = module, [nn.LSTM(I, H, **DEEP, dtype=F64)]  # in a list: no parameters of this one

    def forward(self, x: Tensor):
        for hook in self.module._forward_pre_hooks.values():  # where the old norms and pruning compute
            hook(self.module, (x,))
        weights = {name: getattr(self.module, name) for name in self.module._flat_weights_names}
        return functional_call(self.plain[0], weights, (x,))


no_warnings_of_torch = pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).*:FutureWarning")


@no_warnings_of_torch
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_train_as_torchs(kind, any_backend, x):
    """The gradients of what the weights are computed from, through a few steps, and the same without a graph."""
    ours, theirs = computed(kind, backend=any_backend), ByTorch(computed(kind))
    assert sum(p.numel() for p in ours.parameters()) > 0
    agree(train(ours, x), train(theirs, x), 10 * ORDER_OF_SUMS)
    with torch.no_grad():
        agree(tensors(ours.eval()(x)), tensors((theirs.module.eval(), theirs)[1](x)), 10 * ORDER_OF_SUMS)


def test_a_parametrization_runs_once_a_call(any_backend, x):
    """Inside of ``cached()`` once for all calls; removed, the weights stay and the module is the plain one."""
    ours = computed("custom", backend=any_backend)
    counted = [ours.parametrizations[name][0] for _, name in COMPUTED["custom"]]

    def calls() -> list[int]:
        counts = [each.calls for each in counted]
        for each in counted:
            each.calls = 0
        return counts

    calls()
    alone = gradients(ours, x)
    assert calls() == [1, 1, 1]
    with parametrize.cached():
        loss = loss_of(ours(x)) + loss_of(ours(x))
    assert calls() == [1, 1, 1]
    agree(torch.autograd.grad(loss, list(ours.parameters())), [2 * grad for grad in alone])
    output = ours(x)[0]
    for _, name in COMPUTED["custom"]:
        parametrize.remove_parametrizations(ours, name)
    assert type(ours) is lstmcore.LSTM
    assert torch.equal(ours(x)[0], output)


def test_assigning_to_a_parametrized_weight(backend, x):
    """What is assigned goes through the inverse, and the next call sees it."""
    ours, theirs = computed("custom", backend=backend), nn.LSTM(I, H, **DEEP, dtype=F64)
    ours.weight_hh_l0 = torch.full_like(ours.weight_hh_l0, 0.25)
    theirs.load_state_dict({name: getattr(ours, name) for name in ours._flat_weights_names})
    assert error(theirs.weight_hh_l0, torch.full_like(theirs.weight_hh_l0, 0.25)) < ORDER_OF_SUMS
    agree(tensors(ours(x)), tensors(theirs(x)))


@no_warnings_of_torch
@pytest.mark.parametrize("kind", COMPUTED)
def test_copies_of_computed_weights(kind, backend, x):
    """As far as torch goes: deepcopy, pickle, and a state_dict of a torch.nn.LSTM that was treated alike."""
    ours, theirs = computed(kind, backend=backend).eval(), computed(kind, nn.LSTM).eval()
    if hasattr(ours, "parametrizations"):  # the others leave a computed tensor in the module, which torch does not copy
        twin = copy.deepcopy(ours)
        same(tensors(twin(x)), tensors(ours(x)), backend)
        with torch.no_grad():
            next(twin.parameters()).add_(1.0)
        assert not torch.equal(twin(x)[0], ours(x)[0])
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(1.25)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    assert ours.load_state_dict(torch.load(file, weights_only=True)) == ([], [])
    agree(tensors(ours(x)), tensors(ByTorch(theirs)(x)), 10 * ORDER_OF_SUMS)
    same(ours.state_dict().values(), theirs.state_dict().values())
    if hasattr(ours, "parametrizations"):
        with pytest.raises(RuntimeError, match="only supported through state_dict"):
            pickle.dumps(ours)
    elif kind == "pruned":
        same(tensors(pickle.loads(pickle.dumps(ours))(x)), tensors(ours(x)), backend)


# one tensor in several places, and parameters that are views of others


def test_weights_tied_between_layers_and_modules(any_backend, x):
    """The gradient is the sum over the places; a step moves all of them."""
    results = []
    for cls, options in ((lstmcore.LSTM, {"backend": any_backend}), (nn.LSTM, {})):
        torch.manual_seed(2)
        first, second = (cls(size, H, 3, dtype=F64, **options) for size in (I, H))
        for name in ("weight_ih", "weight_hh", "bias_hh"):
            setattr(first, f"{name}_l2", getattr(first, f"{name}_l1"))
            setattr(second, f"{name}_l0", getattr(first, f"{name}_l1"))
        both = nn.ModuleList([first, second])
        both.forward = lambda x, first=first, second=second: second(first(x)[0])
        assert len(list(both.parameters())) == 2 * 12 - 6
        results.append(train(both, x))
    agree(*results)


def views(base: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an LSTM(I, H) as views of all kinds: of a slice, transposed, expanded, of every second entry."""
    return {
        "weight_ih_l0": base["stack"][1, :, :I],
        "weight_hh_l0": base["transposed"].t(),
        "bias_ih_l0": base["one"].expand(4 * H),
        "bias_hh_l0": base["every_second"][::2],
    }


@pytest.mark.parametrize("frozen", [(), ("stack", "one"), ("transposed",)], ids=str)
def test_weights_that_are_views(frozen, any_backend, x):
    """By functional_call: the gradients arrive at what they are views of, where it wants one."""
    ours, theirs = pair(I, H, backend=any_backend, dtype=F64)
    shapes = {"stack": (3, 4 * H, I + 2), "transposed": (H, 4 * H), "one": (1,), "every_second": (8 * H,)}
    base = {k: (0.3 * torch.randn(s, dtype=F64)).requires_grad_(k not in frozen) for k, s in shapes.items()}
    leaves = [t for t in base.values() if t.requires_grad]
    results = []
    for module in (ours, theirs):
        module(x)
        called = tensors(functional_call(module, views(base), (x,)))
        results.append([*called, *torch.autograd.grad(loss_of(called), leaves)])
    agree(*results)
    with torch.no_grad():
        agree(*(tensors(functional_call(module, views(base), (x,))) for module in (ours, theirs)))


def test_functional_call_is_differentiated_through(any_backend, x):
    """A step of training inside of training, as in MAML: the outer gradient passes through the inner one."""
    results = []
    for module in pair(I, 5, 2, backend=any_backend, dtype=F64):
        weights = dict(module.named_parameters())
        inner = torch.autograd.grad(
            loss_of(functional_call(module, weights, (x,))), weights.values(), create_graph=True
        )
        stepped = {name: w - 0.5 * g for (name, w), g in zip(weights.items(), inner, strict=True)}
        outer = loss_of(functional_call(module, stepped, (x.flip(0),)))
        results.append([outer, *torch.autograd.grad(outer, list(module.parameters()))])
        assert all(module.get_parameter(name) is w for name, w in weights.items())
    agree(*results, 1e-11)  # sums of sums, as in double backward


def test_parameters_put_in_and_swapped(any_backend, x):
    """load_state_dict(assign=True), swap_tensors, .data, vector_to_parameters: the next call uses what is there now."""
    ours, theirs = pair(I, H, 2, backend=any_backend, dtype=F64)

    def check() -> None:
        agree(gradients(ours, x), gradients(theirs, x))

    check()
    for assign in (True, False):
        state = {name: torch.randn_like(p) * 0.3 for name, p in ours.named_parameters()}
        for module in (ours, theirs):
            module.load_state_dict(state, assign=assign)
        check()
    other = nn.Parameter(torch.randn_like(ours.weight_hh_l0) * 0.3)
    theirs.weight_hh_l0.data.copy_(other.data)
    torch.utils.swap_tensors(ours.weight_hh_l0, other)
    check()
    for module in (ours, theirs):
        module.weight_ih_l1.data = torch.full_like(module.weight_ih_l1, 0.1)
    check()
    vector = nn.utils.parameters_to_vector(ours.parameters()) * 0.5
    for module in (ours, theirs):
        nn.utils.vector_to_parameters(vector, module.parameters())
    check()


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("used_before", [False, True])
def test_conversion(used_before, swap, any_backend, x):
    """module.double() with and without swapping the parameters: they stay the same objects as torch's do."""
    ours, theirs = pair(I, H, 2, backend=any_backend)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for module in (ours, theirs):
            if used_before:
                loss_of(module(x.float())).backward()
                module.zero_grad()
            before = list(module.parameters())
            assert module.double() is module
            assert all(p is q for p, q in zip(before, module.parameters(), strict=True))
        agree(gradients(ours, x), gradients(theirs, x))
        agree(train(ours, x), train(theirs, x))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


# inference mode


def outcome(function: Callable) -> str | list[Tensor]:
    """The message of a RuntimeError up to its second sentence, or the results."""
    try:
        return tensors(function())
    except RuntimeError as exception:
        return str(exception).split(".")[0]


@pytest.mark.parametrize("what", ["input", "states", "module"])
def test_inference_tensors_later(what, any_backend, x):
    """Made in inference mode and used outside of it: without a graph they work, with one autograd refuses as ever."""
    found = []
    for cls, options in ((lstmcore.LSTM, {"backend": any_backend}), (nn.LSTM, {})):
        torch.manual_seed(4)
        with torch.inference_mode(what == "module"):
            module = cls(I, H, 2, dtype=F64, **options)
        with torch.inference_mode(what == "input"):
            fed = x + 1
        with torch.inference_mode(what == "states"):
            hx = (torch.ones(2, B, H, dtype=F64), torch.ones(2, B, H, dtype=F64) / 2)
        with torch.no_grad():
            without = tensors(module(fed, hx))
        with torch.inference_mode():
            same(tensors(module(fed, hx)), without, any_backend)
        found.append((without, outcome(lambda module=module, fed=fed, hx=hx: gradients(module, fed, hx))))
    agree(found[0][0], found[1][0])
    for results in found:
        assert results[1] == "Inference tensors cannot be saved for backward", results[1]


# determinism


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@each_call
def test_deterministic_algorithms(call, any_backend, x):
    """Nothing refuses, memory that is filled with NaN changes nothing, and the bits are the same from run to run."""
    ours = lstmcore.LSTM(I, H, **DEEP, dropout=0.3, dtype=F64, backend=any_backend)
    x.requires_grad_()
    expected = backward(lambda x: ours(x, **call), x, ours)
    with deterministic():
        assert torch.empty(3).isnan().all(), "memory is not filled"
        for _ in range(3):
            same(backward(lambda x: ours(x, **call), x, ours), expected, any_backend)


# optimizers and what stands between them and the gradients


@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"fused": True}, {"amsgrad": True, "weight_decay": 0.1}], ids=str
)
def test_optimizers(options, backend, x):
    ours, theirs = pair(I, H, 2, backend=backend, dtype=F64)
    results = []
    for module in (ours, theirs):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, **options)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(loss_of(module(x)))
            losses[-1].backward()
            losses.append(clip_grad_norm_(module.parameters(), 0.01, foreach=options.get("foreach")))
            optimizer.step()
        results.append([*losses, *module.parameters()])
    agree(*results, 1e-11)  # Adam divides by gradients: small ones lose digits


def test_lbfgs(backend, x):
    """Many evaluations a step, and all gradients as one flat vector."""
    results = []
    for module in pair(I, H, backend=backend, dtype=F64):
        optimizer = torch.optim.LBFGS(module.parameters(), max_iter=4, line_search_fn="strong_wolfe")

        def evaluate(module=module, optimizer=optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = (module(x)[0] - 0.25).square().mean()
            loss.backward()
            return loss

        results.append([optimizer.step(evaluate), *module.parameters()])
    agree(*results, 1e-9)  # a line search compares and divides small differences


def test_averaged_models(any_backend, x):
    """SWA and EMA: the average is a module of its own, which runs, and is what torch's would be."""
    results = []
    for module in pair(I, H, 2, backend=any_backend, dtype=F64):
        swa, ema = AveragedModel(module), AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        schedule = SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        for _ in range(3):
            train(module, x, 1, optimizer)
            swa.update_parameters(module)
            ema.update_parameters(module)
            schedule.step()
        assert not torch.equal(swa(x)[0], module(x)[0])
        results.append([swa(x)[0], ema(x)[0], *swa.module.parameters(), *ema.module.parameters()])
    agree(*results)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    """One gloo process, alone in its world."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this build of torch has no gloo")
    store = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}, {"find_unused_parameters": True}],
    ids=str,
)
def test_distributed_data_parallel(options, any_backend, process_group, x):
    """The gradients of the module alone, with several buckets, and accumulated under no_sync."""
    ours, theirs = pair(I, H, 2, backend=any_backend, dtype=F64)
    wrapped = nn.parallel.DistributedDataParallel(ours, bucket_cap_mb=0.01, **options)
    agree(train(wrapped, x), train(theirs, x))
    if not options:
        for module in (wrapped, theirs):
            module.zero_grad()
            with wrapped.no_sync():
                loss_of(module(x)).backward()
            loss_of(module(x.flip(0))).backward()
        agree((p.grad for p in ours.parameters()), (p.grad for p in theirs.parameters()))
        same(gradients(wrapped, x, **CALLS["lengths"]), gradients(ours, x, **CALLS["lengths"]), any_backend)


@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")
def test_fully_sharded(any_backend, process_group, x):
    """fully_shard: built without memory, initialised where it was sharded, trained as torch's; DTensors everywhere."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ours = lstmcore.LSTM(I, H, 2, dtype=F64, device="meta", chrono=20, backend=any_backend)
    fully_shard(ours, mesh=init_device_mesh("cpu", (1,)))
    ours.to_empty(device="cpu")
    ours.reset_parameters()
    theirs, optimizer = nn.LSTM(I, H, 2, dtype=F64), torch.optim.SGD(ours.parameters(), lr=0.5)
    theirs.load_state_dict({name: p.full_tensor() for name, p in ours.named_parameters()})
    for layer in range(2):
        i, f, _, _ = getattr(theirs, f"bias_ih_l{layer}").chunk(4)
        assert torch.equal(i, -f)
        assert 0 <= f.min() < f.max() <= 3  # ln(20) = 2.996
        assert not getattr(theirs, f"bias_hh_l{layer}")[: 2 * H].any()
    train(ours, x, optimizer=optimizer)
    train(theirs, x)
    agree((p.full_tensor() for p in ours.parameters()), theirs.parameters())


# how gradients are asked for


@pytest.mark.parametrize("to_none", [True, False])
def test_accumulation(to_none, backend, x):
    """Several backward passes add up, in the tensors that are there already."""
    ours, theirs = pair(I, H, 2, backend=backend, dtype=F64)
    for module in (ours, theirs):
        loss_of(module(x)).backward()
        module.zero_grad(set_to_none=to_none)
        there = [p.grad for p in module.parameters()]
        for step in range(3):
            loss_of(module(x * (step + 1))).backward()
        for p, grad in zip(module.parameters(), there, strict=True):
            assert (grad is None) if to_none else (p.grad is grad)
    agree((p.grad for p in ours.parameters()), (p.grad for p in theirs.parameters()))


def test_backward_with_respect_to_some(backend, x):
    """``inputs=[...]``: only these get a gradient, the whole one."""
    ours, theirs = pair(I, H, 2, backend=backend, dtype=F64)
    names = ["weight_hh_l0", "bias_ih_l1"]
    for module in (ours, theirs):
        loss_of(module(x)).backward(inputs=[module.get_parameter(name) for name in names])
        assert [name for name, p in module.named_parameters() if p.grad is not None] == names
    agree(*([m.get_parameter(name).grad for name in names] for m in (ours, theirs)))


@pytest.mark.parametrize("used", ["h_n of layer 0", "output of direction 0", "first step"])
def test_what_a_loss_does_not_depend_on(used, backend, x):
    """allow_unused: None where the graph has no path, zeros where it has one that carries nothing, as torch."""
    ours, theirs = pair(I, H, 2, bidirectional=True, backend=backend, dtype=F64)
    pick = {
        "h_n of layer 0": lambda output, h_n: h_n[:2],
        "output of direction 0": lambda output, h_n: output[..., :H],
        "first step": lambda output, h_n: output[0],
    }[used]
    other = torch.ones(3, dtype=F64, requires_grad=True)
    results = []
    for module in (ours, theirs):
        output, (h_n, _) = module(x)
        leaves = [*module.parameters(), other]
        grads = torch.autograd.grad(pick(output, h_n).square().sum(), leaves, allow_unused=True)
        assert grads[-1] is None
        results.append([torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)])
    agree(*results)


# the state of the process: defaults, modes, tools that watch


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class CountCalls(TorchDispatchMode):
    """A logging mode: lets everything pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


class CountFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


SURROUNDINGS: dict[str, Callable] = {
    "default device": lambda: torch.device("cpu"),
    "another default device": lambda: torch.device("meta"),  # as cuda is one, where the module is on the CPU
    "default float64": lambda: default_dtype(F64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "dispatch mode": CountCalls,
    "function mode": CountFunctions,
    "flop counter": lambda: FlopCounterMode(display=False),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "forward-mode level": torch.autograd.forward_ad.dual_level,
    "autograd on one thread": lambda: torch.autograd.set_multithreading_enabled(False),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@each_call
def test_surroundings(call, surrounding, any_backend, x):
    """Whatever the defaults are and whoever watches: the same bits, forward and backward, padded and packed.

    Whoever watches operators finds one a layer; the default may then take another backend, and the reference
    computes its forward pass anew.
    """
    ours = lstmcore.LSTM(I, H, 2, bidirectional=True, dropout=0.3, backend=any_backend)
    x = x.float().requires_grad_()
    packed = pack_padded_sequence(x.detach(), torch.tensor([6, 5, 5, 1]))

    def results() -> list[Tensor]:
        return [*backward(lambda x: ours(x, **call), x, ours), *gradients(ours, packed)]

    expected = results()
    with SURROUNDINGS[surrounding]() as mode:
        operators = isinstance(mode, TorchDispatchMode | FlopCounterMode) and any_backend != "numba"
        same(results(), expected, "auto" if operators else any_backend)
    assert getattr(mode, "seen", 1) > 0


def test_recording_under_another_default_device(backend, x):
    ours, texts = lstmcore.LSTM(I, H, dtype=F64, backend=backend), []
    for surrounding in (contextlib.nullcontext(), torch.device("meta")):
        with surrounding, lstmcore.record_gradient_flow(ours) as flow:
            loss_of(ours(x)).backward()
            texts.append(str(flow.summary()))
    assert texts[0] == texts[1]


def test_profiler(any_backend, x):
    """The layer shows up under its name, forward and backward."""
    ours = lstmcore.LSTM(I, H, dtype=F64, backend=any_backend)
    expected = gradients(ours, x)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, profile_memory=True, with_stack=True
    ) as profile:
        same(gradients(ours, x), expected, any_backend)
    names = [event.key for event in profile.key_averages()]
    assert any("lstm" in name.lower() or "_Layer" in name or "linear" in name for name in names), names
    if any_backend == "numba":
        assert any("Layer" in name and "Backward" in name for name in names), names


def test_anomaly_detection_names_the_layer(backend, x):
    """NaN that arises in a backward pass is reported with the function and the forward call that it comes from."""
    for module in pair(I, H, backend=backend, dtype=F64):
        fed = x.clone()
        fed[-1] = torch.nan
        with warnings.catch_warnings(record=True) as caught, torch.autograd.set_detect_anomaly(True):
            warnings.simplefilter("always")
            loss = module(fed)[0][0].square().sum()
            assert loss.isfinite()
            with pytest.raises(RuntimeError, match=r"Function '\w+' returned nan values") as raised:
                loss.backward()
        text = "".join(str(each.message) for each in caught)
        assert re.search(r"Traceback of forward call that caused the error", text)
        if backend == "numba" and isinstance(module, lstmcore.LSTM):
            assert "Layer" in str(raised.value)
            assert "test_ecosystem.py" in text

"""What tests/gpu/test_cuda.py computes on a GPU; ``python -m tests.support.gpu_problems`` computes a share of it.

A test there runs for milliseconds after its kernels have been compiled for seconds.  Compiled kernels are kept on disk,
so several processes run all of it first, each a share, and what goes wrong is left to the tests to find.

T time, B batch, I input, H hidden, P projection (H where there is none), L layers, D directions.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from lstmcore.kernels.contract import Call, Forward, GateStatistics, Gradients, GradOutputs, Layer, WeightGradients
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstmcore
from lstmcore import backends

from . import cases, contract, gpu_designs
from .contract import Setup, pose, solve

DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """Float32 products as ``name`` says: torch's setting for recurrent layers, which cuDNN and the kernels follow."""
    settings: Any = torch.backends.cudnn.rnn
    before = settings.fp32_precision
    settings.fp32_precision = "ieee" if name == "fp32" else "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


@dataclass(frozen=True)
class Layers:
    """A module and what is fed to it."""

    H: int
    B: int
    T: int
    dtype: str  # "bf16", "fp16", "tf32", "fp32" (products in true float32)
    I: int = 64
    L: int = 1
    P: int = 0
    bidirectional: bool = False
    batch_first: bool = False
    bias: bool = True
    hx: bool = True
    ragged: str = ""  # "packed", or "lengths", which torch's module does not have
    reset: float = 0.0  # the share of steps that reset; torch's module has none
    kind: str | None = None  # the design, where it is not to be the tiling's choice

    def __str__(self) -> str:
        extras = [f"{self.ragged}", f"p{self.P}" if self.P else "", f"l{self.L}" if self.L > 1 else ""]
        extras += [name for name in ("bidirectional", "batch_first") if getattr(self, name)]
        extras += ["reset"] if self.reset else []
        extras += [self.kind or "", "" if self.bias else "no_bias", "" if self.hx else "no_hx"]
        return "-".join([f"h{self.H}-b{self.B}-t{self.T}-{self.dtype}", *filter(None, extras)])

    @property
    def extended(self) -> bool:
        return self.ragged == "lengths" or self.reset > 0

    def arguments(self) -> dict[str, Any]:
        return {
            "input_size": self.I,
            "hidden_size": self.H,
            "num_layers": self.L,
            "bias": self.bias,
            "batch_first": self.batch_first,
            "bidirectional": self.bidirectional,
            "proj_size": self.P,
        }


# The most important first: what fails should fail early.  Each design at its sizes, then what a layer may add.
PROBLEMS = [
    Layers(128, 16, 100, "bf16"),
    Layers(512, 16, 60, "bf16"),
    Layers(1024, 16, 40, "bf16"),
    Layers(768, 16, 60, "fp16"),
    Layers(100, 17, 300, "fp16", I=33),
    Layers(2048, 16, 16, "bf16"),
    Layers(32, 256, 50, "bf16", I=20),
    Layers(129, 5, 60, "fp16", I=7),
    Layers(256, 16, 300, "fp16"),
    Layers(1024, 256, 10, "bf16"),
    Layers(512, 64, 60, "fp16"),
    Layers(100, 16, 60, "tf32"),
    Layers(512, 17, 40, "tf32"),
    Layers(1024, 1, 30, "tf32", hx=False),
    Layers(64, 5, 100, "fp32"),
    Layers(256, 16, 60, "fp32"),
    Layers(513, 1, 40, "fp32", I=3),
    Layers(2048, 1, 10, "tf32"),
    Layers(256, 17, 50, "bf16", bidirectional=True),
    Layers(128, 5, 50, "fp16", bidirectional=True, bias=False),
    Layers(256, 64, 60, "bf16", ragged="packed"),
    Layers(96, 17, 60, "fp16", ragged="packed", bidirectional=True, hx=False),
    Layers(384, 16, 40, "bf16", batch_first=True),
    Layers(256, 16, 40, "bf16", P=64),
    Layers(129, 16, 30, "fp16", L=2, bidirectional=True),
    Layers(200, 17, 40, "bf16", ragged="lengths", reset=0.1, batch_first=True),
    Layers(512, 5, 40, "tf32", ragged="lengths", reset=0.1, bidirectional=True),
    Layers(128, 16, 40, "bf16", reset=0.1, kind="split"),
    Layers(512, 256, 30, "bf16"),
    Layers(768, 130, 20, "fp16", ragged="lengths", reset=0.1, kind="wide"),
    Layers(640, 100, 20, "bf16", L=2, ragged="packed", kind="wide"),
    Layers(512, 96, 20, "bf16", bidirectional=True, P=100, kind="wide"),
    Layers(1024, 64, 20, "fp16", I=30, bias=False, hx=False, kind="wide"),
]


@dataclass
class Data:
    """Float64 on the CPU, of values that the dtype has."""

    input: Tensor  # (T, B, I), or (B, T, I)
    hx: tuple[Tensor, Tensor] | None
    seeds: tuple[Tensor, Tensor, Tensor]  # the gradients of output, h_n, c_n
    lengths: Tensor | None
    reset: Tensor | None
    state_dict: dict[str, Tensor]


def draw(p: Layers) -> Data:
    g = torch.Generator().manual_seed(p.H + p.B)
    dtype, D, P = DTYPES[p.dtype], 2 if p.bidirectional else 1, p.P or p.H

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype).double()

    module = nn.LSTM(**p.arguments(), dtype=torch.float64)
    state_dict = {
        name: ((torch.rand(value.shape, generator=g) * 2 - 1) * p.H**-0.5).to(dtype).double()
        for name, value in module.state_dict().items()
    }
    rows = (p.B, p.T) if p.batch_first else (p.T, p.B)
    states = normal(p.L * D, p.B, P), normal(p.L * D, p.B, p.H)
    lengths = None
    if p.ragged:
        lengths = torch.randint(1, p.T + 1, (p.B,), generator=g)
        lengths[p.B // 2] = p.T
        if p.ragged == "lengths":
            lengths[0] = 0
    reset = torch.rand(rows, generator=g) < p.reset if p.reset else None
    seeds = (normal(*rows, D * P), normal(*states[0].shape), normal(*states[1].shape))
    return Data(normal(*rows, p.I), states if p.hx else None, seeds, lengths, reset, state_dict)


def run(
    p: Layers, data: Data, backend: str | None, dtype: torch.dtype, device: str, *, grad: bool = True, **more: Any
) -> dict[str, Tensor]:
    """Every result by name, in float64 on the CPU; of ``torch.nn.LSTM`` where ``backend`` is None."""
    make: Callable[..., nn.Module] = nn.LSTM if backend is None else lstmcore.LSTM
    more |= {} if backend is None else {"backend": backend}
    module = make(**p.arguments(), dtype=dtype, device=device, **more)
    module.load_state_dict(data.state_dict)

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype).requires_grad_(grad)

    x = leaf(data.input)
    hx = None if data.hx is None else (leaf(data.hx[0]), leaf(data.hx[1]))
    fed: Tensor | PackedSequence = x
    options = {}
    seeds = [seed.to(device, dtype) for seed in data.seeds]
    if p.ragged == "packed":
        fed = pack_padded_sequence(x, data.lengths, p.batch_first, enforce_sorted=False)
        seeds[0] = pack_padded_sequence(seeds[0], data.lengths, p.batch_first, enforce_sorted=False).data
    elif p.ragged:
        options["lengths"] = data.lengths
    if data.reset is not None:
        options["reset"] = data.reset.to(device)
    with precision(p.dtype), torch.set_grad_enabled(grad):
        output, (h_n, c_n) = module(fed, hx, **options)
        if isinstance(output, PackedSequence):
            output = output.data
        results = {"output": output, "h_n": h_n, "c_n": c_n}
        if grad:
            wanted = {
                "input": x,
                **dict(zip(("h_0", "c_0"), hx or (), strict=False)),
                **dict(module.named_parameters()),
            }
            grads = torch.autograd.grad((output, h_n, c_n), list(wanted.values()), seeds)
            results |= {f"grad of {name}": g for name, g in zip(wanted, grads, strict=True)}
    return {name: value.detach().cpu().double() for name, value in results.items()}


def ours(p: Layers, data: Data, *, grad: bool = True, **more: Any) -> dict[str, Tensor]:
    """The results of the kernels, by the design that ``p`` names; ``more``: for the module."""
    with pytest.MonkeyPatch.context() as patch:
        if p.kind:
            gpu_designs.use(patch, p.kind)
        return run(p, data, "triton", DTYPES[p.dtype], DEVICE, grad=grad, **more)


class OnDevice:
    """The Triton backend for callers whose tensors are on the CPU, as those of the contract's tests are."""

    def __init__(self) -> None:
        self.kernels = backends.load("triton")

    @staticmethod
    def there(tensor: Tensor | None) -> Tensor | None:
        """The same on the GPU, laid out as it is here."""
        if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1 or not tensor.is_floating_point():
            return None if tensor is None else tensor.to(DEVICE)
        held = tensor.to(DEVICE)
        return torch.stack([held, torch.full_like(held, torch.nan)], -1).flatten(-2)[..., ::2]

    def move(self, call: Call) -> Call:
        layer = call.layer._replace(device=torch.device(DEVICE, 0))
        return Call.with_tensors(layer, call.rows, [self.there(each) for each in call.tensors])

    def forward(self, call: Call, **options) -> Forward:
        result = self.kernels.forward(self.move(call), **options)
        assert result.output.device.type == torch.device(DEVICE).type
        return Forward(*(None if t is None else t.cpu() for t in result[:4]), result.saved)

    def saves(self, layer: Layer, room: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return self.kernels.saves(layer, room)

    def backward(self, call: Call, grads, output, saved, needs) -> Gradients:
        grads = GradOutputs(*map(self.there, grads))
        result = self.kernels.backward(self.move(call), grads, self.there(output), saved, needs)
        back = [None if t is None else t.cpu() for t in (result.input, result.h_0, result.c_0, result.norms)]
        weights = tuple(WeightGradients(*(None if t is None else t.cpu() for t in w)) for w in result.weights)
        gates = None if result.gates is None else GateStatistics(*(each.cpu() for each in result.gates))
        return Gradients(*back[:3], weights, back[3], gates)


# Every mask of the kernels, small: rows that end early or have no step, resets, projections, both directions.
SETUP_NAMES = ["dense", "ones", "one_row", "strided_batch_first", "proj", "reset_bidirectional", "reset_proj"]
SETUP_NAMES += ["lengths", "lengths_reset", "lengths_b33", "packed_unsorted", "packed_reset", "packed_long"]
SETUPS = [replace(s, dtype=torch.float32) for s in contract.SETUPS if s.name in SETUP_NAMES]
CONTRACT = [(kind, setup) for kind in ("resident", "split") for setup in SETUPS]
SEGMENTED = [
    (kind, replace(s, segment=2))
    for kind, s in CONTRACT
    if s.name in ("strided_batch_first", "reset_proj", "lengths_reset", "packed_reset")
]
POISONED = [(kind, s) for kind, s in CONTRACT if s.name in ("dense", "lengths_reset", "packed_reset")]

# How tensors lie, and stacks of layers: cases of the suite's grid.
CASES = ["layers_bidirectional", "everything", "packed_everything", "unbatched", "sliced", "expanded", "saturated"]
CASES += ["transposed_batch_first", "packed_one_step", "no_bias"]

RACES = [Layers(128, 16, 48, "bf16"), Layers(256, 17, 48, "bf16"), Layers(1024, 16, 24, "bf16")]
RACES += [Layers(512, 256, 24, "bf16")]
JITTERS = (700, 2500)  # nanoseconds

RECOMPUTED = [Layers(128, 17, 300, "bf16"), Layers(512, 16, 300, "fp16", bidirectional=True)]
INFERENCE = [PROBLEMS[0], PROBLEMS[1], PROBLEMS[20]]


def solve_on_device(kind: str, setup: Setup) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch, precision("fp32"):
        gpu_designs.use(patch, kind)
        return solve(OnDevice(), pose(setup))


def race(p: Layers, data: Data, jitter: int) -> dict[str, Tensor]:
    """The results of ``p`` by kernels that sleep for random times of up to ``jitter`` nanoseconds in every step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends.load("triton").launch, "JITTER", jitter)
        return ours(p, data)


def case_on_device(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    case = cases.BY_NAME[name]
    with precision("fp32"):
        return cases.run(case, cases.draw(case, dtype), dtype, "triton", device=DEVICE)


def everything() -> list[Callable[[], object]]:
    """All kernels that the tests will want, the slowest to compile first."""
    jobs: list[Callable[[], object]] = [lambda p=p: ours(p, draw(p)) for p in PROBLEMS]
    jobs += [lambda p=p: ours(p, draw(p), recompute=32) for p in RECOMPUTED]
    jobs += [lambda p=p, j=j: race(p, draw(p), j) for p in RACES for j in (0, *JITTERS)]
    jobs += [lambda k=k, s=s: solve_on_device(k, s) for k, s in (*CONTRACT, *SEGMENTED)]
    jobs += [lambda n=n: case_on_device(n, torch.float32) for n in CASES]
    jobs += [lambda p=p: ours(p, draw(p), grad=False) for p in INFERENCE]
    return jobs


def main(worker: int, workers: int) -> None:
    for job in everything()[worker::workers]:
        with contextlib.suppress(Exception):  # the tests find it again, and say more
            job()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

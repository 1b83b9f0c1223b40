"""``check``: outputs and gradients beside those of float64 ``torch.nn.LSTM``, on this machine."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import lstmcore
from lstmcore.cli.options import DTYPES
from lstmcore.kernels.precision import tf32
from lstmcore.tables import table


@dataclass(frozen=True)
class Comparison:
    """One comparison of the parity check, ``python -m lstmcore check``."""

    name: str
    module: dict[str, Any] = field(default_factory=dict)  # arguments of LSTM over those of DEFAULTS
    steps: int = 33
    batch: int = 5
    form: str = "padded"  # or "packed", "unbatched"
    dtype: str = "float32"
    training: bool = True  # gradients too


DEFAULTS = {"input_size": 12, "hidden_size": 48}
COMPARISONS = (
    Comparison("plain"),
    Comparison("long", steps=1000, batch=3),
    Comparison("B = 1", batch=1),
    Comparison("wide batch", batch=37),
    Comparison("odd sizes", {"input_size": 1, "hidden_size": 17}, steps=7, batch=3),
    Comparison("H = 256", {"input_size": 256, "hidden_size": 256}, batch=16),
    Comparison("no bias", {"bias": False}),
    Comparison("batch_first", {"batch_first": True}),
    Comparison("unbatched", form="unbatched"),
    Comparison("bidirectional", {"bidirectional": True}),
    Comparison("projection", {"proj_size": 20}),
    Comparison("3 layers", {"num_layers": 3}),
    Comparison("packed", batch=9, form="packed"),
    Comparison("packed, all of it", {"num_layers": 2, "bidirectional": True, "proj_size": 20}, batch=9, form="packed"),
    Comparison("float64", dtype="float64"),
    Comparison("bfloat16", dtype="bfloat16"),
    Comparison("float16", dtype="float16"),
)


class Line(NamedTuple):
    """What was found of a comparison's outputs, or gradients."""

    case: Comparison
    what: str
    error: float  # the largest, relative to the largest value
    tolerance: float

    @property
    def good(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def check(arguments: argparse.Namespace) -> int:
    """Compares outputs and all gradients with float64 ``torch.nn.LSTM`` on this machine."""
    start = time.perf_counter()
    lines = compare(COMPARISONS, arguments.device, arguments.backend)
    print(
        table(
            ("case", "dtype", "what", "max error", "tolerance", "result"),
            [
                (
                    line.case.name,
                    line.case.dtype,
                    line.what,
                    f"{line.error:.1e}",
                    f"{line.tolerance:.1e}",
                    "ok" if line.good else "FAILED",
                )
                for line in lines
            ],
        )
    )
    seconds, good = time.perf_counter() - start, sum(line.good for line in lines)
    print(f"\n{good} of {len(lines)} ok in {seconds:.1f} s (errors relative to the largest value)")
    return int(good < len(lines))


def compare(cases: Sequence[Comparison], device: str, backend: str) -> list[Line]:
    """Two lines of each case: of its outputs, and of its gradients, which one in inference does not have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LSTM with projections")  # torch's, on its own slow path
        return [line for seed, case in enumerate(cases) for line in _compare(case, seed, device, backend)]


def _compare(case: Comparison, seed: int, device: str, backend: str) -> Iterator[Line]:
    torch.manual_seed(seed)
    kwargs: dict[str, Any] = {**DEFAULTS, **case.module}
    oracle = nn.LSTM(**kwargs, dtype=torch.float64)
    tensors = _tensors(case, oracle)
    dtype = DTYPES[case.dtype]
    modules = [
        oracle,
        nn.LSTM(**kwargs, dtype=dtype, device=device),
        lstmcore.LSTM(**kwargs, dtype=dtype, device=device, backend=backend),
    ]
    for module in modules[1:]:
        module.load_state_dict(oracle.state_dict())
    with torch.no_grad():  # all of them start from values that the dtype can represent
        oracle.load_state_dict({name: value.double().cpu() for name, value in modules[1].state_dict().items()})
    tensors = [tensor.to(dtype).double() for tensor in tensors]
    floor = _floor(dtype, device)
    truth, torchs, ours = ([*_run(case, module, tensors)] for module in modules)
    for what, at in (("outputs", slice(0, 3)), ("gradients", slice(3, None)))[: 1 + case.training]:
        error, peer = _error(ours[at], truth[at]), _error(torchs[at], truth[at])
        yield Line(case, what, error, 2 * peer + floor)  # twice the error of torch's own


def _floor(dtype: torch.dtype, device: str) -> float:
    """The error that is granted whatever torch's is."""
    if dtype == torch.float32 and torch.device(device).type == "cuda" and tf32():
        return 2 * torch.finfo(torch.float16).eps  # operands may be truncated to TF32, where float16 is rounded
    roundings = 1 if torch.finfo(dtype).bits == 16 else 8  # 16-bit types round what they return, and little else
    return roundings * torch.finfo(dtype).eps


def _tensors(case: Comparison, oracle: nn.LSTM) -> list[Tensor]:
    """input, h_0, c_0 and the gradients of output, h_n, c_n, drawn in float64."""
    shape = {
        "padded": (case.batch, case.steps) if oracle.batch_first else (case.steps, case.batch),
        "packed": (case.batch, case.steps),
        "unbatched": (case.steps,),
    }[case.form]
    directions = 2 if oracle.bidirectional else 1
    width = oracle.proj_size or oracle.hidden_size
    rows = () if case.form == "unbatched" else (case.batch,)
    states = (oracle.num_layers * directions, *rows)
    sizes = [(*shape, oracle.input_size), (*states, width), (*states, oracle.hidden_size), (*shape, directions * width)]
    return [torch.randn(size, dtype=torch.float64) for size in (*sizes, sizes[1], sizes[2])]


def _run(case: Comparison, module: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
    """output, h_n, c_n, then in training the gradients of input, h_0, c_0 and every parameter."""
    with torch.set_grad_enabled(case.training):
        return _run_as_set(case, module, tensors)


def _run_as_set(case: Comparison, module: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
    like = next(module.parameters())
    input, h_0, c_0, *grads = (tensor.to(like).detach().requires_grad_() for tensor in tensors)
    if case.form == "packed":
        lengths = [1 + (7 * row) % case.steps for row in range(case.batch)]  # unsorted
        packed = pack_sequence([sequence[:n] for sequence, n in zip(input, lengths, strict=True)], enforce_sorted=False)
        output, states = module(packed, (h_0, c_0))
        output = output.data
        grads[0] = grads[0].flatten(0, 1)[: len(output)]
    else:
        output, states = module(input, (h_0, c_0))
    outputs = [output, *states]
    found: tuple[Tensor, ...] = ()
    if case.training:
        leaves = [input, h_0, c_0, *module.parameters()]
        found = torch.autograd.grad(outputs, leaves, [grad.detach() for grad in grads])
    return [tensor.detach().double().cpu() for tensor in (*outputs, *found)]


def _error(ours: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest error of any tensor, relative to the largest value of the true one; NaN if any value is."""
    errors = [(a - b).abs().max() / b.abs().max().clamp_min(1e-12) for a, b in zip(ours, truth, strict=True)]
    return float(torch.stack(errors).max())

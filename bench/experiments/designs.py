"""The time of a step by every design that the tiling may choose from.

For a few shapes, each way to share the work runs once for its result (compared with torch's LSTM in float32) and then
for its time: that of the recurrence alone, between two events around its launch, over the steps.  Beside it stands
what the model (``kernels/gpu/tiling.py``) predicted: the constants there are fitted to this table.

Legend: T steps, B batch, H hidden; U units of a program.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from lstmcore.kernels.gpu import tiling
from lstmcore.kernels.gpu.tiling import Design
from torch import Tensor, nn

import lstmcore
from bench.cases import Case, select
from bench.gpu import launches
from bench.gpu.compile import spread
from bench.measure import Experiment, Task, row_of
from bench.rows import Row
from bench.timing import Effort

DEVICE = "cuda"
MOST = 8  # designs of a shape and pass: those with the shortest predicted times
COMPILE_S = 60.0  # for all kernels, by several processes
H200 = (132, 227 * 1024)  # multiprocessors, bytes of shared memory
SHARES = ("kind", "units", "tile", "rows", "groups", "tiles", "slices", "warps", "chunk", "chunks", "stream")


def designs(hidden: int, batch: int, backward: bool, sms: int, shared: int) -> list[Design]:
    """The tiling's choice, and others of short predicted times."""
    chosen = tiling.choose_design(hidden, batch, 1, "16", sms, backward, shared=shared)
    others = tiling.split_designs(hidden, batch, 1, "16", sms, backward, shared)
    ordered = sorted((each for each in others if each != chosen), key=lambda each: each.step_time)
    return [chosen, *ordered[: MOST - 1]]


class Problem:
    """A shape's data, and both passes of a layer."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        hidden, like = case.hidden_size, {"device": DEVICE, "dtype": case.torch_dtype}
        self.module = lstmcore.LSTM(hidden, hidden, backend="triton", **like)
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)  # of the gradients only the input's is wanted: the rest is no recurrence
        self.input = torch.randn(case.steps, case.batch, hidden, **like, requires_grad=True)
        self.grad = torch.randn_like(self.input)

    def forward(self) -> Tensor:
        """The output, in training."""
        return self.module(self.input)[0]

    def backward(self, output: Tensor) -> Tensor:
        """The gradient of the input; the graph stays for another pass."""
        return torch.autograd.grad(output, self.input, self.grad, retain_graph=True)[0]

    def expected(self) -> tuple[Tensor, Tensor]:
        """Both, of torch's LSTM in float32."""
        wide = nn.LSTM(*[self.input.shape[-1]] * 2, device=DEVICE)
        wide.load_state_dict(self.module.state_dict())
        x = self.input.detach().float().requires_grad_()
        output = wide(x)[0]
        return output.detach(), torch.autograd.grad(output, x, self.grad.float())[0]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().float() - expected).norm() / expected.norm())


def measure(case: Case, task: Task) -> Iterator[Row]:
    """A row a design, forward (in training) and backward."""
    problem = Problem(case)
    expected, expected_grad = problem.expected()
    output = problem.forward()
    for backward in (False, True):
        choice = designs(case.hidden_size, case.batch, backward, *launches.limits())
        for design in choice:
            run = (lambda: problem.backward(output)) if backward else problem.forward
            with launches.using(design):
                off = error(launches.timed(run)[1], expected_grad if backward else expected)
                us = statistics.median(launches.timed(run)[0] for _ in range(task.effort.min_pairs)) / case.steps
            shares = {name: str(getattr(design, name)) for name in SHARES}
            yield row_of(
                "designs",
                case,
                "backward" if backward else "forward",
                variant=name_of(shares),
                backend="triton",
                pairs=task.effort.min_pairs,
                p50_ms=us / 1e3,
                max_error=off,
                reference="torch float32",
                details={**shares, "chosen": str(design == choice[0]), "predicted_us": f"{design.step_time:.6g}"},
            )


def name_of(shares: dict[str, str]) -> str:
    """A design in short."""
    name = "{kind} U{units} BT{tile} W{warps} {slices}x{groups}x{tiles}x{rows}".format(**shares)
    if shares["chunk"] == "0":
        return name
    return f"{name} K{shares['chunk']}x{shares['chunks']}{' streamed' if shares['stream'] == 'True' else ''}"


def kernels(sms: int, shared: int) -> list[tuple[Case, bool, Design]]:
    """One design for each kernel that will be wanted: its case, backward, itself."""
    wanted = {}
    for case in select("designs", "cuda"):
        for backward in (False, True):
            for each in designs(case.hidden_size, case.batch, backward, sms, shared):
                shares = (each.kind, each.units, each.tile, each.warps, each.chunk, each.chunks, each.stream)
                wanted.setdefault((case.hidden_size, backward, *shares), (case, backward, each))
    return list(wanted.values())


def compile_share(worker: int, workers: int) -> None:
    """Every ``workers``-th kernel, for the cache on disk."""
    for case, backward, design in kernels(*launches.limits())[worker::workers]:
        problem = Problem(replace(case, steps=2))
        output = problem.forward() if backward else None
        with launches.using(design):
            problem.forward() if output is None else problem.backward(output)


def plan(case: Case) -> Iterator[str]:
    """Says what would run on an H100 or H200."""
    for backward in (False, True):
        for each in designs(case.hidden_size, case.batch, backward, *H200):
            yield f"H {case.hidden_size}, B {case.batch}, {'backward' if backward else 'forward'}: {each}"


def key_figures(rows: Sequence[Row]) -> str:
    by_pass: dict[str, list[Row]] = {}
    for row in rows:
        by_pass.setdefault(f"H{row.hidden_size} B{row.batch} {row.mode}", []).append(row)
    best = []
    for name, same in by_pass.items():
        chosen = ", ".join(f"{row.p50_ms * 1e3:.2f}" for row in same if row.details["chosen"] == "True")
        best.append(f"{name} {min(row.p50_ms for row in same) * 1e3:.2f} (chosen {chosen})")
    return f"µs a step, best: {', '.join(best) or 'none'}"


DESIGNS = Experiment(
    name="designs",
    what="the time of a step on a GPU by every design that the tiling may choose from, its choice first",
    times="a step of the recurrence",
    measure=measure,
    full={"cuda": Effort(5, 0.0)},
    details={
        **dict.fromkeys(SHARES, "of the design: see kernels/gpu/tiling.py"),
        "chosen": "whether the tiling takes this one",
        "predicted_us": "microseconds of a step, as the tiling's model has it",
    },
    prepare=lambda limit_s: spread(compile_share, min(COMPILE_S, limit_s / 2)),
    plan=plan,
    show=None,
    key_figures=key_figures,
    whole=True,
)

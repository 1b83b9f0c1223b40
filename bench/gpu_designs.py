"""``python -m bench.gpu_designs``: the time of a step by every design that the tiling may choose from.

For a few shapes, each way to share the work runs once for its result (compared with torch's LSTM in float32) and then
for its time: that of the recurrence alone, between two events around its launch, over the steps.  Beside it stands
what the model (``kernels/gpu/tiling.py``) predicted: the constants there are fitted to this table.

Legend: T steps, B batch, H hidden; U units of a program.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lstmcore.kernels.contract import Forward, Needs, Rows, Weights
from lstmcore.kernels.gpu import backend, tiling
from lstmcore.kernels.gpu.tiling import Design
from torch import Tensor, nn

from bench import machine, results
from bench.gpu_compile import spread
from bench.run import NO_GPU
from bench.table import KEY_FIGURES

SHAPES = ((128, 16), (512, 16), (1024, 16), (256, 16), (768, 16), (512, 64), (1024, 64), (1024, 256))  # H, B
DTYPE = torch.bfloat16
STEPS = 1024
DESIGNS = 8  # of a shape and pass: those with the shortest predicted times
REPEATS = 5
AHEAD = 1_000_000  # clock cycles for which the device sleeps while the host prepares the launches that are timed
COMPILE_S = 60.0  # for all kernels, by several processes


@dataclass(frozen=True)
class DesignRow:
    """One design of one shape and pass."""

    device: str
    triton: str
    hidden_size: int
    batch: int
    part: str  # "forward" (in training) or "backward"
    kind: str
    units: int
    tile: int
    rows: int
    groups: int
    tiles: int
    slices: int
    warps: int
    chunk: int
    chunks: int
    stream: bool
    chosen: bool  # by the tiling
    error: float  # of the pass's result, against torch's LSTM in float32
    us: float  # a step
    predicted_us: float


def designs(hidden: int, batch: int, backward: bool, sms: int, shared: int) -> list[Design]:
    """The tiling's choice, and others of short predicted times."""
    chosen = tiling.plan(hidden, batch, 1, "16", sms, backward, shared=shared)
    others = tiling.split_designs(hidden, batch, 1, "16", sms, backward, shared)
    ordered = sorted((each for each in others if each != chosen), key=lambda each: each.step_time)
    return [chosen, *ordered[: DESIGNS - 1]]


class Problem:
    """A shape's data, and both passes of a layer by a design."""

    def __init__(self, hidden: int, batch: int, steps: int) -> None:
        torch.manual_seed(0)
        self.module = nn.LSTM(hidden, hidden, device="cuda", dtype=DTYPE)
        self.input = torch.randn(steps, batch, hidden, device="cuda", dtype=DTYPE)
        self.grad = torch.randn_like(self.input)
        p = self.module
        self.weights = (Weights(*(w.detach() for w in (p.weight_ih_l0, p.weight_hh_l0, p.bias_ih_l0, p.bias_hh_l0))),)
        self.rows = Rows(steps, batch)

    def forward(self) -> Forward:
        return backend.forward(self.input, None, None, self.weights, self.rows, save=True)

    def backward(self, done: Forward) -> Tensor:
        given = {"weights": self.weights, "rows": self.rows, "output": done.output, "saved": done.saved}
        needs = Needs(weights=False)
        gradients = backend.backward(
            self.grad, None, None, None, input=self.input, h_0=None, c_0=None, needs=needs, **given
        )
        assert gradients.input is not None
        return gradients.input

    def expected(self) -> tuple[Tensor, Tensor]:
        """The output and the gradient of the input, of torch's LSTM in float32."""
        wide = nn.LSTM(*[self.input.shape[-1]] * 2, device="cuda")
        wide.load_state_dict(self.module.state_dict())
        x = self.input.float().requires_grad_()
        output = wide(x)[0]
        return output.detach(), torch.autograd.grad(output, x, self.grad.float())[0]


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Microseconds of the launch of the recurrence in ``run()``, and what that returned."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    launch = backend._Recurrence.launch

    def between(call: backend._Recurrence, *arguments: object, **options: bool) -> None:
        torch.cuda._sleep(AHEAD)
        events[0].record()
        launch(call, *arguments, **options)  # type: ignore[arg-type]
        events[1].record()

    with mock.patch.object(backend._Recurrence, "launch", between):
        result = run()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) * 1000, result


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm())


def measure(hidden: int, batch: int, sms: int, shared: int, steps: int) -> Iterator[DesignRow]:
    """A shape's designs, forward and backward."""
    problem = Problem(hidden, batch, steps)
    output, grad = problem.expected()
    done = problem.forward()
    for part in ("forward", "backward"):
        backward = part == "backward"
        choice = designs(hidden, batch, backward, sms, shared)
        for design in choice:
            with mock.patch.object(backend, "_plan", lambda *_, design=design: design):
                run = (lambda: problem.backward(done)) if backward else problem.forward
                result = timed(run)[1]
                off = error(result, grad) if backward else error(result.output, output)
                us = statistics.median(timed(run)[0] for _ in range(REPEATS)) / steps
            sizes = (design.kind, design.units, design.tile, design.rows, design.groups, design.tiles, design.slices)
            place = (machine.device_name("cuda"), machine.versions()["triton"], hidden, batch, part)
            chunks = (design.chunk, design.chunks, design.stream)
            yield DesignRow(*place, *sizes, design.warps, *chunks, design == choice[0], off, us, design.step_time)


def kernels(sms: int, shared: int) -> list[tuple[int, int, bool, Design]]:
    """One design for each kernel that will be wanted: H, B, backward."""
    wanted = {}
    for hidden, batch in SHAPES:
        for backward in (False, True):
            for each in designs(hidden, batch, backward, sms, shared):
                shares = (each.kind, each.units, each.tile, each.warps, each.chunk, each.chunks, each.stream)
                wanted.setdefault((hidden, backward, *shares), (hidden, batch, backward, each))
    return list(wanted.values())


def compile_share(worker: int, workers: int, sms: int, shared: int) -> None:
    """Every ``workers``-th kernel, for the cache on disk."""
    for hidden, batch, backward, design in kernels(sms, shared)[worker::workers]:
        problem = Problem(hidden, batch, 2)
        done = problem.forward() if backward else None
        with mock.patch.object(backend, "_plan", lambda *_, design=design: design):
            problem.forward() if done is None else problem.backward(done)


def run(out: Path, limit_s: float, sms: int, shared: int) -> int:
    """Measures all shapes within the time limit; writes designs.csv and prints a line for each design."""
    started = time.monotonic()
    print(spread("bench.gpu_designs", min(COMPILE_S, limit_s / 2)))
    print("    H    B pass       error     µs predicted design (* chosen)")
    rows: list[DesignRow] = []
    failed = 0
    for hidden, batch in SHAPES:
        if time.monotonic() - started > limit_s:
            print(f"H {hidden}, B {batch}: not measured: the {limit_s:.0f} seconds were used up")
            continue
        try:
            for row in measure(hidden, batch, sms, shared, STEPS):
                rows.append(row)
                mark = "*" if row.chosen else " "
                shares = f"{row.kind} U{row.units} BT{row.tile} W{row.warps}"
                shares += f" {row.slices}x{row.groups}x{row.tiles}x{row.rows}"
                chunks = f" K{row.chunk}x{row.chunks}{' streamed' if row.stream else ''}" if row.chunk else ""
                print(
                    f"{hidden:5} {batch:4} {row.part:<8} {row.error:8.1e} {row.us:6.2f} {row.predicted_us:6.2f} {mark} "
                    f"{shares}{chunks}",
                    flush=True,
                )
        except Exception as problem:  # the other shapes have figures to give
            failed += 1
            print(f"H {hidden}, B {batch}: {type(problem).__name__}: {problem}")
        results.write(out / "designs.csv", rows, DesignRow)
    best = [
        f"H{h} B{b} {part} {min(r.us for r in these):.2f} (chosen {next(r.us for r in these if r.chosen):.2f})"
        for h, b in SHAPES
        for part in ("forward", "backward")
        if (these := [r for r in rows if (r.hidden_size, r.batch, r.part) == (h, b, part)])
    ]
    print(f"{KEY_FIGURES}µs a step, best: {', '.join(best) or 'none'}")
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_designs", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--limit-s", type=float, default=600.0, metavar="SECONDS", help="start nothing after that")
    parser.add_argument("--dry-run", action="store_true", help="say what would run on an H100 or H200")
    parser.add_argument("--compile", type=int, nargs=2, metavar=("WORKER", "WORKERS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.dry_run:
        for hidden, batch in SHAPES:
            for backward in (False, True):
                for each in designs(hidden, batch, backward, 132, 227 * 1024):
                    print(f"H {hidden}, B {batch}, {'backward' if backward else 'forward'}: {each}")
        return 0
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    sizes = backend._sms(device), backend._shared(device)
    if options.compile:
        compile_share(*options.compile, *sizes)
        return 0
    return run(options.out, options.limit_s, *sizes)


if __name__ == "__main__":
    sys.exit(main())

"""``python -m bench.gpu_experiments handoff|steps``: what one step costs, and what of it is the hand-off.

``steps`` times one layer over two lengths and takes the difference, which leaves what a single step costs and drops
what a call costs; beside torch's figure for the same and beside the model's prediction.  The input product is part of
a step, as it is in the benchmark; its own time stands beside, so that the recurrence can be told from it.

``handoff`` times the exchange between blocks of threads with next to no work in between.

Legend: T steps, B batch, H hidden.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import gpu_cases, machine, results
from bench.cases import MODES, Case
from bench.gpu_cases import HIDDEN
from bench.providers import OURS, PEER, Runner, algorithm, build, draw
from bench.run import NO_GPU, NOTHING, release
from bench.table import KEY_FIGURES
from bench.timing import CLOCKS, Samples, interleave
from bench.verify import check

SHORT, LONG = 1024, 2048  # steps: the difference is taken between the two
BATCHES = (16, 64, 1)  # what matters most comes first, for a time limit may cut the end
PASSES = ("inference", "forward", "backward")  # forward: in training, which also stores what backward reads
MIN_PAIRS, BUDGET_S = 5, 0.1
BACKEND = "triton"  # by name: "auto" may leave a shape to torch

HANDOFF_STEPS, HANDOFF_ROWS, HANDOFF_WIDTH = 4096, 16, 16


@dataclass(frozen=True)
class StepRow:
    """One pass of one shape, in microseconds a step."""

    device: str
    torch: str
    triton: str
    cudnn: str
    dtype: str
    hidden_size: int
    batch: int
    part: str  # one of PASSES
    ours: str  # what ran
    peer: str
    ours_us: float
    peer_us: float
    product_us: float | None  # the input product alone, which both times include; forward only
    predicted_us: float | None


@dataclass(frozen=True)
class HandoffRow:
    """One number of blocks of threads, in microseconds a hand-off."""

    device: str
    triton: str
    blocks: int
    rows: int
    width: int
    us: float


def step_cases() -> list[Case]:
    """The shapes at their shorter length."""
    return [
        Case(f"step-h{hidden}-b{batch}", "step", hidden, hidden, batch, SHORT, dtype="bfloat16", device="cuda")
        for batch in BATCHES
        for hidden in HIDDEN
    ]


def _module(name: str) -> Any | None:
    """A module of the kernels, or None where this version has none of that name."""
    full = f"lstmcore.kernels.{name}"
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name != full:
            raise
        return None


def predicted_us(case: Case, part: str, multiprocessors: int) -> float | None:
    """The model's microseconds a step of the recurrence, without the input product; None where there is no model."""
    model = _module("gpu.tiling")
    if model is None:
        return None
    precision = model.precision_of(case.torch_dtype, case.tf32)
    sizes = (case.hidden_size, case.batch, case.directions)
    return float(model.predict(*sizes, precision, multiprocessors, backward=part == "backward"))


def _timed(ours: Callable[[], object], peer: Callable[[], object]) -> Samples:
    return interleave(ours, peer, min_pairs=MIN_PAIRS, budget_s=BUDGET_S, clock=CLOCKS["cuda"])


def _forward_in_training(runner: Runner) -> Callable[[], object]:
    """A forward that stores what a backward would read."""
    runner.module.train()
    return runner.forward


def _seconds(case: Case, checked: bool) -> dict[tuple[str, str], float]:
    """Median seconds of a call by pass (and of the input product), and by provider; checked first where asked for."""
    problem = draw(case)
    ours, peer = build(OURS, problem, BACKEND), build(PEER, problem)
    if checked:
        check(problem, ours, peer, MODES)
    else:
        ours.training(), peer.training()
    rows = problem.input.flatten(0, 1)  # (T * B, I)
    weight = problem.weights["weight_ih_l0"]

    def product() -> object:
        return nn.functional.linear(rows, weight)

    samples = {
        "inference": _timed(ours.inference, peer.inference),
        "forward": _timed(_forward_in_training(ours), _forward_in_training(peer)),
        "training": _timed(ours.training, peer.training),
        "product": _timed(product, product),
    }
    seconds = {}
    for name, pair in samples.items():
        seconds[name, OURS] = statistics.median(pair.ours)
        seconds[name, PEER] = statistics.median(pair.peer)
    for provider in (OURS, PEER):
        seconds["backward", provider] = seconds["training", provider] - seconds["forward", provider]
    return seconds


def step_rows(case: Case) -> Iterator[StepRow]:
    """A shape's passes."""
    short, long = _seconds(case, checked=True), _seconds(replace(case, steps=LONG), checked=False)

    def us(name: str, provider: str) -> float:
        return (long[name, provider] - short[name, provider]) / (LONG - SHORT) * 1e6

    for part in PASSES:
        mode = "inference" if part == "inference" else "training"
        yield StepRow(
            device=machine.device_name("cuda"),
            torch=torch.__version__,
            triton=machine.versions()["triton"],
            cudnn=machine.cudnn(),
            dtype=case.dtype,
            hidden_size=case.hidden_size,
            batch=case.batch,
            part=part,
            ours=algorithm(OURS, case, mode, BACKEND),
            peer=algorithm(PEER, case, mode),
            ours_us=us(part, OURS),
            peer_us=us(part, PEER),
            product_us=None if part == "backward" else us("product", OURS),
            predicted_us=predicted_us(case, part, machine.units("cuda")),
        )


def _optional(value: float | None) -> str:
    return f"{'':>7}" if value is None else f"{value:7.2f}"


def steps(out: Path, limit_s: float) -> int:
    """Measures all shapes within the time limit; writes steps.csv and prints a line for each pass."""
    started = time.monotonic()
    rows: list[StepRow] = []
    failed = 0
    print(
        f"µs a step, T {LONG} less T {SHORT}, bfloat16, I = H\n    H    B pass          ours   torch product predicted"
    )
    for case in step_cases():
        if time.monotonic() - started + predicted_s(case) > limit_s:
            print(f"{case.name}: not measured: the {limit_s:.0f} seconds were used up")
            continue
        try:
            new = list(step_rows(case))
        except Exception as error:  # the other shapes have figures to give
            failed += 1
            print(f"{case.name}: no figure: {type(error).__name__}: {error}")
            new = []
        if not release():
            print("the GPU was lost: no more shapes")
            break
        rows += new
        results.write(out / "steps.csv", rows, StepRow)
        for row in new:
            print(
                f"{row.hidden_size:5} {row.batch:4} {row.part:<10} {row.ours_us:7.2f} {row.peer_us:7.2f} "
                f"{_optional(row.product_us)} {_optional(row.predicted_us)}  {row.ours} / {row.peer}",
                flush=True,
            )
    shown = [row for row in rows if row.batch == 16 and row.hidden_size in (128, 1024) and row.part != "inference"]
    parts = [f"H{row.hidden_size} {row.part} {row.ours_us:.2f} (torch {row.peer_us:.2f})" for row in shown]
    print(f"{KEY_FIGURES}µs a step at B 16: {', '.join(parts) or 'none'}")
    return 1 if failed else 0


def predicted_s(case: Case) -> float:
    """Seconds that a shape is expected to take: both lengths, three timed calls of both providers, compilation."""
    long = replace(case, steps=LONG)
    calls = sum(
        gpu_cases.call_s(each, mode) for each in (case, long) for mode in ("inference", "inference", "training")
    )
    return gpu_cases.COMPILE_S / len(BATCHES) + 1.0 + 2 * (MIN_PAIRS + 3) * calls


def handoff(out: Path) -> int:
    """Measures the hand-off by number of blocks; writes handoff.csv."""
    measure = getattr(_module("gpu.probe"), "handoff_latency", None)
    if measure is None:
        print("this version of the kernels has no lstmcore.kernels.gpu.probe.handoff_latency")
        return NOTHING
    rows: list[HandoffRow] = []
    for blocks in handoff_blocks(machine.units("cuda")):
        us = float(measure(blocks, HANDOFF_ROWS, HANDOFF_WIDTH, torch.bfloat16, HANDOFF_STEPS))
        rows.append(
            HandoffRow(
                device=machine.device_name("cuda"),
                triton=machine.versions()["triton"],
                blocks=blocks,
                rows=HANDOFF_ROWS,
                width=HANDOFF_WIDTH,
                us=us,
            )
        )
        results.write(out / "handoff.csv", rows, HandoffRow)
        print(f"{blocks:4} blocks of threads: {us:6.2f} µs a hand-off", flush=True)
    print(f"{KEY_FIGURES}µs a hand-off: {', '.join(f'{row.us:.2f} of {row.blocks}' for row in rows)}")
    return 0


def handoff_blocks(multiprocessors: int) -> list[int]:
    """Powers of two up to one block a multiprocessor, and all of them."""
    powers = [2**k for k in range(1, 11) if 2**k <= multiprocessors]
    return [*powers, *([multiprocessors] if multiprocessors not in powers else [])]


def plan(experiment: str) -> int:
    """Prints what would run."""
    if experiment == "handoff":
        shape = f"{HANDOFF_ROWS} rows of {HANDOFF_WIDTH} units a block, {HANDOFF_STEPS} steps, bfloat16"
        print(f"blocks of threads on an H100 or H200: {handoff_blocks(132)}; {shape}")
        return 0
    for case in step_cases():
        print(f"{case.name}: T {SHORT} and {LONG}, {', '.join(PASSES)}; predicted {predicted_s(case):.1f} s")
    print(f"predicted: {sum(map(predicted_s, step_cases())):.0f} s")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_experiments", description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=("handoff", "steps"))
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--limit-s", type=float, default=600.0, metavar="SECONDS", help="start nothing after that")
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    options = parser.parse_args(arguments)
    if options.dry_run:
        return plan(options.experiment)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    return handoff(options.out) if options.experiment == "handoff" else steps(options.out, options.limit_s)


if __name__ == "__main__":
    sys.exit(main())

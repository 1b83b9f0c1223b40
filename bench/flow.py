"""What recording the gradient flow costs: training steps with and without it, alternating in one process.

    python -m bench.flow            # three minutes on two cores; writes out/bench/flow/<device>.csv
    python -m bench.flow --save     # writes bench/results/flow/<device>.csv

A recorded step is timed with everything that a training waits for: entering and leaving the context, the kernel's
norms, the statistics of the gates.  Means and quantiles are worked out when somebody reads the records, which is timed
apart.  Before a case is timed, its outputs and gradients are checked against torch, and found to be the same bits with
the recording as without.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import lstmcore
from bench import machine, results
from bench.cases import CASES, Case
from bench.gpu_cases import GPU_CASES
from bench.providers import OURS, PEER, Runner, build, draw, precision
from bench.run import NO_GPU
from bench.timing import CLOCKS, interleave, percentile
from bench.verify import Mismatch, check

BACKENDS = {"cpu": "numba", "cuda": "triton"}
LIMIT = 0.05  # of the time of a training step: what the project promises
NAMES = {
    "cpu": (
        "dense-h16-b1-t1000", "dense-h16-b8-t1000", "dense-h16-b32-t1000", "dense-h64-b8-t1000", "dense-h64-b32-t1000",
        "dense-h128-b32-t1000", "dense-h256-b32-t1000", "dense-h512-b8-t1000", "dense-h1024-b8-t250",
    ),
    "cuda": (
        "cuda-bfloat16-h1024-b16-t1024", "cuda-bfloat16-h128-b16-t1024", "cuda-packed-bfloat16-h512-b16-t1024",
        "cuda-float32-h512-b16-t1024",
    ),
}  # fmt: skip
EVERY = (1, 10)
OUT = Path("out/bench")


@dataclass(frozen=True)
class FlowRow:
    """One case, recorded in every so many steps."""

    commit: str
    date: str
    torch: str
    device: str
    threads: int
    case: str
    backend: str
    every: int
    pairs: int
    off_ms: float  # a training step, median
    on_ms: float
    overhead: float  # median over the pairs of (on - off) / off
    overhead_p20: float
    overhead_p80: float
    reading_ms: float  # to read what was recorded of a step


def recorded(runner: Runner, every: int) -> Callable[[], None]:
    """``every`` training steps, the first of them recorded."""

    def steps() -> None:
        with lstmcore.record_gradient_flow(runner.module, every) as flow:
            for _ in range(every):
                runner.training()
        assert flow.passes == every

    return steps


def reading(runner: Runner) -> float:
    """Milliseconds that it takes to read a recorded step, the least of several."""
    seconds = []
    for _ in range(5):
        with lstmcore.record_gradient_flow(runner.module) as flow:
            runner.training()
        start = time.perf_counter()
        assert flow.records
        seconds.append(time.perf_counter() - start)
    return min(seconds) * 1e3


def plain(runner: Runner, every: int) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(every):
            runner.training()

    return steps


def measure(case: Case, every: int, min_pairs: int, budget_s: float) -> FlowRow:
    """Raises Mismatch where results are wrong, or not the same with the recording."""
    backend = BACKENDS[case.device]
    problem = draw(case)
    ours = build(OURS, problem, backend)
    check(problem, ours, build(PEER, problem), ("training",))
    alone = ours.training()
    with lstmcore.record_gradient_flow(ours.module):
        watched = ours.training()
    if not all(map(torch.equal, alone, watched)):
        raise Mismatch(f"{case.name}: expected the same bits with and without a recording, they differ")
    samples = interleave(
        plain(ours, every), recorded(ours, every), min_pairs=min_pairs, budget_s=budget_s, clock=CLOCKS[case.device]
    )
    shares = tuple(on / off - 1 for off, on in zip(samples.ours, samples.peer, strict=True))
    versions = machine.versions()
    return FlowRow(
        machine.commit(),
        machine.today(),
        versions["torch"],
        machine.device_name(case.device),
        machine.units(case.device),
        case.name,
        backend,
        every,
        len(shares),
        percentile(samples.ours, 0.5) * 1e3 / every,
        percentile(samples.peer, 0.5) * 1e3 / every,
        *(percentile(shares, share) for share in (0.5, 0.2, 0.8)),
        reading(ours),
    )


def show(console: Console, rows: Sequence[FlowRow]) -> None:
    """The table; above the limit in red."""
    table = Table(title=f"Recording the gradient flow: share of a training step, limit {LIMIT:.0%}", box=SIMPLE_HEAD)
    for name in ("case", "every", "off, ms", "on, ms", "overhead", "20 %", "80 %"):
        table.add_column(name, justify="left" if name == "case" else "right", no_wrap=True)
    for row in rows:
        colour = "green" if row.overhead <= LIMIT else "red"
        table.add_row(
            row.case, str(row.every), f"{row.off_ms:.4g}", f"{row.on_ms:.4g}",
            f"[{colour}]{row.overhead:+.1%}[/]", f"{row.overhead_p20:+.1%}", f"{row.overhead_p80:+.1%}",
        )  # fmt: skip
    console.print(table)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.flow", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=BACKENDS, default="cpu")
    parser.add_argument("--case", action="append", metavar="NAME", help="a case of python -m bench --list; repeatable")
    parser.add_argument("--pairs", type=int, default=15, metavar="N", help="at least so many pairs (default: 15)")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="go on for so long (default: 5)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=f"for the rows (default: {OUT})")
    parser.add_argument("--save", action="store_true", help="write the rows to bench/results/ instead")
    parser.add_argument("--list", action="store_true", help="show the cases, and measure none")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    console = Console()
    registry: dict[str, Any] = {"cpu": CASES, "cuda": GPU_CASES}[options.device]  # type: ignore[assignment]
    names = options.case or NAMES[options.device]
    unknown = [name for name in names if name not in registry]
    if unknown:
        console.print(f"no such case: {', '.join(unknown)}; python -m bench --list shows them")
        return 2
    if options.list:
        console.print("\n".join(names))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        console.print(NO_GPU)
        return 2
    rows: list[FlowRow] = []
    try:
        for name in names:
            for every in EVERY:
                if every > 1 and rows[-1].overhead <= LIMIT:
                    break  # cheap enough at every step
                with precision(registry[name]):
                    rows.append(measure(registry[name], every, options.pairs, options.seconds))
                console.print(f"{name}, every {every}: {rows[-1].overhead:+.1%}")
    except KeyboardInterrupt:
        console.print("interrupted: what was measured is kept")
    if rows:
        show(console, rows)
        folder = (Path(__file__).parent / "results" if options.save else options.out) / "flow"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{machine.slug(options.device)}.csv"
        results.write(path, rows, FlowRow)
        console.print(f"rows: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

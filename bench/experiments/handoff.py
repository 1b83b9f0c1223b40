"""The latency of a hand-off: blocks of threads that exchange with next to no work in between.

A grid: by the number of blocks, and by the bytes that each hands over.  The case says how many: a block hands over
``hidden_size`` units of ``batch`` rows in each of its steps, and reads what all blocks have handed over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lstmcore.kernels.gpu import tiling
from rich.console import Console

from bench import machine
from bench.cases import Case, select
from bench.gpu import model
from bench.gpu.compile import MOST_S, spread
from bench.gpu.model import Step
from bench.measure import Experiment, Task, row_of
from bench.rows import Row
from bench.timing import Effort

FEW = 3  # hand-offs of a call that makes the compiler run
MOST = 64 * 1024  # bytes that a block reads at once: all of them are in its registers
MULTIPROCESSORS = 132  # of an H100 or H200


def blocks_of(multiprocessors: int) -> list[int]:
    """Powers of two up to one block a multiprocessor, and all of them."""
    powers = [2**k for k in range(1, 11) if 2**k <= multiprocessors]
    return [*powers, *([multiprocessors] if multiprocessors not in powers else [])]


def handed(case: Case) -> int:
    """Bytes that a block hands over in a step."""
    return case.batch * case.hidden_size * case.torch_dtype.itemsize


def sizes(multiprocessors: int) -> list[tuple[Case, int]]:
    """The cells of the grid that a block can hold: a case and a number of blocks."""
    cases, blocks = select("handoff", "cuda"), blocks_of(multiprocessors)
    return [(case, number) for case in cases for number in blocks if number * handed(case) <= MOST]


def latency(case: Case, blocks: int, steps: int) -> float:
    """Microseconds of a hand-off."""
    from lstmcore.kernels.gpu import probe

    return float(probe.handoff_latency(blocks, case.batch, case.hidden_size, case.torch_dtype, steps))


def compile_share(worker: int, workers: int) -> None:
    """Every ``workers``-th size, for the cache on disk."""
    for case, blocks in sizes(machine.units("cuda"))[worker::workers]:
        latency(case, blocks, FEW)


def measure(case: Case, task: Task) -> Iterator[Row]:
    """A row a number of blocks."""
    for blocks in (number for each, number in sizes(machine.units("cuda")) if each == case):
        us = latency(case, blocks, case.steps)
        details = {"blocks": str(blocks), "bytes": str(handed(case))}
        given = {"variant": f"{blocks} blocks", "details": details}
        yield row_of("handoff", case, "inference", backend="triton", pairs=1, p50_ms=us / 1e3, **given)


def parts_of(blocks: int, size: int) -> dict[str, float]:
    """What a hand-off of ``size`` bytes a block is made of, in the terms of the tiling's model."""
    return {"latency": 1.0, "handoff": math.log2(blocks), "read": blocks * size / 1000}


def grid_lines(cells: dict[tuple[int, int], float]) -> Iterator[str]:
    """Microseconds by blocks (down) and bytes (across), then the model's constants as they fit these beside its own."""
    across = sorted({size for _, size in cells})
    yield f"{'blocks':>6}  " + " ".join(f"{f'{size} B':>8}" for size in across)
    for blocks in sorted({number for number, _ in cells}):
        found = (cells.get((blocks, size)) for size in across)
        yield f"{blocks:6}  " + " ".join(f"{'-' if us is None else f'{us:.2f}':>8}" for us in found)
    if missing := len(across) * len({number for number, _ in cells}) - len(cells):
        yield f"-: a block would read more than {MOST // 1024} KiB at once, or it was not measured ({missing} cells)"
    yield from model.fitted_lines([Step(us, parts_of(*cell)) for cell, us in cells.items()])
    yield "now: the model's; its latency is that of a whole step, with the product, the sums and the cell"


def show(console: Console, rows: Sequence[Row]) -> None:
    """The grid of what was measured."""
    cells = {(int(row.details["blocks"]), int(row.details["bytes"])): row.p50_ms * 1e3 for row in rows}
    for line in grid_lines(cells):
        console.print(line, soft_wrap=True, highlight=False)


def plan(case: Case) -> Iterator[str]:
    """Says what would run; after the last case the grid as the model predicts it, and its constants found again."""
    cells = sizes(MULTIPROCESSORS)
    blocks = [number for each, number in cells if each == case]
    shape = f"{case.batch} rows of {case.hidden_size} units a block ({handed(case)} bytes), {case.steps} steps"
    yield f"blocks of threads on an H100 or H200: {blocks}; {shape}, {case.dtype}"
    if case == cells[-1][0]:
        yield "as the model predicts it (nothing of this is measured):"
        predicted = {(number, handed(each)): tiling.time_of(parts_of(number, handed(each))) for each, number in cells}
        yield from grid_lines(predicted)


def key_figures(rows: Sequence[Row]) -> str:
    if not rows:
        return "none"
    found = sorted(rows, key=lambda row: row.p50_ms)
    ends = (f"{row.p50_ms * 1e3:.2f} of {row.variant} x {row.details['bytes']} B" for row in (found[0], found[-1]))
    return f"µs a hand-off: {' to '.join(ends)}"


HANDOFF = Experiment(
    name="handoff",
    what="the latency of a hand-off between blocks of threads on a GPU, by their number and what each hands over",
    times="a hand-off",
    measure=measure,
    full={"cuda": Effort(1, 0.0)},
    details={"blocks": "of threads that wait for each other", "bytes": "that each of them hands over"},
    prepare=lambda limit_s: spread(compile_share, min(MOST_S, 0.75 * limit_s)),  # the rest takes seconds
    plan=plan,
    show=show,
    key_figures=key_figures,
    whole=True,
)

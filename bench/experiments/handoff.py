"""The latency of a hand-off: blocks of threads that exchange with next to no work in between.

The case says how much: a block hands over ``hidden_size`` units of ``batch`` rows in each of its steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench import machine
from bench.cases import Case
from bench.measure import Experiment, Task, row_of
from bench.rows import Row
from bench.timing import Effort


def blocks_of(multiprocessors: int) -> list[int]:
    """Powers of two up to one block a multiprocessor, and all of them."""
    powers = [2**k for k in range(1, 11) if 2**k <= multiprocessors]
    return [*powers, *([multiprocessors] if multiprocessors not in powers else [])]


def measure(case: Case, task: Task) -> Iterator[Row]:
    """A row a number of blocks."""
    from lstmcore.kernels.gpu import probe

    for blocks in blocks_of(machine.units("cuda")):
        us = float(probe.handoff_latency(blocks, case.batch, case.hidden_size, case.torch_dtype, case.steps))
        given = {"variant": f"{blocks} blocks", "details": {"blocks": str(blocks)}}
        yield row_of("handoff", case, "inference", backend="triton", pairs=1, p50_ms=us / 1e3, **given)


def plan(case: Case) -> Iterator[str]:
    """Says what would run."""
    shape = f"{case.batch} rows of {case.hidden_size} units a block, {case.steps} steps, {case.dtype}"
    yield f"blocks of threads on an H100 or H200: {blocks_of(132)}; {shape}"


def key_figures(rows: Sequence[Row]) -> str:
    return f"µs a hand-off: {', '.join(f'{row.p50_ms * 1e3:.2f} of {row.variant}' for row in rows)}"


HANDOFF = Experiment(
    name="handoff",
    what="the latency of a hand-off between blocks of threads on a GPU, by their number",
    times="a hand-off",
    measure=measure,
    full={"cuda": Effort(1, 0.0)},
    details={"blocks": "of threads that wait for each other"},
    plan=plan,
    show=None,
    key_figures=key_figures,
    whole=True,
)

"""Four layers of a few rows beside one: what a wavefront over time saves of three.

One layer after the other takes four times as long as one alone, whatever the threads.  Where one layer cannot occupy
two threads, four at once take as little as twice as long.

Legend: L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.console import Console

from bench import tables
from bench.cases import Case
from bench.measure import Experiment, Task, backends, beside_torch, checked, quantiles, ratio_columns, row_of, timed
from bench.providers import OURS, PEER, build, draw
from bench.rows import COST, Row
from bench.timing import Effort

BACKEND = "numba"  # by name: torch's layers run one after the other
ONE = "one layer"


def measure(case: Case, task: Task) -> Iterator[Row]:
    """A row a mode beside torch's LSTM of as many layers, and one beside one layer of ours."""
    both = checked(case, task.modes(case), BACKEND)
    one = build(OURS, draw(replace(case, num_layers=1)), BACKEND)
    by_name = replace(task, backend=BACKEND)
    for mode in task.modes(case):
        ours = getattr(both.ours, mode)
        yield beside_torch(
            "layers", case, mode, timed(case, ours, getattr(both.peer, mode), task.effort), both, by_name
        )
        samples = timed(case, ours, getattr(one, mode), task.effort)
        yield row_of(
            "layers", case, mode, **{**backends(case, mode, BACKEND), "peer_backend": BACKEND}, peer=ONE,
            pairs=len(samples.ours), **quantiles(samples.ours), **quantiles(samples.peer, "peer_"),
            **ratio_columns(samples, COST),
        )  # fmt: skip


def show(console: Console, rows: Sequence[Row]) -> None:
    """A line a case and mode: four layers, one, torch's four."""
    by_key = {(row.case, row.mode, row.peer): row for row in rows}
    table = tables.grid(
        "four layers", ("case", "mode"), ("ours ms", "one layer ms", "over one", "torch ms", "speed"),
        "medians; over one: the time of four layers over that of one, pair by pair; speed: torch's time over ours",
    )  # fmt: skip
    for (case, mode, peer), row in by_key.items():
        torch_row = by_key.get((case, mode, PEER))
        if peer == ONE and torch_row is not None:
            peers = row.peer_p50_ms or 0.0, torch_row.peer_p50_ms or 0.0
            table.add_row(
                case, mode, f"{row.p50_ms:.2f}", f"{peers[0]:.2f}", f"{row.pair_ratio:.2f}", f"{peers[1]:.2f}",
                f"{torch_row.speed:.2f}x",
            )  # fmt: skip
    console.print(table)


def key_figures(rows: Sequence[Row]) -> str:
    costs = [f"{row.case} {row.mode} {row.pair_ratio:.2f}" for row in rows if row.peer == ONE and row.pair_ratio]
    return f"four layers over one: {', '.join(costs) or 'none'}"


LAYERS = Experiment(
    name="layers",
    what="four layers of a few rows beside one layer, and beside torch's four",
    times="a call, or a training step",
    measure=measure,
    full={"cpu": Effort(15, 1.0)},
    backend={"cpu": BACKEND},
    show=show,
    key_figures=key_figures,
)

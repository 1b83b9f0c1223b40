"""What one step of a layer costs: its time over two lengths, and the difference.

That leaves what a single step costs and drops what a call costs; beside torch's figure for the same and beside the
model's prediction.  The input product is part of a step, as it is in the benchmark; its own time stands beside, so that
the recurrence can be told from it.

Where the host takes longer to launch a call than the device to run it, the difference says too little (small H, short
cases): the experiment ``designs`` times the device itself.

Legend: T steps, B batch, H hidden.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import nn

from bench import costs, machine
from bench.cases import MODES, Case
from bench.gpu import launches
from bench.measure import Experiment, Task, backends, row_of, timed
from bench.providers import OURS, PEER, Runner, build, draw
from bench.rows import Row
from bench.timing import Effort
from bench.verify import check

PASSES = ("inference", "forward", "backward")  # forward: in training, which also stores what backward reads


def _forward_in_training(runner: Runner) -> Callable[[], object]:
    """A forward that stores what a backward would read."""
    runner.module.train()
    return runner.forward


def _seconds(case: Case, task: Task, verified: bool) -> dict[tuple[str, str], float]:
    """Median seconds of a call by pass (and of the input product), and by provider; checked first where asked for."""
    problem = draw(case)
    ours, peer = build(OURS, problem, task.backend), build(PEER, problem)
    if verified:
        check(problem, ours, peer, MODES)
    else:
        ours.training(), peer.training()
    rows = problem.input.flatten(0, 1)  # (T * B, I)
    weight = problem.weights["weight_ih_l0"]

    def product() -> object:
        return nn.functional.linear(rows, weight)

    samples = {
        "inference": timed(case, ours.inference, peer.inference, task.effort),
        "forward": timed(case, _forward_in_training(ours), _forward_in_training(peer), task.effort),
        "training": timed(case, ours.training, peer.training, task.effort),
        "product": timed(case, product, product, task.effort),
    }
    seconds = {}
    for name, pair in samples.items():
        seconds[name, OURS] = statistics.median(pair.ours)
        seconds[name, PEER] = statistics.median(pair.peer)
    for provider in (OURS, PEER):
        seconds["backward", provider] = seconds["training", provider] - seconds["forward", provider]
    return seconds


def measure(case: Case, task: Task) -> Iterator[Row]:
    """A row a pass, of a step: the case, and one twice as long."""
    long_case = replace(case, steps=2 * case.steps)
    short, long = _seconds(case, task, verified=True), _seconds(long_case, task, verified=False)

    def ms(name: str, provider: str) -> float:
        return (long[name, provider] - short[name, provider]) / case.steps * 1e3

    for part in PASSES:
        mode = "inference" if part == "inference" else "training"
        if mode not in task.modes(case):
            continue
        predicted = launches.predicted_us(case, part == "backward", machine.units("cuda"))
        details = {"predicted_us": f"{predicted:.6g}"}
        if part != "backward":
            details["product_us"] = f"{ms('product', OURS) * 1e3:.6g}"
        yield row_of(
            "steps",
            case,
            part,
            **backends(case, mode, task.backend),
            peer=PEER,
            pairs=task.effort.min_pairs,
            p50_ms=ms(part, OURS),
            peer_p50_ms=ms(part, PEER),
            details=details,
        )


def seconds(case: Case, effort: Effort) -> float:
    """Seconds that a shape is expected to take: both lengths, three timed calls of both providers."""
    both = (case, replace(case, steps=2 * case.steps))
    calls = sum(costs.call_s(each, mode) for each in both for mode in (*MODES, "inference"))
    return 1.0 + 2 * (effort.min_pairs + 3) * calls


def key_figures(rows: Sequence[Row]) -> str:
    shown = [row for row in rows if row.batch == 16 and row.hidden_size in (128, 1024) and row.mode != "inference"]
    parts = [
        f"H{row.hidden_size} {row.mode} {row.p50_ms * 1e3:.2f} (torch {row.peer_p50_ms * 1e3:.2f})"
        for row in shown
        if row.peer_p50_ms is not None
    ]
    return f"µs a step at B 16: {', '.join(parts) or 'none'}"


STEPS = Experiment(
    name="steps",
    what="what one step costs on a GPU, beside torch's and the model's prediction",
    times="a step",
    measure=measure,
    full={"cuda": Effort(5, 0.1)},
    backend={"cuda": "triton"},  # by name: "auto" may leave a shape to torch
    details={
        "product_us": "microseconds of the input product alone, which both times include; forward only",
        "predicted_us": "microseconds of the recurrence, as the tiling's model has it",
    },
    seconds=seconds,
    show=None,
    key_figures=key_figures,
)

"""What one more step of a layer costs: the time of a call over two lengths, and the difference.

That leaves what a single step costs and drops what a call costs; beside torch's figure for the same and beside the
model's prediction.  The input product is part of a step, as it is in the benchmark; its own time stands beside, so that
the recurrence can be told from it.

A call of ours is a few launches however long it is, so its steps cost what the device takes for them: its time is that
between two events around a call that was queued while the device was busy.  (On the host's clock the difference says
too little wherever the host launches more slowly than the device computes: small H, short cases.)  The time for which
the host is busy with a call stands beside.  Torch's is on the host's clock: most of its algorithms launch kernels in
each step, and what that takes is part of what its step costs.

Legend: T steps, B batch, H hidden.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import nn

from bench import costs, timing
from bench.cases import MODES, Case
from bench.gpu import launches
from bench.measure import Experiment, Task, backends, row_of
from bench.providers import OURS, PEER, Runner, build, draw
from bench.rows import Row
from bench.timing import Effort
from bench.verify import check

PASSES = ("inference", "forward", "backward")  # forward: in training, which also stores what backward reads
HOST = "host"  # beside the providers: what the host is busy with of ours


def _forward_in_training(runner: Runner) -> Callable[[], object]:
    """A forward that stores what a backward would read."""

    def forward() -> object:
        if not runner.module.training:
            runner.module.train()
        return runner.forward()

    return forward


def _on_device(call: Callable[[], object], effort: Effort) -> tuple[float, float]:
    """Median seconds of a call of ours: of the host, and of the device."""
    pairs = [launches.seconds(call) for _ in range(effort.min_pairs)]
    return statistics.median(host for host, _ in pairs), statistics.median(device for _, device in pairs)


def _on_host(call: Callable[[], object], case: Case, effort: Effort) -> float:
    """Median seconds of a call of torch's."""
    clock = timing.CLOCKS[case.device]
    (times,) = timing.turns((call,), min_rounds=effort.min_pairs, budget_s=effort.budget_s, clock=clock)
    return statistics.median(times)


def _seconds(case: Case, task: Task, verified: bool) -> dict[tuple[str, str], float]:
    """Median seconds of a call by pass (and of the input product), and by whose; checked first where asked for."""
    problem = draw(case)
    ours, peer = build(OURS, problem, task.backend), build(PEER, problem)
    if verified:
        check(problem, ours, peer, MODES)
    else:
        ours.training(), peer.training()
    rows = problem.input.flatten(0, 1)  # (T * B, I)
    weight = problem.weights["weight_ih_l0"]
    seconds = {}
    for name, call, their in (
        ("inference", ours.inference, peer.inference),
        ("forward", _forward_in_training(ours), _forward_in_training(peer)),
        ("training", ours.training, peer.training),
    ):
        seconds[name, HOST], seconds[name, OURS] = _on_device(call, task.effort)
        seconds[name, PEER] = _on_host(their, case, task.effort)
    _, seconds["product", OURS] = _on_device(lambda: nn.functional.linear(rows, weight), task.effort)
    for whose in (OURS, PEER, HOST):
        seconds["backward", whose] = seconds["training", whose] - seconds["forward", whose]
    return seconds


def measure(case: Case, task: Task) -> Iterator[Row]:
    """A row a pass, of a step: the case, and one twice as long."""
    long_case = replace(case, steps=2 * case.steps)
    short, long = _seconds(case, task, verified=True), _seconds(long_case, task, verified=False)

    def ms(name: str, whose: str) -> float:
        return (long[name, whose] - short[name, whose]) / case.steps * 1e3

    for part in PASSES:
        mode = "inference" if part == "inference" else "training"
        if mode not in task.modes(case):
            continue
        predicted = launches.predicted_us(case, part == "backward")
        details = {"predicted_us": f"{predicted:.6g}", "host_us": f"{short[part, HOST] * 1e6:.6g}"}
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
    """Seconds that a shape is expected to take: both lengths, three timed calls, of which ours take half as long."""
    both = (case, replace(case, steps=2 * case.steps))
    calls = sum(costs.call_s(each, mode) for each in both for mode in (*MODES, "inference"))
    return 1.0 + 1.5 * (effort.min_pairs + 3) * calls


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
    times="one more step, of ours on the device's clock, of torch's on the host's",
    measure=measure,
    full={"cuda": Effort(5, 0.1)},
    backend={"cuda": "triton"},  # by name: "auto" may leave a shape to torch
    details={
        "product_us": "microseconds of the input product alone, which both times include; forward only",
        "predicted_us": "microseconds of the recurrence, as the tiling's model has it",
        "host_us": "microseconds for which the host is busy with a whole call of ours; of backward, without forward",
    },
    seconds=seconds,
    show=None,
    key_figures=key_figures,
)

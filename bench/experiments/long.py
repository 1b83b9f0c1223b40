"""The longest sequences: time a step and peak memory as T grows, to a million steps, and where a peer has too little.

Ours is measured as it is, and where it keeps only the states between segments of steps (``recompute=``).

Each side first takes one training step in a process of its own, which tells its peak and is stopped where the machine
has not the memory.  Only sides that got through run in this process: they are checked, then timed by turns.  Where
torch does not get through, ours is timed without it, and the row says so.

The check covers all steps up to ``CHECKED_STEPS``, of longer cases the same shape with so many.

Legend: T steps.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from bench import tables
from bench.cases import Case
from bench.measure import Experiment, Task, backends, peak_gflops, quantiles, ratio_columns, row_of
from bench.memory import OutOfMemory, peak_memory_mib
from bench.providers import OURS, PEER, Problem, Runner, algorithm, build, draw
from bench.rows import SPEED, Row
from bench.timing import Effort, Samples, turns
from bench.verify import Verdict, check

CHECKED_STEPS = 8192
# A training step of more takes torch seconds on two cores: it is timed once, and what warms it up is the check.
ONCE_GFLOP = 150
SHORTEST_SEGMENT = 128


class Side(NamedTuple):
    """Who computes, and whether ours recomputes."""

    provider: str
    variant: str = ""

    def options(self, case: Case) -> dict[str, Any]:
        """What the constructor is told."""
        return {"recompute": segment(case.steps)} if self.variant == RECOMPUTE else {}


def segment(steps: int) -> int:
    """Steps of a segment: as many as there are segments, and not so few that it costs more to start than to compute."""
    return max(SHORTEST_SEGMENT, math.isqrt(steps))


RECOMPUTE = "recompute"
PLAIN, RECOMPUTED, TORCH = Side(OURS), Side(OURS, RECOMPUTE), Side(PEER)
VARIANTS = (PLAIN, RECOMPUTED)
SIDES = (*VARIANTS, TORCH)
FAILS = {"plain_fails": PLAIN, "peer_fails": TORCH}  # by the details that say so


@dataclass(frozen=True)
class Trial:
    """A case in one mode, with what is known of it before it is timed."""

    case: Case
    mode: str
    backend: str
    memory: dict[Side, float | None]  # MiB, of those that got through; None where nobody asked
    fails: dict[Side, str]  # why the others did not


def short(case: Case) -> Case:
    """What is checked of a case."""
    return replace(case, steps=min(case.steps, CHECKED_STEPS))


def tried(case: Case, mode: str, backend: str, through: Collection[str] = ()) -> Trial:
    """Each side's peak in a process of its own; providers that got ``through`` more than this are not asked.

    In inference all variants of ours are the same: there is only one.
    """
    trial = Trial(case, mode, backend, {}, {})
    for side in SIDES if mode == "training" else (PLAIN, TORCH):
        if side.provider in through:
            trial.memory[side] = None
            continue
        try:
            trial.memory[side] = peak_memory_mib(case, side.provider, backend, mode=mode, options=side.options(case))
        except OutOfMemory as error:
            trial.fails[side] = f"out of memory, {error}"
    return trial


def trials(case: Case, task: Task) -> list[Trial]:
    """One a mode, training first: who gets through that, in any variant, gets through inference."""
    found: list[Trial] = []
    for mode in sorted(task.modes(case), reverse=True):
        through = {side.provider for trial in found for side in trial.memory}
        found.append(tried(case, mode, task.backend, through))
    return found


def runner(side: Side, problem: Problem, backend: str) -> Runner:
    return build(side.provider, problem, backend, side.options(problem.case))


def verdicts(every: Sequence[Trial]) -> dict[tuple[Side, str], Verdict]:
    """Each variant of ours against torch, on as many steps as that is feasible for; raises Mismatch."""
    case = every[0].case
    problem, found = draw(short(case)), {}
    peer = build(PEER, problem)
    note = f", {short(case).steps:,} steps" if short(case) != case else ""
    for side in VARIANTS:
        if modes := [trial.mode for trial in every if side in trial.memory]:
            for mode, verdict in check(problem, runner(side, problem, every[0].backend), peer, modes).items():
                found[side, mode] = replace(verdict, reference=verdict.reference + note)
    return found


def timed(trial: Trial, problem: Problem, effort: Effort) -> dict[Side, tuple[float, ...]]:
    """Seconds a call of each side that got through."""
    once = trial.case.flops("training") > ONCE_GFLOP * 1e9
    least = Effort(1, 0.0) if once else effort
    calls = [getattr(runner(side, problem, trial.backend), trial.mode) for side in trial.memory]
    times = turns(calls, min_rounds=least.min_pairs, budget_s=least.budget_s, probed=not once)
    return dict(zip(trial.memory, times, strict=True))


def row(trial: Trial, side: Side, verdict: Verdict, times: Mapping[Side, tuple[float, ...]]) -> Row:
    """Ours, beside torch where that got through."""
    case, mode = trial.case, trial.mode
    ours, peer = times[side], times.get(TORCH)
    columns: dict[str, Any] = quantiles(ours) | backends(short(case), mode, trial.backend)
    details = {"step_us": f"{columns['p50_ms'] / case.steps * 1e3:.6g}"}
    if options := side.options(case):
        columns["backend"] = algorithm(OURS, short(case), mode, trial.backend, options)
        details["segment"] = str(options["recompute"])
    if peer is not None:
        columns |= quantiles(peer, "peer_") | ratio_columns(Samples(ours, peer), SPEED)
        details["peer_step_us"] = f"{columns['peer_p50_ms'] / case.steps * 1e3:.6g}"
    details |= {name: trial.fails[each] for name, each in FAILS.items() if each in trial.fails}
    if mode == "training":
        columns |= {"memory_mib": trial.memory[side], "peer_memory_mib": trial.memory.get(TORCH)}
    return row_of(
        "long",
        case,
        mode,
        **columns,
        variant=side.variant,
        peer=PEER,
        pairs=len(ours),
        gflops=case.flops(mode) / columns["p50_ms"] / 1e6,
        peak_gflops=peak_gflops(case.dtype, torch.get_num_threads()),
        max_error=verdict.max_error,
        reference=verdict.reference,
        details=details,
    )


def measure(case: Case, task: Task) -> Iterator[Row]:
    """A row a mode; of training a row a variant.  Raises OutOfMemory where nothing of ours gets through."""
    every = [trial for trial in trials(case, task) if set(VARIANTS) & trial.memory.keys()]
    if not every:
        raise OutOfMemory("ours takes more memory than there is")
    found, problem = verdicts(every), draw(case)
    for trial in every:
        times = timed(trial, problem, task.effort)
        for side in (each for each in VARIANTS if each in times):
            yield row(trial, side, found[side, trial.mode], times)


LONG = Experiment(
    name="long",
    what="time a step and peak memory of the longest sequences, ours beside torch's; and where the memory runs out",
    times="a call",
    measure=measure,
    full={"cpu": Effort(3, 0.0)},
    details={
        "step_us": "microseconds of a call over T",
        "peer_step_us": "the same of torch",
        "segment": "steps between the states that are kept; the gates of a segment are computed again in backward",
        "peer_fails": "why torch has no figures",
        "plain_fails": "why ours without recomputing has none",
    },
    show=tables.show_long,
)

"""What all experiments share: a case drawn, built and checked once; two calls timed by turns; the row made of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch
from rich.console import Console

from bench import machine, tables
from bench.cases import DTYPES, Case
from bench.providers import OURS, PEER, PROVIDERS, Problem, Runner, algorithm, build, draw
from bench.rows import COST, SPEED, Row
from bench.timing import CLOCKS, Effort, Samples, interleave, percentile
from bench.verify import Verdict, check

NO_GPU = f"there is no CUDA device: torch {torch.__version__} finds none, so nothing was measured"
NOTHING = 77  # the exit status of a command that found nothing to do: what automake's tests use for "skipped"


@dataclass(frozen=True)
class Task:
    """What the user wants of each case."""

    effort: Effort
    backend: str = "auto"  # of ours
    mode: str | None = None  # only this one
    slow: bool = False  # also peers that take minutes

    def modes(self, case: Case) -> tuple[str, ...]:
        return tuple(mode for mode in case.modes if self.mode in (None, mode))


@dataclass(frozen=True)
class Experiment:
    """One question put to cases: how it is answered, and what its rows say."""

    name: str
    what: str  # for the help: one sentence
    times: str  # what p50_ms is the time of
    measure: Callable[[Case, Task], Iterator[Row]]  # raises Mismatch where a result is wrong
    full: Mapping[str, Effort]  # by device
    quick: Mapping[str, Effort] | None = None  # where it differs
    backend: Mapping[str, str] = field(default_factory=dict)  # of ours, by device; else "auto"
    details: Mapping[str, str] = field(default_factory=dict)  # what its rows say beyond the columns that all have
    seconds: Callable[[Case, Effort], float] = lambda case, effort: 0.0  # that a case will take, for a time limit
    prepare: Callable[[float], str] | None = None  # before the first case, within so many seconds; what it has done
    plan: Callable[[Case], Iterator[str]] | None = None  # says what would be run; else tables.show_cases does
    show: Callable[[Console, Sequence[Row]], None] | None = tables.show_pairs  # at the end
    key_figures: Callable[[Sequence[Row]], str] | None = None  # in one line
    whole: bool = False  # the rows of a case replace all that it had


@dataclass(frozen=True)
class Checked:
    """Both providers on a case, found to agree."""

    problem: Problem
    ours: Runner
    peer: Runner
    verdicts: dict[str, Verdict]  # by mode


@lru_cache(maxsize=1)  # the experiments on a case follow each other; keeping more would keep their memory
def checked(case: Case, modes: tuple[str, ...], backend: str = "auto") -> Checked:
    """Draws the case, builds both sides and compares them; raises Mismatch where they differ."""
    problem = draw(case)
    ours, peer = build(OURS, problem, backend), build(PEER, problem)
    return Checked(problem, ours, peer, check(problem, ours, peer, modes))


@lru_cache(maxsize=4)  # the experiments on a case ask again
def backends(case: Case, mode: str, backend: str = "auto") -> dict[str, str]:
    """What runs inside ours and inside torch's, as columns."""
    names = ("backend", "peer_backend")
    return {name: algorithm(each, case, mode, backend) for name, each in zip(names, PROVIDERS, strict=True)}


def forget() -> None:
    """Lets go of the last case, and gives its memory back."""
    checked.cache_clear()
    gc.collect()


@cache
def peak_gflops(dtype: str, threads: int) -> float:
    """The peak of the instruction that the kernels multiply with in a dtype: GF/s with so many threads."""
    from lstmcore.kernels.cpu.peak import peak

    return peak(DTYPES[dtype], threads)


def quantiles(values: tuple[float, ...], prefix: str = "", scale: float = 1e3) -> dict[str, float]:
    """The columns of a side's times."""
    return {f"{prefix}p{share}_ms": percentile(values, share / 100) * scale for share in (20, 50, 80)}


def ratio_columns(samples: Samples, kind: str, scale: float = 1.0) -> dict[str, Any]:
    """The columns of the ratios of back-to-back pairs, of a cost times ``scale``."""
    both = zip(samples.ours, samples.peer, strict=True)
    ratios = tuple(ours / peer * scale if kind == COST else peer / ours for ours, peer in both)
    middle, low, high = (percentile(ratios, share) for share in (0.5, 0.2, 0.8))
    return {"kind": kind, "pair_ratio": middle, "pair_ratio_p20": low, "pair_ratio_p80": high}


def row_of(experiment: str, case: Case, mode: str, **columns: Any) -> Row:
    """A row of this machine and case; the rest of its columns is given."""
    on_gpu = case.device == "cuda"
    own = {"device": machine.device_name(case.device), "threads": machine.units(case.device)} | machine.versions()
    shape = ("group", "input_size", "hidden_size", "batch", "steps", "num_layers", "directions", "proj_size")
    own |= {name: getattr(case, name) for name in (*shape, "mean_length", "dtype")}
    if on_gpu:
        own["cudnn"] = machine.cudnn()
        own["precision"] = ("tf32" if case.tf32 else "ieee") if case.dtype == "float32" else ""
    given = {"experiment": experiment, "commit": machine.commit(), "date": machine.today(), "case": case.name}
    return Row(**{**own, **given, "mode": mode, **columns})


def beside_torch(experiment: str, case: Case, mode: str, samples: Samples, both: Checked, task: Task) -> Row:
    """A row of ours beside torch's LSTM, of calls that were checked and timed."""
    verdict = both.verdicts[mode]
    times = quantiles(samples.ours) | quantiles(samples.peer, "peer_")
    return row_of(
        experiment,
        case,
        mode,
        peer=PEER,
        **backends(case, mode, task.backend),
        pairs=len(samples.ours),
        **times,
        **ratio_columns(samples, SPEED),
        gflops=case.flops(mode) / times["p50_ms"] / 1e6,
        peak_gflops=peak_gflops(case.dtype, torch.get_num_threads()) if case.device == "cpu" else None,
        max_error=verdict.max_error,
        reference=verdict.reference,
    )


def timed(
    case: Case,
    ours: Callable[[], object],
    peer: Callable[[], object],
    effort: Effort,
    before: Callable[[], object] | None = None,
) -> Samples:
    """Two calls by turns, on the clock of the case's device."""
    return interleave(
        ours, peer, min_pairs=effort.min_pairs, budget_s=effort.budget_s, clock=CLOCKS[case.device], before=before
    )

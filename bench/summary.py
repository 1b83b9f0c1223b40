"""Rows summed up by group: what the table on the screen, the README and docs/benchmarks.md show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from bench.cases import GROUPS, MODES, UNIONS
from bench.cudnn import ALGORITHMS
from bench.onnx_peer import NAME as ONNXRUNTIME
from bench.providers import PEER
from bench.rows import Row, geometric_mean

PUBLISHED = ("after-torch", "speed", "bfloat16-gain")  # experiments whose rows the tables are about


@dataclass(frozen=True)
class Entry:
    """A case in a mode: the main figure, and what else was measured of it."""

    main: Row  # behind an operation of torch's where there is such a row
    alone: Row | None  # where ``main`` is behind
    onnxruntime: Row | None
    float32: Row | None  # of a case in bfloat16: ours beside ours in float32


@dataclass(frozen=True)
class Summary:
    """One mode of several cases."""

    group: str
    title: str
    mode: str
    cases: int
    ratio: float  # the geometric mean
    lowest: float
    highest: float
    ours_share: float | None  # mean share of the peak, where that was measured
    peer_share: float | None
    memory_ratio: float | None  # ours over the peer's, geometric mean of the cases that have both
    alone: float | None = None  # the ratio alone, where ``ratio`` is that behind an operation of torch's
    onnxruntime: float | None = None  # onnxruntime's time over ours, geometric mean of the cases that have it
    float32: float | None = None  # ours in float32 over ours in bfloat16, geometric mean of the cases that have it


def entries(rows: Sequence[Row]) -> list[Entry]:
    """The rows of ``PUBLISHED``, put together by case and mode."""
    found: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
    for row in rows:
        if row.experiment in PUBLISHED:
            found.setdefault((row.case, row.mode), {})[row.experiment, row.peer] = row
    result = []
    for each in found.values():
        behind, alone = each.get(("after-torch", PEER)), each.get(("speed", PEER))
        if (main := behind or alone) is not None:
            gain = next((row for (experiment, _), row in each.items() if experiment == "bfloat16-gain"), None)
            result.append(Entry(main, alone if behind else None, each.get(("speed", ONNXRUNTIME)), gain))
    return result


def has_onnxruntime(chosen: Sequence[Entry]) -> bool:
    """Whether onnxruntime was measured on any case."""
    return any(each.onnxruntime is not None for each in chosen)


def has_float32(chosen: Sequence[Entry]) -> bool:
    """Whether ours was measured against ours in float32 on any case."""
    return any(each.float32 is not None for each in chosen)


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is missing."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def summarise(group: str, title: str, mode: str, chosen: Sequence[Entry]) -> Summary:
    """One line about these cases."""
    mains = [each.main for each in chosen]
    ratios = [row.speed for row in mains]
    return Summary(
        group=group,
        title=title,
        mode=mode,
        cases=len(chosen),
        ratio=geometric_mean(ratios) or 0.0,
        lowest=min(ratios),
        highest=max(ratios),
        ours_share=_mean([row.peak_share for row in mains]),
        peer_share=_mean([row.peer_peak_share for row in mains]),
        memory_ratio=geometric_mean([row.memory_ratio for row in mains]),
        alone=geometric_mean([each.alone.speed for each in chosen if each.alone]),
        onnxruntime=geometric_mean([each.onnxruntime.speed for each in chosen if each.onnxruntime]),
        float32=geometric_mean([each.float32.speed for each in chosen if each.float32]),
    )


def summaries(rows: Sequence[Row]) -> Iterator[Summary]:
    """Each group, and each union of groups, in each mode that has rows."""
    every = entries(rows)
    named: list[tuple[str, str, tuple[str, ...]]] = [
        *((name, " + ".join(members), members) for name, members in UNIONS.items()),
        *((name, group.title, (name,)) for name, group in GROUPS.items()),
    ]
    for name, title, members in named:
        for mode in MODES:
            if chosen := [each for each in every if each.main.group in members and each.main.mode == mode]:
                yield summarise(name, title, mode, chosen)


LONG = 1000  # steps from which a sequence counts as long


def by_algorithm(rows: Sequence[Row]) -> Iterator[tuple[Summary, Summary | None]]:
    """Each path that torch took on a GPU, in each mode: all its cases, then its long ones.

    A training row whose passes differ is counted with the algorithm of its forward.  What is no algorithm of cuDNN's,
    as torch's loop over the steps, stands under its own name.
    """
    every = [each for each in entries(rows) if each.main.on_gpu]

    def path(each: Entry) -> str:
        return each.main.peer_backend.split(",")[0]

    names = [f"cuDNN {name}" for name in ALGORITHMS]
    names += sorted({path(each) for each in every} - set(names))
    for name in names:
        for mode in MODES:
            if chosen := [each for each in every if path(each) == name and each.main.mode == mode]:
                long = [each for each in chosen if each.main.steps >= LONG]
                yield summarise(name, name, mode, chosen), summarise(name, name, mode, long) if long else None

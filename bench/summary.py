"""Rows summed up by group: what both the table on the screen and the one in the README show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from bench.cases import GROUPS, MODES, UNIONS
from bench.cudnn import ALGORITHMS
from bench.gpu_cases import GPU_GROUPS
from bench.providers import OURS, PEER
from bench.results import Row, geometric_mean


@dataclass(frozen=True)
class Summary:
    """One mode of one group."""

    group: str
    title: str
    mode: str
    cases: int
    ratio: float  # the geometric mean
    lowest: float
    highest: float
    ours_share: float | None  # mean share of the FMA peak, where that was measured
    peer_share: float | None
    memory_ratio: float | None  # ours over the peer's, geometric mean of the cases that have both
    alone: float | None = None  # the ratio alone, where ``ratio`` is that behind an operation of torch's
    onnxruntime: float | None = None  # onnxruntime's time over ours, geometric mean of the cases that have it


def pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Ours and the peer's rows of the same case and mode."""
    peers = {row.key[:2]: row for row in rows if row.provider == PEER}
    return [(row, peers[row.key[:2]]) for row in rows if row.provider == OURS and row.key[:2] in peers]


def has_onnxruntime(rows: Sequence[Row]) -> bool:
    """Whether onnxruntime was measured on any case."""
    return any(row.onnxruntime_ratio is not None for row in rows)


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is missing."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _summarise(group: str, title: str, mode: str, chosen: list[tuple[Row, Row]]) -> Summary:
    ratios = [ours.ratio for ours, _ in chosen if ours.ratio is not None]
    memory = [ours.memory_mib / peer.memory_mib for ours, peer in chosen if ours.memory_mib and peer.memory_mib]
    alone = [ours.alone_ratio for ours, _ in chosen if ours.alone_ratio is not None]
    onnxruntime = [ours.onnxruntime_ratio for ours, _ in chosen if ours.onnxruntime_ratio is not None]
    return Summary(
        group=group,
        title=title,
        mode=mode,
        cases=len(chosen),
        ratio=geometric_mean(ratios),
        lowest=min(ratios),
        highest=max(ratios),
        ours_share=_mean([ours.peak_share for ours, _ in chosen]),
        peer_share=_mean([peer.peak_share for _, peer in chosen]),
        memory_ratio=geometric_mean(memory) if memory else None,
        alone=geometric_mean(alone) if alone else None,
        onnxruntime=geometric_mean(onnxruntime) if onnxruntime else None,
    )


def summaries(rows: Sequence[Row]) -> Iterator[Summary]:
    """Each group, and each union of groups, in each mode that has rows."""
    both = pairs(rows)
    named: list[tuple[str, str, tuple[str, ...]]] = [
        *((name, " + ".join(members), members) for name, members in UNIONS.items()),
        *((name, title, (name,)) for name, title in (GROUPS | GPU_GROUPS).items()),
    ]
    for name, title, members in named:
        for mode in MODES:
            if chosen := [pair for pair in both if pair[0].group in members and pair[0].mode == mode]:
                yield _summarise(name, title, mode, chosen)


LONG = 1000  # steps from which a sequence counts as long


def by_algorithm(rows: Sequence[Row]) -> Iterator[tuple[Summary, Summary | None]]:
    """Each path that torch took on a GPU, in each mode: all its cases, then its long ones.

    A training row whose passes differ is counted with the algorithm of its forward.  What is no algorithm of cuDNN's,
    as torch's loop over the steps, stands under its own name.
    """
    both = [pair for pair in pairs(rows) if pair[0].on_gpu]

    def path(peer: Row) -> str:
        return peer.backend.split(",")[0]

    names = [f"cuDNN {name}" for name in ALGORITHMS]
    names += sorted({path(peer) for _, peer in both} - set(names))
    for name in names:
        for mode in MODES:
            chosen = [pair for pair in both if path(pair[1]) == name and pair[0].mode == mode]
            if chosen:
                long = [pair for pair in chosen if pair[0].steps >= LONG]
                yield (
                    _summarise(name, name, mode, chosen),
                    _summarise(name, name, mode, long) if long else None,
                )

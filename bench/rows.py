"""Tidy rows: one for each measurement, of whatever experiment, kept in one CSV file for each device and its threads.

A row tells of one call of ours, and of the peer's beside which it ran by turns.  What an experiment has to say beyond
these columns stands in ``details``, under names that the experiment explains.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from bench.cases import CASES, GROUPS

RESULTS = Path(__file__).parent / "results"
SPEED, COST = "speed", "cost"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.  None, or nothing, where a figure does not apply or was not measured."""

    experiment: str
    commit: str = ""
    date: str = ""
    torch: str = ""  # versions
    numba: str = ""
    lstmcore: str = ""
    triton: str = ""
    cudnn: str = ""  # on a GPU only
    onnxruntime: str = ""
    device: str
    threads: int  # of a GPU: its multiprocessors, which are all used
    case: str
    group: str
    input_size: int
    hidden_size: int
    batch: int
    steps: int
    num_layers: int = 1
    directions: int = 1
    proj_size: int = 0
    mean_length: float = 1.0
    dtype: str
    precision: str = ""  # on a GPU, of float32: "tf32", or "ieee" where products are float32 throughout
    mode: str  # "inference" or "training"; where the passes of a training step are told apart, "forward", "backward"
    variant: str = ""  # what the call of ours was told, where a case is measured in several ways
    backend: str  # what ran inside ours
    peer: str = ""
    peer_backend: str = ""  # what ran inside the peer
    pairs: int
    p20_ms: float | None = None  # of ours: 20th, 50th and 80th percentile
    p50_ms: float
    p80_ms: float | None = None
    peer_p20_ms: float | None = None
    peer_p50_ms: float | None = None
    peer_p80_ms: float | None = None
    kind: str = SPEED  # of the ratios: SPEED, the peer's time over ours; or COST, ours over the peer's, a step of a row
    pair_ratio: float | None = None  # the median of the ratios of back-to-back pairs
    pair_ratio_p20: float | None = None
    pair_ratio_p80: float | None = None
    limit: float | None = None  # of a cost from above, of a speed from below; None where nothing is promised
    gflops: float | None = None  # billions of operations a second at our median, counted by Case.flops
    peak_gflops: float | None = None  # of the instruction that our kernels multiply with in this dtype; not on a GPU
    max_error: float | None = None  # of ours: relative to the largest entry of a tensor, the worst of all tensors
    reference: str = ""  # against what max_error was measured
    memory_mib: float | None = None  # selected cases: what one training step adds to a process at its peak
    peer_memory_mib: float | None = None
    details: Mapping[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> str:
        """The backend without what it says about its design: "triton" of "triton (split, 64 slices)"."""
        return self.backend.split(" (")[0]

    @property
    def on_gpu(self) -> bool:
        return GROUPS[self.group].device == "cuda"

    @property
    def speed(self) -> float:
        """The peer's median over ours: above one, ours is faster."""
        assert self.peer_p50_ms is not None
        return self.peer_p50_ms / self.p50_ms

    @property
    def peak_share(self) -> float | None:
        return self.gflops / self.peak_gflops if self.gflops and self.peak_gflops else None

    @property
    def peer_peak_share(self) -> float | None:
        return None if self.peak_share is None else self.peak_share / self.speed

    @property
    def memory_ratio(self) -> float | None:
        """Ours over the peer's."""
        return self.memory_mib / self.peer_memory_mib if self.memory_mib and self.peer_memory_mib else None

    @property
    def broken(self) -> bool:
        """Whether the ratio breaks what is promised."""
        if self.limit is None or self.pair_ratio is None:
            return False
        return self.pair_ratio > self.limit if self.kind == COST else self.pair_ratio < self.limit

    @property
    def key(self) -> tuple[str, ...]:
        """What makes a row of a file unique: a later row of the same key replaces it."""
        return self.experiment, self.case, self.mode, self.variant, self.peer


COLUMNS = [each.name for each in fields(Row)]
Kind = TypeVar("Kind")  # a dataclass of columns


def _parse(text: str, kind: str) -> object:
    """A cell as the field's annotation has it."""
    if kind.startswith("Mapping"):
        return dict(each.split("=", 1) for each in text.split("; ")) if text else {}
    if text == "" and "None" in kind:
        return None
    return {"int": int, "float": float, "str": str}[kind.removesuffix(" | None")](text)


def _format(value: object) -> object:
    """A cell as it is written: eight digits, so that a cost of 1.0123 has six of what it adds."""
    if isinstance(value, float):
        return f"{value:.8g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{name}={_format(each)}" for name, each in value.items())
    return "" if value is None else value


def read(path: Path, kind: type[Kind] = Row) -> list[Kind]:  # type: ignore[assignment]
    """The rows of a file; none where there is no file yet."""
    if not path.exists():
        return []
    columns = {each.name: str(each.type) for each in fields(kind)}  # type: ignore[arg-type]
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if (found := list(reader.fieldnames or [])) != list(columns):
            old = kind is Row and "experiment" not in found
            why = " (a file from before all experiments had the same columns)" if old else ""
            raise ValueError(f"{path}: expected the columns {list(columns)}, got {found}{why}; move the file away")
        return [kind(**{name: _parse(record[name], columns[name]) for name in columns}) for record in reader]


def merge(old: Iterable[Row], new: Iterable[Row], *, whole: Iterable[str] = ()) -> list[Row]:
    """The old rows with those of the same key replaced; in the order of the registry, without cases it has lost.

    Of the experiments in ``whole``, all old rows of a case that has new ones go.
    """
    rank = {case: index for index, case in enumerate(CASES)}
    new = list(new)
    again = {(row.experiment, row.case) for row in new if row.experiment in set(whole)}
    rows = {row.key: row for row in [*(row for row in old if (row.experiment, row.case) not in again), *new]}
    return sorted((row for row in rows.values() if row.case in rank), key=lambda row: (row.experiment, rank[row.case]))


def write(path: Path, rows: Iterable[Any], kind: type = Row) -> None:
    """Writes rows of a dataclass in one move, so that an interruption leaves either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(kind)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _format(value) for name, value in asdict(row).items()} for row in rows)
    unfinished.replace(path)


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """The mean for ratios, half as fast and twice as fast cancel out; of those that are known, None where none is."""
    logarithms = [math.log(value) for value in values if value is not None]
    return math.exp(fmean(logarithms)) if logarithms else None

"""Tidy rows: one for each case, mode and provider; kept in one CSV file for each device and number of threads."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One provider on one case in one mode.  None where a figure does not apply or was not measured."""

    commit: str
    date: str
    torch: str
    numba: str
    lstmcore: str
    device: str
    threads: int  # of a GPU: its multiprocessors, which are all used
    case: str
    group: str
    input_size: int
    hidden_size: int
    batch: int
    steps: int
    num_layers: int
    directions: int
    proj_size: int
    mean_length: float
    dtype: str
    mode: str
    provider: str
    backend: str  # what ran inside the provider
    pairs: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    gflops: float  # billions of operations a second at the median, counted by Case.flops
    peak_gflops: float | None  # what the machine's FMA units do at most in this dtype; not measured on a GPU
    peak_share: float | None
    ratio: float | None  # ours only: the peer's median over ours
    pair_ratio: float | None  # ours only: the median of the ratios of back-to-back pairs
    max_error: float | None  # ours only: relative to the largest entry of a tensor, the worst of all tensors
    reference: str | None  # ours only: against what max_error was measured
    memory_mib: float | None  # training only, selected cases: what one step adds to a process at its peak
    # Later than the first files, which do not have these columns:
    triton: str = ""  # versions
    cudnn: str | None = None  # on a GPU only
    precision: str | None = None  # on a GPU, of float32: "tf32", or "ieee" where products are float32 throughout
    setting: str = "alone"  # "behind": an operation of torch's, as in a model (see timing.py)
    alone_ms: float | None = None  # the median alone, where the setting is another
    alone_ratio: float | None = None  # ours only
    onnxruntime: str = ""  # version
    onnxruntime_ms: float | None = None  # ours only: the median of onnxruntime's LSTM, where it covers the case
    onnxruntime_ratio: float | None = None  # ours only: that over ours alone, the setting in which it is timed

    @property
    def runs(self) -> str:
        """The backend without what it says about its design: "triton" of "triton (split, 64 slices)"."""
        return self.backend.split(" (")[0]

    @property
    def on_gpu(self) -> bool:
        return self.cudnn is not None

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes a row of a file unique: a later row of the same key replaces it."""
        return self.case, self.mode, self.provider


def _parse(text: str, annotation: str) -> object:
    """A cell as the field's annotation has it."""
    if text == "" and "None" in annotation:
        return None
    kind = {"int": int, "float": float, "str": str}[annotation.removesuffix(" | None")]
    return kind(text)


def _format(value: object) -> object:
    """A cell as it is written: six digits are more than a timer has."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else value


def read(path: Path) -> list[Row]:
    """The rows of a file, which may lack the columns that have a default; none where there is no file yet."""
    if not path.exists():
        return []
    expected = [field.name for field in fields(Row)]
    required = [field.name for field in fields(Row) if field.default is MISSING]
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        found = list(reader.fieldnames or [])
        if found != expected[: max(len(found), len(required))]:
            raise ValueError(f"{path}: expected the columns {expected}, got {found}; move the file away")
        present = [field for field in fields(Row) if field.name in found]
        return [
            Row(**{field.name: _parse(record[field.name], str(field.type)) for field in present})  # type: ignore[arg-type]
            for record in reader
        ]


def merge(old: Iterable[Row], new: Iterable[Row], order: Iterable[str]) -> list[Row]:
    """The old rows with those of the same key replaced; in the order of the registry, without cases it has lost."""
    rank = {case: index for index, case in enumerate(order)}
    rows = {row.key: row for row in [*old, *new]}
    return sorted((row for row in rows.values() if row.case in rank), key=lambda row: (rank[row.case], row.key[1:]))


def write(path: Path, rows: Iterable[Any], kind: type = Row) -> None:
    """Writes rows of a dataclass in one move, so that an interruption leaves either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(kind)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _format(value) for name, value in asdict(row).items()} for row in rows)
    unfinished.replace(path)


def geometric_mean(values: Iterable[float]) -> float:
    """The mean for ratios: half as fast and twice as fast cancel out."""
    logarithms = [math.log(value) for value in values]
    return math.exp(math.fsum(logarithms) / len(logarithms))

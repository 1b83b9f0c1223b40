"""The rows of the libraries, a file for each machine and its threads, and the table in docs/libraries.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import rows
from bench.rows import RESULTS

FOLDER = RESULTS / "libraries"
COLUMNS = ("library", "version", "how it moves over", "checked equal", "timed", "times as fast")
WORDS = 5  # of these columns; what follows is figures


@dataclass(frozen=True, kw_only=True)
class Row:
    """A pipeline of a library: moved over, beside which it ran by turns with torch's LSTM."""

    pipeline: str
    distribution: str
    version: str
    commit: str
    date: str
    torch: str
    numba: str
    lstmcore: str
    device: str
    threads: int
    how: str
    checked: str
    share: float  # of the difference allowed in float32, the largest that was met
    float64: float | None = None  # the largest relative difference in float64
    timed: str
    pairs: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    peer_p20_ms: float
    peer_p50_ms: float
    peer_p80_ms: float

    @property
    def speed(self) -> float:
        """The peer's median over ours: above one, ours is faster."""
        return self.peer_p50_ms / self.p50_ms


def read(path: Path) -> list[Row]:
    return rows.read(path, Row)


def save(path: Path, new: Iterable[Row]) -> None:
    """Adds rows to a file; one of the same pipeline is replaced."""
    found = {row.pipeline: row for row in [*read(path), *new]}
    rows.write(path, [found[name] for name in sorted(found, key=str.casefold)], Row)


def lines(found: Sequence[Row]) -> list[tuple[str, ...]]:
    """What stands under ``COLUMNS``."""
    return [
        (
            row.pipeline,
            row.version,
            f"`{row.how}`",
            row.checked,
            f"{row.timed}: {row.peer_p50_ms:.0f} ms, moved over {row.p50_ms:.0f} ms",
            f"**{row.speed:.2f}×**",
        )
        for row in found
    ]

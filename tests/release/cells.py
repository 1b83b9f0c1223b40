"""The matrix: which versions the package is tried on, each pinned, and why these."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What the tests of a cell need; the last release of hypothesis for Python 3.10 serves all.
TOOLS = ("pytest==9.1.1", "pytest-xdist==3.8.0", "hypothesis==6.168.5")
NAMES = ("torch", "triton", "numba", "numpy")  # what a cell is about, in the order of its table


@dataclass(frozen=True)
class Cell:
    """One environment: a Python and exact versions. A library that is not among them is not installed."""

    name: str
    python: str
    pins: tuple[str, ...]
    why: str


def development(*names: str) -> tuple[str, ...]:
    """The pins of the development environment, from constraints.txt."""
    lines = [line.split(";")[0].split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = {re.split("==", line)[0]: line for line in lines if line}
    return tuple(pins[name] for name in names)


# A CUDA build of torch brings the Triton that it was built for, so a cell with one has to name that.
CELLS = (
    Cell(
        "oldest",
        "3.10",
        ("torch==2.11.0", "triton==3.6.0", "numba==0.62.0", "numpy==1.22.0"),
        "the lower bounds in pyproject.toml, all at once",
    ),
    Cell("pinned", "3.11", development("torch", "triton", "numba", "numpy"), "what is developed on"),
    Cell(
        "cpu",
        "3.11",
        (*development("torch"), "numba==0.62.0", "numpy==1.26.4"),
        "no Triton; the oldest Numba under a newer torch",
    ),
    Cell(
        "crossed",
        "3.11",
        ("torch==2.14.1", "triton==3.8.0", "numba==0.65.1", "numpy==2.2.6"),
        "versions between the bounds",
    ),
    Cell(
        "newest",
        "3.13",
        ("torch==2.15.0", "triton==3.9.0", "numba==0.68.1", "numpy==2.4.6"),
        "the newest releases",
    ),
    Cell(
        "newest-python",
        "3.14",
        ("torch==2.15.0", "triton==3.9.0", "numba==0.68.1", "numpy==2.4.6"),
        "the newest Python",
    ),
)

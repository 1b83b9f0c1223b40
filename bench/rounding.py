"""``python -m bench rounding``: how far results in 16 bits are off, ours and torch's, on each shape of the group.

The oracle is float64 ``torch.nn.LSTM`` on the very inputs, states, weights and incoming gradients, which are in 16 bits
already: what is left is what an implementation rounds on its way and in its results.  An error is relative, in the
2-norm.  Weights are drawn as torch initialises them, and a second time larger, which saturates gates and carries errors
farther.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import machine, rows
from bench.cases import CASES, Case, select
from bench.providers import OURS, OUTPUTS, PEER, Problem, Runner, algorithm, arguments, build, draw
from bench.rows import RESULTS, geometric_mean

FOLDER = RESULTS / "rounding"
BACKEND = "numba"  # by name: "auto" may leave such calls to torch
DTYPES = ("bfloat16", "float16")
SCALES = (1, 3)  # times torch's initial weights
SETS = tuple(product(DTYPES, SCALES))
BOUND = 2.0  # times torch's error: what the project promises
KINDS = (
    "output", "h_n", "c_n", "grad input", "grad h_0", "grad c_0",
    "grad weight_ih", "grad weight_hh", "grad bias_ih", "grad bias_hh", "grad weight_hr",
)  # fmt: skip
COLUMNS = (
    "error of",
    *(column for dtype, scale in SETS for column in (f"{dtype}, weights × {scale}: ours / torch's", "ratio at most")),
)
WORDS = 1  # of these columns; what follows is figures


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result of one case: the errors of both."""

    commit: str
    date: str
    torch: str
    numba: str
    lstmcore: str
    device: str
    threads: int
    case: str
    dtype: str
    weights: int  # one of ``SCALES``
    result: str  # "output", or "grad weight_ih_l0"
    backend: str
    peer_backend: str
    error: float
    peer_error: float

    @property
    def ratio(self) -> float:
        """Our error over torch's."""
        return self.error / self.peer_error if self.peer_error else float("inf") if self.error else 1.0

    @property
    def kind(self) -> str:
        """The result without its layer and direction: one of ``KINDS``."""
        return re.sub(r"_l\d+(_reverse)?$", "", self.result)

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.case, self.dtype, self.weights, self.result


def problem_of(case: Case, scale: int) -> Problem:
    """The data of the case with weights so many times as large, rounded to its dtype once more."""
    problem = draw(case)
    return replace(problem, weights={name: weight * scale for name, weight in problem.weights.items()})


def exact(problem: Problem) -> tuple[Tensor, ...]:
    """What float64 ``torch.nn.LSTM`` returns for the same data."""
    (h_0, c_0), (output, h_n, c_n) = problem.hx, problem.grad_outputs
    same = replace(
        problem,
        weights={name: weight.double() for name, weight in problem.weights.items()},
        input=problem.input.double(),
        hx=(h_0.double(), c_0.double()),
        grad_outputs=(output.double(), h_n.double(), c_n.double()),
    )
    return Runner(nn.LSTM(**arguments(problem.case), dtype=torch.float64), same).training()


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The 2-norm of the difference over that of what is expected; infinite where a shape differs or a NaN appears."""
    if got.shape != expected.shape:
        return float("inf")
    return ((got.double() - expected).norm() / expected.norm()).nan_to_num(nan=float("inf")).item()


def measure(case: Case, scale: int) -> Iterator[Row]:
    """A row a result of a training step."""
    problem = problem_of(case, scale)
    ours, peer = build(OURS, problem, BACKEND), build(PEER, problem)
    about = {name: machine.versions()[name] for name in ("torch", "numba", "lstmcore")}
    about |= {"commit": machine.commit(), "date": machine.today(), "device": machine.device_name()}
    about["peer_backend"] = algorithm(PEER, case, "training")
    names = OUTPUTS + ours.gradient_names
    for name, mine, theirs, expected in zip(names, ours.training(), peer.training(), exact(problem), strict=True):
        yield Row(
            **about, threads=torch.get_num_threads(), case=case.name, dtype=case.dtype, weights=scale, result=name,
            backend=BACKEND, error=relative_error(mine, expected), peer_error=relative_error(theirs, expected),
        )  # fmt: skip


def read(path: Path) -> list[Row]:
    return rows.read(path, Row)


def save(path: Path, new: Iterable[Row]) -> None:
    """Adds rows to a file: all that it had of the same case, dtype and weights go, and those of cases that are gone."""
    new = list(new)
    again = {row.key[:3] for row in new}
    kept = [row for row in read(path) if row.key[:3] not in again and row.case in CASES]
    rank = {name: index for index, name in enumerate(CASES)}
    rows.write(path, sorted([*kept, *new], key=lambda row: (row.dtype, row.weights, rank[row.case])), Row)


def _errors(row: Row) -> tuple[float, float]:
    return row.error, row.peer_error


def _cells(found: Sequence[Row]) -> tuple[str, str]:
    """The errors of both, geometric means, and the largest ratio."""
    if not found:
        return "", ""
    means = (geometric_mean(filter(None, errors)) or 0.0 for errors in zip(*map(_errors, found), strict=True))
    return " / ".join(f"{mean:.1e}" for mean in means), f"{max(row.ratio for row in found):.2f}"


def lines(found: Sequence[Row]) -> list[tuple[str, ...]]:
    """What stands under ``COLUMNS``: a line a kind of result."""
    return [
        (
            f"`{kind}`",
            *(
                cell
                for each in SETS
                for cell in _cells([row for row in found if (row.kind, (row.dtype, row.weights)) == (kind, each)])
            ),
        )
        for kind in KINDS
    ]


def run(case: str | None, threads: int | None, out: Path | None, no_save: bool) -> int:
    """``python -m bench rounding``; 1 where an error is more than the bound allows."""
    if threads is not None:
        torch.set_num_threads(threads)
    if not (cases := select("rounding", pattern=case)):
        print(f"no case matches --case {case}", file=sys.stderr)
        return 2
    found: list[Row] = []
    for each, (dtype, scale) in product(cases, SETS):
        new = list(measure(replace(each, dtype=dtype), scale))
        told = [f"{row.result} {row.error:.1e} / {row.peer_error:.1e} ({row.ratio:.2f})" for row in new]
        print(f"{each.name}, {dtype}, weights × {scale}: {', '.join(told)}", flush=True)
        found += new
    if not no_save:
        path = (out or FOLDER) / f"{machine.slug()}.csv"
        save(path, found)
        print(f"rows: {path}")
    return verdict(found)


def verdict(found: Sequence[Row]) -> int:
    """Says how far the errors are from the bound, and which break it."""
    broken = [row for row in found if not row.ratio <= BOUND]
    worst = max(found, key=lambda row: row.ratio)
    print(
        f"{len(found)} results: at most {worst.ratio:.2f} times torch's error ({worst.case}, {worst.result}); "
        f"{len(broken) or 'none'} above {BOUND:g}"
    )
    for row in broken:
        print(f"{row.case}, {row.dtype}, weights × {row.weights}, {row.result}: {row.error:.2e} / {row.peer_error:.2e}")
    return 1 if broken else 0

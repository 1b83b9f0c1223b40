"""``python -m bench bfloat16-gain``: ours in bfloat16 beside ours in float32, both checked, and its column."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import findings, measure, verify
from bench.cases import CASES, select
from bench.experiments.gain import BACKEND, IN_FLOAT32
from bench.experiments.gain import measure as gain
from bench.measure import Task
from bench.rows import Row
from bench.timing import Effort
from bench.verify import Mismatch

TINY = replace(CASES["bfloat16-h16-b1-t1000"], name="tiny", steps=5, batch=3)
TASK = Task(Effort(2, 0.0), BACKEND)


@pytest.fixture(autouse=True)
def quickly(short_samples, monkeypatch):
    monkeypatch.setattr(measure, "peak_gflops", lambda dtype, threads: 1.0)
    yield
    measure.forget()


def test_rows(monkeypatch):
    checks = []
    original = measure.check

    def watch(problem, ours, peer, modes):
        checks.append((problem.case.dtype, tuple(modes)))
        return original(problem, ours, peer, modes)

    monkeypatch.setattr(measure, "check", watch)
    found = list(gain(TINY, TASK))
    assert checks == [(dtype, ("inference", "training")) for dtype in ("bfloat16", "float32")]
    assert [(row.mode, row.dtype, row.peer, row.backend, row.peer_backend) for row in found] == [
        (mode, "bfloat16", IN_FLOAT32, "numba", "numba") for mode in ("inference", "training")
    ]
    assert all(row.pairs == 2 and row.p50_ms > 0 and row.peer_p50_ms > 0 for row in found)
    assert list(gain(replace(TINY, dtype="float32"), TASK)) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_figure_where_either_is_wrong(monkeypatch, dtype):
    floors = verify.FLOOR_EPS | {dtype: -1e9}
    monkeypatch.setattr(verify, "FLOOR_EPS", floors)
    with pytest.raises(Mismatch):
        list(gain(TINY, TASK))


def test_its_cases_are_those_in_bfloat16():
    assert {case.dtype for case in select("bfloat16-gain")} == {"bfloat16"}
    grid = {(case.hidden_size, case.batch, case.steps) for case in select(group="dense")}
    assert {(case.hidden_size, case.batch, case.steps) for case in select("bfloat16-gain", group="bfloat16")} == grid


def row(case: str, experiment: str, mode: str, peer: str, ms: float) -> Row:
    """A row that nobody has measured, of a call of a millisecond."""
    shape = {name: getattr(CASES[case], name) for name in ("group", "input_size", "hidden_size", "batch", "steps")}
    return Row(
        experiment=experiment, case=case, mode=mode, peer=peer, peer_p50_ms=ms, p50_ms=1.0, pairs=7, device="Made Up",
        threads=2, backend="numba", dtype=CASES[case].dtype, **shape,
    )  # fmt: skip


def test_its_column():
    cases = ("bfloat16-h64-b8-t1000", "bfloat16-h128-b32-t1000", "dense-h64-b8-t1000")
    found = [row(case, "after-torch", mode, "torch", 3.0) for case in cases for mode in ("training", "inference")]
    assert "vs our float32" not in findings.groups(found, speeds_only=False).columns
    assert "float32" not in findings.said(found, speeds_only=False)
    found += [
        row(case, "bfloat16-gain", "training", IN_FLOAT32, ms) for case, ms in zip(cases, (1.0, 4.0), strict=False)
    ]
    table = findings.groups(found, speeds_only=False)
    cells = {str(line[0]).partition(":")[0]: line[-1] for line in table.lines}
    assert table.columns[-1] == "vs our float32"
    assert (cells["bfloat16"], cells["dense"]) == ("2.00× / -", "")
    assert "our kernels in float32 over their time in bfloat16" in findings.said(found, speeds_only=False)
    assert "vs our float32" not in findings.groups(found, speeds_only=True).columns

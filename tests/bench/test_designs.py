"""The designs that are timed on a GPU, and what was measured of them there against the model that chooses."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need Triton, which is not installed")

from lstmcore.kernels.gpu import tiling

from bench import cli, rows
from bench.cases import Case, select
from bench.experiments import designs as designs_of
from bench.experiments.designs import H200, MOST, designs, kernels
from bench.gpu import launches
from bench.measure import Task
from bench.rows import RESULTS, Row
from bench.timing import Effort

SHAPES = [(case.hidden_size, case.batch) for case in select("designs", "cuda")]


def measured() -> list[Row]:
    return [row for path in sorted(RESULTS.glob("*.csv")) for row in rows.read(path) if row.experiment == "designs"]


def place(row: Row) -> tuple[int, int, bool]:
    """H, B, and whether it is the backward pass."""
    return row.hidden_size, row.batch, row.mode == "backward"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_designs_of_a_shape(shape, backward):
    found = designs(*shape, backward, *H200)
    assert found[0] == tiling.choose_design(*shape, 1, "16", H200[0], backward, shared=H200[1])
    assert 1 < len(found) <= MOST
    assert len(set(found)) == len(found)
    assert all(design.programs <= H200[0] for design in found if design.kind == "split")


def test_each_kernel_is_compiled_once():
    wanted = kernels(*H200)
    told = [
        (case.hidden_size, back, d.kind, d.units, d.tile, d.warps, d.chunk, d.chunks, d.stream)
        for case, back, d in wanted
    ]
    assert len(set(told)) == len(told)
    assert {case.hidden_size for case, _, _ in wanted} == {hidden for hidden, _ in SHAPES}


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["designs"]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err
    assert cli.main(["designs", "--dry-run"]) == 0
    assert "H 1024, B 256, backward: split" in capsys.readouterr().out


def test_the_model_is_not_far_from_what_was_measured():
    """30 %: it is fitted to all of these at once, and the worst was 27 % off."""
    assert measured()
    for row in measured():
        design = row.details
        if design["kind"] == "split":
            hidden, _, backward = place(row)
            units = int(design["units"])
            terms, m = (4 * hidden, units) if backward else (hidden, 4 * units)
            sizes = (int(design[name]) for name in ("tile", "rows", "tiles"))
            shares = (int(design["slices"]), int(design["chunks"]), design["stream"] == "True")
            model = tiling.split_time(terms, *sizes, m, *shares, "16")
            assert model == pytest.approx(row.p50_ms * 1e3, rel=0.3), row


def test_the_tiling_chooses_what_measured_best():
    """Or what took a tenth longer at most: so much differs from one run to the next."""
    for (hidden, batch, backward), group in groupby(sorted(measured(), key=place), key=place):
        found = list(group)
        chosen = tiling.choose_design(hidden, batch, 1, "16", H200[0], backward, shared=H200[1])
        shares = ("kind", "units", "tile", "groups", "tiles", "warps", "chunk", "chunks")
        same = [row for row in found if all(row.details[name] == str(getattr(chosen, name)) for name in shares)]
        assert len(same) == 1, f"nobody has measured what is chosen for H {hidden}, B {batch}: {chosen}"
        assert same[0].p50_ms <= 1.1 * min(row.p50_ms for row in found)


def test_results_were_right():
    """Of a kernel that computes something else no time counts."""
    assert all(row.max_error < 8 * torch.finfo(torch.bfloat16).eps for row in measured())


@pytest.mark.slow
def test_designs_are_measured_of_the_right_results(monkeypatch):
    """With Triton's interpreter and a clock that stands still: what runs by each design is what torch computes."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU: make gpu runs the experiment itself")

    class Event:
        def __init__(self, **_: object) -> None: ...

        def record(self) -> None: ...

        def elapsed_time(self, end: object) -> float:
            return 0.006

    monkeypatch.setattr(designs_of, "DEVICE", "cpu")
    monkeypatch.setattr(launches, "limits", lambda: (16, tiling.SHARED))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("_sleep", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    made = []
    monkeypatch.setattr(designs_of, "row_of", lambda *given, **columns: made.append((given, columns)))
    case = Case("design-tiny", "design", 40, 40, 3, 3, dtype="bfloat16", modes=("training",), device="cuda")
    list(designs_of.measure(case, Task(Effort(2, 0.0))))
    for part in ("forward", "backward"):
        these = [columns for given, columns in made if given[2] == part]
        assert len(these) > 1
        assert [columns["details"]["chosen"] for columns in these] == ["True"] + ["False"] * (len(these) - 1)
        assert len({columns["variant"] for columns in these}) == len(these)
        for columns in these:
            assert columns["max_error"] < 8 * torch.finfo(torch.bfloat16).eps
            assert columns["p50_ms"] == pytest.approx(0.006 / 3)

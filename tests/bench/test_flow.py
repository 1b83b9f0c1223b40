"""``python -m bench flow``: what it measures is what it says, and wrong results get no figure."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import cli, rows
from bench.cases import CASES, select
from bench.experiments import flow
from bench.measure import Task
from bench.providers import Runner
from bench.timing import Effort
from bench.verify import Mismatch

TINY = replace(CASES["dense-h16-b1-t1000"], name="tiny", steps=40, batch=3)
FAST = ["flow", "--case", "tiny", "--pairs", "2", "--seconds", "0"]
pytestmark = pytest.mark.usefixtures("short_samples")


@pytest.mark.slow
def test_rows(registry, monkeypatch, tmp_path):
    recorded = []
    original = flow.recorded

    def watch(runner, every):
        steps = original(runner, every)

        def call() -> None:
            recorded.append(every)
            steps()

        return call

    registry(TINY)
    monkeypatch.setattr(flow, "recorded", watch)
    monkeypatch.setattr(flow, "LIMIT", -1.0)  # so that every tenth step is measured too
    assert cli.main([*FAST, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.csv")
    found = rows.read(path)
    assert [row.variant for row in found] == ["every 1", "every 10"]
    for row in found:
        assert (row.backend, row.kind, row.mode) == ("numba", "cost", "training")
        assert row.p50_ms > 0
        assert row.peer_p50_ms > 0
        assert set(row.details) == set(flow.FLOW.details)
    assert set(recorded) == {1, 10}


def test_every_tenth_step_is_measured_only_where_every_step_is_too_dear(registry, monkeypatch, tmp_path):
    registry(TINY)
    monkeypatch.setattr(flow, "LIMIT", 1e9)
    assert cli.main([*FAST, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.csv")
    assert [row.variant for row in rows.read(path)] == ["every 1"]


def test_results_that_differ_get_no_figure(monkeypatch):
    def training(runner):
        outputs = original(runner)
        return [outputs[0] + bool(flow.lstmcore.recording._watched), *outputs[1:]]

    original = Runner.training
    monkeypatch.setattr(Runner, "training", training)
    with pytest.raises(Mismatch, match="tiny: expected the same bits"):
        list(flow.measure(TINY, Task(Effort(2, 0.0), "numba")))


def test_what_cannot_be_measured(capsys):
    assert cli.main(["flow", "--case", "nothing"]) == 2
    assert "no case matches --case nothing" in capsys.readouterr().err
    assert cli.main(["flow", "--device", "cuda", "--list"]) == 0
    listed = capsys.readouterr().out
    assert "4 of 4 cases" in listed
    assert all(case.name in listed for case in select("flow", "cuda"))
    if not torch.cuda.is_available():
        assert cli.main(["flow", "--device", "cuda"]) == 2
        assert "nothing was measured" in capsys.readouterr().err


def test_a_case_that_is_not_tagged_may_be_named():
    assert {case.name for case in select("flow")} < {case.name for case in select("flow", pattern="dense-*")}


@pytest.mark.slow
def test_the_interruption_keeps_what_is_done(registry, monkeypatch, tmp_path, capsys):
    def interrupted(runner):
        raise KeyboardInterrupt

    registry(TINY, replace(TINY, name="tiny too"))
    reading, done = flow.reading, []
    monkeypatch.setattr(flow, "LIMIT", 1e9)
    monkeypatch.setattr(
        flow, "reading", lambda runner: interrupted(runner) if done else done.append(1) or reading(runner)
    )
    assert cli.main([*FAST, "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.csv")
    assert [row.case for row in rows.read(path)] == ["tiny"]

"""``python -m bench.flow``: what it measures is what it says, and wrong results get no figure."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import flow
from bench.cases import CASES
from bench.verify import Mismatch

TINY = replace(CASES["dense-h16-b1-t1000"], name="tiny", steps=40, batch=3)


def test_a_row(monkeypatch, tmp_path):
    recorded = []
    original = flow.recorded

    def watch(runner, every):
        steps = original(runner, every)

        def call() -> None:
            recorded.append(every)
            steps()

        return call

    monkeypatch.setattr(flow, "recorded", watch)
    monkeypatch.setattr(flow, "LIMIT", -1.0)  # so that every tenth step is measured too
    monkeypatch.setattr(flow, "CASES", {"tiny": TINY})
    assert flow.main(["--case", "tiny", "--pairs", "2", "--seconds", "0", "--out", str(tmp_path)]) == 0
    (path,) = (tmp_path / "flow").glob("*.csv")
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    columns = lines[0].split(",")
    assert columns[:3] == ["commit", "date", "torch"]
    for line, every in zip(lines[1:], ("1", "10"), strict=True):
        row = dict(zip(columns, line.split(","), strict=True))
        assert row["every"] == every
        assert row["backend"] == "numba"
        assert float(row["off_ms"]) > 0
    assert set(recorded) == {1, 10}


def test_results_that_differ_get_no_figure(monkeypatch):
    def training(runner):
        outputs = original(runner)
        return [outputs[0] + bool(flow.lstmcore.recording._watched), *outputs[1:]]

    original = flow.Runner.training
    monkeypatch.setattr(flow.Runner, "training", training)
    with pytest.raises(Mismatch, match="tiny: expected the same bits"):
        flow.measure(TINY, 1, 2, 0.0)


def test_what_cannot_be_measured(capsys):
    assert flow.main(["--case", "nothing"]) == 2
    assert "no such case: nothing" in capsys.readouterr().out
    assert flow.main(["--device", "cuda", "--list"]) == 0
    assert capsys.readouterr().out.split() == list(flow.NAMES["cuda"])
    if not torch.cuda.is_available():
        assert flow.main(["--device", "cuda"]) == 2
        assert "nothing was measured" in capsys.readouterr().out


def test_the_interruption_keeps_what_is_done(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(flow, "LIMIT", -1.0)
    monkeypatch.setattr(flow, "CASES", {"tiny": TINY})
    measured = iter([flow.measure(TINY, 1, 1, 0.0)])
    monkeypatch.setattr(flow, "measure", lambda *_: next(measured, None) or raise_interrupt())
    assert flow.main(["--case", "tiny", "--out", str(tmp_path)]) == 0
    assert "interrupted" in capsys.readouterr().out
    (path,) = (tmp_path / "flow").glob("*.csv")
    assert len(path.read_text().splitlines()) == 2


def raise_interrupt():
    raise KeyboardInterrupt

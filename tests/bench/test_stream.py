"""``python -m bench stream``: all compute the same steps, wrong ones get no figure, rows say who was beside whom."""

from __future__ import annotations

import pytest
import torch

from bench import cli, onnx_peer, rows
from bench.cases import Case, select
from bench.experiments import stream
from bench.verify import Mismatch

ONE = Case("stream-one", "stream", 3, 17, 2, 100, modes=("inference",))
TWO = Case("stream-two", "stream", 3, 17, 1, 100, num_layers=2, modes=("inference",))
PEERS = {"torch.nn.LSTM": "tensors", "torch.nn.LSTMCell": "tensors"}
ONNX = {"onnxruntime, 1 thread": "arrays", "onnxruntime": "arrays"} if onnx_peer.missing() is None else {}


def test_everyone_takes_the_same_steps_and_rows_say_who(registry, tmp_path):
    registry(ONE, TWO)
    assert cli.main(["stream", "--pairs", "20", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    found = rows.read(path)
    assert {(row.case, row.peer): row.variant for row in found} == {
        (case.name, peer): kind
        for case in (ONE, TWO)
        for peer, kind in (PEERS | ONNX).items()
        if (case, peer) != (TWO, "torch.nn.LSTMCell")  # it has one layer
    }
    for row in found:
        assert (row.backend, row.reference, row.pairs) == ("numba", "float64", 20)
        assert 0 < row.max_error < 1e-5
        assert set(row.details) == set(stream.STREAM.details)
        assert float(row.details["p99_us"]) >= row.p50_ms * 999
        assert row.speed == pytest.approx(row.pair_ratio, rel=1e-6)


def test_a_wrong_step_gets_no_figure(registry, monkeypatch, tmp_path, capsys):
    registry(ONE)
    monkeypatch.setattr(stream, "torchs_cell", lambda module, batch: lambda x: torch.zeros(batch, 17))
    assert cli.main(["stream", "--pairs", "5", "--out", str(tmp_path)]) != 0
    told = " ".join(capsys.readouterr().out.split())
    assert "stream-one, torch.nn.LSTMCell, output: expected an error of at most" in told


def test_the_judge_sees_a_state_that_is_lost():
    problem = stream.draw(ONE, steps=8)
    module = torch.nn.LSTM(3, 17)
    module.load_state_dict(problem.weights)
    judge, inputs = stream.Judge(problem, module), list(problem.input)
    right = stream.ours(module, 2)
    judge.error("ours", stream.outputs(right.step, inputs))

    def forgets(x):
        right.reset()
        return right.step(x)

    with pytest.raises(Mismatch, match="forgets"):
        judge.error("forgets", stream.outputs(forgets, inputs))


def test_weights_are_counted():
    parameters = sum(p.numel() for name, p in torch.nn.LSTM(3, 17, 2).named_parameters() if "weight" in name)
    assert stream.weight_bytes(TWO) == 4 * parameters
    assert {case.group for case in select("stream")} == {"stream"}

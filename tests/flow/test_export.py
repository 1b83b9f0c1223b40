"""A recording in files and loggers: what is read back is what was written, to the bit."""

import csv
import json
import math
from dataclasses import fields, is_dataclass

import pytest
import torch
from torch import Tensor

from lstmcore.flow import export
from lstmcore.flow.record import GATES, QUANTILES

from ..support.flow_records import gates, geometric, record


def records():
    """One of every kind: NaN tails, infinities, zeros, rows, an infinite horizon, a plain RNN."""
    return [
        record(0.9, 12, module="", kind=gates(12, 4, forget=[0.1, 0.3, 0.9, 1.0]), keep=True),
        record(0.3, 200, iteration=3, module="encoder.0", layer=1, direction=1, call=2),
        record(curve=geometric(400, 1.5, 1e-3), iteration=3, kind=gates(400)),
        record(1 / 3, 9, lengths=torch.tensor([3, 7]), keep=True),
        record(0.7, 5, plain=True, iteration=4),
        record(0.7, 1, iteration=5),
    ]


def same(a, b) -> bool:
    """To the bit, NaN where NaN is."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return type(a) is type(b) and a == b


def test_json_round_trip(tmp_path):
    written = records()
    path = export.to_json(written, tmp_path / "new" / "flow.json")
    assert path == tmp_path / "new" / "flow.json"
    read = export.from_json(path)
    assert len(read) == len(written)
    assert all(map(same, written, read))
    assert not same(written[0], read[1])  # the comparison can fail
    assert read[0].h.rows is not None
    assert export.from_json(export.to_json([], tmp_path / "none.json")) == []


def test_json_is_valid(tmp_path):
    """No NaN, no Infinity, which other readers refuse."""
    path = export.to_json(records(), tmp_path / "flow.json")

    def refuse(constant):
        raise AssertionError(constant)

    data = json.loads(path.read_text(), parse_constant=refuse)
    assert data["format"] == "lstmcore.flow"
    assert data["quantiles"] == list(QUANTILES)
    assert data["records"][2]["c"]["mean"][0] == "inf"
    assert data["records"][3]["c"]["mean"][-1] is None
    assert data["records"][4]["c"] is None


def test_json_that_is_not_ours(tmp_path):
    path = tmp_path / "x.json"
    for text, match in (
        ("{", "not JSON"),
        ("[]", "no recorded gradient flow"),
        ('{"format": "lstmcore.flow", "version": 99}', "version 99"),
        ('{"format": "lstmcore.flow", "version": 1, "records": [{}]}', "damaged"),
        ('{"format": "lstmcore.flow", "version": 1}', "damaged"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=match):
            export.from_json(path)
    with pytest.raises(FileNotFoundError):
        export.from_json(tmp_path / "there is none.json")


def test_csv(tmp_path):
    written = records()
    path = export.to_csv(written, tmp_path / "new" / "flow.csv")
    assert path == tmp_path / "new" / "flow.csv"
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames) == export.COLUMNS
        blocks = {}
        for line in reader:
            blocks.setdefault(tuple(line[name] for name in export.COLUMNS[:7]), []).append(line)

    def column(record, quantity, axis, name) -> Tensor:
        key = (record.iteration, record.module or "(model)", record.layer, record.direction, record.call)
        found = blocks.get((*map(str, key), quantity, axis), [])
        assert [int(line["position"]) for line in found] == list(range(len(found)))
        return torch.tensor([float(line[name] or "nan") for line in found], dtype=torch.float64)

    for each in written:
        for state, norms in (("h", each.h), ("c", each.c)):
            if norms is None:
                assert not len(column(each, state, "lag", "mean"))
                continue
            assert same(column(each, state, "step", "mean"), norms.mean)
            assert same(column(each, state, "lag", "mean"), norms.mean_by_lag)
            for index, name in enumerate(("q05", "q25", "q50", "q75", "q95")):
                assert same(column(each, state, "step", name), norms.quantiles[index])
                assert same(column(each, state, "lag", name), norms.quantiles_by_lag[index])
        assert same(column(each, "entering", "step", "mean"), each.entering)
        assert same(column(each, "entering", "lag", "mean"), each.entering_by_lag)
        if each.gates is not None:
            for index, gate in enumerate(GATES):
                assert same(column(each, gate, "step", "mean"), each.gates.mean[index])
                assert same(column(each, gate, "step", "closed"), each.gates.closed[index])
                assert same(column(each, gate, "step", "open"), each.gates.open[index])
            assert same(column(each, "horizon", "unit", "mean"), each.gates.horizon)


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (export.to_csv, export.to_json):
        for path in (tmp_path / "file" / "below.it", tmp_path):
            with pytest.raises(OSError, match="cannot write this file") as caught:
                write(records()[:1], path)
            assert str(path) in str(caught.value)
    with pytest.raises(IsADirectoryError):
        export.to_csv([], tmp_path)


def test_scalars():
    found = export.scalars(record(0.9, 200, kind=gates(200, 4, forget=[0.05, 0.5, 0.5, 0.95], spread=0.0)))
    assert found["c/norm_lag_0"] == pytest.approx(1)
    assert found["c/ratio"] == found["c/norm_far_end"] / found["c/norm_lag_0"]
    assert found["c/ratio"] == pytest.approx(0.9**199, rel=1e-5)
    assert found["c/log10_ratio_lag_100"] == pytest.approx(100 * math.log10(0.9), rel=1e-6)
    assert found["h/norm_lag_0"] == pytest.approx(0.3)
    assert found["horizon/median"] == pytest.approx(1)
    assert found["gates/forget_mean"] == pytest.approx(0.5)
    assert found["gates/forget_closed"] == found["gates/forget_open"] == 0.25
    assert found["gates/output_closed"] == 0
    assert all(type(value) is float for value in found.values())


def test_scalars_of_what_is_not_there():
    plain = export.scalars(record(0.9, 50, plain=True))
    assert set(plain) == {"h/norm_lag_0", "h/norm_far_end", "h/ratio"}  # no cell, no gates, no lag 100
    assert "h/log10_ratio_lag_100" in export.scalars(record(0.9, 101, plain=True))
    ragged = export.scalars(record(0.9, 60, lengths=torch.tensor([20, 40])))
    assert ragged["c/norm_far_end"] == pytest.approx(1.5 * 0.9**39, rel=1e-6)  # of the longest row
    assert export.scalars(record(0.1, 200))["c/log10_ratio_lag_100"] == -math.inf


class Writer:
    """As much of TensorBoard's SummaryWriter as is used."""

    def __init__(self):
        self.scalars, self.histograms = {}, {}

    def add_scalar(self, tag, scalar_value, global_step=None, walltime=None):
        self.scalars[tag, global_step] = scalar_value

    def add_histogram(self, tag, values, global_step=None, bins="tensorflow"):
        self.histograms[tag, global_step] = values


def test_log_to_a_writer():
    each = record(0.9, 50, iteration=7, module="enc", kind=gates(50, 4, forget=[0.5, 0.5, 0.25, 1.0]))
    turned = record(0.9, 50, iteration=8, module="", layer=1, direction=1, call=1)
    writer = Writer()
    export.log([each, turned], writer)
    numbers = export.scalars(each)
    assert writer.scalars["gradient_flow/enc/layer_0/c/ratio", 7] == numbers["c/ratio"]
    assert (
        writer.scalars["gradient_flow/(model)/layer_1_reverse/call_1/h/ratio", 8] == export.scalars(turned)["h/ratio"]
    )
    assert len(writer.scalars) == len(numbers) + len(export.scalars(turned))
    ((key, values),) = writer.histograms.items()
    assert key == ("gradient_flow/enc/layer_0/horizon/log2", 7)
    assert values.tolist() == pytest.approx([0, 0, -1])  # finite ones only


def test_log_to_a_writer_without_histograms():
    class Plain:
        seen = ()

        def add_scalar(self, tag, value, step):
            self.seen += (tag,)

    writer = Plain()
    export.log([record(0.9, 50, kind=gates(50))], writer)
    assert "gradient_flow/lstm/layer_0/horizon/median" in writer.seen


def test_log_to_a_callable():
    seen = []
    export.log(
        [record(0.9, 9, iteration=4), record(0.8, 9, iteration=2), record(0.7, 9, iteration=4, layer=1)],
        lambda numbers, iteration: seen.append((iteration, numbers)),
    )
    assert [iteration for iteration, _ in seen] == [2, 4]
    assert seen[1][1]["gradient_flow/lstm/layer_1/c/ratio"] == pytest.approx(0.7**8, rel=1e-6)
    assert len(seen[1][1]) == 2 * len(seen[0][1])


@pytest.mark.parametrize("wrong", [None, "runs/1", {}])
def test_log_to_something_else(wrong):
    with pytest.raises(TypeError, match=r"add_scalar.*callable"):
        export.log([record(0.9, 9)], wrong)

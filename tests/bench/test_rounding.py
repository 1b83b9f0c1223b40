"""``python -m bench rounding``: its oracle, its errors, and that what is committed keeps the bound."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from bench import cli, report, rounding
from bench.cases import CASES, select
from bench.providers import Runner, arguments, draw

TINY = replace(CASES["rounding-h64-b8-t10"], name="rounding-tiny", input_size=5, hidden_size=8, batch=3, steps=4)
COMMITTED = sorted(rounding.FOLDER.glob("*.csv"))


def test_relative_error():
    expected = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert rounding.relative_error(torch.tensor([3.0, 4.5]).bfloat16(), expected) == pytest.approx(0.1)
    assert rounding.relative_error(torch.tensor([3.0, float("nan")]), expected) == float("inf")
    assert rounding.relative_error(torch.tensor([3.0]), expected) == float("inf")


@pytest.mark.parametrize("name", [case.name for case in select("rounding") if "t10" in case.name])
def test_the_oracle_has_the_same_data(name):
    case = replace(CASES[name], hidden_size=8, batch=3, steps=4, proj_size=min(CASES[name].proj_size, 4))
    problem = rounding.problem_of(case, 1)
    oracle = Runner(nn.LSTM(**arguments(case), dtype=torch.float64), draw(case, dtype=torch.float64))
    for mine, expected in zip(rounding.exact(problem), oracle.training(), strict=True):
        assert torch.equal(mine, expected)


def test_larger_weights_are_rounded_before_the_oracle_sees_them():
    once, thrice = (rounding.problem_of(TINY, scale).weights for scale in (1, 3))
    for name, weight in thrice.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, (3 * once[name].double()).bfloat16())


@pytest.mark.parametrize("dtype", rounding.DTYPES)
def test_rows(dtype):
    case = replace(TINY, dtype=dtype, bidirectional=True, proj_size=4)
    found = list(rounding.measure(case, 3))
    assert {row.kind for row in found} == set(rounding.KINDS)
    assert len(found) == len({row.key for row in found}) == 6 + 2 * 5
    eps = torch.finfo(getattr(torch, dtype)).eps
    for row in found:
        assert (row.dtype, row.weights, row.backend) == (dtype, 3, "numba")
        assert eps / 20 < row.error < 4 * eps  # of the roundings of one type, neither of a wider one nor of a narrower


def test_a_wrong_result_is_seen(registry, monkeypatch, capsys):
    registry(TINY)
    original = rounding.build
    monkeypatch.setattr(
        rounding, "build", lambda provider, problem, *rest: original(provider, spoiled(provider, problem), *rest)
    )

    def spoiled(provider, problem):
        wrong = {name: weight.clone() for name, weight in problem.weights.items()}
        if provider == "lstmcore":
            wrong["weight_hh_l0"][0, 0] += 0.5
        return replace(problem, weights=wrong)

    assert cli.main(["rounding", "--no-save"]) == 1
    assert "rounding-tiny, bfloat16, weights × 1, output: " in capsys.readouterr().out


def test_a_run(registry, tmp_path, capsys):
    registry(TINY, replace(TINY, name="rounding-other"))
    assert cli.main(["rounding", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.csv")
    first = rounding.read(path)
    assert len(first) == 2 * 2 * 2 * 10
    rounding.save(path, [replace(row, error=1.0) for row in first if row.case == "rounding-tiny"][:10])
    again = rounding.read(path)
    assert [row.key for row in again] == [row.key for row in first]
    assert sum(row.error == 1.0 for row in again) == 10
    assert "none above 2" in capsys.readouterr().out
    assert cli.main(["rounding", "--case", "nothing"]) == 2


def test_the_table():
    row = next(rounding.measure(TINY, 1))
    found = [replace(row, error=error, peer_error=0.02) for error in (0.01, 0.04)]
    line = next(line for line in rounding.lines(found) if line[0] == "`output`")
    assert line == ("`output`", "2.0e-02 / 2.0e-02", "2.00", *[""] * 6)
    assert len(line) == len(rounding.COLUMNS)
    assert replace(row, error=0.0, peer_error=0.0).ratio == 1.0
    assert replace(row, error=0.1, peer_error=0.0).ratio == float("inf")


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_rows_are_whole_and_keep_the_bound(path):
    found = rounding.read(path)
    assert {row.case for row in found} == {case.name for case in select("rounding")}
    assert {(row.dtype, row.weights) for row in found} == set(rounding.SETS)
    assert all(row.ratio <= rounding.BOUND for row in found)


def test_the_page_has_the_table_of_the_committed_rows(tmp_path):
    page = tmp_path / "numerics.md"
    page.write_text(report.NUMERICS.read_text())
    report.update_rounding(target=page)
    assert page.read_text() == report.NUMERICS.read_text()
    report.update_rounding(tmp_path / "none", page)
    assert report.NO_ROUNDING in page.read_text()

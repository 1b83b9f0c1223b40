"""The forecasts of the length of the day: what they read, what they are measured against, what they go on from."""

from __future__ import annotations

import argparse
import math

import numpy as np
import pytest
import torch

pytest.importorskip("astropy_iers_data", reason="needs the package astropy-iers-data, which holds the series")
pytest.importorskip("matplotlib", reason="needs matplotlib")
pytest.importorskip("rich", reason="needs rich")

import time_series
from common import CannotRun
from learner import Learner
from tests.support.examples import interrupt, refused, same, state_of
from time_series import Series, following, forecasts, linear, loss_of, naive, origins, seasonal

TINY = ("--history", "40", "--batch", "2", "--hidden-size", "4", "--max-lag", "20", "--days", "5")
FILE = time_series.Path(time_series.astropy_iers_data.IERS_B_FILE)


@pytest.fixture
def run(tmp_path):
    def run(*arguments: str, out: str = "out") -> int:
        return time_series.main([*TINY, "--validate-every", "2", "--out", str(tmp_path / out), *arguments])

    return run


@pytest.fixture(scope="module")
def series() -> Series:
    return Series.read(FILE)


@pytest.mark.slow
def test_it_runs(run, tmp_path, capsys):
    assert run("--iterations", "3") == 0
    told = capsys.readouterr().out
    for text in ("lstmcore.LSTM", "seasonal naive, 27 days", "linear autoregression", "RMSE", "torch.nn.LSTM"):
        assert text in told
    assert told.count("mean absolute error") == 4, "a title, and a sentence for each of three baselines"
    assert (tmp_path / "out" / "time_series.png").stat().st_size > 20_000
    state = state_of(tmp_path / "out" / "time_series.pt")["state"]
    assert len(state["losses"]) == 3
    assert all(math.isfinite(loss) for loss in state["losses"])
    assert [step for step, _ in state["validations"]] == [2, 3]


def test_it_goes_on_as_if_it_had_never_stopped(run, tmp_path, monkeypatch, capsys):
    assert run("--iterations", "5", out="whole") == 0
    with monkeypatch.context() as patch:
        interrupt(patch, Learner, "step", at=3)
        assert run("--iterations", "5", out="parts") == 130
    assert "stopped after iteration 3; go on with --resume" in capsys.readouterr().out
    assert run("--iterations", "5", "--resume", out="parts") == 0
    assert "resumed after step 3" in capsys.readouterr().out
    whole, parts = (state_of(tmp_path / out / "time_series.pt") for out in ("whole", "parts"))
    assert same(whole, parts)


def test_what_is_read(series):
    assert len(series.values) == len(series.dates) == 15341
    assert [str(series.dates[index]) for index in (0, series.validation, series.test, -1)] == [
        *("1984-01-01", "2018-01-01", "2022-01-01", "2025-12-31"),
    ]
    assert (np.diff(series.dates) == np.timedelta64(1, "D")).all()
    assert 0.5 < series.values.mean() < 1.5, "milliseconds"


def damaged(text: str) -> dict[str, str]:
    lines = text.splitlines()
    return {
        "a day is missing": "\n".join(lines[:100] + lines[101:]),
        "it ends too early": "\n".join(lines[:3000]),
        "other words": "something else\n" * 10,
    }


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("a day is missing", "expected a line for each day"),
        ("it ends too early", "expected the days from 1984-01-01 to 2026-01-01"),
        ("other words", "not in the form of EOP 20 C04"),
    ],
)
def test_a_file_that_is_not_whole(damage, told, tmp_path):
    path = tmp_path / "series"
    path.write_text(damaged(FILE.read_text())[damage])
    with pytest.raises(CannotRun, match=told):
        Series.read(path)


# ------------------------------------------------------------------------------------------------------------ forecasts


def test_the_baselines_by_hand():
    values = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7])
    days_of = torch.tensor([4, 5])
    assert naive(values, days_of, 3).tolist() == [[4, 4, 4], [5, 5, 5]]
    assert seasonal(2)(values, days_of, 3).tolist() == [[3, 4, 3], [4, 5, 4]]
    assert seasonal(4)(values, days_of, 2).tolist() == [[1, 2], [2, 3]]
    assert following(values, days_of, 2).tolist() == [[5, 6], [6, 7]]
    assert origins(4, 8, 2).tolist() == [3, 4, 5], "the last target is the last value"


def test_the_season_is_found():
    """And none of its multiples, which a trend spoils."""
    days = torch.arange(2000.0)
    assert time_series.best_season(torch.sin(days * 2 * math.pi / 23) + days / 1000, 5) == 23


def test_the_autoregression_is_exact():
    """A sum of two waves is a linear recurrence, which it has to find."""
    days = torch.arange(3000, dtype=torch.float64)
    values = (torch.sin(days / 3) + 0.5 * torch.sin(days / 7 + 1)).float()
    forecast = linear(values[:2000], lags=30, days=10)
    days_of = origins(2500, 3000, 10)
    torch.testing.assert_close(forecast(values, days_of, 10), following(values, days_of, 10), atol=0.01, rtol=0)


@pytest.mark.parametrize("name", ["naive", "seasonal", "linear", "model"])
def test_no_forecast_sees_what_it_forecasts(name, series):
    """Later values change nothing in it."""
    options = argparse.Namespace(history=60, days=5)
    model = time_series.Forecaster(torch.nn.LSTM, series.train, 4, 5)
    every = {
        "naive": naive,
        "seasonal": seasonal(3),
        "linear": linear(series.train[:500], 20, 5),
        "model": lambda values, days_of, days: forecasts(model, values, 200, 300, options),
    }
    days_of = origins(200, 300, 5)
    values, row = series.values[:300], 50
    changed = values.clone()
    changed[days_of[row] + 1 :] += 1
    with torch.no_grad():
        before, after = (every[name](each, days_of, 5) for each in (values, changed))
    assert before.shape == (len(days_of), 5)
    assert torch.equal(before[: row + 1], after[: row + 1])
    assert not torch.equal(before[row + 1 :], after[row + 1 :])


def test_training_sees_neither_validation_nor_test(series):
    options = argparse.Namespace(history=40, days=5, batch=4)
    spoilt = Series(series.dates, series.values.clone(), series.validation, series.test)
    spoilt.values[series.validation :] = math.nan
    model = time_series.Forecaster(torch.nn.LSTM, series.train, 4, 5)
    torch.manual_seed(0)
    assert all(math.isfinite(loss_of(spoilt, options)(model).item()) for _ in range(20))


def test_verdicts():
    """Of a model that is better than one, and worse than the other on one of two days."""
    truth = torch.zeros(3, 2)
    made = {
        time_series.LSTM: torch.tensor([1.0, 3.0]).expand(3, 2),
        "poor": torch.tensor([4.0, 4.0]).expand(3, 2),
        "good": torch.tensor([1.5, 0.5]).expand(3, 2),
    }
    assert time_series.Tested(truth, made).verdicts() == [
        "mean absolute error 50% below that of poor: better at every day ahead",
        "mean absolute error 100% above that of good: not better at 1 of 2 days ahead",
    ]


def test_the_periods_of_a_model_are_found(series):
    """Of one that is a wave by construction: its weights swing with 20 days."""

    class Wave(torch.nn.Module):
        def forward(self, values):
            weights = torch.cos(torch.arange(len(values) - 1, -1, -1) * 2 * math.pi / 20)
            return (values * weights[:, None]).sum(0)[None, :, None].expand(1, -1, 7)

    periods = time_series.found(Wave(), series, 200, argparse.Namespace(history=400, days=7))
    assert periods.ahead == 4
    assert periods.periods[periods.strength.argmax()].item() == pytest.approx(20, abs=0.5)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--max-lag 2", "pass --max-lag 3 or more"),
        ("--history 9000", "--history 9000 and --days 5 are too long for 12,419 days"),
        ("--max-lag 9000", "--max-lag 9000"),
        ("--history 7", "at least 8 days, got 7"),
        ("--days 400", "--days of at most 365, got 400"),
        ("--iterations 0", "above 0, got 0"),
        ("--learning-rate nan", "above 0, got nan"),
        ("--resume", "run without --resume first"),
    ],
)
def test_what_it_refuses(arguments, told, run, capsys):
    assert told in refused(lambda each: run(*each), arguments.split(), capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_gpu(run, capsys):
    assert "there is no cuda on this machine" in refused(lambda each: run(*each), ["--device", "cuda"], capsys)


def test_a_checkpoint_of_another_training(run, capsys):
    assert run("--iterations", "2") == 0
    told = refused(lambda each: run(*each), ["--iterations", "3", "--seed", "1", "--resume"], capsys)
    assert "seed 0 (now 1), iterations 2 (now 3)" in told

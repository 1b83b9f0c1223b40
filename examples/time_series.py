"""How long is a day?  Forecasts of the Earth's rotation, thirty days ahead, by lstmcore.LSTM.

    python examples/time_series.py             # a minute or two on two cores
    python examples/time_series.py --resume    # goes on from the checkpoint, as if it had never stopped

A day is longer than 86,400 seconds by a millisecond or so, and by how much changes from day to day: tides of the Moon
slow the rotation and speed it up, winds and seasons do, and so does the core of the Earth.  It is measured, every day
since 1962; the package astropy-iers-data holds the series (EOP 20 C04 of the International Earth Rotation and
Reference Systems Service).  Here it is read from 1984 on, when measurements became as good as they are.

Nobody tells the model a period.  It reads the series day by day, and says at each day what the next thirty will be.
``chrono`` alone is set: the longest lag that its memory should span.  Several periods overlap, none of them a whole
number of days, and their strength changes over years.  The picture shows which ones it found, beside the tides' own.

Beside it stand the last value (naive), the value a season ago, with the season that is best on the training years
(seasonal naive), and a linear autoregression on as many days as ``chrono`` spans, solved exactly.

The last four years are the test, the four before them choose the weights that are kept; neither is trained on.

Legend: T days of a window, B batch, D days ahead, L lags.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import lstmcore
from common import CannotRun, Checkpoint, add_options, brought_by, positive, reported
from learner import SETTINGS, Learner, add_training_options, compare_steps, measured

with brought_by("examples"):
    import astropy_iers_data
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

    from lstmcore.flow import plots

FIRST, VALIDATION, TEST, END = (np.datetime64(f"{year}-01-01") for year in (1984, 2018, 2022, 2026))
YEAR, MONTH, DAY, MJD, EXCESS = 0, 1, 2, 4, 12  # columns of the file; the excess over 86,400 s is in seconds
SEASONS = range(2, 800)  # days, of which the seasonal naive forecast takes the best
RIDGE = 1.0
TIDES = {"Mf, 13.66 days": 13.66, "Mm, 27.55 days": 27.55}  # the strongest two that the Moon makes in this series
SHOWN = (1, 7, 14, 30)  # days ahead
LSTM, NAIVE, LINEAR = "lstmcore.LSTM", "naive", "linear autoregression"
COLOURS = {LSTM: plots.BLUE, NAIVE: plots.GREY, LINEAR: plots.GREEN}
SEASONAL_COLOUR = plots.ORANGE


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Series:
    """A value a day, in milliseconds, and where its parts begin."""

    dates: np.ndarray
    values: Tensor  # (N,)
    validation: int  # index of the first day of it; what is before is trained on
    test: int

    @property
    def train(self) -> Tensor:
        return self.values[: self.validation]

    def to(self, device: torch.device) -> Series:
        return Series(self.dates, self.values.to(device), self.validation, self.test)

    @staticmethod
    def read(path: Path) -> Series:
        """Raises CannotRun for a file in which the days are not all there."""
        try:
            table = np.loadtxt(path, usecols=(YEAR, MONTH, DAY, MJD, EXCESS))
        except ValueError as error:
            raise CannotRun(f"{path} is not in the form of EOP 20 C04: {error}; reinstall astropy-iers-data") from error
        if table.ndim < 2 or (np.diff(table[:, 3]) != 1).any():
            raise CannotRun(f"expected a line for each day in {path}, some are missing; reinstall astropy-iers-data")
        days = [np.datetime64(f"{year:04.0f}-{month:02.0f}-{day:02.0f}") for year, month, day in table[:, :3]]
        dates = np.array(days)
        if dates[0] > FIRST or dates[-1] + 1 < END:
            raise CannotRun(
                f"expected the days from {FIRST} to {END} in {path}, got {dates[0]} to {dates[-1]}; "
                "pip install --upgrade astropy-iers-data"
            )
        inside = (dates >= FIRST) & (dates < END)
        values = torch.from_numpy(table[inside, 4] * 1e3).float()
        dates = dates[inside]
        return Series(dates, values, *(int(np.searchsorted(dates, day)) for day in (VALIDATION, TEST)))


def origins(first: int, end: int, days: int) -> Tensor:
    """The days from which to forecast, so that all D days ahead lie in [first, end)."""
    return torch.arange(first - 1, end - days)


def following(values: Tensor, days_of: Tensor, days: int) -> Tensor:
    """(M, D): what came on the D days after each of these."""
    return values[days_of[:, None] + torch.arange(1, days + 1)]


# ----------------------------------------------------------------------------------------------------------- baselines

# Each makes (M, D) forecasts from M days of the series on, and reads nothing that comes later.
Forecast = Callable[[Tensor, Tensor, int], Tensor]


def naive(values: Tensor, days_of: Tensor, days: int) -> Tensor:
    return values[days_of][:, None].expand(-1, days)


def seasonal(season: int) -> Forecast:
    def forecast(values: Tensor, days_of: Tensor, days: int) -> Tensor:
        ahead = torch.arange(1, days + 1)
        back = (ahead + season - 1) // season * season  # whole seasons, as few as reach the past
        return values[days_of[:, None] + ahead - back]

    return forecast


def best_season(values: Tensor, days: int) -> int:
    """The season whose naive forecast errs least on these values."""
    days_of = torch.arange(SEASONS[-1], len(values) - days)
    truth = following(values, days_of, days)
    errors = [(seasonal(season)(values, days_of, days) - truth).abs().mean() for season in SEASONS]
    return SEASONS[int(torch.stack(errors).argmin())]


def linear(train: Tensor, lags: int, days: int) -> Forecast:
    """The last value, and for each day ahead a weighted sum of how the L values before differed from it."""

    def features(values: Tensor, days_of: Tensor) -> Tensor:
        past = values.double()[days_of[:, None] - torch.arange(lags + 1)]  # (M, L + 1), the latest first
        return torch.cat([past[:, 1:] - past[:, :1], torch.ones(len(past), 1, dtype=past.dtype)], 1)

    days_of = torch.arange(lags, len(train) - days)
    x = features(train, days_of)
    y = (following(train, days_of, days) - train[days_of][:, None]).double()
    weight = torch.linalg.solve(x.T @ x + RIDGE * torch.eye(lags + 1, dtype=x.dtype), x.T @ y)

    def forecast(values: Tensor, days_of: Tensor, days: int) -> Tensor:
        return values[days_of][:, None] + (features(values, days_of) @ weight).float()

    return forecast


# --------------------------------------------------------------------------------------------------------------- model


class Forecaster(nn.Module):
    """From the values so far to those of the next D days, at every day."""

    def __init__(self, lstm: Callable[..., nn.RNNBase], train: Tensor, hidden_size: int, days: int) -> None:
        super().__init__()
        self.lstm = lstm(2, hidden_size)
        self.linear = nn.Linear(hidden_size, days)
        for name, value in (("mean", train.mean()), ("spread", train.std()), ("change", train.diff().std())):
            self.register_buffer(name, value)

    def forward(self, values: Tensor) -> Tensor:
        """(T, B) values, in milliseconds, to (T, B, D) forecasts."""
        changes = torch.cat([torch.zeros_like(values[:1]), values.diff(dim=0)])
        input = torch.stack([(values - self.mean) / self.spread, changes / self.change], -1)
        output, _ = self.lstm(input)
        return values[..., None] + self.spread * self.linear(output)


def loss_of(series: Series, options: argparse.Namespace) -> Callable[[nn.Module], Tensor]:
    """Mean absolute error of windows of the training years, drawn anew at each call.

    A sum of waves is one as well when it runs backwards and upside down: half of the windows are turned in either way,
    which makes four series of one.  The first quarter of a window is read without being asked for forecasts.
    """
    steps, days, settled = options.history, options.days, options.history // 4

    def loss(model: nn.Module) -> Tensor:
        first = torch.randint(len(series.train) - steps - days + 1, (options.batch,))
        turned = torch.randint(2, (2, options.batch), dtype=torch.bool).to(series.values.device)
        window = series.train[first + torch.arange(steps + days)[:, None]]  # (T + D, B)
        window = torch.where(turned[0], window.flip(0), window)
        window = torch.where(turned[1], 2 * model.mean - window, window)
        truth = window[settled:].unfold(0, days + 1, 1)[..., 1:]
        return (model(window[:steps])[settled:] - truth).abs().mean()

    return loss


def forecasts(model: nn.Module, values: Tensor, first: int, end: int, options: argparse.Namespace) -> Tensor:
    """(M, D): those from each of the ``origins``, in one call that starts T days before the first of them."""
    start = max(0, first - options.history)
    return model(values[start : end - options.days, None])[first - 1 - start :, 0]


@dataclass(frozen=True)
class Found:
    """What the model makes of each past day: its weight in a forecast, as far as the model is linear there."""

    ahead: int
    weights: Tensor  # (L,), the latest day first
    periods: Tensor  # days, and how strongly the weights swing with each of them
    strength: Tensor


def found(model: nn.Module, series: Series, lags: int, options: argparse.Namespace) -> Found:
    """By the gradient of forecasts to what was read, a mean over the test; the periods by Fourier's transform.

    The model is in training mode, as cuDNN demands for a gradient; it has no dropout.
    """
    ahead = (options.days + 1) // 2
    days_of = torch.linspace(series.test + 1, len(series.values) - 1, 32).long().to(series.values.device)
    windows = series.values[days_of - torch.arange(options.history - 1, -1, -1, device=days_of.device)[:, None]]
    windows = windows.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(windows)[-1, :, ahead - 1].sum(), windows)
    weights = gradient.mean(1).flip(0)[:lags].cpu()
    spectrum = torch.fft.rfft(weights * torch.hann_window(2 * len(weights))[len(weights) :], n=8192).abs()
    periods = 8192 / torch.arange(1, len(spectrum))
    inside = (periods >= 5) & (periods <= 60)
    return Found(ahead, weights, periods[inside], spectrum[1:][inside])


# -------------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Tested:
    """Forecasts for the test, by name: the model's first, then what it is measured against."""

    truth: Tensor  # (M, D)
    forecasts: dict[str, Tensor]  # (M, D) each

    def errors(self, name: str) -> Tensor:
        """(D,): the mean absolute error by days ahead."""
        return (self.forecasts[name] - self.truth).abs().mean(0)

    def rmse(self, name: str) -> float:
        return (self.forecasts[name] - self.truth).square().mean().sqrt().item()

    def verdicts(self) -> list[str]:
        """For each baseline, how much lower the model's error is, and where it is not."""
        mine = self.errors(LSTM)
        said = []
        for name in list(self.forecasts)[1:]:
            theirs = self.errors(name)
            change = (mine.mean() / theirs.mean() - 1).item()
            worse = int((mine >= theirs).sum())
            verb = "below" if change < 0 else "above"
            where = f"not better at {worse} of {len(mine)} days ahead" if worse else "better at every day ahead"
            said.append(f"mean absolute error {abs(change):.0%} {verb} that of {name}: {where}")
        return said


def colour(name: str) -> str:
    return COLOURS.get(name, SEASONAL_COLOUR)


def show(console: Console, tested: Tested, seconds: tuple[float, float]) -> None:
    days = tested.truth.shape[1]
    shown = [day for day in SHOWN if day <= days]
    table = Table(title=f"mean absolute error by days ahead, in ms; test: {TEST} to {END}")
    table.add_column("", no_wrap=True)
    for day in shown:
        table.add_column("1 day" if day == 1 else f"{day} days", justify="right")
    for name in ("mean", "RMSE"):
        table.add_column(name, justify="right")
    for name in tested.forecasts:
        errors = tested.errors(name)
        cells = [*(errors[day - 1] for day in shown), errors.mean(), tested.rmse(name)]
        table.add_row(name, *(f"{cell:.3f}" for cell in cells), style="bold" if name == LSTM else "")
    console.print(table)
    for verdict in tested.verdicts():
        console.print(verdict, highlight=False, soft_wrap=True)
    ours, peer = seconds
    console.print(
        f"forward and backward of one batch: {ours * 1e3:.0f} ms, with torch.nn.LSTM {peer * 1e3:.0f} ms: "
        f"[bold]{peer / ours:.2f}×[/]",
        soft_wrap=True,
    )


@plots.styled
def draw(series: Series, tested: Tested, periods: Found) -> Figure:
    """Forecasts beside what came, the error by days ahead, and the periods that the model has found."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    draw_forecasts(top.subplots(1, 1), series, tested)
    errors, spectrum = bottom.subplots(1, 2)
    ahead = range(1, tested.truth.shape[1] + 1)
    for name in tested.forecasts:
        width = 2.2 if name == LSTM else 1.4
        errors.plot(ahead, tested.errors(name), color=colour(name), label=name, linewidth=width)
    errors.set(title=f"error of the test, {TEST} to {END}", xlabel="days ahead", ylabel="mean absolute error, ms")
    errors.set_ylim(0, 1.35 * max(float(tested.errors(name).max()) for name in tested.forecasts))
    errors.grid(alpha=0.3)
    errors.legend(frameon=False, ncols=2, loc="upper left")

    spectrum.plot(periods.periods, periods.strength / periods.strength.max(), color=COLOURS[LSTM])
    for (name, period), line in zip(TIDES.items(), ("--", ":"), strict=True):
        spectrum.axvline(period, color="black", linestyle=line, linewidth=1, label=f"lunar tide {name}")
    spectrum.set(
        title=f"periods that the model has found (forecast of day {periods.ahead})",
        xlabel="period, days",
        ylabel="strength, relative",
        xlim=(5, 60),
        ylim=(0, 1.05),
    )
    spectrum.grid(alpha=0.3)
    spectrum.legend(frameon=False)
    return figure


def draw_forecasts(axes: Axes, series: Series, tested: Tested) -> None:
    """The last half year of the test, and forecasts one after the other, each from the day that its curve begins at."""
    days = tested.truth.shape[1]
    names = [name for name in tested.forecasts if name != LINEAR]  # lies on the model's: it is in the other picture
    last = len(tested.truth) - 1
    rows = [last - days * back for back in range(6) if last - days * back >= 0][::-1]
    first = series.test - 1 + rows[0]  # row 0 is the forecast from the day before the test
    values = series.values.cpu()
    shown = slice(max(0, first - 60), first + days * len(rows) + 1)
    axes.plot(series.dates[shown], values[shown], color="black", linewidth=1.6, label="measured")
    for name in names[::-1]:
        for row in rows:
            origin = series.test - 1 + row
            curve = torch.cat([values[origin : origin + 1], tested.forecasts[name][row]])
            label = name if row == rows[0] else None
            width = 2 if name == LSTM else 1
            axes.plot(series.dates[origin : origin + days + 1], curve, color=colour(name), linewidth=width, label=label)
    for row in rows:
        axes.axvline(series.dates[series.test - 1 + row], color=plots.GREY, linewidth=0.6, alpha=0.6)
    axes.set(title=f"forecasts of {days} days, each from a grey line", ylabel="length of day − 86,400 s, ms")
    axes.margins(x=0.01)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.2 * (high - low))
    axes.grid(alpha=0.3)
    axes.legend(ncols=4, loc="upper left", framealpha=1, edgecolor="none")  # grey lines pass behind it


# ---------------------------------------------------------------------------------------------------------------- main


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Forecasts the length of the day with lstmcore.LSTM, and compares with naive, seasonal and linear "
        "forecasts. Ctrl-C saves a checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--history", type=positive, default=1024, help="T: days of a window that is trained on")
    parser.add_argument("--days", type=positive, default=30, help="D: days ahead")
    parser.add_argument("--max-lag", type=int, default=400, help="L: days that the memory should span, 3 or more")
    add_training_options(parser, iterations=1200, batch=16, hidden_size=128, learning_rate=6e-3, validate_every=50)
    add_options(parser, out="out/time_series", save_every=100)
    return parser


def check(options: argparse.Namespace, series: Series) -> None:
    """Raises CannotRun for sizes that do not fit the series, or each other."""
    if options.max_lag < 3:
        raise CannotRun(f"there is no memory to spread over {options.max_lag} days; pass --max-lag 3 or more")
    for name, length in (("history", series.validation), ("max_lag", series.validation)):
        if getattr(options, name) + options.days > length // 2:
            raise CannotRun(
                f"--{name.replace('_', '-')} {getattr(options, name)} and --days {options.days} are too long for "
                f"{length:,} days of training; expected at most {length // 2:,} together"
            )
    if options.days > 365:
        raise CannotRun(f"the test has four years: expected --days of at most 365, got {options.days}")
    if options.history < 8:
        raise CannotRun(f"expected --history of at least 8 days, got {options.history}")


@reported
def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, compares, reports; returns the exit status."""
    options = parser().parse_args(arguments)
    console = Console()
    series = Series.read(Path(astropy_iers_data.IERS_B_FILE))
    check(options, series)
    console.print(
        f"{series.validation:,} days to train on, {series.test - series.validation:,} to validate with, "
        f"{len(series.values) - series.test:,} to test; {options.device}, {torch.get_num_threads()} threads",
        soft_wrap=True,
    )
    torch.manual_seed(options.seed)

    def build(lstm: Callable[..., nn.RNNBase]) -> Forecaster:
        return Forecaster(lstm, series.train, options.hidden_size, options.days).to(options.device)

    model = build(lambda *sizes: lstmcore.LSTM(*sizes, chrono=options.max_lag))
    learner = Learner(model, torch.optim.Adam(model.parameters()))
    settings = {name: getattr(options, name) for name in (*SETTINGS, "history", "days", "max_lag")}
    checksum = zlib.crc32(series.values.numpy().tobytes())
    checkpoint = Checkpoint(
        options.out / "time_series.pt", {"example": "time_series", "data_checksum": checksum} | settings
    )
    if options.resume:
        learner.load_state_dict(checkpoint.load())
        console.print(f"resumed after step {len(learner.losses)} from {checkpoint.path}", soft_wrap=True)

    near = series.to(options.device)
    loss = loss_of(near, options)

    def error(model: nn.Module) -> float:
        truth = following(series.values, origins(series.validation, series.test, options.days), options.days)
        made = forecasts(model, near.values, series.validation, series.test, options).cpu()
        return (made - truth).abs().mean().item()

    if not learner.train(loss, error, checkpoint, options, console):
        return 130
    learner.take_best()
    peer = build(nn.LSTM)
    peer.load_state_dict(model.state_dict())
    tested = test(model, near, options)
    show(console, tested, compare_steps(model, peer, loss))
    plots.save(draw(series, tested, found(model, near, options.max_lag, options)), options.out, "time_series")
    console.print(f"plot: {options.out / 'time_series.png'}; checkpoint: {checkpoint.path}", soft_wrap=True)
    return 0


def test(model: nn.Module, series: Series, options: argparse.Namespace) -> Tested:
    """The model's forecasts and the baselines', each fitted to the training years alone."""
    values, train, end, days = series.values.cpu(), series.train.cpu(), len(series.values), options.days
    days_of = origins(series.test, end, days)
    mine: list[Tensor] = []

    def keep(model: nn.Module) -> float:
        mine.append(forecasts(model, series.values, series.test, end, options).cpu())
        return 0.0

    measured(model, keep)
    season = best_season(train, days)
    others: dict[str, Forecast] = {
        f"seasonal naive, {season} days": seasonal(season),
        NAIVE: naive,
        LINEAR: linear(train, options.max_lag, days),
    }
    made = {name: forecast(values, days_of, days) for name, forecast in others.items()}
    return Tested(following(values, days_of, days), {LSTM: mine[0]} | made)


if __name__ == "__main__":
    sys.exit(main())

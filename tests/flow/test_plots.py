"""The pictures of a recording: what their lines and bars hold, that they can be read, and that files are written."""

import builtins
import importlib
import math
import sys
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lstmcore.flow import plots
from lstmcore.flow.record import QUANTILES

from ..support.flow_records import gates, geometric, record


def lines(axes, label: str) -> list[np.ndarray]:
    return [np.asarray(line.get_ydata()) for line in axes.get_lines() if line.get_label() == label]


def texts(figure: Figure) -> str:
    found = [figure.get_suptitle(), *(text.get_text() for legend in figure.legends for text in legend.get_texts())]
    found += [text.get_text() for axes in figure.axes for text in axes.texts]
    return "\n".join(found)


def readable(figure: Figure) -> bool:
    """Whether every panel says what it is and what its axes are."""
    labels = [(axes.get_ylabel(), axes.get_xlabel() or axes.get_shared_x_axes()) for axes in figure.axes]
    return bool(figure.get_suptitle()) and all(x and y for y, x in labels)


def test_norms_by_lag():
    each = record(0.9, 50)
    figure = plots.norms_by_lag([each])
    (axes,) = figure.axes
    for norms, label in ((each.c, "cell state c"), (each.h, "hidden state h")):
        (line,) = lines(axes, label)
        np.testing.assert_array_equal(line, norms.quantiles_by_lag[QUANTILES.index(0.5)])
    (threshold,) = lines(axes, "1e-6 of the largest: vanished")
    assert threshold == pytest.approx([1e-6, 1e-6])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(float(each.c.quantiles_by_lag[0].min()))
    assert band.max() == pytest.approx(float(each.c.quantiles_by_lag[-1].max()))
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[0] < 1e-6 < 1.5 < axes.get_ylim()[1]
    assert axes.get_title() == "lstm, layer 0\n(iteration 0, 50 steps)"
    assert "lag" in axes.get_xlabel()
    assert readable(figure)


def test_norms_by_step_run_as_the_input_does():
    each = record(0.9, 50)
    (axes,) = plots.norms_by_step([each]).axes
    (line,) = lines(axes, "cell state c")
    np.testing.assert_array_equal(line, each.c.quantiles[2])
    assert line[-1] == line.max()
    assert axes.get_xlabel() == "time step"


def test_first_pass_beside_the_last():
    records = [record(rate, 50, iteration=n) for n, rate in enumerate((0.8, 0.9, 0.99))]
    (axes,) = plots.norms_by_lag(records).axes
    np.testing.assert_array_equal(lines(axes, "cell state c")[0], records[-1].c.quantiles_by_lag[2])
    np.testing.assert_array_equal(lines(axes, "cell state c, first recorded pass")[0], records[0].c.quantiles_by_lag[2])
    (axes,) = plots.norms_by_lag(records, iteration=1).axes
    np.testing.assert_array_equal(lines(axes, "cell state c")[0], records[1].c.quantiles_by_lag[2])
    with pytest.raises(ValueError, match="iteration 7 was not recorded: expected one of 0, 1, 2"):
        plots.norms_by_lag(records, iteration=7)


def test_plain_rnn_has_no_cell():
    (axes,) = plots.norms_by_lag([record(0.9, 50, plain=True), record(0.8, 50, plain=True, iteration=1)]).axes
    assert not lines(axes, "cell state c")
    assert len(lines(axes, "hidden state h")) == len(lines(axes, "hidden state h, first recorded pass")) == 1


def test_zeros_lie_on_a_marked_floor():
    each = record(0.5, 300)
    figure = plots.norms_by_lag([each])
    (axes,) = figure.axes
    (line,) = lines(axes, "cell state c")
    assert line.min() == line[-1] == pytest.approx(1e-16)
    assert line[53] == each.c.quantiles_by_lag[2, 53] > 1e-16  # the floor raises nothing that lies above it
    assert "on this line: below 1e-16" in texts(figure)
    zero = plots.norms_by_lag([record(curve=torch.zeros(20, dtype=torch.float64))])
    assert "on this line: exactly 0" in texts(zero)
    assert "on this line" not in texts(plots.norms_by_lag([record(0.9, 50)]))


def test_what_is_not_finite_is_marked():
    each = record(curve=geometric(400, 1.5, 1e-3))
    first = int(each.c.mean_by_lag.isinf().nonzero()[0])
    (axes,) = plots.norms_by_lag([each]).axes
    (line,) = lines(axes, "cell state c")
    assert np.isfinite(line[: first - 2]).all()
    assert np.isnan(line[first:]).all()
    crosses = [line for line in axes.get_lines() if line.get_label() == "not finite"]
    assert first - 2 <= min(crosses[0].get_xdata()) <= first + 1
    assert math.isfinite(axes.get_ylim()[1])


def test_rows_of_different_lengths_leave_a_gap():
    each = record(0.9, 60, lengths=torch.tensor([20, 40]))
    (axes,) = plots.norms_by_lag([each]).axes
    (line,) = lines(axes, "cell state c")
    assert np.isnan(line[40:]).all()
    assert np.isfinite(line[:40]).all()
    assert axes.get_xlim()[1] > 58


@pytest.mark.parametrize("steps", [1, 2, 2000])
def test_any_number_of_steps(steps):
    records = [record(0.999, steps, iteration=n, kind=gates(steps)) for n in range(2)]
    for draw in (plots.norms_by_step, plots.norms_by_lag, plots.heatmap, plots.gate_histograms, plots.horizons):
        figure = draw(records)
        figure.canvas.draw()
        assert readable(figure) or draw is plots.gate_histograms


def test_heatmap():
    records = [record(0.9, 30, iteration=0), record(0.8, 20, iteration=10), record(0.7, 30, iteration=50)]
    figure = plots.heatmap(records)
    axes, bar = figure.axes
    cells = axes.get_images()[0].get_array()
    assert cells.shape == (30, 3)
    np.testing.assert_allclose(cells[:, 0], records[0].c.mean_by_lag.log10())
    np.testing.assert_allclose(cells[:20, 1], records[1].c.mean_by_lag.log10())
    assert cells.mask[20:, 1].all()
    assert not cells.mask[:, [0, 2]].any()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "10", "50"]
    assert "grey: no sequence is that long" in texts(figure)
    assert "gradient" in bar.get_ylabel()
    assert "lag" in axes.get_ylabel()
    by_step = plots.heatmap(records, by="step").axes[0].get_images()[0].get_array()
    np.testing.assert_allclose(by_step[:, 0], records[0].c.mean.log10())
    with pytest.raises(ValueError, match='by="lag" or by="step"'):
        plots.heatmap(records, by="time")


def test_heatmap_of_zeros_and_infinities():
    curve = geometric(400, 1.5, 1e-3)
    figure = plots.heatmap([record(curve=curve), record(0.4, 400, iteration=1)])
    image = figure.axes[0].get_images()[0]
    low, high = image.get_clim()
    assert low == pytest.approx(-16, abs=0.1)  # below the first norm of the last pass
    assert 37 < high < 39
    colours = image.cmap(image.norm(image.get_array()))
    assert to_hex(colours[-1, 0]) == plots.RED  # not finite
    assert to_hex(colours[-1, 1]) == "#000000"  # zero
    assert "orange: not finite" in texts(figure)
    assert "black: 0, or below the scale" in texts(figure)


def test_heatmap_of_less_than_a_decade():
    bar = plots.heatmap([record(0.99, 50), record(0.99, 50, iteration=1)]).axes[-1]
    labels = [text.get_text() for text in bar.get_yticklabels()]
    assert len(set(labels)) == len(labels)
    for text, tick in zip(labels, bar.get_yticks(), strict=True):
        assert float(text) == pytest.approx(10**tick, rel=0.06)


def test_heatmap_of_many_iterations_draws_some_of_them():
    each = record(0.9, 5)
    figure = plots.heatmap([replace(each, iteration=n) for n in range(2500)])
    axes = figure.axes[0]
    assert axes.get_images()[0].get_array().shape == (5, plots.MAX_COLUMNS)
    assert [label.get_text() for label in axes.get_xticklabels()][:: len(axes.get_xticks()) - 1] == ["0", "2499"]


@pytest.mark.parametrize("steps", [10, 100])
def test_terms(steps):
    norms = {name: torch.full((steps, 4), value) for name, value in zip("ABCE", (0.1, 0.6, 0.2, 0.1), strict=True)}
    norms["A"][0, :2] = 0.5
    figure = plots.terms(norms)
    above, below = figure.axes
    if steps == 10:
        assert [container.patches[0].get_height() for container in above.containers] == pytest.approx(
            [0.3, 0.6, 0.2, 0.1]
        )
        assert [container.patches[0].get_y() for container in above.containers] == pytest.approx([0, 0.3, 0.9, 1.1])
        assert sum(container.patches[0].get_height() for container in below.containers) == pytest.approx(1)
    else:
        tops = [area.get_paths()[0].vertices[:, 1].max() for area in above.collections]
        assert tops == pytest.approx([0.3, 0.9, 1.1, 1.2])
    for part in (
        "A: through the forget gate",
        "B: direct, additive path",
        "C: through the input",
        "E: through the cand",
    ):
        assert part in texts(figure)
    assert readable(figure)


def test_terms_of_the_wrong_kind():
    good = torch.ones(5)
    for bad, match in (
        ({}, "got none"),
        ({"A": good, "D": good}, "'D'"),
        ({"A": good, "B": torch.ones(4)}, r"\[4, 5\]"),
        ({"A": torch.ones(2, 2, 2)}, r"\(2, 2, 2\)"),
    ):
        with pytest.raises(ValueError, match=match):
            plots.terms(bad)


def test_gate_histograms():
    first, last = gates(20, forget=0.5), gates(20, forget=0.95, spread=0.1)
    records = [record(0.9, 20, kind=first), record(0.9, 20, iteration=9, kind=last)]
    figure = plots.gate_histograms(records)
    forget = figure.axes[1]
    heights = [patch.get_height() for patch in forget.containers[0].patches]
    assert heights == pytest.approx([0.01] * 9 + [0.91])
    assert "forget gate: 1.0% closed, 91% open" in forget.get_title(loc="left")
    (stairs,) = [patch for patch in forget.patches if type(patch).__name__ == "StepPatch"]
    assert stairs.get_data().values[5] == 1
    shaded = sorted(patch.get_x() for patch in forget.patches if to_hex(patch.get_facecolor()) == "#eeeeee")
    assert shaded == [0, 0.9]
    assert "first recorded pass" in texts(figure)
    with pytest.raises(ValueError, match="no record has gates"):
        plots.gate_histograms([record(0.9, plain=True)])


def test_horizons():
    forget = [0.5 ** (1 / horizon) for horizon in (0.5, 1.5, 1.5, 24.0, 3e5)] + [1.0]
    figure = plots.horizons([record(0.9, 64, kind=gates(64, 6, forget=forget))])
    (axes,) = figure.axes
    bars = {round(patch.get_x() + 0.45, 6): patch.get_height() for patch in axes.containers[0].patches}
    expected = {-0.5: 1 / 6, 0.5: 2 / 6, 4.5: 1 / 6, 8.5: 2 / 6}  # up to 1, 1 to 2, 16 to 32, more than 256 or never
    assert {place: height for place, height in bars.items() if height} == pytest.approx(expected)
    assert axes.get_xticklabels()[-1].get_text() == ">256\nor ∞"
    (line,) = [line for line in axes.get_lines() if line.get_label() == "length of the sequences"]
    assert line.get_xdata()[0] == 6  # 2^6 steps
    ticks = {label.get_text(): place for label, place in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True)}
    assert all(2**place == int(text) for text, place in ticks.items() if text.isdigit())
    assert readable(figure)


def test_compare_by_lag():
    lstm = [record(0.5, 40, iteration=0), record(0.9, 40, iteration=1)]
    two = [record(0.8, 40), record(0.7, 40, layer=1)]
    figure = plots.compare_by_lag({"chrono": lstm, "deep": two, "by hand": geometric(30, 0.99, 7.0)})
    (axes,) = figure.axes
    curve = lstm[1].c.mean_by_lag
    np.testing.assert_allclose(lines(axes, "chrono")[0], curve / curve[0])
    np.testing.assert_allclose(lines(axes, "by hand")[0], geometric(30, 0.99), rtol=1e-6)
    assert len(lines(axes, "deep: lstm, layer 0")) == len(lines(axes, "deep: lstm, layer 1")) == 1
    assert readable(figure)
    assert "by hand" in texts(figure)
    with pytest.raises(ValueError, match="nothing to compare"):
        plots.compare_by_lag({})
    with pytest.raises(ValueError, match=r"\(T,\) for 'x'"):
        plots.compare_by_lag({"x": torch.ones(2, 2)})


def test_too_many_layers_are_counted():
    figure = plots.norms_by_lag([record(0.9, 5, layer=n) for n in range(plots.MAX_PANELS + 3)])
    assert len(figure.axes) == plots.MAX_PANELS
    assert "3 more layers are not shown" in texts(figure)


@pytest.mark.slow
def test_plot_all(tmp_path):
    each = record(0.9, 30, kind=gates(30))
    names = {"norms_by_step", "norms_by_lag", "heatmap", "gates", "horizons"}
    paths = plots.plot_all([each, replace(each, iteration=1)], tmp_path / "new" / "folder", ("png",))
    assert {path.name for path in paths} == {f"{name}.png" for name in names}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    paths = plots.plot_all([record(0.9, 30, plain=True)], tmp_path)
    assert {path.name for path in paths} == {"norms_by_step.png", "norms_by_lag.png"}
    with pytest.raises(ValueError, match=r"record_gradient_flow"):
        plots.plot_all([], tmp_path)


def test_save_says_what_is_wrong(tmp_path):
    figure = Figure()
    with pytest.raises(ValueError, match=r"'bmp2'.*png"):
        plots.save(figure, tmp_path, "x", ("bmp2",))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write this file"):
        plots.save(figure, tmp_path / "file", "x")


def test_formats(tmp_path):
    assert plots.save(Figure(), tmp_path, "x", "png") == [tmp_path / "x.png"]
    paths = plots.save(Figure(), tmp_path, "y", ("png", "svg"))
    assert paths == [tmp_path / "y.png", tmp_path / "y.svg"]
    assert "<svg" in paths[1].read_text(encoding="utf-8")


def test_settings_of_the_user_stay_as_they_are():
    with matplotlib.rc_context({"font.size": 17.0, "axes.spines.top": True}):
        (axes,) = plots.norms_by_lag([record(0.9, 5)]).axes
        assert not axes.spines["top"].get_visible()
        assert {key: matplotlib.rcParams[key] for key in ("font.size", "axes.spines.top")} == {
            "font.size": 17.0,
            "axes.spines.top": True,
        }


def test_without_matplotlib(monkeypatch):
    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, *args, **kwargs)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.delitem(sys.modules, "lstmcore.flow.plots")
    with pytest.raises(ImportError, match="pip install matplotlib"):
        importlib.import_module("lstmcore.flow.plots")

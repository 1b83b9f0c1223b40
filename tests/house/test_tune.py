"""``python -m lstmcore tune``: what it times, keeps, shows and exports, and what it says where it cannot."""

import builtins
import itertools
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lstmcore.kernels import cell
from lstmcore.kernels.contract import Layer
from lstmcore.kernels.cpu import threads as kernel_threads

import lstmcore
from lstmcore import backends, cli, direct
from lstmcore.backends import machine, tuning
from lstmcore.backends.timings import Class
from lstmcore.cli import trials
from lstmcore.cli import tuning as command
from lstmcore.cli.trials import Clock, Effort, Grid, Trial

from ..support.timings import timing

SMALL = Grid(((16, 2), (24, 2)), ((16, 2),), ((16, 2),), ("float32",), 2, 8)
X = torch.randn(100, 2, 16)


def tune(capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit status, output, errors)."""
    try:
        status = cli.main(["tune", *arguments])
    except SystemExit as end:  # argparse
        status = end.code
    return status, *capsys.readouterr()


@pytest.fixture
def quick(tuned_here, monkeypatch):
    """Three classes of shapes that take no time to compute; returns the directory of this machine's tables."""
    monkeypatch.setitem(trials.GRIDS, "cpu", SMALL)
    monkeypatch.setattr(trials, "EFFORT", Effort(3, 0.0))
    monkeypatch.setattr(trials, "clock_of", lambda device: trials.Clock(*_clock()))
    return tuned_here


def _clock():
    return itertools.count(0.0, 0.001).__next__, lambda: None, lambda: None, 0.0


@pytest.fixture
def pretended(quick, monkeypatch):
    """Nothing is run: each shape takes what ``timing`` says; a list of those that were asked for."""
    asked = []

    def run(trial, fused, device, effort):
        asked.append(trial)
        return timing(**trial.cls._asdict(), hidden=trial.hidden, batch=trial.batch)

    monkeypatch.setattr(trials, "run", run)
    return asked


def kept() -> tuning.Table:
    device = machine.device(torch.device("cpu"), kernel_threads.count())
    return tuning.read(tuning.path_of(device, machine.versions("cpu")))


def test_it_times_and_keeps(quick, capsys):
    status, output, errors = tune(capsys)
    assert status == 0, output + errors
    for text in ("dense", "ragged", "projection", "training", "inference", "ours ms", "ratio", "8 shapes kept in"):
        assert text in output, text
    found = kept().timings
    assert len(found) == 8
    assert all(each.right and each.short == 2 and each.long == 8 for each in found)
    assert all(each.ours_long_ms > 0 and each.torch_long_ms > 0 for each in found)


@pytest.mark.slow
@pytest.mark.serial
def test_of_this_machine(tuned_here, capsys, monkeypatch):
    """As users run it, except for how long, and that noise does not matter; nothing is said of how fast it is."""
    monkeypatch.setattr(command, "NOISY", float("inf"))
    monkeypatch.setitem(trials.GRIDS, "cpu", trials.GRIDS["cpu"]._replace(quick=((64, 8),)))
    status, output, errors = tune(capsys, "--quick", "--limit-s", "60", "--dtype", "float32", "--dtype", "bfloat16")
    assert status == 0, output + errors
    assert {each.arithmetic for each in kept().timings} == {"float32", "bfloat16"}


@pytest.mark.gpu
def test_of_a_gpu(tuned_here, capsys, monkeypatch):
    monkeypatch.setitem(trials.GRIDS, "cuda", trials.GRIDS["cuda"]._replace(quick=((128, 16),)))
    status, output, errors = tune(capsys, "--device", "cuda", "--quick", "--limit-s", "60", "--dtype", "bfloat16")
    assert status == 0, output + errors
    module = lstmcore.LSTM(128, 128, device="cuda", dtype=torch.bfloat16)
    choice = lstmcore.explain(module, torch.randn(500, 16, 128, device="cuda", dtype=torch.bfloat16))
    assert "tuned here on" in str(choice)


def test_auto_goes_by_it_at_once(pretended, capsys):
    """In this process too, in which torch's was chosen before."""
    module, x = lstmcore.LSTM(16, 16), X[:1]
    module(x)
    assert lstmcore.explain(module, x).name == "torch"
    assert direct._known
    assert tune(capsys)[0] == 0
    assert not direct._known
    assert "tuned here" in str(lstmcore.explain(module, x))
    assert lstmcore.explain(module, X).name == "numba"


def test_info_says_that_it_was_tuned(pretended, capsys):
    cli.main(["info"])
    assert "not tuned: python -m lstmcore tune" in capsys.readouterr().out
    tune(capsys)
    cli.main(["info"])
    (line,) = (each for each in capsys.readouterr().out.splitlines() if each.startswith("tuned, CPU"))
    assert "8 shapes tuned here, last on 2026-11-27, " in line
    assert "not tuned" not in line
    backends.forget()
    (path,) = tuning.directory().glob("*.csv")
    path.write_text("nonsense")
    cli.main(["info"])
    output = capsys.readouterr().out
    assert "is not used: its columns are not those of a table of timings" in output
    assert "not tuned: python -m lstmcore tune" in output


def test_a_second_run_adds_to_the_first(pretended, capsys):
    tune(capsys, "--quick")
    assert len(kept().timings) == 6
    first = list(pretended)
    pretended.clear()
    tune(capsys)
    assert len(kept().timings) == 8
    assert set(pretended[:2]) == set(pretended) - set(first)  # what is there already comes last


def test_what_was_kept_is_replaced_where_it_is_not_in_order(pretended, capsys):
    tune(capsys)
    (path,) = tuning.directory().glob("*.csv")
    path.write_text("nonsense")
    assert tune(capsys, "--quick")[0] == 0
    assert len(kept().timings) == 6


def test_the_limit_keeps_what_there_is(pretended, capsys, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    status, output, _ = tune(capsys, "--limit-s", "4")
    assert status == 0
    assert len(kept().timings) == 3
    assert "5 shapes were left out (no time was left" in output


def test_ctrl_c_keeps_what_there_is(pretended, capsys, monkeypatch):
    run = trials.run

    def interrupted(*arguments):
        if len(pretended) == 3:
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(trials, "run", interrupted)
    status, output, _ = tune(capsys)
    assert status == command.INTERRUPTED
    assert len(kept().timings) == 3
    assert "5 shapes were left out (interrupted)" in output


def test_what_is_wrong_is_told_and_not_taken(quick, capsys, monkeypatch):
    """A sabotaged kernel: the reference stands in for ours, and its cell is spoiled."""
    monkeypatch.setattr(command, "_fused", lambda device: "reference")
    monkeypatch.setattr(cell, "hidden_state", lambda o, tanh_c: o * tanh_c * 1.0001)
    status, output, _ = tune(capsys)
    assert status == 1
    assert "8 shapes have wrong results" in output
    assert "no: WRONG" in output
    assert not any(each.right for each in kept().timings)
    choice = lstmcore.explain(lstmcore.LSTM(16, 16), X)
    assert choice.name == "torch"
    assert "wrong" in dict(choice.reasons)["numba"]


def test_what_is_too_noisy_is_not_kept(pretended, capsys, monkeypatch):
    """Another program was at work: "auto" is better off with what it knew."""
    run = trials.run

    def noisy(trial, *arguments):
        timed = run(trial, *arguments)
        return timed._replace(noise=0.3, right=trial.hidden == 16) if trial.cls.kind == "dense" else timed

    monkeypatch.setattr(trials, "run", noisy)
    status, output, _ = tune(capsys)
    assert status == 1
    assert "2 shapes have a noise of more than 20 % and are not kept" in output
    assert output.count("not kept: noisy") == 2
    assert [each.right for each in kept().timings if each.kind == "dense"] == [False, False]
    assert len(kept().timings) == 6


def test_one_that_fails_does_not_lose_the_others(pretended, capsys, monkeypatch):
    run = trials.run

    def failing(trial, *arguments):
        timed = run(trial, *arguments)
        if trial.cls.kind == "ragged":
            raise ZeroDivisionError("division by zero\nand more")
        if trial.cls.kind == "projection":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return timed

    monkeypatch.setattr(trials, "run", failing)
    status, output, _ = tune(capsys)
    assert status == 1
    assert "FAILED: ragged float32 training, H 16, B 2: ZeroDivisionError: division by zero\n" in output
    assert "projection float32 training, H 16, B 2: there is not enough memory\n" in output
    assert len(kept().timings) == 4


def test_what_our_kernels_do_not_run_is_no_fault(pretended, capsys, monkeypatch):
    kernels = backends.load("numba")
    monkeypatch.setattr(kernels, "supports", lambda layer: "it is too wide" if layer.hidden_size > 16 else None)
    status, output, _ = tune(capsys)
    assert status == 0
    assert "dense float32 training, H 24, B 2: backend 'numba' cannot run this call: it is too wide\n" in output
    assert len(kept().timings) == 6


@pytest.mark.parametrize("to", ["-", "a file"])
def test_what_is_exported_is_read_again(to, pretended, capsys, tmp_path):
    place = "-" if to == "-" else str(tmp_path / "table.csv")
    status, output, errors = tune(capsys, "--export", place)
    assert status == 0
    text = output if to == "-" else (tmp_path / "table.csv").read_text()
    assert tuning.from_text(text) == kept()
    assert "ours ms" in (errors if to == "-" else output)
    again = tune(capsys, "--export", place, "--show")
    assert again[0] == 0
    assert len(pretended) == 8  # nothing was timed anew
    assert (again[1] if to == "-" else (tmp_path / "table.csv").read_text()) == text


def test_an_exported_table_can_be_committed(pretended, capsys, monkeypatch, tmp_path):
    tuning.COMMITTED.mkdir()
    device = kernel_threads.count()
    name = f"{machine.device(torch.device('cpu'), device).slug}.csv"
    _, output, _ = tune(capsys, "--export", str(tuning.COMMITTED / name))
    assert f"measured/{name}" in output
    next(tuning.directory().glob("*.csv")).unlink()
    backends.forget()
    assert "timed for the package on 2026-11-27" in str(lstmcore.explain(lstmcore.LSTM(16, 16), X))


def test_by_the_number_of_threads(pretended, capsys):
    before = torch.get_num_threads()
    assert tune(capsys, "--threads", "1")[0] == 0
    assert torch.get_num_threads() == before
    (path,) = tuning.directory().glob("*.csv")
    assert tuning.read(path).device.units == 1


def test_without_rich_it_goes_on_line_by_line(pretended, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments):
        if name.startswith("rich"):
            raise ImportError("No module named 'rich'")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    status, _, errors = tune(capsys)
    assert status == 0
    assert errors.count("dense float32") == 4
    assert "1.50x" in errors


# Where it cannot


def test_a_cache_that_cannot_be_written(pretended, capsys, monkeypatch, tmp_path):
    """Nothing is timed for nothing; but a table can be exported."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tuning, "directory", lambda: tmp_path / "file" / "tuned")
    status, _, errors = tune(capsys)
    assert status == 2
    assert not pretended
    assert "nothing can be kept beside the compiled kernels" in errors
    assert "--export" in errors
    status, output, _ = tune(capsys, "--export", "-")
    assert status == 0
    assert len(tuning.from_text(output).timings) == 8


def test_a_disk_that_is_full(pretended, capsys, monkeypatch, tmp_path):
    """Status 2 and a sentence; what was found is shown, and exported."""

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuning.os, "replace", full)
    status, output, errors = tune(capsys, "--export", str(tmp_path / "table.csv"))
    assert status == 2
    assert "No space left on device" in errors
    assert "ours ms" in output
    assert len(tuning.read(tmp_path / "table.csv").timings) == 8
    assert not list(tuning.directory().glob("*.csv"))


def test_a_second_one_at_the_same_time(pretended, capsys):
    with tuning.locked():
        status, _, errors = tune(capsys)
    assert status == 2
    assert "another tuning runs on this machine" in errors
    assert not pretended


BAD = [
    ("--limit-s 0", "positive number of seconds, got 0"),
    ("--limit-s nan", "nan"),
    ("--limit-s soon", "soon"),
    ("--threads 0", "0"),
    ("--dtype int8", "int8"),
    ("--dtype tf32 --device cpu", "--dtype float32"),
    ("--device meta", "'meta'"),
    ("--device nonsense", "nonsense"),
    ("--export /nowhere/at/all.csv --device cpu", "/nowhere/at/all.csv"),
    ("--export / --device cpu", "expected the path of a file"),
    ("--show --device cpu", "python -m lstmcore tune"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD)
def test_bad_arguments(arguments, named, pretended, capsys):
    status, output, errors = tune(capsys, *arguments.split())
    assert status == 2, output + errors
    assert named in errors
    assert "Traceback" not in errors
    assert not pretended
    assert not tuning.directory().exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(pretended, capsys):
    status, _, errors = tune(capsys, "--device", "cuda")
    assert status == 2
    assert "CUDA" in errors


# What it times


@pytest.mark.parametrize("kind", trials.GRIDS)
@pytest.mark.parametrize("quick", [False, True])
def test_the_trials(kind, quick):
    grid = trials.GRIDS[kind]
    found = trials.trials(kind, grid.arithmetics, quick)
    assert len(found) == len(set(found)) > 10
    assert found == trials.trials(kind, grid.arithmetics, quick)
    assert {trial.cls.kind for trial in found} == {"dense", "ragged", "projection"}
    assert {trial.cls.mode for trial in found} == {"training", "inference"}
    if quick:
        assert set(found) < set(trials.trials(kind, grid.arithmetics, False))
    for trial in found:
        assert trial.layer(torch.device("cpu"), 5).hidden_size == trial.hidden
        strict = trial.cls.arithmetic == "float32" and kind == "cuda"
        assert Class.of(trial.layer(torch.device(kind), 5), strict) == trial.cls


@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("kind", ["dense", "ragged", "projection"])
def test_both_run_the_same_call(kind, mode):
    trial = Trial(Class(kind, "float64", mode), 6, 3)
    results = [call() for call in trials.pair(trial, "reference", torch.device("cpu"), 5)]
    if mode == "training":
        assert len(results[0]) == 5 + (kind == "projection")
    else:
        assert not results[0].requires_grad
    torch.testing.assert_close(*results)


class Made:
    """A clock that stands still unless a call moves it."""

    def __init__(self) -> None:
        self.time, self.log = 0.0, []

    def call(self, name: str, seconds: float):
        def run() -> None:
            self.log.append(name)
            self.time += seconds

        return run

    def clock(self, sample_s: float = 0.0) -> Clock:
        return Clock(lambda: self.time, self.call("before", 1.0), self.call("finish", 0.001), sample_s)


def test_what_stands_before_a_call_is_not_timed():
    made = Made()
    ours, peer = trials.by_turns([made.call("ours", 0.25), made.call("peer", 0.5)], made.clock(), Effort(7, 10.0))
    assert ours == pytest.approx([0.251] * 7)
    assert peer == pytest.approx([0.501] * 7)
    assert made.log.count("before") == 14


def test_the_first_calls_are_not_timed():
    """A compiler runs in them."""
    made, first = Made(), []

    def slow_at_first() -> None:
        made.time += 0.1 if first else 60.0
        first.append(True)

    ours, _ = trials.by_turns([slow_at_first, made.call("peer", 0.1)], made.clock(), Effort(7, 0.1))
    assert max(ours) < 0.2


def test_short_calls_on_a_gpu_are_repeated():
    made = Made()
    (ours, _) = trials.by_turns([made.call("ours", 0.0005), made.call("peer", 0.002)], made.clock(0.01), Effort(7, 0.1))
    assert statistics.median(ours) == pytest.approx(0.0005 + 0.001 / 4, rel=0.1)  # four calls are waited for together


def test_they_take_turns_and_who_goes_first_is_drawn():
    made = Made()
    trials.by_turns([made.call("a", 0.1), made.call("b", 0.1)], made.clock(), Effort(20, 0.0))
    turns = [name for name in made.log if name in "ab"][4:]
    assert set(zip(turns[::2], turns[1::2], strict=True)) == {("a", "b"), ("b", "a")}


@given(st.lists(st.floats(0.5, 2.0), min_size=2, max_size=30))
def test_noise_is_none_where_the_ratio_is_one_number(times):
    assert trials.noise(times, [2 * each for each in times]) == pytest.approx(0, abs=1e-12)
    assert trials.noise(times, times[::-1]) >= 0


def test_slow_calls_are_run_less_often():
    effort = Effort(7, 1.0)
    assert not effort.enough(100, 0.5)
    assert effort.enough(101, 0.5)
    assert not effort.enough(6, 3.9)
    assert effort.enough(7, 1.0)
    assert effort.enough(3, 4.1)
    assert not effort.enough(2, 100.0)


def test_precision_is_set_and_put_back(monkeypatch):
    settings = torch.backends.cudnn.rnn
    before = settings.fp32_precision
    for arithmetic, expected in (("tf32", "tf32"), ("float32", "ieee"), ("bfloat16", before)):
        with trials.precision(arithmetic):
            assert settings.fp32_precision == expected
        assert settings.fp32_precision == before


def test_a_made_up_gpu_is_timed_by_its_own_clock(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(device))
    clock = trials.clock_of(torch.device("cuda", 0))
    clock.before()
    clock.finish()
    assert len(waits) == 2
    assert clock.sample_s > 0


def test_a_gpu_goes_by_what_was_tuned(gpu_here, pretended, capsys):
    """Its table is its own, in each of the dtypes that are usual there; "auto" changes its mind in this process."""
    layer = Layer(torch.device("cuda", 0), torch.bfloat16, 500, 16, 512, 512)
    assert backends.choose("auto", (layer,)).name == "torch"
    status, output, errors = tune(capsys, "--export", "-")  # on the GPU, where there is one
    assert status == 0, errors
    table = tuning.from_text(output)
    assert table.device == ("cuda", "NVIDIA Made Up", 132, "9.0")
    assert table.versions.compiler.startswith("triton ")
    assert {each.arithmetic for each in table.timings} == {"bfloat16", "tf32", "float16"}
    assert len(table.timings) == len(pretended) > 100
    assert backends.choose("auto", (layer,)).name == "triton"
    assert "tuned here on" in str(backends.choose("auto", (layer,)))


def test_help_names_every_option(capsys):
    status, output, _ = tune(capsys, "--help")
    assert status == 0
    for option in ("--device", "--dtype", "--quick", "--limit-s", "--threads", "--export", "--show"):
        assert option in output

"""The tasks of the demonstration, what it claims of untrained models, the command, and the example of a long memory."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.nn import functional as F

import lstmcore
from gradient_flow import tasks
from gradient_flow.training import MODELS, SETTINGS, Run, build, left, train, untrained
from lstmcore import cli
from lstmcore.flow.measure import measure

ROOT = pathlib.Path(__file__).parents[2]
needs_pictures = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("rich", "matplotlib"))), reason="needs rich and matplotlib"
)
SEEDS = range(5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("steps", [2, 3, 50, 101])
def test_adding(steps):
    input, target = tasks.adding(steps, 200, generator())
    assert input.shape == (steps, 200, 2)
    assert target.shape == (200,)
    numbers, marks = input.unbind(-1)
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert ((marks == 0) | (marks == 1)).all()
    assert (marks[: steps // 2].sum(0) == 1).all()
    assert (marks[steps // 2 :].sum(0) == 1).all()
    for row in range(200):
        first, second = (t for t in range(steps) if marks[t, row])
        torch.testing.assert_close(target[row], numbers[first, row] + numbers[second, row])
    marked = marks.sum(1) > 0
    assert marked.all() or steps > 50, "every step is marked in some row"


@pytest.mark.parametrize(("delay", "length", "symbols"), [(1, 1, 2), (5, 3, 4), (100, 10, 8)])
def test_copy(delay, length, symbols):
    input, target = tasks.copy(delay, 64, symbols, length, generator())
    steps = delay + 2 * length
    assert input.shape == (steps, 64, symbols + 2)
    assert target.shape == (steps, 64)
    assert (input.sum(-1) == 1).all()
    read = input.argmax(-1)
    for row in range(64):
        word = read[:length, row].tolist()
        assert all(symbol < symbols for symbol in word)
        blank, go = symbols, symbols + 1
        assert read[length:, row].tolist() == [blank] * (delay - 1) + [go] + [blank] * length
        assert target[:, row].tolist() == [blank] * (length + delay) + word
    assert set(read[:length].flatten().tolist()) == set(range(symbols))


@pytest.mark.parametrize(("steps", "classes"), [(1, 3), (2, 8), (200, 8)])
def test_recall(steps, classes):
    input, target = tasks.recall(steps, 100, classes, generator())
    assert input.shape == (steps, 100, 2 * classes)
    assert (input.sum(-1) == 1).all()
    read = input.argmax(-1)
    assert torch.equal(read[0], target)
    assert (target < classes).all()
    assert (read[1:] >= classes).all(), "the noise cannot be taken for the symbol"
    assert set(target.tolist()) == set(range(classes))


@pytest.mark.parametrize("task", [tasks.Adding(30), tasks.Copy(20, 3, 4), tasks.Recall(25)], ids=lambda task: task.name)
def test_task(task):
    """What a task says of itself is what it draws; the generator decides what that is."""
    input, target = task.draw(7, generator(1))
    assert input.shape == (task.steps, 7, task.inputs)
    assert task.lag < task.steps
    again, other = task.draw(7, generator(1)), task.draw(7, generator(2))
    assert torch.equal(input, again[0])
    assert torch.equal(target, again[1])
    assert not torch.equal(input, other[0])

    model = tasks.Model(lstmcore.LSTM(task.inputs, 5), task.outputs, task.at_end)
    answer = model(input)
    assert answer.shape == ((7,) if task.at_end else (task.steps, 7)) + (task.outputs,)
    for loss in (task.loss(answer, target), task.memory_loss(answer, target)):
        assert loss.ndim == 0
        assert loss.item() > 0
        loss.backward(retain_graph=True)
    assert 0 <= task.accuracy(answer, target) <= 1


@pytest.mark.parametrize("arguments", [("adding", 1), ("copy", 0), ("recall", 0)])
def test_lengths_that_make_no_sense(arguments):
    name, length = arguments
    with pytest.raises(ValueError, match=f"got {length}"):
        getattr(tasks, name)(length, 3)


def test_chance_of_adding():
    """By brute force: no constant answer has a smaller error than 1, whose error is 1/6."""
    _, target = tasks.adding(10, 200_000, generator())
    answers = torch.linspace(0, 2, 201)
    errors = torch.stack([(target - answer).square().mean() for answer in answers])
    best = errors.argmin()
    assert answers[best].item() == pytest.approx(1, abs=0.02)
    task = tasks.Adding(10)
    assert errors[best].item() == pytest.approx(task.chance, rel=0.01)
    assert task.loss(torch.ones(len(target), 1), target).item() == pytest.approx(1 / 6, rel=0.01)


@pytest.mark.parametrize(("delay", "length", "symbols"), [(3, 2, 3), (2, 3, 2)])
def test_chance_of_copy(delay, length, symbols):
    """By brute force, over all words: the best answer that depends on the step alone."""
    task = tasks.Copy(delay, length, symbols)
    words = torch.tensor(list(itertools.product(range(symbols), repeat=length))).T  # every word once
    target = torch.full((task.steps, words.shape[1]), symbols)
    target[-length:] = words
    shares = F.one_hot(target, symbols + 1).double().mean(1)  # (T + 2S, K + 1): the best answer for each step
    answer = shares.log().clamp(min=-1e4)[:, None].expand(-1, words.shape[1], -1)
    assert task.loss(answer, target).item() == pytest.approx(task.chance)
    assert task.chance == pytest.approx(length * math.log(symbols) / (delay + 2 * length))
    assert task.memory_loss(answer, target).item() == pytest.approx(math.log(symbols))
    assert task.accuracy(F.one_hot(target, symbols + 1), target) == 1
    blanks = F.one_hot(torch.full_like(target, symbols), symbols + 1)
    assert task.accuracy(blanks, target) == 0, "blanks do not count"


def test_chance_of_recall():
    task = tasks.Recall(4, 5)
    target = torch.arange(5)
    shares = F.one_hot(target, 5).double().mean(0)
    assert task.loss(shares.log().expand(5, 5), target).item() == pytest.approx(task.chance)


def test_accuracy_of_adding():
    task = tasks.Adding(10)
    target = torch.tensor([0.5, 1.0, 1.5])
    assert task.accuracy(torch.tensor([[0.5], [1.09], [1.0]]), target) == pytest.approx(2 / 3)


# ----------------------------------------------------------------------------------------------------- what it claims


@pytest.mark.parametrize("task", [tasks.Adding(260), tasks.Copy(250, 2, 4)], ids=lambda task: task.name)
@pytest.mark.parametrize("hidden_size", [32, 64])
def test_what_is_left_before_training(task, hidden_size):
    """Over several seeds: lag 200 of a plain RNN, of LSTMs, and of the LSTM with the cure."""
    ratios = {name: [left(untrained(name, task, hidden_size, seed)) for seed in SEEDS] for name in MODELS}
    for name in ("sigmoid RNN", "tanh RNN", "LSTM, default"):
        assert max(ratios[name]) < 1e-8, name
    assert min(ratios["LSTM, chrono"]) > 1e-3
    # torch's forget gates start near one half; with a bias of one they keep more, and far too little
    assert max(ratios["LSTM, default"]) < min(ratios["LSTM, bias 1"]) < max(ratios["LSTM, bias 1"]) < 1e-3


def test_what_a_step_keeps():
    rates = {
        name: [measure(untrained(name, tasks.Adding(260), 32, seed)).rate for seed in SEEDS]
        for name in ("sigmoid RNN", "LSTM, default", "LSTM, chrono")
    }
    assert max(rates["sigmoid RNN"]) < 0.25
    assert all(0.4 < rate < 0.75 for rate in rates["LSTM, default"])
    assert min(rates["LSTM, chrono"]) > 0.98


def test_models_differ_in_their_biases_alone():
    models = [build(name, tasks.Adding(50), 8, seed=3) for name in MODELS if name.startswith("LSTM")]
    for (name, first), *others in zip(*(model.named_parameters() for model in models), strict=True):
        for _, other in others:
            assert torch.equal(first, other) or name.startswith("recurrent.bias_")


def test_training_learns_and_stops():
    """A lag of a few steps, which every LSTM learns: the loop, the records, the verdict."""
    run = Run("LSTM, chrono", tasks.Copy(3, 1, 2))
    train(run, SETTINGS["copy"], seed=0)
    assert run.learned
    assert run.accuracy > 0.9
    assert len(run.losses) == run.iterations < SETTINGS["copy"].iterations
    assert not run.remark
    assert [run.records[0].iteration, run.records[-1].iteration] == [0, run.iterations]
    assert len(run.records) > 2

    stopped = Run("tanh RNN", tasks.Adding(20))
    train(stopped, SETTINGS["adding"], seed=0, stop=lambda: len(stopped.losses) == 4)
    assert (stopped.iterations, stopped.remark) == (4, "interrupted")
    late = Run("tanh RNN", tasks.Adding(20))
    train(late, SETTINGS["adding"], seed=0, deadline=0)
    assert (late.iterations, late.remark) == (1, "out of time")
    assert not late.learned


# -------------------------------------------------------------------------------------------------------- the command

SMALL = ("--steps", "220", "--adding", "30", "--copy", "201", "--hidden-size", "8")
PICTURES = {f"{name}.png" for name in ("untrained-adding", "untrained-copy")}
PICTURES |= {
    f"{name}-{what}.png"
    for name in ("adding-30", "copy-201")
    for what in ("losses", "before", "after", "training", "gates", "horizons")
}


def rows(path: pathlib.Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@needs_pictures
def test_command(tmp_path):
    program = [sys.executable, "-m", "lstmcore", "flow", "--quick", *SMALL, "--out", tmp_path / "flow"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "flow"
    assert {path.name for path in folder.glob("*.png")} == PICTURES
    assert all(path.stat().st_size > 5000 for path in folder.glob("*.png"))

    table = rows(folder / "table.csv")
    assert len(table) == 10
    assert {(row["task"], row["length"]) for row in table} == {("adding", "30"), ("copy", "201")}
    for row in table:
        assert row["learned"] in ("yes", "no")
        assert math.isfinite(float(row["loss"]))
        assert float(row["chance-level loss"]) == pytest.approx(
            1 / 6 if row["task"] == "adding" else 2 * math.log(4) / 205, abs=1e-4
        )
        assert row["iterations"] == "10"
    left = {row["model"]: float(row["left before"]) for row in table if row["task"] == "copy"}
    assert left["sigmoid RNN"] < 1e-8 < 1e-3 < left["LSTM, chrono"]
    assert len(rows(folder / "untrained.csv")) == 10
    for text in ("sigmoid RNN", "LSTM, chrono", "Before training", "Training", "chance-level loss"):
        assert text in (folder / "table.md").read_text(encoding="utf-8")
        assert text in done.stdout or text == "chance-level loss"
    summaries = (folder / "summaries.txt").read_text(encoding="utf-8")
    assert summaries.count("Gradient flow of") == 10
    assert "vanishing" in summaries


@pytest.mark.slow
@needs_pictures
def test_ctrl_c_keeps_what_is_done(tmp_path):
    """Interrupted in its third training; the first two are there afterwards."""
    options = ("--iterations", "1000000", "--minutes", "0.75", "--steps", "50", "--adding", "20", "--copy", "10")
    # 45 seconds less the 25 for pictures are 20 for 10 trainings: each is stopped after about two
    program = [sys.executable, "-u", "-m", "lstmcore", "flow", *options, "--hidden-size", "8", "--out", tmp_path]
    running = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        lines = []
        for line in running.stdout:
            lines.append(line)
            if line.startswith("adding 20: tanh RNN"):
                time.sleep(0.3)
                os.kill(running.pid, signal.SIGINT)
                break
        output = "".join(lines) + running.communicate(timeout=100)[0]
    finally:
        running.kill()
    assert running.returncode == 130, output
    assert "Traceback" not in output
    assert "Ctrl-C" in output
    table = rows(tmp_path / "table.csv")
    assert [row["model"] for row in table] == ["sigmoid RNN", "tanh RNN", "LSTM, default"]
    assert table[-1]["remark"] == "interrupted"
    names = {path.name for path in tmp_path.glob("*.png")}
    assert {"untrained-adding.png", "untrained-copy.png", "adding-20-losses.png", "adding-20-training.png"} <= names
    assert not any(name.startswith("copy") for name in names)


@pytest.mark.slow
def test_it_runs_by_itself_too():
    """As the command without a checkout says."""
    program = [sys.executable, ROOT / "examples" / "gradient_flow", "--help"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python examples/gradient_flow")
    assert "--adding" in done.stdout


@needs_pictures
def test_command_that_cannot_write(tmp_path, capsys):
    """Known at once, not after minutes, and without a traceback."""
    (tmp_path / "file").write_text("")
    start = time.monotonic()
    assert cli.main(["flow", "--out", str(tmp_path / "file" / "flow")]) == 2
    assert time.monotonic() - start < 20
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"), [("--steps 0", "0"), ("--adding x", "x"), ("--minutes soon", "soon"), ("--seed a", "a")]
)
def test_bad_arguments(arguments, named, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["flow", *arguments.split()])
    assert end.value.code == 2
    assert named in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["flow", "--help"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    for option in ("--out", "--steps", "--adding", "--copy", "--hidden-size", "--seed", "--minutes", "--quick"):
        assert option in output


@pytest.mark.slow
def test_the_other_commands_need_no_pictures():
    """Neither rich nor matplotlib is loaded before the command runs, and its absence is named."""
    program = """
import sys
sys.modules["rich"] = sys.modules["matplotlib"] = None  # as if they were not installed
from lstmcore import cli
try:
    cli.main(["flow", "--help"])
except SystemExit as end:
    assert end.code == 0
sys.exit(cli.main(["flow", "--quick"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr


# -------------------------------------------------------------------------------------------------------- the example


@pytest.mark.slow
@needs_pictures
def test_example(tmp_path):
    program = [sys.executable, ROOT / "examples" / "long_memory.py", "--quick", "--out", tmp_path]
    done = subprocess.run(program, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("vanish", "lstmcore.init.chrono_(model.recurrent, max_lag=200)", "real text", "last character alone"):
        assert text in done.stdout, text
    assert {path.name for path in tmp_path.iterdir()} == {
        *("1-default", "2-chrono", "3-text", "3-text-last-character"),
        *("learning.png", "before-training.png"),
    }
    for folder in ("1-default", "2-chrono", "3-text", "3-text-last-character"):
        assert (tmp_path / folder / "norms_by_lag.png").exists()


@pytest.mark.slow
@needs_pictures
@pytest.mark.parametrize(("option", "named"), [("--steps=2", "--steps"), ("--text=/nowhere", "/nowhere")])
def test_example_with_bad_arguments(option, named, tmp_path):
    program = [sys.executable, ROOT / "examples" / "long_memory.py", "--quick", "--out", tmp_path, option]
    done = subprocess.run(program, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr

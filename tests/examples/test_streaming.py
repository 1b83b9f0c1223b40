"""The highlighter: the answers it learns from, one key at a time against one long run, and the program around it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import lstmcore
import streaming
from char_lm import CharModel
from streaming import CODE, COMMENT, STRING
from tests.support.examples import interrupt, refused, same, state_of

TINY = (
    *("--batch", "4", "--steps", "16", "--hidden-size", "5", "--embedding-size", "4"),
    *("--type", "300", "--timed", "30", "--save-every", "2"),
)


@pytest.fixture
def program(tmp_path) -> Path:
    path = tmp_path / "program"
    path.write_text(Path(lstmcore.__file__).with_name("stream.py").read_text())
    return path


@pytest.fixture
def run(tmp_path, program):
    def run(*arguments: str, out: str = "out") -> int:
        return streaming.main(["--text", str(program), *TINY, "--out", str(tmp_path / out), *arguments])

    return run


def test_kinds():
    pieces = [
        *[("x = ", CODE), ('"a"', STRING), (" + ", CODE), ("'#b'", STRING), ("  ", CODE), ('# "c"', COMMENT)],
        *[("\ndef f():\n    ", CODE), ('"""d\n\x0c# e\n    """', STRING), ("\n    return ", CODE)],
        *[('rb"\\""', STRING), ("\n", CODE)],
    ]
    expected = [kind for text, kind in pieces for _ in text]
    assert streaming.kinds_of("".join(text for text, _ in pieces)).tolist() == expected


def test_f_strings_are_strings():
    """In whole before Python 3.12, outside of their braces since."""
    found = streaming.kinds_of('f"ab{c}d"\n')
    assert found[:4].tolist() == [STRING] * 4
    assert found[7:9].tolist() == [STRING] * 2
    assert found[9] == CODE


def test_one_key_at_a_time(program):
    torch.manual_seed(0)
    model = CharModel(lstmcore.LSTM, 20, 6, 9, kinds=3)
    characters = torch.randint(20, (50,))
    typed = streaming.type_out(model, characters)
    with torch.no_grad():
        scores, _ = model(characters[:, None], None)
    assert typed.kinds.tolist() == scores.argmax(-1).flatten().tolist()
    assert typed.difference < 1e-6
    assert typed.seconds.shape == (50,)


def test_outputs_are_checked_before_they_are_timed(monkeypatch):
    model = CharModel(lstmcore.LSTM, 20, 6, 9, kinds=3)
    wrong = {"wrong": ("arrays", lambda x: np.zeros((1, 9), np.float32))}
    monkeypatch.setattr(streaming, "contestants", lambda *_: wrong)
    with pytest.raises(AssertionError, match="wrong: another output than the module's at step 0"):
        streaming.latencies(model, torch.randint(20, (300,)), 5, Console())


def test_who_is_left_out_is_told(monkeypatch, capsys):
    monkeypatch.setattr(streaming.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else 1)
    found = streaming.contestants(CharModel(lstmcore.LSTM, 20, 6, 9, kinds=3), Console())
    assert "onnxruntime" not in found
    assert "onnxruntime is left out: pip install onnxscript" in capsys.readouterr().out


@pytest.mark.slow
def test_it_runs(run, tmp_path, capsys):
    assert run("--iterations", "3") == 0
    told = capsys.readouterr().out
    for text in (
        "as it was typed",
        "counts, last 5 characters",
        "always code",
        "one long run",
        "p99",
        "Stream, arrays",
    ):
        assert text in told
    assert (tmp_path / "out" / "streaming.png").stat().st_size > 20_000


def test_it_goes_on_as_if_it_had_never_stopped(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(streaming, "contestants", lambda model, console: {
        "Stream": ("arrays", lstmcore.Stream(model.lstm, 1).step)})  # fmt: skip
    assert run("--iterations", "5", out="whole") == 0
    with monkeypatch.context() as patch:
        interrupt(patch, streaming.Training, "step", at=3)
        assert run("--iterations", "5", out="parts") == 130
    assert "stopped after iteration 3; go on with --resume" in capsys.readouterr().out
    assert run("--iterations", "5", "--resume", out="parts") == 0
    assert "resumed after iteration 3" in capsys.readouterr().out
    whole, parts = (state_of(tmp_path / out / "streaming.pt") for out in ("whole", "parts"))
    assert same(whole, parts)
    assert len(whole["state"]["losses"]) == 5


def test_streams_start_over_when_they_are_through(program):
    """And the state with them: the window after the last is the first, from no state."""
    options = streaming.parser().parse_args([*TINY])
    options.learning_rate = 0.0
    programs = streaming.Programs.of(*streaming.read_programs(program, 10_000), options)
    windows = len(programs.train) // options.steps
    training = streaming.Training.new(options, len(programs.vocabulary))
    for _ in range(2 * windows):
        training.step(programs, options)
    assert training.losses[:windows] == training.losses[windows:]
    assert len({*training.losses}) > windows // 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--text /nowhere", "cannot read /nowhere"),
        ("--batch 900", "lower --batch or --steps, or pass more --text"),
        ("--type 100", "pass --type 205 or more"),
        ("--resume", "run without --resume first"),
    ],
)
def test_what_it_refuses(arguments, told, run, capsys):
    assert told in refused(lambda each: run(*each), arguments.split(), capsys)


def test_text_that_is_no_program(run, program, capsys):
    program.write_text('"""never closed\n' * 3)
    told = refused(lambda each: run(*each), [], capsys)
    assert "is no Python program" in told
    assert "pass one with --text FILE" in told

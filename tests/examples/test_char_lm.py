"""The character language model: what it writes, goes on from, keeps and refuses."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import char_lm
import lstmcore
from tests.support.examples import interrupt, refused, same, state_of

TINY = ("--batch", "3", "--steps-per-window", "16", "--hidden-size", "5", "--embedding-size", "4", "--sample", "9")


@pytest.fixture
def run(tmp_path):
    """Arguments to status, on text of the library's own."""
    text = tmp_path / "text"
    text.write_text(Path(lstmcore.__file__).with_name("stream.py").read_text()[:8000])

    def run(*arguments: str, out: str = "out") -> int:
        return char_lm.main(
            ["--text", str(text), *TINY, "--validate-every", "2", "--out", str(tmp_path / out), *arguments]
        )

    return run


@pytest.mark.slow
def test_it_runs(run, tmp_path, capsys):
    assert run("--iterations", "3") == 0
    told = capsys.readouterr().out
    for text in ("lstmcore.LSTM", "torch.nn.LSTM", "2-gram", "5-gram", "gzip -9", "xz -9", "speedup", "written by"):
        assert text in told
    assert (tmp_path / "out" / "char_lm.png").stat().st_size > 20_000
    trainees = state_of(tmp_path / "out" / "char_lm.pt")["state"]
    assert trainees.keys() == {char_lm.OURS, char_lm.PEER}
    for each in trainees.values():
        assert len(each["losses"]) == 3
        assert all(math.isfinite(loss) for loss in each["losses"])
        assert [step for step, _ in each["validations"]] == [2]
    ours, peer = (trainees[name]["losses"] for name in (char_lm.OURS, char_lm.PEER))
    assert ours == pytest.approx(peer, abs=1e-4)


def test_mixed_precision(run, tmp_path):
    assert run("--iterations", "3", "--amp", "bfloat16") == 0
    trainees = state_of(tmp_path / "out" / "char_lm.pt")["state"]
    assert {value.dtype for each in trainees.values() for value in each["model"].values()} == {torch.float32}
    ours, peer = (trainees[name]["losses"] for name in (char_lm.OURS, char_lm.PEER))
    assert ours == pytest.approx(peer, abs=0.02)
    assert run("--iterations", "3", out="wide") == 0
    wide = state_of(tmp_path / "wide" / "char_lm.pt")["state"][char_lm.OURS]["losses"]
    assert ours != wide  # it did round
    assert ours == pytest.approx(wide, abs=0.02)


def test_it_goes_on_as_if_it_had_never_stopped(run, tmp_path, monkeypatch, capsys):
    assert run("--iterations", "5", out="whole") == 0
    with monkeypatch.context() as patch:
        interrupt(patch, char_lm.Trainee, "step", at=5)  # in the third iteration: two models take turns
        assert run("--iterations", "5", out="parts") == 130
    assert "stopped after iteration 3; go on with --resume" in capsys.readouterr().out
    assert run("--iterations", "4", "--resume", out="parts") == 0
    assert "resumed after iteration 3" in capsys.readouterr().out
    assert run("--iterations", "5", "--resume", out="parts") == 0
    whole, parts = (state_of(tmp_path / out / "char_lm.pt") for out in ("whole", "parts"))
    assert same(whole, parts)
    assert len(whole["state"][char_lm.OURS]["losses"]) == 5


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--text /nowhere", "cannot read /nowhere"),
        ("--batch 500", "lower --batch or --steps-per-window, or pass more --text"),
        ("--resume", "run without --resume first"),
    ],
)
def test_what_it_refuses(arguments, told, run, capsys):
    assert told in refused(lambda each: run(*each), arguments.split(), capsys)


def test_another_training(run, capsys):
    assert run("--iterations", "1") == 0
    told = refused(lambda each: run(*each), ["--iterations", "2", "--resume", "--seed", "7"], capsys)
    assert "seed 0 (now 7)" in told


def test_the_best_weights_are_kept(monkeypatch):
    options = argparse.Namespace(
        seed=0,
        embedding_size=4,
        hidden_size=5,
        learning_rate=0.1,
        device=torch.device("cpu"),
        steps_per_window=8,
        clip=1.0,
        amp=None,
    )
    corpus = char_lm.Corpus.of("abc" * 400, 2, 8)
    trainee = char_lm.Trainee.new(char_lm.OURS, options, len(corpus.characters))
    weights = []
    for loss in (3.0, 1.0, 2.0, 1.0):
        monkeypatch.setattr(char_lm, "evaluate", lambda *_, loss=loss, **__: loss)
        trainee.step(corpus.train[:9], options)
        trainee.validate(corpus, options)
        weights.append({name: value.clone() for name, value in trainee.model.state_dict().items()})
    assert trainee.validations == [(1, 3.0), (2, 1.0), (3, 2.0), (4, 1.0)]
    assert same(trainee.best, weights[1])
    assert not same(trainee.best, weights[2])


def test_schedule():
    shares = [char_lm.schedule(step) for step in range(10 * char_lm.WARM_UP)]
    top = char_lm.WARM_UP - 1
    assert shares[top] == 1
    assert shares[: top + 1] == sorted(shares[: top + 1])
    assert shares[top:] == sorted(shares[top:], reverse=True)
    assert 0 < shares[0] < shares[-1]


def test_a_table_of_counts_knows_what_was_read_alone():
    """Of text in which every character says what follows, two characters say it all, once they have been read."""
    corpus = char_lm.Corpus.of("e" * 500 + "abcd" * 2000, 1, 8)
    seen, unseen = char_lm.baselines(corpus, 3000), char_lm.baselines(corpus, 100)
    assert seen["2-gram of the characters read"] < 0.02
    assert unseen["2-gram of the characters read"] > 1
    assert seen["gzip -9 of the test alone"] == unseen["gzip -9 of the test alone"] < 2


def test_evaluation_is_that_of_one_long_run():
    """The windows share nothing but the state that goes from one to the next."""
    torch.manual_seed(0)
    model, text = char_lm.CharModel(lstmcore.LSTM, 6, 4, 5), torch.randint(6, (41, 2))
    with torch.no_grad():
        scores, _ = model(text[:-1], None)
        expected = torch.nn.functional.cross_entropy(scores.flatten(0, 1), text[1:].flatten()).item()
        first = torch.nn.functional.cross_entropy(scores[:16].flatten(0, 1), text[1:17].flatten()).item()
    for steps in (7, 8, 40, 100):
        assert char_lm.evaluate(model, text, steps) == pytest.approx(expected, rel=1e-5)
    assert char_lm.evaluate(model, text, 8, windows=2) == pytest.approx(first, rel=1e-5)


def test_streams():
    text = torch.arange(11)
    cut = char_lm.streams(text, 2)
    assert cut.t().tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    np.testing.assert_array_equal(char_lm.in_order(cut), range(10))

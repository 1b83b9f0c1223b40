"""Where a passage comes from: the split by files, the bag of words, the classifier, checkpoints and errors."""

from __future__ import annotations

import argparse
import itertools
import math
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs matplotlib")
pytest.importorskip("rich", reason="needs rich")

import lstmcore
import text_classification
from common import CannotRun
from learner import Learner
from tests.support.examples import interrupt, refused, same, state_of
from text_classification import Bag, Classifier, Corpus, Part, cut, split_files

TINY = ("--batch", "3", "--hidden-size", "4", "--embedding-size", "3")
SIZES = argparse.Namespace(embedding_size=3, hidden_size=4, dropout=0.3)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Three packages of eight files, of words of their own and of words they share."""
    folder, random_ = tmp_path_factory.mktemp("sources"), random.Random(0)
    for name in ("asyncio", "json", "email", "xml"):
        (folder / name / "tests").mkdir(parents=True)
        (folder / name / "tests" / "test_it.py").write_text("neverRead = 1\n" * 100)
        words = [f"{name}{letter}" for letter in "abcdef"] + ["shared", "other"]
        for number in range(8):
            lines = [" ".join(random_.choices(words, k=8)) for _ in range(30)]
            (folder / name / f"file{number}.py").write_text("\n".join([f"# {name} {number}", *lines, ""]))
    return folder


@pytest.fixture(scope="module")
def corpus(sources) -> Corpus:
    return Corpus.read(sources)


@pytest.fixture
def run(tmp_path, sources):
    def run(*arguments: str, out: str = "out") -> int:
        every = ["--sources", str(sources), *TINY, "--validate-every", "2", "--out", str(tmp_path / out)]
        return text_classification.main([*every, *arguments])

    return run


@pytest.mark.slow
def test_it_runs(run, tmp_path, capsys):
    assert run("--iterations", "3") == 0
    told = capsys.readouterr().out
    for text in ("3 packages (asyncio, email, xml)", "bag of words", "largest package", "LSTM + bag", "torch.nn.LSTM"):
        assert text in told
    assert (tmp_path / "out" / "text_classification.png").stat().st_size > 20_000
    state = state_of(tmp_path / "out" / "text_classification.pt")["state"]
    assert len(state["losses"]) == 3
    assert all(math.isfinite(loss) for loss in state["losses"])
    assert [step for step, _ in state["validations"]] == [2, 3]


@pytest.mark.slow
def test_it_learns(run, tmp_path, capsys):
    """Words that name their package are soon known; by guessing, more than half of the answers are wrong."""
    assert run("--iterations", "60", "--learning-rate", "0.02", "--hidden-size", "8") == 0
    validations = state_of(tmp_path / "out" / "text_classification.pt")["state"]["validations"]
    assert min(error for _, error in validations) < 0.25


def test_it_goes_on_as_if_it_had_never_stopped(run, tmp_path, monkeypatch, capsys):
    assert run("--iterations", "5", out="whole") == 0
    with monkeypatch.context() as patch:
        interrupt(patch, Learner, "step", at=3)
        assert run("--iterations", "5", out="parts") == 130
    assert "stopped after iteration 3; go on with --resume" in capsys.readouterr().out
    assert run("--iterations", "5", "--resume", out="parts") == 0
    whole, parts = (state_of(tmp_path / out / "text_classification.pt") for out in ("whole", "parts"))
    assert same(whole, parts)


# ---------------------------------------------------------------------------------------------------------------- data


def test_no_file_is_on_both_sides(sources):
    for package in ("asyncio", "email"):
        texts = text_classification.read_package(sources / package)
        assert len(texts) == 8, "without the tests"
        parts = split_files(texts)
        assert sorted(itertools.chain(*parts.values())) == sorted(texts)
        assert [len(parts[part]) for part in ("train", "validation", "test")] == [5, 1, 2]


def test_passages_are_the_text(sources):
    text = (sources / "asyncio" / "file0.py").read_text()
    passages = cut(text, random.Random(1))
    assert "".join(passages) == text
    assert len(passages) > 3
    assert all(passage.endswith("\n") for passage in passages)
    assert all(len(passage) >= text_classification.SHORTEST for passage in passages[:-1])


def test_the_vocabulary_is_of_the_training_files(corpus):
    seen = torch.cat(corpus.train.tokens).unique()
    assert seen.max() < corpus.vocabulary
    assert set(range(text_classification.UNKNOWN + 1, corpus.vocabulary)) <= set(seen.tolist())
    assert len(corpus.test.tokens) == len(corpus.test.labels) > 5
    assert torch.equal(torch.cat(corpus.files.tokens), torch.cat(corpus.train.tokens))


def test_tokens():
    assert text_classification.TOKEN.findall("def readLine(self):\n    HTTPServer_1 = 42") == [
        *("def", "read", "Line", "(", "self", ")", ":", "\n    ", "HTTP", "Server", "1", "=", "4", "2"),
    ]


# -------------------------------------------------------------------------------------------------------------- models


def test_the_bag_by_hand():
    """Token 2 in both passages of package 0, token 3 in that of package 1; twice in a passage counts once."""
    part = Part([torch.tensor([2, 2]), torch.tensor([2]), torch.tensor([3])], torch.tensor([0, 0, 1]))
    scores = Bag(part, vocabulary=4, packages=2, smoothing=1.0)(Part([torch.tensor([2, 2])], torch.tensor([0])))
    # shares of the tokens unknown, 2 and 3: package 0 (1, 3, 1) / 5, package 1 (1, 1, 2) / 4; packages 3 : 2
    odds = (3 / 5 * 3) / (1 / 4 * 2)
    assert scores.exp()[0].tolist() == pytest.approx([odds / (1 + odds), 1 / (1 + odds)])


def test_padding_does_not_count():
    torch.manual_seed(0)
    model = Classifier(lstmcore.LSTM, (9, 4), SIZES).eval()
    passages = [torch.randint(1, 9, (length,)) for length in (7, 3, 1)]
    together = model(*text_classification.padded(passages, torch.device("cpu")))
    alone = torch.cat([model(*text_classification.padded([passage], torch.device("cpu"))) for passage in passages])
    torch.testing.assert_close(together, alone)


def test_the_peer_computes_the_same():
    torch.manual_seed(0)
    ours, peer = (Classifier(lstm, (9, 4), SIZES) for lstm in (lstmcore.LSTM, torch.nn.LSTM))
    peer.load_state_dict(ours.state_dict())
    batch = text_classification.padded([torch.randint(1, 9, (length,)) for length in (5, 8, 2)], torch.device("cpu"))
    torch.testing.assert_close(ours.eval()(*batch), peer.eval()(*batch))


def test_confusion():
    part = Part([torch.tensor([2])] * 3, torch.tensor([0, 0, 1]))
    scores = torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    tested = text_classification.Tested(part, ["a", "b", "c"], {"it": scores}, 0.5)
    tested.scores["it"] = torch.nn.functional.pad(scores, (0, 1), value=-1)
    assert tested.confusion("it").tolist() == [[0.5, 0.5, 0], [0, 1, 0], [0, 0, 0]]
    assert tested.accuracy("it") == pytest.approx(2 / 3)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--dropout 1", "from 0 up to 1, got 1"),
        ("--batch 0", "above 0, got 0"),
        ("--hidden-size x", "invalid int value: 'x'"),
        ("--resume", "run without --resume first"),
        ("--sources /nowhere", "at least two of the packages"),
    ],
)
def test_what_it_refuses(arguments, told, run, capsys):
    assert told in refused(lambda each: run(*each), arguments.split(), capsys)


def test_too_few_packages(tmp_path):
    (tmp_path / "xml").mkdir()
    for name in "abcdefgh":
        (tmp_path / "xml" / f"{name}.py").write_text("word " * 50)
    with pytest.raises(CannotRun, match=r"at least two of the packages .*got xml; install Python"):
        Corpus.read(tmp_path)


def test_a_checkpoint_of_other_text(run, sources, tmp_path, capsys):
    assert run("--iterations", "2") == 0
    copy = tmp_path / "copy"
    for package in ("asyncio", "email"):
        (copy / package).mkdir(parents=True)
        for file in (sources / package).glob("*.py"):
            (copy / package / file.name).write_text(file.read_text())
    told = refused(lambda each: run(*each), f"--iterations 2 --resume --sources {copy}".split(), capsys)
    assert "text_checksum" in told

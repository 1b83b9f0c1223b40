"""flair's SequenceTagger."""

from __future__ import annotations

import pytest

pytest.importorskip("flair", reason="flair is not installed here: make test-libraries")

import pathlib

from flair.data import Dictionary
from flair.embeddings import CharacterEmbeddings
from flair.models import LanguageModel, SequenceTagger
from torch import nn

import lstmcore
from bench.libraries import flair, parity
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", flair.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)


def tagger() -> SequenceTagger:
    characters, tags = Dictionary(), Dictionary()
    for letter in "ab":
        characters.add_item(letter)
        tags.add_item(letter)
    return SequenceTagger(CharacterEmbeddings(characters), tags, "pos", hidden_size=8)


def test_a_table_made_at_import_escapes_install():
    """Why the page says to patch: language models take the class from it, taggers from torch.nn."""
    characters = Dictionary()
    with lstmcore.installed():
        assert type(tagger().rnn) is lstmcore.LSTM
        model = LanguageModel(characters, True, hidden_size=8, nlayers=1)
    assert type(model.rnn) is nn.LSTM
    assert lstmcore.patch(model).moved == ["rnn"]


def test_what_a_saved_tagger_restores(tmp_path: pathlib.Path):
    built = tagger()
    assert lstmcore.patch(built).moved == ["embeddings.char_rnn", "rnn"]
    path = tmp_path / "tagger.pt"
    built.save(path)
    loaded = SequenceTagger.load(path)
    assert type(loaded.rnn) is nn.LSTM
    assert lstmcore.patch(loaded).moved == ["embeddings.char_rnn", "rnn"]

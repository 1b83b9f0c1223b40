"""flair: a SequenceTagger with a CRF over embeddings of characters, trained by ModelTrainer."""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Sequence
from typing import Any

import flair
import torch
from flair.data import Corpus, Dictionary, Sentence
from flair.embeddings import CharacterEmbeddings, HashEmbeddings, StackedEmbeddings
from flair.models import SequenceTagger
from flair.trainers import ModelTrainer
from torch import Tensor

import lstmcore
from bench.libraries.pipeline import Job, Pipeline

flair.device = torch.device("cpu")
logging.getLogger("flair").setLevel(logging.ERROR)

LETTERS, CLASSES = "abcdefgh", 6


class Tagger(SequenceTagger):
    """A tagger that keeps its losses."""

    losses: list[float]

    def forward_loss(self, sentences: list[Sentence]) -> tuple[Tensor, int]:
        loss, count = super().forward_loss(sentences)
        self.losses.append(loss.item())
        return loss, count


def sentence(longest: int) -> Sentence:
    """Words of random letters; a word's tag follows from its first letter and that of the word before."""
    lengths = [random.randint(2, 9) for _ in range(random.randint(longest // 3, longest))]
    words = ["".join(random.choices(LETTERS, k=length)) for length in lengths]
    made = Sentence(words)
    for before, token in zip(["a", *words], made, strict=False):
        token.add_label("pos", str((LETTERS.index(before[0]) + LETTERS.index(token.text[0])) % CLASSES))
    return made


def build(small: bool, moved: bool) -> Job:
    count, longest, batch, hidden = (6, 18, 3, 8) if small else (96, 45, 32, 256)
    corpus: Any = Corpus([sentence(longest) for _ in range(count)], sample_missing_splits=False)
    characters, tags = Dictionary(), Dictionary(add_unk=False)
    for letter in LETTERS:
        characters.add_item(letter)
    for number in range(CLASSES):
        tags.add_item(str(number))
    tagger = Tagger(
        StackedEmbeddings([HashEmbeddings(), CharacterEmbeddings(characters)]),
        tags,
        "pos",
        hidden_size=hidden,
    )
    if moved:
        lstmcore.patch(tagger)

    def train() -> Sequence[float]:
        tagger.losses = []
        with tempfile.TemporaryDirectory() as folder:
            ModelTrainer(tagger, corpus).train(
                folder,
                max_epochs=1,
                mini_batch_size=batch,
                embeddings_storage_mode="none",
                save_final_model=False,
                create_file_logs=False,
                create_loss_file=False,
            )
        return tagger.losses

    def outputs() -> Tensor:
        sentences = sorted(corpus.train, key=len, reverse=True)[:4]
        for each in sentences:
            each.clear_embeddings()
        tagger.eval()
        with torch.no_grad():
            return tagger(*tagger._prepare_tensors(sentences))[0]

    return Job(train, outputs)


PIPELINES = (
    Pipeline(
        name="flair SequenceTagger",
        distribution="flair",
        how="lstmcore.patch(tagger)",
        timed="`trainer.train`, an epoch of three batches of 32 sentences of up to 45 words, hidden size 256",
        build=build,
    ),
)

"""stanza: the tagger of parts of speech, a HighwayLSTM over words and an LSTM over their characters, both packed."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from stanza.models.pos.data import Dataset
from stanza.models.pos.trainer import Trainer
from stanza.models.tagger import build_argparse
from stanza.utils.conll import CoNLL
from torch import Tensor

import lstmcore
from bench.libraries.pipeline import Job, Pipeline

LETTERS, TAGS = "abcdefgh", ("NOUN", "VERB", "ADJ", "ADV", "DET", "ADP")


def sentence(longest: int) -> str:
    """In CoNLL-U: words of random letters; a word's tag follows from its first letter and that of the word before."""
    lengths = [random.randint(2, 9) for _ in range(random.randint(longest // 3, longest))]
    words = ["".join(random.choices(LETTERS, k=length)) for length in lengths]
    lines = []
    for number, (before, word) in enumerate(zip(["a", *words], words, strict=False), 1):
        tag = TAGS[(LETTERS.index(before[0]) + LETTERS.index(word[0])) % len(TAGS)]
        lines.append(f"{number}\t{word}\t{word}\t{tag}\t{tag}\t_\t{number - 1}\tdep\t_\t_\n")
    return "".join(lines) + "\n"


def build(small: bool, moved: bool) -> Job:
    """Small: a few short sentences; else the sizes of stanza's command line."""
    count, longest, batch = (9, 12, 50) if small else (60, 45, 1000)
    sizes = ["--hidden_dim", "8", "--char_hidden_dim", "8", "--deep_biaff_hidden_dim", "8"] if small else []
    given = ["--no_pretrain", "--lang", "xx", "--word_cutoff", "1", "--augment_nopunct", "0", *sizes]
    options = vars(build_argparse().parse_args(given))
    document = CoNLL.conll2doc(input_str="".join(sentence(longest) for _ in range(count)))
    data = Dataset(document, options, None)
    batches = list(data.to_loader(batch_size=batch, shuffle=False))
    trainer = Trainer(options, data.vocab, None, device="cpu")
    if moved:
        lstmcore.patch(trainer.model)

    def train() -> Sequence[float]:
        return [trainer.update(each) for each in batches]

    def outputs() -> Tensor:
        """What the HighwayLSTM gives: the tagger itself gives tags."""
        found: list[Tensor] = []
        hook = trainer.model.taggerlstm.register_forward_hook(lambda _, __, result: found.append(result[0].data))
        with torch.no_grad():
            trainer.update(batches[0], eval=True)
        hook.remove()
        return found[0]

    return Job(train, outputs)


PIPELINES = (
    Pipeline(
        name="stanza part-of-speech tagger",
        distribution="stanza",
        how="lstmcore.patch(trainer.model)",
        timed="`trainer.update` on 60 sentences of up to 45 words, at stanza's own sizes",
        build=build,
    ),
)

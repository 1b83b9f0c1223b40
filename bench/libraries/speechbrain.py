"""SpeechBrain: its Brain trains encoders of speech with CTC, one on a padded batch, one on a packed one."""

from __future__ import annotations

from collections.abc import Sequence

import speechbrain
import torch
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.CRDNN import CRDNN
from speechbrain.nnet.losses import ctc_loss
from speechbrain.nnet.RNN import LSTM
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lstmcore
from bench.libraries.pipeline import Job, Pipeline

RATE, MELS, TOKENS = 16000, 40, 32

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # waves, tokens, and of both the lengths relative to the longest


class Recogniser(speechbrain.Brain):
    """Waves to tokens, as in SpeechBrain's templates; ``losses`` has that of each batch."""

    losses: list[float]

    def compute_forward(self, batch: Batch, stage: speechbrain.Stage) -> Tensor:
        waves, lengths = batch[0], batch[2]
        features = self.hparams.features(waves)
        encoded = self.hparams.encode(self.modules.encoder, features, lengths)
        return self.modules.output(encoded).log_softmax(-1)

    def compute_objectives(self, predictions: Tensor, batch: Batch, stage: speechbrain.Stage) -> Tensor:
        _, tokens, lengths, tokens_lengths = batch
        loss = ctc_loss(predictions, tokens, lengths, tokens_lengths, blank_index=0)
        self.losses.append(loss.item())
        return loss


def batches(small: bool, count: int) -> list[Batch]:
    """Noise of two seconds (small: of half a second), some of it shorter."""
    rows, samples, words = (2, RATE // 2, 3) if small else (8, 2 * RATE, 15)
    return [
        (
            torch.randn(rows, samples),
            torch.randint(1, TOKENS, (rows, words)),
            torch.linspace(0.5, 1.0, rows),
            torch.ones(rows),
        )
        for _ in range(count)
    ]


def crdnn(small: bool) -> tuple[nn.Module, int]:
    """Convolutions, an LSTM in both directions and linear layers: the encoder of SpeechBrain's recipes."""
    cnn, rnn, dnn = ([4, 4], 12, 16) if small else ([32, 64], 256, 256)
    model = CRDNN(
        input_size=MELS,
        cnn_channels=cnn,
        rnn_class=LSTM,
        rnn_layers=2,
        rnn_neurons=rnn,
        rnn_bidirectional=True,
        rnn_re_init=True,
        time_pooling=True,
        dnn_neurons=dnn,
    )
    return model, dnn


def packed(small: bool) -> tuple[nn.Module, int]:
    """SpeechBrain's LSTM over the features, packed by their lengths."""
    hidden = 12 if small else 256
    return LSTM(hidden, input_size=MELS, num_layers=3, dropout=0.15, bidirectional=True), 2 * hidden


def job(small: bool, moved: bool, packs: bool) -> Job:
    encoder, width = (packed if packs else crdnn)(small)
    output = nn.Linear(width, TOKENS)
    brain = Recogniser(
        modules={"encoder": encoder, "output": output},
        opt_class=torch.optim.Adam,
        hparams={
            "features": Fbank(n_mels=MELS),
            "encode": (lambda m, x, lengths: m(x, lengths=lengths)[0]) if packs else (lambda m, x, lengths: m(x)),
        },
        run_opts={"device": "cpu", "noprogressbar": True},
    )
    if moved:
        lstmcore.patch(brain.modules)
    loader = DataLoader(batches(small, 3 if small else 2), batch_size=None)

    def train() -> Sequence[float]:
        brain.losses = []
        brain.fit(range(1), loader)
        return brain.losses

    def outputs() -> Tensor:
        brain.modules.eval()
        with torch.no_grad():
            return brain.compute_forward(loader.dataset[0], speechbrain.Stage.TEST)

    return Job(train, outputs)


PIPELINES = (
    Pipeline(
        name="speechbrain nnet.RNN.LSTM with lengths",
        distribution="speechbrain",
        how="lstmcore.patch(brain.modules)",
        timed="`brain.fit` on two batches of eight waves of one to two seconds, three layers of 256 in both directions",
        build=lambda small, moved: job(small, moved, packs=True),
    ),
    Pipeline(
        name="speechbrain CRDNN",
        distribution="speechbrain",
        how="lstmcore.patch(brain.modules)",
        timed="`brain.fit` on two batches of eight waves of two seconds, two layers of 256 in both directions",
        build=lambda small, moved: job(small, moved, packs=False),
    ),
)

"""Transformers' EnCodec: its encoder and decoder, each with an LSTM, trained to give back what goes in."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

import lstmcore
from bench.libraries.pipeline import Job, Pipeline

# transformers asks whether Hugging Face's package of this name is there, and finds the folder of our sources where
# Python runs from the root of the repository
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

from transformers import EncodecConfig, EncodecModel  # noqa: E402

STEPS = 3


def job(small: bool, moved: bool) -> Job:
    """Small: fewer filters and a hundredth of a second; else the sizes of encodec_24khz."""
    rows, samples = (2, 640) if small else (2, 24000)
    sizes = {"num_filters": 4, "hidden_size": 16, "codebook_dim": 16, "upsampling_ratios": [4, 2]} if small else {}
    model = EncodecModel(EncodecConfig(**sizes)).train()
    if moved:
        lstmcore.patch(model)
    waves = torch.randn(rows, 1, samples)
    optimizer = torch.optim.Adam([*model.encoder.parameters(), *model.decoder.parameters()], lr=3e-4)

    def step() -> float:
        optimizer.zero_grad()
        loss = (model.decoder(model.encoder(waves)) - waves).abs().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    def train() -> Sequence[float]:
        return [step() for _ in range(STEPS if small else 1)]

    @torch.no_grad()
    def outputs() -> Tensor:
        return model.decoder(model.encoder(waves))

    return Job(train, outputs)


PIPELINES = (
    Pipeline(
        name="transformers EnCodec",
        distribution="transformers",
        how="lstmcore.patch(model)",
        timed="a step on two seconds of sound at 24 kHz, encoder and decoder of encodec_24khz without its quantizer",
        build=job,
    ),
)

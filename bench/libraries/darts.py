"""darts: BlockRNNModel and TFTModel, which build their modules when they are fitted."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from darts import TimeSeries
from darts.models import BlockRNNModel, TFTModel
from pytorch_lightning import Callback, Trainer
from torch import Tensor

import lstmcore
from bench.libraries import pages
from bench.libraries.forecasts import QUIET, losses_of, waves
from bench.libraries.pipeline import SEED, Job, Pipeline

MoveOver = pages.run("darts")["MoveOver"]  # the page's recipe, as it stands there

SMALL = {"input": 64, "horizon": 6, "hidden": 16, "rows": 4, "steps": 3}
USUAL = {"input": 168, "horizon": 24, "hidden": 64, "rows": 32, "steps": 10}


def build(small: bool, moved: bool, make: Any, how: str, hidden: str, **options: Any) -> Job:
    size = SMALL if small else USUAL
    values = waves(1, 4 * size["input"])[0].astype(torch.empty(0).numpy().dtype)
    series = TimeSeries.from_values(values)
    callbacks = [MoveOver()] if moved and how == "callback" else []
    model = make(
        input_chunk_length=size["input"],
        output_chunk_length=size["horizon"],
        batch_size=size["rows"],
        random_state=SEED,
        **{hidden: size["hidden"]},
        **options,
    )
    installed: AbstractContextManager = lstmcore.installed() if moved and how == "installed" else nullcontext()
    with installed:  # a trainer of no steps: the module is built, and as it was drawn
        model.fit(series, trainer=Trainer(max_steps=0, callbacks=list(callbacks), **QUIET), verbose=False)

    def train() -> Sequence[float]:
        losses = losses_of(Callback)
        trainer = Trainer(max_steps=size["steps"], callbacks=[*callbacks, losses], **QUIET)
        model.fit(series, trainer=trainer, verbose=False)
        return losses.found

    def outputs() -> Tensor:
        trainer = Trainer(callbacks=list(callbacks), **QUIET)
        return torch.from_numpy(
            np.array(model.predict(size["horizon"], series, trainer=trainer, verbose=False).values())
        )

    return Job(train, outputs)


TIMED = f"`model.fit`, {USUAL['steps']} steps on {USUAL['rows']} windows of {USUAL['input']} hours"

PIPELINES = (
    Pipeline(
        name="darts BlockRNNModel",
        distribution="darts",
        how="with lstmcore.installed(): model.fit(series)",
        timed=f"{TIMED}, two layers of {USUAL['hidden']}",
        build=partial(build, make=BlockRNNModel, how="installed", hidden="hidden_dim", model="LSTM", n_rnn_layers=2),
    ),
    Pipeline(
        name="darts TFTModel",
        distribution="darts",
        how='pl_trainer_kwargs={"callbacks": [MoveOver()]}',
        timed=f"{TIMED}, hidden size {USUAL['hidden']}",
        build=partial(
            build, make=TFTModel, how="callback", hidden="hidden_size", num_attention_heads=4, add_relative_index=True
        ),
    ),
)

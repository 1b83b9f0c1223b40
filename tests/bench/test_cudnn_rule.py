"""The rule by which "auto" takes the GPU kernels on the device that it was measured on, against that device's rows."""

from __future__ import annotations

import pytest
import torch
from lstmcore.kernels.contract import Layer

from bench import rows
from bench.cases import DTYPES
from bench.rows import RESULTS, Row
from lstmcore.backends import rules

NAME, SMS = rules.CUDNN_MEASURED_ON
AS_FAST = 0.97  # of cuDNN's speed; ours reached that wherever the rule takes them: so much differs between runs

# Where it does not, they were at most so much faster: H 2048, left to cuDNN for its training, 1.16 times in inference.
SLOWER = 1.2


def measured() -> list[Row]:
    """Calls of one layer on that device."""
    found = [row for path in RESULTS.glob("*.csv") for row in rows.read(path)]
    return [
        row
        for row in found
        if (row.device, row.threads, row.num_layers) == (NAME, SMS, 1)
        and row.experiment == "speed"
        and row.peer_p50_ms is not None
    ]


def layer_of(row: Row) -> Layer:
    return Layer(
        torch.device("cuda"),
        DTYPES[row.dtype],
        row.steps,
        row.batch,
        row.input_size,
        row.hidden_size,
        row.proj_size,
        row.directions,
        ragged=row.mean_length < 1,
        training=row.mode == "training",
    )


@pytest.mark.parametrize("row", measured(), ids=lambda row: f"{row.case}-{row.mode}")
def test_what_the_rule_takes_was_as_fast(row):
    assert row.peer_p50_ms is not None
    ratio = row.peer_p50_ms / row.p50_ms
    if rules.faster_than_cudnn(layer_of(row)):
        assert ratio >= AS_FAST
    else:
        assert ratio < SLOWER, "a class in which ours were measured faster is left to cuDNN"

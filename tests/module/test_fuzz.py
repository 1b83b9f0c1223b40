"""Outputs and every gradient against float64 ``torch.nn.LSTM``, over configurations that hypothesis draws."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ..support.cases import DTYPES, Case
from ..support.oracle import assert_parity, conditioning, judge

SIZES = st.one_of(st.integers(1, 40), st.sampled_from([16, 17, 32, 33, 48, 64, 65, 96]))


@st.composite
def configurations(draw) -> Case:
    H = draw(SIZES)
    T = draw(st.integers(1, 12))
    layout = draw(st.sampled_from(["batched", "batched", "unbatched", "packed"]))
    return Case(
        "drawn",
        T=T,
        B=draw(st.integers(1, 35)),
        I=draw(SIZES),
        H=H,
        num_layers=draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        bidirectional=draw(st.booleans()),
        proj_size=draw(st.one_of(st.just(0), st.integers(0, H - 1))),
        hx=draw(st.booleans()),
        lengths=tuple(draw(st.lists(st.integers(1, T), min_size=1, max_size=20))) if layout == "packed" else None,
        unbatched=layout == "unbatched",
        strided=draw(st.sampled_from(["", "", "transposed", "sliced", "expanded"])) if layout == "batched" else "",
        scale=draw(st.sampled_from([0.0, 0.1, 1.0, 1.0, 8.0])),
        seed=draw(st.integers(0, 1000)),
    )


@pytest.mark.slow
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    case=configurations(),
    dtype=st.sampled_from(["float32", "float32", "float64", "bfloat16", "float16"]),
    count=st.integers(1, 3),
)
def test_drawn(backend, threads, case, dtype, count):
    """On one to three threads, where there is work.  No fixture carries anything from one example to the next."""
    torch.manual_seed(0)
    threads(1)  # torch's small operations take ten times as long on several, which wait for each other
    judge(case, DTYPES[dtype])  # is remembered, as the next is
    conditioning(case, DTYPES[dtype])
    threads(count)
    assert_parity(case, DTYPES[dtype], backend)

"""What follows from timings: pure arithmetic, with properties that hold for any numbers."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from lstmcore.kernels.contract import Layer

from lstmcore.backends import timings
from lstmcore.backends.timings import Class, Line, Span

from ..support.timings import timing

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
times = st.floats(1e-3, 1e6)
steps = st.integers(1, 10_000)
lines = st.builds(Line, st.floats(0, 1e4), st.floats(0, 1e3))


@given(st.integers(1, 100), st.integers(1, 10_000), times, times)
def test_a_line_is_never_negative_and_keeps_the_long_time(short, more, first, second):
    line = Line.through(short, first, short + more, second)
    assert line.overhead >= 0
    assert line.step >= 0
    assert line.at(short + more) == pytest.approx(second)
    assert line.at(short + more + 1) >= line.at(short)


@given(lines, st.integers(1, 100), st.integers(1, 10_000))
def test_a_line_is_found_again(line, short, more):
    assume(line.at(short) > 0)
    found = Line.through(short, line.at(short), short + more, line.at(short + more))
    assert found.at(short) == pytest.approx(line.at(short), rel=1e-6, abs=1e-6)
    assert found.at(100_000) == pytest.approx(line.at(100_000), rel=1e-3, abs=1e-3 + 1e-9 * line.overhead * 100_000)


@given(lines, lines, steps)
def test_a_span_is_where_ours_takes_no_longer(ours, peer, at):
    """Up to rounding, at the very step where the lines cross."""
    span = Span.ahead(ours, peer)
    inside = span is not None and at in span
    difference = peer.at(at) - ours.at(at)
    rounding = 1e-9 * (peer.at(at) + ours.at(at))
    assert inside == (difference >= 0) or abs(difference) <= rounding


@given(lines, lines)
def test_one_of_two_is_ahead(ours, peer):
    """At every number of steps; where they are equal, both."""
    spans = Span.ahead(ours, peer), Span.ahead(peer, ours)
    for at in (1, 2, 77, 10_000):
        near = abs(peer.at(at) - ours.at(at)) <= 1e-9 * (peer.at(at) + ours.at(at))
        assert near or sum(span is not None and at in span for span in spans) == 1


@pytest.mark.parametrize(
    ("ours", "peer", "expected", "words"),
    [
        (Line(1, 1), Line(1, 1), Span(1, math.inf), "for any number of steps"),
        (Line(2, 1), Line(1, 2), Span(1, math.inf), "for any number of steps"),
        (Line(10, 1), Line(1, 2), Span(9, math.inf), "from 9 steps on"),
        (Line(1, 2), Line(10, 1), Span(1, 9), "up to 9 steps"),
        (Line(2, 1), Line(1, 1), None, "None"),
        (Line(10, 2), Line(1, 1), None, "None"),
        (Line(0, 0), Line(0, 5e-324), Span(1, math.inf), "for any number of steps"),
        (Line(0, 0), Line(1, 5e-324), Span(1, math.inf), "for any number of steps"),
        (Line(1, 0), Line(0, 5e-324), None, "None"),
        (Line(1, 5e-324), Line(0, 0), None, "None"),
        (Line(0, 5e-324), Line(1, 0), Span(1, math.inf), "for any number of steps"),
    ],
)
def test_spans(ours, peer, expected, words):
    assert Span.ahead(ours, peer) == expected
    assert str(Span.ahead(ours, peer)) == words


@pytest.mark.parametrize(
    ("layer", "strict", "expected"),
    [
        (Layer(CPU, torch.float32, 5, 2, 3, 4), False, ("dense", "float32", "inference")),
        (Layer(CPU, torch.bfloat16, 5, 2, 3, 4, training=True), False, ("dense", "bfloat16", "training")),
        (Layer(GPU, torch.float32, 5, 2, 3, 4, proj_size=2), False, ("projection", "tf32", "inference")),
        (Layer(GPU, torch.float32, 5, 2, 3, 4), True, ("dense", "float32", "inference")),
        (Layer(GPU, torch.float16, 5, 2, 3, 4, proj_size=2, ragged=True), False, ("ragged", "float16", "inference")),
    ],
)
def test_classes(layer, strict, expected):
    assert Class.of(layer, strict) == expected


GRID = [timing(hidden=hidden, batch=batch) for hidden in (16, 64, 256) for batch in (1, 8, 32)]


@pytest.mark.parametrize(
    ("hidden", "batch", "expected"),
    [
        (64, 8, (64, 8)),
        (33, 8, (64, 8)),
        (31, 8, (16, 8)),
        (256, 20, (256, 32)),
        (4, 32, (16, 32)),
        (3, 32, "no dense float32 training was timed near H 3, B 32"),
        (257, 8, "H 257 is beyond the largest that was timed of dense float32 training, 256"),
        (64, 33, "B 33 is beyond the largest that was timed of dense float32 training, 32"),
    ],
)
def test_the_nearest_judges(hidden, batch, expected):
    found = timings.nearest(GRID, GRID[0].cls, hidden, batch)
    assert (found if isinstance(found, str) else (found.hidden, found.batch)) == expected


def test_a_class_that_was_not_timed():
    other = GRID[0].cls._replace(mode="inference")
    assert timings.nearest(GRID, other, 64, 8) == "no dense float32 inference was timed"
    assert timings.nearest([], other, 64, 8) == "no dense float32 inference was timed"


@given(st.sets(st.sampled_from(GRID), min_size=1), st.integers(1, 1000), st.integers(1, 100))
def test_none_that_is_far_away_judges(grid, hidden, batch):
    found = timings.nearest(grid, GRID[0].cls, hidden, batch)
    if isinstance(found, str):
        assert not any((each.hidden, each.batch) == (hidden, batch) for each in grid)
    else:
        for ratio in (hidden / found.hidden, batch / found.batch):
            assert 1 / timings.REACH <= ratio <= timings.REACH


@given(times, times, times, times, steps)
def test_a_verdict_is_that_of_its_span(ours_short, ours_long, torch_short, torch_long, at):
    each = timing(
        ours_short_ms=ours_short, ours_long_ms=ours_long, torch_short_ms=torch_short, torch_long_ms=torch_long
    )
    verdict = each.verdict(at, "tuned here")
    assert verdict.faster == (each.span is not None and at in each.span)
    assert "tuned here on 2026-11-27" in verdict.why
    assert f"{each.ratio(at):.2f}x" in verdict.why
    assert not verdict.faster or ": " not in verdict.why  # what follows it in a reason is a design
    wrong = each._replace(right=False).verdict(at, "tuned here")
    assert not wrong.faster
    assert "wrong" in wrong.why

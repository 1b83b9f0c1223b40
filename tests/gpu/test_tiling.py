"""The GPU half of the tiling: pure functions, checked for what the kernels rely on, at sizes that nobody runs here."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lstmcore.kernels.gpu import tiling
from lstmcore.kernels.gpu.tiling import (
    DEPTH,
    SHARED,
    STATE,
    WEIGHT,
    Design,
    cover,
    power_of_two,
)
from lstmcore.kernels.integers import ceil_div

choose_design, predict, resident_design = (
    functools.partial(each, shared=SHARED) for each in (tiling.choose_design, tiling.predict, tiling.resident_design)
)

REGISTERS = 64 * 1024  # of an SM, 32 bits each
HOPPER = 227 * 1024  # bytes of shared memory of a program
THREADS = 32
SIZES = {
    "hidden": st.one_of(st.integers(1, 300), st.integers(1, 4096)),
    "batch": st.one_of(st.integers(1, 40), st.integers(1, 2000)),
    "directions": st.sampled_from([1, 2]),
    "precision": st.sampled_from(list(WEIGHT)),
    "sms": st.sampled_from([16, 46, 64, 108, 132, 148, 160]),
    "backward": st.booleans(),
}


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def constants(design: Design) -> tuple:
    """What a kernel is compiled for; everything else about a design is told to it at run time."""
    return design.kind, design.units, design.tile, design.warps, design.chunk, design.chunks, design.stream


@settings(max_examples=400)
@given(**SIZES, kind=st.sampled_from([None, "split"]))
@example(hidden=1024, batch=16, directions=1, precision="16", sms=132, backward=True, kind=None)
@example(hidden=2112, batch=1, directions=2, precision="float32", sms=132, backward=True, kind=None)
@example(hidden=1, batch=1, directions=1, precision="16", sms=16, backward=False, kind="split")
def test_a_design_can_be_carried_out(hidden, batch, directions, precision, sms, backward, kind):
    """It covers all units, rows and terms, holds what it says in registers, and fits the device at once."""
    if directions * ceil_div(hidden, 32) > sms and (
        kind or resident_design(hidden, batch, directions, precision, sms, backward) is None
    ):
        with pytest.raises(ValueError, match=rf"{hidden}.*{sms}"):
            choose_design(hidden, batch, directions, precision, sms, backward, kind=kind)
        return
    d = choose_design(hidden, batch, directions, precision, sms, backward, kind=kind)
    assert d.directions == directions
    assert all(map(is_power_of_two, (d.units, d.tile, d.warps)))
    assert d.tile >= 8, "an instruction has eight columns"
    assert d.rows <= d.tile
    assert d.slices * d.units >= hidden > (d.slices - 1) * d.units
    assert d.groups * d.tiles * d.rows >= batch
    assert (d.groups - 1) * d.tiles * d.rows < batch, "a group without rows"
    assert d.programs == directions * d.groups * d.slices
    assert d.step_time > 0
    assert str(d.programs) in str(d)
    assert d.kind in str(d)
    registers = 32 * THREADS * d.warps  # a thread has 128 for weights; the budget below is in those of all threads
    if d.kind == "resident":
        assert d.slices == d.tiles == 1
        assert 4 * d.units**2 * WEIGHT[precision] // 4 <= 4 * registers
        return
    terms = 4 * hidden if backward else hidden
    m = d.units if backward else 4 * d.units
    assert d.programs <= sms, "programs that wait for each other have to be there at once"
    assert is_power_of_two(d.chunk)
    assert d.chunk * d.chunks >= terms > d.chunk * (d.chunks - 1)
    assert d.chunk >= DEPTH[precision] * d.warps
    held = 2 * d.chunk if d.stream else d.chunk * d.chunks
    least = d.stream and d.chunk == DEPTH[precision] * d.warps  # a chunk cannot be shorter: it may spill, and runs
    assert m * held * WEIGHT[precision] // 4 <= 4 * registers or least
    assert registers * 8 <= REGISTERS * 4
    if d.stream:
        assert "streamed" in str(d)
    else:
        assert m * d.chunk * d.chunks * STATE[precision] <= SHARED


WIDE = SIZES | {"precision": st.just("16"), "sms": st.sampled_from([108, 132])}


@settings(max_examples=400)
@given(**WIDE)
@example(hidden=1024, batch=256, directions=1, precision="16", sms=132, backward=False)
@example(hidden=1024, batch=256, directions=1, precision="16", sms=132, backward=True)
@example(hidden=520, batch=200, directions=2, precision="16", sms=132, backward=True)
def test_a_wide_design_can_be_carried_out(hidden, batch, directions, precision, sms, backward):
    """It covers all units, rows and terms; its weights are where they fit, and its programs there at the same time."""
    for d in tiling.wide_designs(hidden, batch, directions, precision, sms, backward, HOPPER):
        assert hidden % 8 == 0, "rows are read 16 bytes at a time"
        assert all(map(is_power_of_two, (d.tile, d.units, d.chunk)))
        assert d.tile // 2 < d.rows <= d.tile
        assert d.programs == directions * d.groups * d.slices <= sms
        assert (d.groups - 1) * d.tiles * d.rows < batch <= d.groups * d.tiles * d.rows
        assert d.slices * d.units >= hidden
        terms = d.chunk * d.chunks  # that a program multiplies
        if backward:
            of_part = terms // 4  # units of each of the parts; a K chunk is of one gate
            assert of_part % d.chunk == 0
            assert of_part % d.units == 0, "who writes a part, writes it whole"
            assert d.parts * of_part >= hidden
            assert d.slices % d.parts == 0
            assert d.slices // d.parts * d.units <= of_part, "the owner of a unit writes to a part that exists"
        else:
            assert d.parts == 1
            assert terms >= hidden > terms - 128
        assert 128 * d.held * d.chunk * 2 <= 96 * 4 * THREADS * d.warps, "96 registers of a thread for weights"
        assert 128 * (d.chunks - d.held) * d.chunk * 2 + 128 * d.tile * 4 <= HOPPER


@given(**SIZES)
def test_wide_only_where_the_tensor_cores_can(hidden, batch, directions, precision, sms, backward):
    sizes = (hidden, batch, directions, precision, sms, backward, HOPPER)
    assert not any(each.kind == "wide" for each in tiling.every_design(*sizes, wgmma=False))
    if precision != "16":
        assert not any(each.kind == "wide" for each in tiling.every_design(*sizes, wgmma=True))


def test_wide_has_to_be_predicted_faster_by_a_margin():
    """Forward of 64 rows of H 1024, 1.14 times as fast by the model, was not; that of 128 rows was."""
    kinds = [
        tiling.choose_design(1024, batch, 1, "16", 132, False, shared=HOPPER, wgmma=True).kind
        for batch in (16, 64, 128)
    ]
    assert kinds == ["split", "split", "wide"]


@given(**SIZES)
def test_gates_are_asked_for_ahead_where_that_was_faster(hidden, batch, directions, precision, sms, backward):
    for d in tiling.split_designs(hidden, batch, directions, precision, sms, backward, HOPPER):
        assert (d.ahead > 0) == (precision == "16" and d.tiles == 1 and hidden >= 512 and not d.stream)


@given(**SIZES)
def test_resident_wherever_it_fits(hidden, batch, directions, precision, sms, backward):
    """And then for every batch: a resident program waits for nobody, so there may be more of them than SMs."""
    limit = {"16": 128, "tf32": 64, "float32": 64}[precision]
    resident = resident_design(hidden, batch, directions, precision, sms, backward)
    assert (resident is not None) == (hidden <= limit)
    if resident is not None:
        assert choose_design(hidden, batch, directions, precision, sms, backward) == resident


def test_a_kind_can_be_forced():
    assert choose_design(64, 16, 1, "16", 132, False, kind="split").kind == "split"
    assert choose_design(64, 16, 1, "16", 132, False, kind="resident").kind == "resident"
    with pytest.raises(ValueError, match="512"):
        choose_design(512, 16, 1, "16", 132, False, kind="resident")


@pytest.mark.parametrize(("hidden", "directions"), [(4225, 1), (2113, 2), (100_000, 1)])
def test_what_does_not_fit_says_so(hidden, directions):
    with pytest.raises(ValueError, match=rf"{hidden}.* {directions * ceil_div(hidden, 32)} SMs.*132"):
        choose_design(hidden, 1, directions, "16", 132, False)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("precision", WEIGHT)
@pytest.mark.parametrize("hidden", [129, 512, 768, 1024, 2048])
def test_few_kernels_for_all_batches(hidden, precision, backward):
    """A kernel is compiled for its tiles, so a changing batch may ask for a handful of them, and steps for none."""
    kernels = {constants(choose_design(hidden, batch, 1, precision, 132, backward)) for batch in range(1, 513)}
    assert len(kernels) <= 6


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("precision", WEIGHT)
def test_batches_of_a_tile_share_a_kernel(precision, backward):
    """Up to eight rows are a single tile: the last batch of an epoch compiles nothing."""
    for hidden in (33, 129, 256, 1000, 2048):
        designs = [choose_design(hidden, batch, 1, precision, 132, backward) for batch in range(1, 9)]
        assert len({constants(d) for d in designs}) == 1
        assert {(d.groups, d.tiles) for d in designs} == {(1, 1)}


@given(**SIZES, more=st.integers(1, 100))
def test_more_sms_are_not_slower(hidden, batch, directions, precision, sms, backward, more):
    try:
        before = predict(hidden, batch, directions, precision, sms, backward)
    except ValueError:
        return
    assert predict(hidden, batch, directions, precision, sms + more, backward) <= before


def test_predictions_grow_with_the_work():
    for backward in (False, True):
        by_hidden = [predict(h, 16, 1, "16", 132, backward) for h in (128, 256, 512, 1024, 2048)]
        assert by_hidden == sorted(by_hidden)
        by_batch = [predict(1024, b, 1, "16", 132, backward) for b in (1, 16, 64, 256, 1024)]
        assert by_batch == sorted(by_batch)
        assert by_batch[0] < by_batch[-1]
        for precision, coarser in (("tf32", "16"), ("float32", "tf32")):
            for hidden in (256, 1024):
                slow, fast = (predict(hidden, 16, 1, p, 132, backward) for p in (precision, coarser))
                assert slow >= fast


@given(terms=st.integers(1, 20_000), least=st.sampled_from([16, 64, 256]), factor=st.sampled_from([1, 2, 8, 64]))
def test_chunks_cover_with_little_waste(terms, least, factor):
    size, count = cover(terms, least, least * factor)
    assert is_power_of_two(size)
    assert least <= size <= least * factor
    assert size * (count - 1) < terms <= size * count
    # No shorter chunk would have saved a fifth: at most two of the tenths that are not worth another chunk.
    shorter = least
    while shorter < size:
        assert shorter * ceil_div(terms, shorter) >= 0.8 * size * count
        shorter *= 2


def test_precision_of_a_dtype():
    for dtype in (torch.float16, torch.bfloat16):
        assert {tiling.precision_of(dtype, tf32) for tf32 in (False, True)} == {"16"}
    assert tiling.precision_of(torch.float32, True) == "tf32"
    assert tiling.precision_of(torch.float32, False) == "float32"


def test_power_of_two():
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 129)] == [1, 2, 4, 4, 8, 256]

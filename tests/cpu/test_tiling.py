"""The block shapes and plans: pure functions, checked for what every caller relies on."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lstmcore.kernels.cpu import tiling
from lstmcore.kernels.cpu.microkernel import vectors_together
from lstmcore.kernels.integers import ceil_div


@pytest.mark.parametrize("isa", tiling.REGISTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_fits_its_registers(isa, dtype):
    width, registers = tiling.REGISTERS[isa]
    block = tiling.block_shape(isa, dtype)
    assert block.lanes * dtype.itemsize == width
    assert block.panel == 4 * block.lanes
    assert block.registers == registers
    for vectors in (1, 2, 4):
        choices = block.row_choices(vectors)
        assert choices[0] == 1, "any number of rows has to be made up of blocks"
        assert max(choices) * vectors <= 4 * block.rows
        assert list(choices) == sorted(set(choices))
        for rows in choices:
            parts = vectors_together(rows, vectors, registers)
            assert [v for part in parts for v in part] == list(range(vectors))
            for part in parts:  # the sums, and what a step needs beside them: weights and a broadcast
                assert rows * len(part) + len(part) + 1 <= registers


def test_this_machine_has_a_known_instruction_set():
    assert tiling.cpu_isa() in tiling.REGISTERS


@settings(deadline=None)
@given(
    steps=st.integers(1, 2000),
    batch=st.integers(1, 300),
    hidden=st.integers(1, 2100),
    inputs=st.integers(1, 2100),
    threads=st.integers(1, 64),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    backward=st.booleans(),
)
def test_a_plan_can_be_carried_out(steps, batch, hidden, inputs, threads, dtype, backward):
    block = tiling.block_shape("avx512", dtype)
    plan = tiling.plan(steps, batch, hidden, hidden, inputs, block, dtype.itemsize, threads, backward)
    assert 1 <= plan.members <= threads
    assert plan.row_groups <= batch
    assert plan.unit_groups <= ceil_div(hidden, block.panel if backward else block.lanes)
    assert 1 <= plan.chunk <= steps
    alone = tiling.plan(steps, batch, hidden, hidden, inputs, block, dtype.itemsize, 1, backward)
    assert alone.members == 1
    assert alone.chunk == plan.chunk, "what decides the bits may not depend on threads"


def test_large_batches_share_rows_and_large_weights_share_units():
    block = tiling.block_shape("avx512", torch.float32)
    rows = tiling.plan(1000, 64, 64, 64, 64, block, 4, 2)
    assert (rows.row_groups, rows.unit_groups) == (2, 1)
    units = tiling.plan(1000, 1, 512, 512, 512, block, 4, 2)
    assert (units.row_groups, units.unit_groups) == (1, 2)


def test_parts_are_for_batches_that_fill_blocks_and_weights_that_stay_near():
    block = tiling.block_shape("avx512", torch.float32)

    def count(batch, hidden=64, inputs=64, directions=1):
        return tiling.parts(batch, hidden, hidden, inputs, block, 4, directions)

    assert [count(batch) for batch in (1, 7, 8, 31, 32, 63, 64, 1000)] == [1, 1, 2, 2, 4, 4, 8, 8]
    assert [count(batch, directions=2) for batch in (8, 31, 32, 64)] == [1, 1, 2, 4]
    assert [count(batch, hidden=16) for batch in (8, 32, 64, 128, 256)] == [2, 2, 2, 4, 8]
    assert count(64, hidden=256) == 2
    assert count(32, hidden=1024) == count(32, inputs=1 << 14) == 1


@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=40), groups=st.integers(1, 6))
def test_balanced_rows_share_the_work(lengths, groups):
    lengths = sorted(lengths, reverse=True)
    groups = min(groups, len(lengths))
    steps = max(max(lengths), 1)
    sizes = np.array([sum(length > t for length in lengths) for t in range(steps)])
    borders = tiling.balanced_rows(sizes, len(lengths), groups)
    assert borders[0] == 0
    assert borders[-1] == len(lengths)
    assert borders == sorted(borders)
    shares = [sum(lengths[a:b]) for a, b in itertools.pairwise(borders)]
    assert sum(shares) == sum(lengths)
    # A border is off by half a row at most: no share exceeds its due by more than a row, half at either end.
    assert all(share <= sum(lengths) / groups + max(lengths) + 1 for share in shares)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(0, 30))
def test_ragged_chunks_fill_their_room(alive, more):
    alive = np.array(sorted(alive, reverse=True))
    for each in (alive, alive[::-1]):  # the directions
        room = max(int(alive.max()), 1) + more
        borders = tiling.ragged_chunks(each, room)
        assert borders[0] == 0
        assert borders[-1] == len(each)
        rows = [int(each[a:b].sum()) for a, b in itertools.pairwise(borders)]
        assert all(a < b for a, b in itertools.pairwise(borders))
        assert max(rows) <= room
        # and no step of the next chunk would have fitted
        assert all(here + each[end] > room for here, end in zip(rows, borders[1:-1], strict=False))


def test_balanced_rows_of_a_dense_batch():
    assert tiling.balanced_rows(None, 10, 3) == [0, 3, 6, 10]


def test_small_calls_stay_on_one_thread():
    assert tiling.threads_worth(1000) == 1
    assert tiling.threads_worth(tiling.WORTH_A_THREAD) == 2
    assert tiling.threads_worth(10**9) > 64

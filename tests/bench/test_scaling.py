"""The table of what more threads are predicted to bring."""

import pathlib

import pytest
from lstmcore.kernels.cpu import caches, tiling

from bench.experiments import scaling


@pytest.mark.parametrize("title", scaling.CORES)
def test_more_threads_are_not_predicted_to_be_slower(title):
    isa, vendor, size = scaling.CORES[title]
    core = tiling.core_of(isa, caches.Caches(size, vendor))
    for backward in (False, True):
        for batch, hidden in scaling.SHAPES:
            times = [scaling.predicted(batch, hidden, threads, isa, core, backward) for threads in scaling.THREADS]
            assert times == sorted(times, reverse=True)
            assert times[0] / times[-1] > 8, "32 threads"
    assert scaling.table(isa, core).count("\n") == 1 + 2 * len(scaling.SHAPES)


@pytest.mark.parametrize("title", scaling.CORES)
def test_the_notes_have_the_table_of_today(title):
    isa, vendor, size = scaling.CORES[title]
    notes = pathlib.Path(__file__).parents[2] / "docs" / "notes" / "cpu-tuning.md"
    assert scaling.table(isa, tiling.core_of(isa, caches.Caches(size, vendor))) in notes.read_text()

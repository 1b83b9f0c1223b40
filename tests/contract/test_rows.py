"""Rows of some of the steps: the same rows, in the same order, with the steps that they have there.

T time, B batch, N tokens: (step, row) pairs.
"""

from __future__ import annotations

import pytest
import torch
from lstmcore.kernels.contract import Rows

T = 5
LENGTHS = torch.tensor([2, 0, 5, 1, 4, 5])
SORTED = [5, 5, 4, 2, 1]
SIZES = torch.tensor([sum(length > t for length in SORTED) for t in range(T)])
ROWS = {
    "dense": Rows(T, 3),
    "batch_first": Rows(T, 3, batch_first=True),
    "lengths": Rows.from_lengths(LENGTHS, T),
    "lengths_batch_first": Rows.from_lengths(LENGTHS, T, batch_first=True),
    "roomy": Rows.from_lengths(LENGTHS, T, roomy=True),
    "packed": Rows.from_packed(SIZES),
    "device": Rows(T, 6, lengths=LENGTHS.to(torch.uint8)),
    "nothing": Rows.from_lengths(torch.zeros(3, dtype=torch.int64), T),
}
PARTS = [(0, 5), (0, 2), (1, 4), (2, 3), (4, 5)]


@pytest.mark.parametrize(("first", "last"), PARTS, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_part(name, first, last):
    rows = ROWS[name]
    part = rows.part(first, last)
    assert (part.steps, part.batch) == (last - first, rows.batch)
    assert (part.packed, part.batch_first, part.roomy) == (rows.packed, rows.batch_first, rows.roomy)
    assert part.order is rows.order
    assert part.ragged == rows.ragged
    wanted = [max(0, min(length - first, last - first)) for length in rows.row_lengths().tolist()]
    assert part.row_lengths().tolist() == wanted
    if rows.lengths is None:
        assert part.total == sum(wanted)


@pytest.mark.parametrize("name", [name for name in ROWS if name != "device"])
def test_place(name):
    """What lies at the part's place is a tensor of the part's rows: its steps are those of the whole."""
    rows = ROWS[name]
    tensor = torch.randn(*rows.shape, 2)
    steps = rows.split(tensor)
    for first, last in PARTS:
        part, there = rows.part(first, last), tensor[rows.place(first, last)]
        assert there.shape == (*part.shape, 2)
        assert there.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        for got, expected in zip(part.split(there), steps[first:last], strict=True):
            assert torch.equal(got, expected)


def test_lengths_on_the_device_are_not_read():
    there = Rows(T, 6, lengths=LENGTHS.to("meta"))
    part = there.part(1, 3)
    assert part.lengths.device == torch.device("meta")
    assert (part.lengths.shape, part.place(0, 2)) == ((6,), slice(0, 2))

"""The same inputs give the same bits: run to run, for any number of threads, whatever else is in the batch."""

import ctypes
import dataclasses

import pytest
import torch
from lstmcore.kernels.cpu import buffers, prepare, tiling
from lstmcore.kernels.cpu import threads as kernel_threads
from lstmcore.kernels.integers import ceil_div

import lstmcore

from ..support.cases import BY_NAME, DTYPES, Case, draw, run

NAMES = ["h17", "h129", "b33", "one_row", "long", "proj_bidirectional", "packed_b33", "packed_everything", "expanded"]
LARGE = [
    Case("large", T=20, B=34, I=24, H=96),
    Case("large_one_row", T=12, B=1, I=5, H=300),
    Case("large_bidirectional", T=9, B=18, I=40, H=72, bidirectional=True),
    Case("large_packed", I=40, H=64, lengths=tuple(1 + 7 * r % 19 for r in range(40))),
]
SPLIT = [*(BY_NAME[name] for name in NAMES), *LARGE]


def assert_bitwise(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_run_to_run_and_any_number_of_threads(case, dtype, threads):
    data = draw(case, DTYPES[dtype])
    threads(1)
    expected = run(case, data, DTYPES[dtype], "numba")
    assert_bitwise(run(case, data, DTYPES[dtype], "numba"), expected)
    for n in (2, 3, 5):
        threads(n)
        assert_bitwise(run(case, data, DTYPES[dtype], "numba"), expected)


@pytest.mark.parametrize("case", [*LARGE, Case("many_rows", T=5, B=131, I=20, H=40)], ids=str)
def test_many_threads(case, threads, monkeypatch):
    """As many as a workstation has, on whatever cores there are: the same bits, and it comes to an end."""
    monkeypatch.setattr(tiling, "WORTH_A_THREAD", 1)
    data = draw(case, torch.float32)
    threads(1)
    expected = run(case, data, torch.float32, "numba")
    for n in (8, 16):
        threads(n)
        assert_bitwise(run(case, data, torch.float32, "numba"), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", [BY_NAME["h17"], BY_NAME["proj_bidirectional"], BY_NAME["packed_b33"]], ids=str)
def test_projected_inside_the_recurrence_or_ahead_of_it(case, dtype, monkeypatch, fresh_plans):
    """Which of the two depends on how many rows a member has, and so on the number of threads."""
    data, results = draw(case, DTYPES[dtype]), []
    for most in (0, 1000):
        monkeypatch.setattr(tiling, "FUSED", most)
        monkeypatch.setattr(tiling, "FUSED_ONE_ROW", most)
        tiling.plan.cache_clear()
        prepare.forget()
        results.append(run(case, data, DTYPES[dtype], "numba"))
    assert_bitwise(*results)


@pytest.mark.parametrize("groups", [(1, 2), (2, 1), (2, 2), (3, 2)], ids=lambda g: f"{g[0]}x{g[1]}")
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_any_way_of_sharing(case, groups, threads, monkeypatch, fresh_plans):
    """Rows and units shared out in other ways than this machine's plan does: groups in each part and direction."""
    data = draw(case, torch.float32)
    threads(1)
    expected = run(case, data, torch.float32, "numba")
    prepare.forget()
    planned, used = tiling.plan, set()

    def plan(steps, batch, hidden, depth, inputs, block, size, available, backward=False):
        most = ceil_div(hidden, block.panel if backward else block.lanes)
        row_groups, unit_groups = min(groups[0], batch), min(groups[1], most)
        assert row_groups * unit_groups <= available
        used.add((row_groups, unit_groups))
        alone = planned(steps, batch, hidden, depth, inputs, block, size, 1, backward)
        return dataclasses.replace(alone, row_groups=row_groups, unit_groups=unit_groups)

    monkeypatch.setattr(tiling, "plan", plan)
    monkeypatch.setattr(tiling, "WORTH_A_THREAD", 1)
    threads(4 * groups[0] * groups[1])  # for each part, or each direction
    assert_bitwise(run(case, data, torch.float32, "numba"), expected)
    assert used, "nothing was shared out"


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize(
    "rows", [[0], [13], [4, 5], [30, 2, 7, 7, 16], list(range(12)), list(range(32, -1, -1))], ids=len
)
@pytest.mark.parametrize("H", [17, 64])
def test_a_row_does_not_depend_on_the_others(H, rows, n_threads, dtype, threads):
    threads(n_threads)
    dtype = DTYPES[dtype]
    module = lstmcore.LSTM(5, H, bidirectional=True, dtype=dtype, backend="numba")
    given = [torch.randn(s, dtype=dtype) for s in ((6, 33, 5), (2, 33, H), (2, 33, H))]
    seeds = [torch.randn(s, dtype=dtype) for s in ((6, 33, 2 * H), (2, 33, H), (2, 33, H))]

    def results(which):
        leaves = [t[:, which].clone().requires_grad_() for t in given]
        output, states = module(leaves[0], tuple(leaves[1:]))
        return output, *states, *torch.autograd.grad((output, *states), leaves, [s[:, which] for s in seeds])

    for whole, part in zip(results(list(range(33))), results(rows), strict=True):
        assert torch.equal(whole[:, rows], part)


def test_a_packed_row_is_the_row_alone():
    """Ragged rows too: packed with others, or alone, the same bits."""
    module = lstmcore.LSTM(5, 17, bidirectional=True, backend="numba")
    rows = [torch.randn(length, 5) for length in (3, 9, 1, 5, 9, 2, 2)]
    padded, lengths = torch.nn.utils.rnn.pad_sequence(rows), torch.tensor([len(r) for r in rows])
    output, (h_n, c_n) = module(torch.nn.utils.rnn.pack_padded_sequence(padded, lengths, enforce_sorted=False))
    output, _ = torch.nn.utils.rnn.pad_packed_sequence(output)
    for r, row in enumerate(rows):
        alone, (h, c) = module(row)
        assert torch.equal(output[: len(row), r], alone)
        assert torch.equal(h_n[:, r], h)
        assert torch.equal(c_n[:, r], c)


@pytest.mark.parametrize(("dtype", "grad"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
def test_ragged_rows_on_several_threads(dtype, grad, threads):
    """Enough work to be shared out, over several chunks of time: members that share scratch must not meet in it."""
    module = lstmcore.LSTM(80, 64, dtype=dtype, backend="numba")  # inputs beyond those projected in the recurrence
    lengths = torch.randint(1, 400, (24,)).sort(descending=True).values
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(400, 24, 80, dtype=dtype), lengths)

    def run(count):
        threads(count)
        with torch.set_grad_enabled(grad):
            return module(packed)[0].data

    expected = run(1)
    for _ in range(5):
        assert torch.equal(run(2), expected)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_peak_is_measured(dtype, count, threads):
    """What every share of the peak is a share of: it runs, on as many threads as asked for."""
    from lstmcore.kernels.cpu.peak import peak

    threads(count)
    assert 0 < peak(DTYPES[dtype], count) < 1e6  # GF/s; no core does a hundredth of that many


def test_a_member_that_cannot_start_leaves_no_trace(threads, monkeypatch, fresh_plans):
    """On the pool, where there is no memory to call a kernel: its error, and nobody writes to where it had to say.

    Scratch is filled with the address of a canary, so that rows of dx that nobody listed would go there.
    """
    module = lstmcore.LSTM(8, 16, backend="numba")
    input = torch.randn(7, 4, 8, requires_grad=True)
    planned, scratch, starves = tiling.plan, buffers.scratch, []
    canary = torch.zeros(4096)

    def plan(steps, batch, hidden, depth, inputs, block, size, available, backward=False):
        alone = planned(steps, batch, hidden, depth, inputs, block, size, 1, backward)
        return dataclasses.replace(alone, row_groups=min(2, available))

    def filled(size):
        owner, address = scratch(size)
        ctypes.memmove(address, (ctypes.c_int64 * (size // 8))(*[canary.data_ptr()] * (size // 8)), size // 8 * 8)
        return owner, address

    def call(function, arguments):
        if starves:
            raise MemoryError("no memory for a call")
        function(arguments)

    monkeypatch.setattr(tiling, "plan", plan)
    monkeypatch.setattr(tiling, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(kernel_threads, "_no_team", lambda: "not in this test")
    monkeypatch.setattr(kernel_threads, "_deeper", call)
    threads(2)
    (expected,) = torch.autograd.grad(module(input)[0].sum(), input)
    output = module(input)[0].sum()
    with monkeypatch.context() as patch:
        patch.setattr(buffers, "scratch", filled)
        starves.append(True)
        with pytest.raises(MemoryError, match="no memory for a call"):
            torch.autograd.grad(output, input, retain_graph=True)
        starves.clear()
        assert not canary.any()
        assert torch.equal(torch.autograd.grad(output, input)[0], expected)

"""The instructions that multiply bfloat16: AMX's tiles, AVX512-BF16's dot products, and what stands in for both.

On a machine without an instruction, portable ones round as it is documented to; where it is there, their bits are its.
"""

import ctypes
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lstmcore.kernels.cpu import backend as kernels
from lstmcore.kernels.cpu import buffers, caches, problem, products, tiling
from lstmcore.kernels.cpu.products import FMA, Products
from lstmcore.kernels.cpu.variant import Variant

import lstmcore

from ..support import contract_checks as checks
from ..support.cases import BY_NAME, Case, draw, run
from ..support.contract import SETUPS
from ..support.modules import check_goes_where_torchs_goes, results
from ..support.oracle import assert_parity
from ..support.processes import in_process
from ..support.tolerances import assert_library

pytestmark = pytest.mark.xdist_group("products")  # one worker compiles the kernels of other machines

BF16 = torch.bfloat16
TILES, DOTS = Products("tdpbf16ps"), Products("dpbf16ps")
EMULATED = {each: each._replace(emulated=True) for each in (TILES, DOTS)}
SLOW = pytest.mark.slow
VARIANTS = [
    pytest.param(TILES, id="tiles"),
    pytest.param(EMULATED[TILES], id="tiles emulated"),
    pytest.param(DOTS, id="dots", marks=SLOW),
    pytest.param(EMULATED[DOTS], id="dots emulated", marks=SLOW),
]
NAMES = ["ones", "one_step", "one_row", "one_input", "one_unit", "h17", "h33", "h129", "i129", "b33", "long", "sliced"]
NAMES += ["bidirectional", "proj_one", "proj_bidirectional", "layers", "transposed", "packed_b33", "packed_everything"]
WIDE = Case("wide", T=3, B=17, I=40, H=300, bidirectional=True)  # several strips of a product
MANY_ROWS = Case("many_rows", T=5, B=131, I=20, H=40)
SHARED = [*(BY_NAME[name] for name in ("proj_bidirectional", "packed_everything", "layers")), WIDE, MANY_ROWS]
BY_SETUP = {setup.name: setup for setup in SETUPS}
AWKWARD = ["one_row", "reset_proj", "reset_long", "lengths_short", "lengths_reset", "lengths_b33", "packed_reset"]
AWKWARD += ["strided_batch_first"]


@pytest.fixture
def multiply_by(monkeypatch, fresh_plans):
    """Makes this a machine that multiplies bfloat16 as it is told to."""

    def force(chosen: Products) -> None:
        if chosen == TILES and not products.tiles_permitted():
            pytest.skip("needs AMX, and the system's permission to use it")
        if chosen == DOTS and not products.features().get("avx512bf16"):
            pytest.skip("needs AVX512-BF16")
        monkeypatch.setattr(products, "this_machines", lambda dtype, isa: chosen if dtype == BF16 else FMA)
        fresh_plans()
        assert problem.kernels_of(BF16).products == chosen

    return force


def assert_bitwise(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


# Which instruction it is


@pytest.mark.parametrize(
    ("features", "vendor", "permitted", "expected"),
    [
        ("amx-tile amx-bf16 avx512bf16", "GenuineIntel", True, TILES),
        ("amx-tile amx-bf16 avx512bf16", "GenuineIntel", False, FMA),  # the system refuses
        ("amx-tile avx512bf16", "GenuineIntel", True, FMA),  # tiles of integers only
        ("avx512bf16", "GenuineIntel", False, FMA),
        ("avx512bf16", "AuthenticAMD", False, DOTS),
        ("amx-tile amx-bf16 avx512bf16", "AuthenticAMD", True, TILES),
        ("avx512f", "AuthenticAMD", False, FMA),
        ("", "", True, FMA),
    ],
)
def test_the_instruction_of_a_machine(features, vendor, permitted, expected):
    features = dict.fromkeys(features.split(), True) | {"amx-fp16": False}
    assert products.products_for(BF16, features, vendor, permitted) == expected
    for dtype in (torch.float32, torch.float64, torch.float16):
        assert products.products_for(dtype, features, vendor, permitted) == FMA


def test_other_instruction_sets_multiply_by_fma(fresh_plans):
    for isa in tiling.REGISTERS.keys() - {"avx512"}:
        assert products.this_machines(BF16, isa) == FMA


@given(values=st.integers(0, 5000))
@pytest.mark.parametrize("chosen", [FMA, TILES, DOTS, *EMULATED.values()], ids=str)
def test_terms_cover_their_values(chosen, values):
    whole = chosen.values * chosen.group
    assert whole == {"fma": 1, "dpbf16ps": 2, "tdpbf16ps": 32}[chosen.instruction]
    terms = chosen.terms(values)
    assert terms % chosen.group == 0
    assert 0 <= terms * chosen.values - values < whole
    block = tiling.block_shape("avx512", torch.float32, chosen)
    variant = Variant("float32", "bfloat16", block, True)
    row = variant.operand_row(values)
    assert variant.operand_size * chosen.values == variant.size == 4
    assert row >= terms * variant.size, "a product reads whole groups of terms"
    assert row % (block.lanes * variant.operand_size) == 0, "a row is written by whole vectors"
    assert row < (values + max(block.lanes, whole)) * variant.operand_size


@pytest.mark.parametrize("isa", tiling.REGISTERS)
def test_blocks_of_pairs_are_those_of_avx512(isa):
    for chosen in (TILES, DOTS, *EMULATED.values()):
        block = tiling.block_shape(isa, torch.float32, chosen)
        assert (block.lanes, block.products) == (16, chosen)
        assert block.rows == (16 if chosen.tiled else 6)
    assert tiling.block_shape("avx512", torch.float32) == tiling.block_shape("avx512", torch.float32, FMA)


def test_kernels_of_different_products_have_different_names():
    every = [FMA, TILES, DOTS, *EMULATED.values()]
    keys = {
        Variant("float32", "bfloat16", tiling.block_shape("avx512", torch.float32, each), True).key for each in every
    }
    assert len(keys) == len(every)


# Right


@pytest.mark.parametrize("chosen", VARIANTS)
@pytest.mark.parametrize("case", [*(BY_NAME[name] for name in NAMES), WIDE], ids=str)
def test_against_float64(case, chosen, multiply_by):
    multiply_by(chosen)
    assert_parity(case, BF16, "numba")


@pytest.mark.parametrize("chosen", VARIANTS)
@pytest.mark.parametrize("name", AWKWARD)
def test_what_torch_does_not_have(name, chosen, multiply_by, request):
    """Resets, lengths, cells and norms, with segments and in fresh memory full of NaN."""
    multiply_by(chosen)
    setup = BY_SETUP[name]
    checks.check_16_bits_keep_the_state_in_float32(kernels, setup, BF16)
    checks.check_segments(kernels, replace(setup, dtype=BF16), 0)
    checks.check_garbage_in_fresh_memory(kernels, setup, BF16, request)


@pytest.mark.parametrize("chosen", VARIANTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["input", "h_0", "weight_ih_l0", "weight_hh_l0", "grad"])
@pytest.mark.parametrize("options", ["h17", "proj"])
def test_what_is_not_finite_goes_where_torchs_goes(options, place, value, chosen, multiply_by):
    multiply_by(chosen)
    check_goes_where_torchs_goes(options, place, value, BF16, "numba")


# The same bits


@pytest.mark.parametrize("instruction", [TILES, pytest.param(DOTS, marks=SLOW)], ids=lambda each: each.instruction)
@pytest.mark.parametrize("case", [*(BY_NAME[name] for name in NAMES), WIDE], ids=str)
def test_emulated_instructions_round_as_the_real_ones(case, instruction, multiply_by):
    data, found = draw(case, BF16), []
    for chosen in (instruction, EMULATED[instruction]):
        multiply_by(chosen)
        found.append(run(case, data, BF16, "numba"))
    real, emulated = found
    if caches.read().vendor == "GenuineIntel":
        assert_bitwise(emulated, real)
    for name, value in real.items():  # another maker's may add the products of a pair in another order
        assert_library(emulated[name], value, name, BF16)


@pytest.mark.parametrize("chosen", VARIANTS)
@pytest.mark.parametrize("H", [17, 48])
def test_a_row_does_not_depend_on_the_batch(H, chosen, multiply_by, threads, monkeypatch):
    """Nor on the number of threads: outputs, states and their gradients."""
    multiply_by(chosen)
    monkeypatch.setattr(tiling, "WORTH_A_THREAD", 1)
    module = lstmcore.LSTM(5, H, dtype=BF16, backend="numba")
    given = [torch.randn(s, dtype=BF16) for s in ((3, 40, 5), (1, 40, H), (1, 40, H))]

    def of_rows(n):
        leaves = [t[:, :n].clone().requires_grad_() for t in given]
        output, states = module(leaves[0], tuple(leaves[1:]))
        return output, *states, *torch.autograd.grad((output, *states), leaves, [output, *states])

    threads(1)
    whole = of_rows(40)
    for n in range(1, 41):
        for count in (1, 2, 3, 8):
            threads(count)
            for all_rows, some in zip(whole, of_rows(n), strict=True):
                assert torch.equal(all_rows[:, :n], some), (n, count)


@pytest.mark.parametrize("chosen", VARIANTS)
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_any_number_of_threads(case, chosen, multiply_by, threads, monkeypatch):
    multiply_by(chosen)
    monkeypatch.setattr(tiling, "WORTH_A_THREAD", 1)
    data = draw(case, BF16)
    threads(1)
    expected = run(case, data, BF16, "numba")
    for count in (2, 3, 8):
        threads(count)
        assert_bitwise(run(case, data, BF16, "numba"), expected)


@pytest.mark.parametrize("chosen", VARIANTS)
@pytest.mark.parametrize("name", ["b33", "proj_bidirectional", "packed_b33"])
def test_projected_inside_the_recurrence_or_ahead_of_it(name, chosen, multiply_by, monkeypatch):
    case, found = BY_NAME[name], []
    for limits in (
        {"FUSED": 0, "FUSED_ONE_ROW": 0, "FUSED_TILE_ROWS": 1000},
        {"FUSED": 1000, "FUSED_ONE_ROW": 1000, "FUSED_TILE_ROWS": 0},
    ):
        for limit, value in limits.items():
            monkeypatch.setattr(tiling, limit, value)
        multiply_by(chosen)
        found.append(run(case, draw(case, BF16), BF16, "numba"))
    assert_bitwise(*found)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", VARIANTS)
@pytest.mark.parametrize(
    "options", [{"hidden_size": 33}, {"hidden_size": 40, "proj_size": 18, "num_layers": 2}], ids=str
)
@pytest.mark.parametrize("B", [1, 19])
def test_a_stream_has_the_modules_bits(B, options, chosen, multiply_by, threads, monkeypatch):
    multiply_by(chosen)
    monkeypatch.setattr(tiling, "WORTH_A_THREAD", 1)
    module, x = lstmcore.LSTM(5, **options, dtype=BF16, backend="numba").eval(), torch.randn(7, B, 5, dtype=BF16)
    with torch.no_grad():
        expected, states = module(x)
    for count in (1, 2, 3):
        threads(count)
        stream = lstmcore.Stream(module, B)
        assert stream.backend == "numba"
        got = [stream.step(x[0]).clone(), stream.step(x[1]).clone(), *stream.chunk(x[2:]).clone()]
        assert torch.equal(torch.stack(got), expected)
        for one, other in zip(stream.state, states, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("chosen", VARIANTS[:1])
@pytest.mark.parametrize(
    "options", [{"hidden_size": 33, "bidirectional": True}, {"hidden_size": 40, "proj_size": 18}], ids=str
)
def test_rows_beyond_a_tiles_own_do_not_matter(options, chosen, multiply_by, monkeypatch):
    """A tile reads up to 16 rows, of which only some are a block's: what lies there changes nothing."""
    multiply_by(chosen)
    module = lstmcore.LSTM(5, **options, num_layers=2, dtype=BF16, backend="numba")
    scratch, take, fill = buffers.scratch, buffers.take, [0]

    def filled_scratch(size):
        owner, address = scratch(size)
        ctypes.memset(address, fill[0], size)
        return owner, address

    def filled_take(count, dtype):
        memory = take(count, dtype)
        memory.view(torch.uint8).fill_(fill[0])
        return memory

    monkeypatch.setattr(buffers, "scratch", filled_scratch)
    monkeypatch.setattr(buffers, "take", filled_take)
    for rows in (1, 9, 17, 33, 47):
        x, lengths, found = torch.randn(5, rows, 5, dtype=BF16), [1 + 3 * row % 5 for row in range(rows)], []
        for byte in (0x00, 0xFF, 0x7F):  # zeros, NaN, and what products of it are too large for
            fill[0] = byte
            found.append(results(module, x, lengths=lengths))
        for others in found[1:]:
            for one, other in zip(others, found[0], strict=True):
                assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mprotect"), reason="pages are protected by mprotect")
def test_nothing_beyond_the_scratch_is_read():
    """Scratch that ends where a page begins that nobody may read: this machine's bfloat16 keeps off it."""
    in_process("""
        import ctypes, mmap
        import numpy as np
        from lstmcore.kernels.cpu import buffers
        libc, page, kept = ctypes.CDLL(None), mmap.PAGESIZE, []

        def scratch(size):
            pages = -(-size // page)
            memory = np.frombuffer(mmap.mmap(-1, (pages + 1) * page), np.uint8)
            end = memory.ctypes.data + pages * page
            assert libc.mprotect(ctypes.c_void_p(end), page, 0) == 0
            kept.append(memory)
            begin = pages * page - -(-size // buffers.ALIGN) * buffers.ALIGN
            return memory[begin : begin + size], memory.ctypes.data + begin

        buffers.scratch = scratch
        for options in ({}, {"proj_size": 5}, {"bidirectional": True, "num_layers": 2}, {"recompute": 5}):
            for B in (1, 9, 17, 33):
                for H in (16, 33, 48):
                    module, x = build(H=H, B=B, dtype=torch.bfloat16, **options)
                    step(module, x)
                    if not module.bidirectional:
                        lstmcore.Stream(module, B).chunk(x.detach())
    """)


@pytest.mark.parametrize("chosen", VARIANTS[:1])
def test_torchs_own_tiles(chosen, multiply_by):
    """Shapes of tiles are a thread's: torch's kernels, which use them as well, and ours leave each other theirs."""
    multiply_by(chosen)
    module, x = lstmcore.LSTM(40, 48, dtype=BF16, backend="numba"), torch.randn(5, 21, 40, dtype=BF16)
    theirs = torch.nn.LSTM(40, 48, dtype=BF16)
    a, q = torch.randn(70, 90, dtype=BF16), torch.randn(2, 3, 40, 64, dtype=BF16)
    of_torch = [
        lambda: a @ a.T,
        lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q),
        lambda: theirs(x)[0],
    ]
    with torch.no_grad():
        alone, expected = module(x)[0], [each() for each in of_torch]
        for _ in range(3):
            for each, before in zip(of_torch, expected, strict=True):
                assert torch.equal(module(x)[0], alone)
                assert torch.equal(each(), before)


# Where the system does not permit tiles


@pytest.fixture
def refused(monkeypatch, fresh_plans):
    """The system refuses AMX."""
    asked = (products.tiles_permitted, products.this_machines)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    for each in asked:
        each.cache_clear()
    yield
    for each in asked:
        each.cache_clear()


def test_without_the_permission_there_are_no_tiles(refused):
    assert not products.tiles_permitted()
    assert not problem.kernels_of(BF16).products.tiled


@pytest.mark.slow
def test_a_process_without_the_permission():
    """Tiles would end it: it has not asked the system for them."""
    in_process("""
        torch.cpu._init_amx = lambda: False
        module, x = build(dtype=torch.bfloat16)
        oracle = torch.nn.LSTM(7, 33, dtype=torch.float64)
        oracle.load_state_dict(module.state_dict())
        output, exact = module(x)[0], oracle(x.double())[0]
        assert (output.double() - exact).abs().max() < 4 * torch.finfo(torch.bfloat16).eps
        for loss in (output, exact):
            loss.double().square().sum().backward()
        for ours, theirs in zip(module.parameters(), oracle.parameters()):
            scale = max(1.0, theirs.grad.abs().max().item())
            assert (ours.grad.double() - theirs.grad).abs().max() < 4 * torch.finfo(torch.bfloat16).eps * scale
    """)

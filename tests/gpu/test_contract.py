"""The contract of the Triton backend, its kernels interpreted, for each of the designs: a choice of the checks.

The interpreter runs every operation of a kernel in NumPy, one program after the other: about a thousand times slower
than the Numba kernels, which have all checks.  So the sizes are the least that reach every mask.

T time, B batch, H hidden, P projection (H where there is none), D directions.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lstmcore.kernels.contract import Layer, Needs

from ..support import contract, gpu_designs
from ..support import contract_checks as checks
from ..support.contract import pose, solve
from ..support.interpreted import DENSE, PACKED, SHARES, SMALL
from ..support.tolerances import ORDER_OF_SUMS_F32

SHORTER = {  # as many steps as it takes to have several resets, and to end at different times
    "reset_long": {"T": 24, "reset": 0.2},
    "packed_long": {"T": 20, "lengths": (7, 20, 2), "reset": 0.2},
    "one_row": {"T": 4},
}
SETUPS = [replace(s, dtype=torch.float32, **SHORTER.get(s.name, {})) for s in contract.SETUPS]
BY_NAME = {s.name: s for s in SETUPS}
SPLIT = ["dense", "ones", "one_row", "strided_batch_first", "proj", "lengths", "lengths_reset"]
SPLIT += ["lengths_b33", "packed_reset"]


@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_resident_against_oracle(triton_kernels, monkeypatch, setup):
    gpu_designs.use(monkeypatch, "resident")
    checks.check_against_oracle(triton_kernels, setup, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLIT)
def test_split_against_oracle(triton_kernels, monkeypatch, name):
    """The design that the tiling chooses; step by step where it has several slices, which the interpreter needs."""
    gpu_designs.use(monkeypatch, "split")
    checks.check_against_oracle(triton_kernels, BY_NAME[name], torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "setup"),
    [
        ("one_slice", DENSE),
        ("one_slice", PACKED),
        ("tiles", SMALL),
        ("tiles_of_16", DENSE),
        ("chunks", PACKED),
        ("stream", SMALL),
        ("wide", SMALL),
        ("wide", replace(PACKED, H=40)),
        ("wide_tiles", replace(DENSE, H=40, B=21)),
        ("stream_one_slice", DENSE),
    ],
    ids=str,
)
def test_shared_in_other_ways(triton_kernels, monkeypatch, share, setup):
    """Designs that the tiling takes for other sizes: what one gives does not depend on how work is shared."""
    gpu_designs.use(monkeypatch, share=SHARES[share])
    checks.check_against_oracle(triton_kernels, setup, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "dtype"),
    [(DENSE, torch.bfloat16), (SMALL, torch.float16), (PACKED, torch.bfloat16), (replace(DENSE, H=16), torch.float16)],
    ids=["dense-bfloat16", "small-float16", "packed-bfloat16", "h16-float16"],
)
def test_16_bits_keep_the_state_in_float32(triton_kernels, design, setup, dtype):
    """Two 16-bit values share a word of the channel; rows of an odd H are padded there, those of 16 are not."""
    checks.check_16_bits_keep_the_state_in_float32(triton_kernels, setup, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("share", ["tiles_of_16", "chunks", "stream", "wide"])
def test_16_bits_shared_in_other_ways(triton_kernels, monkeypatch, share):
    gpu_designs.use(monkeypatch, share=replace(SHARES[share], chunk=2 * SHARES[share].chunk))
    checks.check_16_bits_keep_the_state_in_float32(triton_kernels, replace(SMALL, H=17, P=0, D=1), torch.bfloat16)


@pytest.mark.parametrize("setup", [DENSE, SMALL], ids=str)
def test_shapes_layouts_and_padding(triton_kernels, design, setup):
    checks.check_shapes_layouts_and_padding(triton_kernels, setup)


@pytest.mark.parametrize("setup", [DENSE, PACKED], ids=str)
def test_inference_saves_nothing_and_gives_the_same_bits(triton_kernels, design, setup):
    checks.check_inference_saves_nothing_and_gives_the_same_bits(triton_kernels, setup)


def test_backward_twice_and_inputs_untouched(triton_kernels, design):
    checks.check_backward_twice_and_inputs_untouched(triton_kernels, SMALL)


@pytest.mark.parametrize("setup", [DENSE, SMALL, PACKED, replace(SMALL, batch_first=True)], ids=str)
def test_gate_statistics(triton_kernels, monkeypatch, setup):
    """Torch operations on what is saved, in the same order by both designs: one of them shows it."""
    gpu_designs.use(monkeypatch, "resident")
    checks.check_gates(triton_kernels, setup, 3, ORDER_OF_SUMS_F32)


@pytest.mark.parametrize("off", [*Needs._fields, Needs._fields], ids=str)
def test_needs(triton_kernels, monkeypatch, off):
    """Also without norms.  What is not needed is left out after the recurrence, so one design shows it."""
    gpu_designs.use(monkeypatch, "resident")
    checks.check_needs(triton_kernels, SMALL, off)


@pytest.mark.parametrize("given", ["grad_output", "grad_h_n", "grad_c_n", "grad_cells"])
def test_missing_gradients_are_zeros(triton_kernels, design, given):
    checks.check_missing_gradients_are_zeros(triton_kernels, replace(SMALL, P=0, D=1), given)


def test_missing_gradients_of_a_projection(triton_kernels, monkeypatch):
    gpu_designs.use(monkeypatch, "resident")
    checks.check_missing_gradients_are_zeros(triton_kernels, SMALL, "grad_h_n")


@pytest.mark.slow
@pytest.mark.parametrize("state", ["h_0", "c_0"])
def test_missing_states_are_zeros(triton_kernels, design, state):
    """The two come apart here: with only one of them, as with zeros for the other."""
    p, zeros = pose(SMALL), pose(SMALL)
    p.given[state], zeros.given[state] = None, torch.zeros_like(zeros.given[state])
    contract.assert_close(solve(triton_kernels, p), solve(triton_kernels, zeros), ORDER_OF_SUMS_F32)


@pytest.mark.slow
def test_nan_in_padding_stays_there(triton_kernels, design):
    checks.check_nan_in_padding_stays_there(triton_kernels, replace(SMALL, batch_first=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "dtype"),
    [(DENSE, torch.bfloat16), (SMALL, torch.float32), (PACKED, torch.bfloat16)],
    ids=["dense-bfloat16", "small-float32", "packed-bfloat16"],
)
def test_garbage_in_fresh_memory(triton_kernels, design, setup, dtype, request):
    checks.check_garbage_in_fresh_memory(triton_kernels, setup, dtype, request)


def test_keeps_no_reference(triton_kernels, monkeypatch):
    gpu_designs.use(monkeypatch, "resident")
    checks.check_keeps_no_reference(triton_kernels, SMALL)


class Guard:
    """Memory with a band on both sides that nobody may write to."""

    def __init__(self, monkeypatch) -> None:
        self.whole: list[torch.Tensor] = []
        for owner, name in ((torch.Tensor, "new_empty"), (torch, "zeros"), (torch, "full")):
            original = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda *a, _f=original, **k: self.inside(_f(*a, **k)))

    def inside(self, fresh: torch.Tensor) -> torch.Tensor:
        """A tensor like ``fresh``, of the same values, between two bands of 77."""
        band = 64
        whole = torch.ones(fresh.numel() + 2 * band, dtype=fresh.dtype).mul_(77)
        self.whole.append(whole)
        return whole[band:-band].view(fresh.shape).copy_(fresh)

    def check(self) -> None:
        assert len(self.whole) > 4, "the backend allocates in other ways than this test knows"
        for whole in self.whole:
            assert (whole[:64] == 77).all()
            assert (whole[-64:] == 77).all()


@pytest.mark.parametrize("setup", [SMALL, BY_NAME["ones"]], ids=str)
def test_nothing_outside_of_a_tensor_is_written(triton_kernels, design, setup, monkeypatch):
    """The masks of rows that do not fill a tile, and of units that do not fill a slice."""
    p = pose(setup)
    expected = solve(triton_kernels, p)
    guard = Guard(monkeypatch)
    contract.assert_same(triton_kernels, solve(triton_kernels, p), expected)
    guard.check()


def test_prewarm_runs_both_ways(triton_kernels, monkeypatch):
    """It compiles by running: here it must only not fail, in any kind of layer."""
    for kind in ("resident", "split"):
        gpu_designs.use(monkeypatch, kind)
        for extra in ({}, {"proj_size": 3, "bias": False, "ragged": True, "directions": 2}):
            layer = Layer(torch.device("cpu"), torch.float32, 10, 4, 8, 9, **extra)
            triton_kernels.prewarm(layer, training=True)


def test_supports(triton_kernels):
    """Interpreted, it takes the CPU's tensors, of the dtypes that it has kernels for."""
    layer = Layer(torch.device("cpu"), torch.float32, 10, 4, 8, 16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert triton_kernels.supports(layer._replace(dtype=dtype)) is None
    for change in ({"device": torch.device("cuda")}, {"dtype": torch.float64}, {"dtype": torch.complex64}):
        assert isinstance(triton_kernels.supports(layer._replace(**change)), str)


@pytest.mark.parametrize(
    "setup",
    [SMALL, DENSE, replace(SMALL, P=0, dtype=torch.float16), replace(SMALL, P=0, dtype=torch.float16, segment=2)],
    ids=["small", "dense", "16_bits", "segments"],
)
def test_launches_have_the_dtypes_that_kernels_are_compiled_for(triton_kernels, design, monkeypatch, setup):
    """``make kernels`` compiles for ``Recurrence.pointers``: a call has to give these tensors, in these dtypes."""
    recurrence, seen = triton_kernels.launch.Recurrence, []
    launch = recurrence.launch

    def checked(self, rows, tensors, **options):
        given = {**tensors, "reset": rows.reset, "offsets": rows.offsets}
        expected = self.pointers()
        assert given.keys() == expected.keys()
        assert {name: each.dtype for name, each in given.items() if each is not None} == {
            name: expected[name] for name, each in given.items() if each is not None
        }
        seen.append(self.backward)
        return launch(self, rows, tensors, **options)

    monkeypatch.setattr(recurrence, "launch", checked)
    solve(triton_kernels, pose(setup))
    # by segments, two of each direction: backward computes forward again
    assert seen == ([False] * 4 + [False, True] * 4 if setup.segment else [False, True])

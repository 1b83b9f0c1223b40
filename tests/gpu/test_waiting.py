"""What the programs of the Triton backend's split design hand to each other: data as its own flag; -1 says "not yet".

So no value may look like -1, whatever it was computed from; a wait that does not end has to end all the same, with NaN
in what is missing, and be reported; and where programs cannot run at the same time, no one may wait.

Interpreted, programs run one after the other: a wait for a later one never succeeds, which is a device that cannot hold
all programs at once.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from lstmcore.kernels.contract import Needs
from lstmcore.kernels.gpu import tiling
from lstmcore.kernels.gpu.tiling import Design

from ..support import contract, gpu_designs, modules
from ..support.contract import Setup, call_backward, call_forward, named, pose
from ..support.gpu_designs import Share
from ..support.tolerances import assert_library

CPU = torch.device("cpu")
TWO_SLICES = Share(units=16, warps=2, chunk=32)
SETUP = Setup("waiting", T=4, B=5, H=20, dtype=torch.float32, cells=False)
INTS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
# All bits; all but the sign; quiet and negative; signalling, with the least payload.
PAYLOADS = {
    torch.float32: [-1, 0x7FFFFFFF, -0x400000, 0x7F800001],
    torch.bfloat16: [-1, 0x7FFF, -0x40, 0x7F81],
    torch.float16: [-1, 0x7FFF, -0x200, 0x7C01],
}


@pytest.fixture
def split(triton_kernels, monkeypatch):
    """The backend with two slices of units, impatient, so that a value taken for "not yet" shows at once."""
    gpu_designs.use(monkeypatch, share=TWO_SLICES)
    monkeypatch.setattr(triton_kernels.launch, "PATIENCE", 3)
    return triton_kernels


def gave_up(kernels) -> bool:
    return bool(kernels.status.word(CPU).item())


def put(tensor: torch.Tensor, bits: int, *where: int) -> None:
    """Writes a NaN by its bits; a float would lose them on its way."""
    tensor.view(INTS[tensor.dtype])[where] = bits
    assert tensor[where].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", INTS, ids=str)
def test_every_nan_arrives(split, dtype):
    """A payload each in rows of their own, in every thing that is given: NaN where any other NaN gives NaN.

    (That ordinary ones go where torch's go is compared below.)
    """
    results = []
    ordinary = [torch.tensor(torch.nan, dtype=dtype).view(INTS[dtype]).item()] * 4
    for payloads in (PAYLOADS[dtype], ordinary):
        p = pose(replace(SETUP, dtype=dtype))
        places = ((p.given["input"], (1, 0, 2)), (p.given["h_0"], (0, 1, 3)), (p.given["c_0"], (0, 2, 17)))
        for (tensor, where), bits in zip((*places, (p.given["grad_output"], (2, 3, 1))), payloads, strict=True):
            put(tensor, bits, *where)
        results.append(contract.solve(split, p))
        assert not gave_up(split)
    assert results[0]["output"][1:, :2].isnan().all(), "the test feeds nothing that shows"
    for name, value in results[0].items():
        assert torch.equal(value.isnan(), results[1][name].isnan()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_weight_of_all_ones_bits(split, dtype):
    p = pose(replace(SETUP, dtype=dtype))
    put(p.given_weights[0].weight_hh, -1, 3, 4)
    results = contract.solve(split, p)
    assert not gave_up(split)
    assert results["output"][1:, :, :20].isnan().all()
    assert results["grad weight_hh 0"].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "value", "options", "dtype"),
    [
        ("input", float("nan"), "h17", torch.bfloat16),
        ("weight_hh_l0", float("nan"), "proj", torch.float32),
        ("grad", float("nan"), "h17", torch.float32),
        ("input", float("inf"), "h17", torch.float32),
        ("c_0", float("-inf"), "h17", torch.bfloat16),
        ("bias_hh_l0", float("inf"), "h17", torch.float32),
        ("grad", float("-inf"), "h17", torch.float32),
        ("weight_hh_l0", float("inf"), "h17", torch.float32),
    ],
    ids=str,
)
def test_non_finite_values_go_where_torchs_go(split, place, value, options, dtype):
    modules.check_goes_where_torchs_goes(options, place, value, dtype, "triton")
    assert not gave_up(split)


@dataclass(frozen=True)
class Together(Design):
    """A design of two slices that says it has one, so that all of its steps are interpreted in one launch."""

    @property
    def programs(self) -> int:
        return 2 * super().programs

    @staticmethod
    def choose_design(*sizes, **limits) -> Design:
        design = TWO_SLICES.choose_design(*sizes, **limits)
        assert design.slices == (2 if design.units == 16 else 1)
        return Together(**{**vars(design), "slices": 1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wait_that_does_not_end(split, dtype, monkeypatch):
    """The first slice waits for the second, which has not begun: NaN from there on, never a number that is wrong."""
    p = pose(replace(SETUP, dtype=dtype))
    expected = named(p, call_forward(split, p), None)
    good = split.forward
    with monkeypatch.context() as patch:
        patch.setattr(tiling, "choose_design", Together.choose_design)
        got = named(p, call_forward(split, p), None)
    assert gave_up(split)
    output = got["output"]
    assert_library(output[0], expected["output"][0])  # before anybody waits
    assert output[1:, :, :16].isnan().all()  # the first slice misses the second's step 0
    assert_library(output[1, :, 16:], expected["output"][1, :, 16:])  # the second has all of step 0
    assert output[2:].isnan().all()
    assert got["h_n"].isnan().all()
    with pytest.raises(RuntimeError, match=r"gave up waiting.*NaN.*backend='torch'"):
        good(p.call)
    contract.assert_same(split, named(p, call_forward(split, p), None), expected)  # told once, and over


def test_a_wait_that_does_not_end_in_backward(split, monkeypatch):
    p = pose(replace(SETUP, dtype=torch.float32))
    forward = call_forward(split, p)
    expected = named(p, forward, call_backward(split, p, forward, norms=False))
    with monkeypatch.context() as patch:
        patch.setattr(tiling, "choose_design", Together.choose_design)
        got = named(p, forward, call_backward(split, p, forward, norms=False))
    assert gave_up(split)
    assert torch.equal(got["grad input"][-1].isnan(), torch.zeros_like(got["grad input"][-1], dtype=torch.bool))
    assert got["grad input"][:-2].isnan().all()
    for name in ("grad weight_ih 0", "grad weight_hh 0"):
        assert got[name].isnan().any(), name
        assert_library(torch.where(got[name].isnan(), expected[name], got[name]), expected[name], name)
    with pytest.raises(RuntimeError, match="gave up waiting"):
        call_backward(split, p, forward)
    again = named(p, forward, call_backward(split, p, forward, norms=False))
    contract.assert_same(split, again, expected)


def test_a_module_reports_it_too(split, monkeypatch):
    """Through autograd: the error of a forward pass comes with its backward, if no call came between."""
    import lstmcore

    module = lstmcore.LSTM(3, 20, backend="triton")
    x = torch.randn(3, 2, 3)
    with monkeypatch.context() as patch:
        patch.setattr(tiling, "choose_design", Together.choose_design)
        output, _ = module(x)
    assert output.isnan().any()
    with pytest.raises(RuntimeError, match="gave up waiting"):
        output.sum().backward()
    module(x)[0].sum().backward()


class NotTogether:
    """A kernel on a device that refuses to run so many programs at once."""

    def __init__(self, kernel, refusal: str) -> None:
        self.kernel, self.refusal, self.launches = kernel, refusal, []
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        def launch(**constants):
            for hint in ("enable_fp_fusion", "maxnreg"):  # the interpreter has no compiler to take them
                constants.pop(hint, None)
            self.launches.append(constants.pop("launch_cooperative_grid", False))
            if self.launches[-1]:
                raise RuntimeError(self.refusal)
            self.kernel[grid](**constants)

        return launch


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_step_by_step_where_a_device_cannot_hold_all_programs(split, backward, monkeypatch):
    """One refused launch, then one a step, in which nobody waits: the same results, one warning, and it is told."""
    p = pose(SETUP)
    expected = contract.solve(split, p)
    monkeypatch.setattr(split.launch, "INTERPRETED", SimpleNamespace(value=False))
    kernels, split_kernels = {}, split.launch.split
    for name in ("lstm_fwd_kernel", "lstm_bwd_kernel"):
        kernel = getattr(split_kernels, name)
        kernels[name] = NotTogether(kernel, "Triton Error [CUDA]: too many blocks in cooperative launch")
        monkeypatch.setattr(split_kernels, name, kernels[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of this forward
        given = call_forward(split, p) if backward else None
    kernel = kernels["lstm_bwd_kernel" if backward else "lstm_fwd_kernel"]
    split.launch._refused.clear()
    layer = p.call.layer
    assert "one launch per step" not in split.describe(layer)

    def again() -> dict[str, torch.Tensor]:
        return contract.solve(split, p) if given is None else named(p, given, call_backward(split, p, given))

    with pytest.warns(RuntimeWarning, match="cpu did not run 2 programs .* at the same time") as caught:
        results = [again(), again()]
    assert len(caught) == 1
    for got in results:
        contract.assert_same(split, got, expected)
    assert kernel.launches[-2 * SETUP.T - 1 :] == [True] + 2 * SETUP.T * [False]
    assert split.describe(layer).count("one launch per step") == 2


def test_fewer_programs_than_were_refused_are_still_launched_together(triton_kernels):
    launch, sizes = triton_kernels.launch, (1, 1, "16", 132, False)
    many, few = (tiling.choose_design(H, *sizes, shared=tiling.SHARED) for H in (1024, 256))
    assert many.programs > few.programs > 1
    with pytest.warns(RuntimeWarning):
        launch._refuse(many, CPU, RuntimeError("too many blocks in cooperative launch"))
    assert launch.stepwise(many, CPU)
    assert not launch.stepwise(few, CPU)
    launch._refuse(few, CPU, RuntimeError("too many blocks in cooperative launch"))  # no second warning
    assert launch.stepwise(few, CPU)
    assert not launch.stepwise(few, torch.device("cuda", 1))
    assert not launch.stepwise(tiling.choose_design(64, *sizes, shared=tiling.SHARED), CPU)


def test_other_errors_of_a_launch_are_not_hidden(split, monkeypatch):
    monkeypatch.setattr(split.launch, "INTERPRETED", SimpleNamespace(value=False))
    split_kernels = split.launch.split
    kernel = NotTogether(split_kernels.lstm_fwd_kernel, "Triton Error [CUDA]: out of memory")
    monkeypatch.setattr(split_kernels, "lstm_fwd_kernel", kernel)
    with pytest.raises(RuntimeError, match="out of memory"):
        call_forward(split, pose(SETUP))
    assert kernel.launches == [True]


@pytest.mark.slow
def test_rows_do_not_depend_on_each_other(split):
    """Whatever is in the other rows of its tile: a row stays what it is."""
    p, other = (pose(replace(SETUP, D=2, B=9)) for _ in range(2))
    for name in ("input", "h_0", "c_0"):
        other.given[name][:, 1:] = torch.nan
    one, two = (call_forward(split, q) for q in (p, other))
    for name in ("output", "h_n", "c_n"):
        assert_library(getattr(one, name)[:, 0], getattr(two, name)[:, 0], name)
        assert getattr(two, name)[:, 1:].isnan().all(), name


def test_what_is_not_needed_does_not_wait_either(split):
    p = pose(SETUP)
    forward = call_forward(split, p)
    gradients = call_backward(split, p, forward, needs=Needs(False, False, True, False), norms=False)
    assert gradients.input is None
    assert gradients.c_0 is not None
    assert not gave_up(split)


def test_a_device_seen_first_under_inference_mode(triton_kernels):
    """What a kernel says there can be told, and cleared, by a call outside of it."""
    triton_kernels.status._words.clear()
    with torch.inference_mode():
        triton_kernels.status.raise_pending(CPU)
    triton_kernels.status.word(CPU).fill_(1)
    with pytest.raises(RuntimeError, match="gave up waiting"):
        triton_kernels.status.raise_pending(CPU)
    triton_kernels.status.raise_pending(CPU)

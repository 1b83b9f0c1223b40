"""``lstmcore.LSTM(backend="triton")``, interpreted: what lies between a module and the kernels.

T time, B batch, H hidden.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from lstmcore.kernels import precision
from torch import nn

import lstmcore

from ..support import flow_calls, gpu_designs, modules
from ..support.cases import BY_NAME
from ..support.gpu_designs import Share
from ..support.modules import close, pair
from ..support.oracle import assert_parity

NAMES = ["layers_bidirectional", "everything", "packed_everything", "unbatched", "sliced", "expanded", "no_bias"]
NAMES += ["saturated", "packed_one_step", "proj_one"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_parity(triton_kernels, name):
    assert_parity(BY_NAME[name], torch.float32, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["everything", "packed_everything"])
def test_parity_of_the_split_design(triton_kernels, monkeypatch, name):
    gpu_designs.use(monkeypatch, share=Share(units=8, warps=2, chunk=64))
    assert_parity(BY_NAME[name], torch.float32, "triton")


@pytest.mark.parametrize("name", ["packed_bidirectional", "sliced"])
def test_parity_in_float16(triton_kernels, name):
    """Not in bfloat16: where a GPU rounds to it, the interpreter cuts off, with twice the error and to one side."""
    assert_parity(BY_NAME[name], torch.float16, "triton")


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_autocast(triton_kernels, packed):
    modules.check_autocast(packed, torch.float32, "triton")


def test_packed_sequences(triton_kernels):
    modules.check_packed_sequences({"batch_first": True, "bidirectional": True}, False, "triton")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(triton_kernels, mode):
    modules.check_modes_without_gradients(mode, "triton")


def test_empty_batch(triton_kernels):
    modules.check_empty_batch({"bidirectional": True, "num_layers": 2, "proj_size": 2}, True, "triton")


def test_extended_arguments(triton_kernels):
    """Lengths, resets and cells, against the plain step loop."""
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        module = lstmcore.LSTM(3, 9, 2, bidirectional=True, batch_first=True, backend=backend)
        x = torch.randn(4, 3, 3, requires_grad=True)
        reset = torch.rand(4, 3) < 0.4
        output, (h_n, c_n), cells = module(x, lengths=[3, 0, 2, 3], reset=reset, return_cells=True)
        loss = output.square().sum() + h_n.sum() + c_n.sum() + cells.square().sum()
        results.append((output, h_n, c_n, cells, *torch.autograd.grad(loss, [x, *module.parameters()])))
    for got, expected in zip(*results, strict=True):
        close(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stack", "packed", "everything"])
def test_recorded_norms_are_autograds(triton_kernels, name):
    call = next(call for call in flow_calls.CALLS if call.name == name)
    flow_calls.check_norms_are_autograds(call, torch.float32, "triton")


def test_recorded_norms_of_the_split_design(triton_kernels, monkeypatch):
    gpu_designs.use(monkeypatch, share=Share(units=8, warps=2, chunk=64))
    flow_calls.check_norms_are_autograds(flow_calls.CALLS[0], torch.float32, "triton")


@pytest.mark.slow
def test_vanishing_norms_are_exact(triton_kernels, monkeypatch):
    """The sums of squares are in float64 here too."""
    gpu_designs.use(monkeypatch, "resident")
    flow_calls.check_vanishing_norms_are_exact(torch.float32, "triton")


def test_double_backward(triton_kernels):
    """A gradient penalty: second derivatives come from the step loop, in float32 as everything here."""
    ours, theirs = pair(2, 5, bidirectional=True, backend="triton")
    x = torch.randn(3, 2, 2)
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        output, (_, c_n) = module(leaf)
        (grad,) = torch.autograd.grad(output.square().sum() + c_n.sum(), leaf, create_graph=True)
        results.append((grad, *torch.autograd.grad(grad.square().sum(), [leaf, *module.parameters()])))
    for got, expected in zip(*results, strict=True):
        close(got, expected)


LEAVES = ["input", "h_0", "c_0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_hr_l0"]


@pytest.mark.parametrize("asked", [("input",), ("h_0",), ("c_0",), ("weight_hh_l0",), ("bias_hh_l0", "c_0")], ids=str)
def test_gradients_of_a_few(triton_kernels, asked):
    """The others are not computed, and the ones asked for do not change."""
    ours, theirs = pair(3, 9, proj_size=4, backend="triton")
    given = {"input": torch.randn(3, 2, 3), "h_0": torch.randn(1, 2, 4), "c_0": torch.randn(1, 2, 9)}
    results = []
    for module in (ours, theirs):
        leaves = {name: value.clone() for name, value in given.items()} | dict(module.named_parameters())
        assert list(leaves) == LEAVES
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in asked)
        output, (h_n, c_n) = module(leaves["input"], (leaves["h_0"], leaves["c_0"]))
        (output.square().sum() + h_n.sum() + c_n.square().sum()).backward()
        results.append({name: leaf.grad for name, leaf in leaves.items()})
    for name, expected in results[1].items():
        if name in asked:
            close(results[0][name], expected)
        else:
            assert results[0][name] is None, name


@pytest.fixture
def setting():
    """Sets torch's precision of float32 in recurrent layers, and in products, for the duration of a test."""
    rnn, matmul = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = rnn.fp32_precision, matmul.fp32_precision

    def change(recurrent: str, products: str = "none") -> None:
        rnn.fp32_precision, matmul.fp32_precision = recurrent, products

    yield change
    rnn.fp32_precision, matmul.fp32_precision = before


@pytest.mark.parametrize("kind", ["resident", "split"])
@pytest.mark.parametrize(("recurrent", "expected"), [("tf32", "tf32"), ("ieee", "tf32x3")])
def test_torchs_setting_chooses_the_precision_of_float32(
    triton_kernels, monkeypatch, setting, recurrent, expected, kind
):
    """TF32 exactly where the setting for recurrent layers allows it: in the tiling, the kernels and the products."""
    setting(recurrent)
    gpu_designs.use(monkeypatch, kind)
    planned, launched, multiplied = [], [], []
    choose = gpu_designs.tiling.choose_design
    names = list(inspect.signature(gpu_designs.CHOOSE_DESIGN).parameters)

    def note(*sizes, **rest):
        planned.append(dict(zip(names, sizes, strict=False))["precision"])
        return choose(*sizes, **rest)

    monkeypatch.setattr(gpu_designs.tiling, "choose_design", note)
    addmm = torch.addmm

    class Noting:
        def __init__(self, kernel) -> None:
            self.kernel, self.arg_names = kernel, kernel.arg_names

        def __getitem__(self, grid):
            return lambda *a, **k: (launched.append(k["PRECISION"]), self.kernel[grid](*a, **k))

    for module in (triton_kernels.launch.persistent, triton_kernels.launch.split):
        for name in ("lstm_fwd_kernel", "lstm_bwd_kernel"):
            monkeypatch.setattr(module, name, Noting(getattr(module, name)))

    def noting_addmm(*args, **kwargs):
        multiplied.append(torch.backends.cuda.matmul.fp32_precision)
        return addmm(*args, **kwargs)

    monkeypatch.setattr(torch, "addmm", noting_addmm)
    lstmcore.LSTM(3, 9, backend="triton")(torch.randn(2, 2, 3))[0].sum().backward()
    assert set(planned) == {"tf32" if expected == "tf32" else "float32"}
    assert set(launched) == {expected}
    assert set(multiplied) == {recurrent}
    assert torch.backends.cuda.matmul.fp32_precision == "none", "the setting of the user was not restored"


def test_16_bits_do_not_care(triton_kernels, setting):
    setting("ieee")
    layer = triton_kernels.Layer(torch.device("cpu"), torch.float16, 5, 4, 8, 100)
    strict = triton_kernels.describe(layer)
    setting("tf32")
    assert triton_kernels.describe(layer) == strict


def test_products_restore_the_setting_after_an_error(triton_kernels, setting):
    from lstmcore.kernels.gpu.products import products

    setting("tf32", "ieee")

    def fail() -> None:
        with products(torch.float32):
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


def test_legacy_settings_count_too():
    """``torch.backends.cudnn.allow_tf32 = False``, which much code has."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        assert not precision.tf32()
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert precision.tf32() == before


def test_a_module_of_torch_loads_into_it(triton_kernels):
    theirs = nn.LSTM(3, 9, 2)
    ours = lstmcore.LSTM(3, 9, 2, backend="triton")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 2, 3)
    close(ours(x)[0], theirs(x)[0])

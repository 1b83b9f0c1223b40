"""Where the Triton backend cannot run: by name an error that says what helps; "auto" takes the next and says why.

The machines are made up: what torch and the package index say about this one is replaced.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from lstmcore.kernels.contract import Layer
from lstmcore.kernels.gpu import tiling

import lstmcore
from lstmcore import backends
from lstmcore.backends import Situation, choice

GPU = torch.device("cuda", 0)
LAYER = Layer(GPU, torch.bfloat16, 100, 16, 64, 512)
X = torch.randn(5, 2, 3)


@pytest.fixture
def gpu(compiled_triton, monkeypatch):
    """A GPU with 132 SMs of compute capability 9.0; returns a function that changes what it is."""

    def change(
        capability: tuple[int, int] = (9, 0), hip: str | None = None, sms: int = 132, name: str = "NVIDIA H200"
    ) -> None:
        found = SimpleNamespace(name=name, multi_processor_count=sms, major=capability[0], minor=capability[1])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: found)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(compiled_triton.launch, "sms", lambda device: sms)
        monkeypatch.setattr(compiled_triton.launch, "shared", lambda device: tiling.SHARED)

    change()
    return change


def refused(layer: Layer, **options) -> str:
    """What a call by name says; "auto" has passed it over with the same words."""
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this call") as caught:
        backends.choose("triton", (layer,), Situation(**options))
    choice = backends.choose("auto", (layer,), Situation(**options))
    assert choice.name != "triton"
    reason = dict(choice.reasons)["triton"]
    assert reason in str(caught.value) or layer.device.type == "cpu"
    assert reason in str(choice)
    return str(caught.value)


def test_supported(gpu):
    choice = backends.choose("triton", (LAYER,))
    assert choice.name == "triton"
    assert "split" in str(choice)
    assert "backward" not in str(choice)
    training = backends.choose("triton", (LAYER._replace(training=True),))
    assert "backward split" in str(training)
    resident = backends.choose("triton", (LAYER._replace(hidden_size=100),))
    assert "resident" in str(resident)


def test_the_design_does_not_depend_on_the_number_of_steps(gpu):
    said = {str(backends.choose("triton", (LAYER._replace(steps=steps),))) for steps in (1, 7, 100_000)}
    assert len(said) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_dtype(gpu, dtype):
    message = refused(LAYER._replace(dtype=dtype))
    assert str(dtype) in message
    assert "torch" in message


@pytest.mark.parametrize("capability", [(7, 5), (6, 1)])
def test_an_old_gpu(gpu, capability):
    gpu(capability=capability)
    message = refused(LAYER)
    for text in ("8.0", f"{capability[0]}.{capability[1]}", "cuda:0", "auto"):
        assert text in message


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
def test_newer_gpus(gpu, capability):
    gpu(capability=capability)
    assert backends.choose("triton", (LAYER,)).name == "triton"


def test_rocm(gpu):
    gpu(hip="6.4.0")
    message = refused(LAYER)
    assert "ROCm" in message
    assert "auto" in message


def test_no_design_fits(gpu):
    message = refused(LAYER._replace(hidden_size=5000))
    for text in ("5000", "132", "SMs", "auto"):
        assert text in message
    gpu(sms=20)
    backends.choose.cache_clear()
    assert "20" in refused(LAYER._replace(hidden_size=1024))


def test_the_other_layers_of_a_stack_count_too(gpu):
    with pytest.raises(RuntimeError, match="float64"):
        backends.choose("triton", (LAYER, LAYER._replace(dtype=torch.float64)))


@pytest.mark.parametrize("training", [False, True])
def test_auto_leaves_it_to_torch_where_nobody_has_measured(gpu, training):
    """What is measured is a device, of a name and with so many SMs; its capability alone says nothing."""
    layer = LAYER._replace(training=training)
    gpu(name="NVIDIA H100 80GB HBM3")
    choice = backends.choose("auto", (layer,))
    assert choice.name == "torch"
    for text in ("not measured on NVIDIA H100 80GB HBM3: `python -m lstmcore tune` does", "backend='triton'"):
        assert text in dict(choice.reasons)["triton"]
    extended = backends.choose("auto", (layer,), Situation(extended=True))  # which cuDNN cannot run
    assert extended.name == "triton"
    assert "checked here against the reference" in str(extended)
    gpu()
    backends.forget()
    choice = backends.choose("auto", (layer,))
    assert choice.name == "triton"
    assert "split" in str(choice)
    assert backends.choose("auto", (layer,), Situation(extended=True)).name == "triton"


def test_auto_leaves_it_to_torch_on_a_slice_of_a_gpu(gpu):
    """What was measured is the whole device."""
    gpu(sms=16)
    layer = LAYER._replace(hidden_size=128)
    choice = backends.choose("auto", (layer,))
    assert choice.name == "torch"
    assert "not measured" in dict(choice.reasons)["triton"]
    assert backends.choose("triton", (layer,)).name == "triton"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ({}, "triton"),
        ({"training": True}, "triton"),
        ({"steps": 20}, "torch"),  # a call costs more than so many steps save
        ({"steps": 99, "training": True}, "torch"),
        ({"ragged": True}, "triton"),
        ({"proj_size": 64}, "triton"),
        ({"hidden_size": 1024, "batch": 64}, "triton"),
        ({"hidden_size": 1024, "batch": 256}, "triton"),
        ({"hidden_size": 1024, "batch": 257}, "torch"),
        ({"hidden_size": 1024, "batch": 65, "dtype": torch.float16}, "torch"),  # many rows: dense bfloat16 was measured
        ({"hidden_size": 1023, "batch": 65}, "torch"),
        ({"hidden_size": 1024, "batch": 65, "ragged": True}, "torch"),
        ({"hidden_size": 1024, "batch": 65, "directions": 2}, "torch"),
        ({"hidden_size": 2048}, "torch"),
        ({"dtype": torch.float32}, "triton"),
        ({"dtype": torch.float32, "hidden_size": 1024}, "torch"),
        ({"dtype": torch.float32, "hidden_size": 128}, "torch"),  # SMALL_H, and few steps
        ({"dtype": torch.float32, "hidden_size": 128, "steps": 1000}, "triton"),
        ({"dtype": torch.float16, "steps": 1000}, "torch"),  # PERSIST_STATIC, few rows, inference
        ({"dtype": torch.float16, "steps": 1000, "training": True}, "triton"),
        ({"dtype": torch.float16, "steps": 1000, "batch": 64}, "triton"),
        ({"dtype": torch.float16, "hidden_size": 513}, "triton"),
    ],
    ids=str,
)
def test_auto_by_class(gpu, kind, expected):
    """As the rows in bench/results say; what ATen's LSTM does not have goes to the kernels whatever its size."""
    layer = LAYER._replace(**kind)
    choice = backends.choose("auto", (layer,))
    assert choice.name == expected
    if expected == "torch":
        assert "cuDNN was measured faster" in dict(choice.reasons)["triton"]
    assert backends.choose("auto", (layer,), Situation(extended=True)).name == "triton"


def test_on_the_cpu(compiled_triton):
    module = lstmcore.LSTM(3, 4, backend="triton")
    for call in (lambda: module(X), lambda: lstmcore.explain(module, X)):
        with pytest.raises(RuntimeError, match=r"triton.*NVIDIA GPUs, not on cpu.*auto"):
            call()


def test_interpreted_it_does_not_take_a_gpus_tensors(triton_kernels, fresh_choices):
    with pytest.raises(RuntimeError, match=r"interpreter.*CPU"):
        backends.choose("triton", (LAYER,))


@pytest.mark.parametrize("found", ["3.5.1", "2.3.0", "none"])
def test_triton_missing_or_too_old(found, fresh_choices, monkeypatch):
    """On a GPU and on the CPU: by name an error with the command that helps, "auto" goes on."""
    spec = None if found == "none" else object()
    find, version = importlib.util.find_spec, importlib.metadata.version
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: spec if name == "triton" else find(name, *a))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found if name == "triton" else version(name))
    message = refused(LAYER)
    for text in ("3.6", found, "pip install"):
        assert text in message
    module = lstmcore.LSTM(3, 4, backend="triton")
    with pytest.raises(RuntimeError, match=r"Triton 3\.6 or newer.*pip install"):
        module(X)
    assert lstmcore.LSTM(3, 4)(X)[0].shape == (5, 2, 4)


def test_triton_is_new_enough(fresh_choices, monkeypatch, compiled_triton):
    """Versions are numbers: 3.10 is newer than 3.6, and what a build adds to one says nothing."""
    for found in ("3.6.0", "3.10.0", "4.0", "3.9.0+git1234"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, found=found: found)
        backends.load.cache_clear()
        assert backends.load("triton") is compiled_triton


def test_a_broken_triton_is_reported(fresh_choices, monkeypatch):
    """One that is there and cannot be imported: the reason is passed on."""

    real = importlib.import_module

    def fail(name):
        if name == "lstmcore.kernels.gpu.backend":
            raise ImportError("libtriton.so: undefined symbol")
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.9.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", fail)
    assert "undefined symbol" in refused(LAYER)


def test_auto_does_not_load_triton_for_the_cpu(fresh_choices, monkeypatch):
    load, loaded = backends.load, []
    monkeypatch.setattr(choice, "load", lambda name: loaded.append(name) or load(name))
    module = lstmcore.LSTM(3, 17)
    for steps in (5, 200):
        for extended in (False, True):
            lstmcore.explain(module, torch.randn(steps, 2, 3), extended=extended)
    module(X)
    assert loaded
    assert "triton" not in loaded
    reasons = dict(lstmcore.explain(module, X).reasons)
    assert "cuda" in reasons["triton"]
    assert "cpu" in reasons["triton"]


def test_opaque_tensors(gpu):
    assert "subclasses" in refused(LAYER, opaque=True)

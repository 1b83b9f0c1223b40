"""``recompute=``: backward from the states between segments, with the results of one that kept everything.

T time, B batch, I input, H hidden, P projection, L layers, D directions, S steps of a segment.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import nn

import lstmcore
from lstmcore import backends
from lstmcore import recompute as recomputing

from ..support.cases import BY_NAME, DTYPES, build, draw
from ..support.cases import run as run_case
from ..support.modules import kept, results
from ..support.tolerances import ORDER_OF_SUMS, error

CASES = ["ones", "one_row", "h17", "h129", "b33", "long", "no_hx", "batch_first", "proj_bidirectional", "everything"]
CASES += ["layers_bidirectional", "unbatched_all", "sliced", "expanded", "packed_everything", "packed_long"]
T, B, I, H = 23, 4, 3, 17


def assert_the_same(got, expected) -> None:
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits(name, dtype, monkeypatch):
    case, dtype = BY_NAME[name], DTYPES[dtype]
    data = draw(case, dtype)
    expected = run_case(case, data, dtype, "numba")
    for segment in (1, 4, 1000):
        monkeypatch.setattr(lstmcore.LSTM, "__init__", _told(recompute=segment))
        assert build(case, data, dtype, "numba").recompute == segment
        got = run_case(case, data, dtype, "numba")
        monkeypatch.undo()
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(got[key], value), (segment, key)


def _told(**more):
    original = lstmcore.LSTM.__init__
    return lambda self, *args, **kwargs: original(self, *args, **kwargs, **more)


@pytest.mark.parametrize("segment", [1, 7, 23])
@pytest.mark.parametrize(
    "options",
    [
        {"lengths": torch.tensor([5, 23, 0, 11])},
        {"reset": torch.arange(T * B).view(T, B) % 7 == 0},
        {"return_cells": "all", "lengths": [23, 23, 2, 1], "reset": torch.arange(T * B).view(T, B) % 5 == 0},
    ],
    ids=["lengths", "reset", "all"],
)
def test_what_torch_does_not_have(options, segment):
    module = lstmcore.LSTM(I, H, 2, bidirectional=True, proj_size=6, dropout=0.4, backend="numba")
    given = torch.randn(T, B, I), torch.randn(4, B, 6), torch.randn(4, B, H)
    expected = results(module, *given, **options)
    module.recompute = segment
    assert_the_same(results(module, *given, **options), expected)


@pytest.mark.parametrize("threads_", [1, 2, 5])
def test_any_number_of_threads(threads_, threads, monkeypatch):
    from lstmcore.kernels.cpu import tiling

    monkeypatch.setattr(tiling, "WORTH_A_THREAD", 1)
    module = lstmcore.LSTM(24, 96, bidirectional=True, backend="numba")
    x = torch.randn(40, 34, 24)
    threads(1)
    expected = results(module, x)
    threads(threads_)
    module.recompute = 6
    assert_the_same(results(module, x), expected)


def test_against_torch():
    theirs = nn.LSTM(I, H, 2, dtype=torch.float64)
    for backend in ("numba", "reference"):
        ours = lstmcore.LSTM(I, H, 2, dtype=torch.float64, backend=backend, recompute=5)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(T, B, I, dtype=torch.float64)
        for got, expected in zip(results(ours, x), results(theirs, x), strict=True):
            assert error(got, expected) <= ORDER_OF_SUMS * max(1.0, expected.abs().max().item())


def bytes_of(module, x) -> int:
    return kept(module, x)[1]


def test_memory_grows_with_the_borders_only():
    x = torch.randn(1024, 2, I)
    module = lstmcore.LSTM(I, 16, backend="numba")
    assert bytes_of(module, x) >= 1024 * 2 * 5 * 16 * 4
    module.recompute = 32
    assert bytes_of(module, x) == 32 * 2 * 2 * 16 * 4
    assert bytes_of(module, x[:512]) == 16 * 2 * 2 * 16 * 4
    with torch.no_grad():
        assert bytes_of(module, x) == 0


def test_auto_keeps_what_fits():
    x = torch.randn(256, 2, I)
    module = lstmcore.LSTM(I, 16, backend="numba")
    whole = bytes_of(module, x)
    module.recompute = "auto"
    assert bytes_of(module, x) == whole  # a little: nobody asks how much memory there is
    module.memory_budget = whole
    assert bytes_of(module, x) == whole
    expected = results(module, x)
    module.memory_budget = whole - 1
    assert 0 < bytes_of(module, x) < whole // 4
    assert_the_same(results(module, x), expected)


@pytest.mark.parametrize("layers", [1, 3])
def test_auto_grows_with_the_root_of_the_steps(layers):
    """Segments and their number both: sixteen times the steps need four times the memory."""
    cpu = torch.device("cpu")
    sizes = [
        recomputing._Sizes.of(lstmcore.kernels.contract.Layer(cpu, torch.float32, steps, 64, 64, 256), layers)
        for steps in (4096, 65536)
    ]
    short, long = (each.kept(each.segment(0)) for each in sizes)
    assert 3.8 < long / short < 4.2
    for each in sizes:
        best = min(each.kept(segment) for segment in range(1, 2000))
        assert each.kept(each.segment(0)) <= 1.02 * best


def test_auto_asks_how_much_memory_there_is(monkeypatch):
    x = torch.randn(256, 2, I)
    module = lstmcore.LSTM(I, 16, backend="numba", recompute="auto")
    whole = bytes_of(module, x)
    monkeypatch.setattr(recomputing, "UNASKED", 0)
    monkeypatch.setattr(recomputing, "available", lambda device: 8 * whole)
    assert bytes_of(module, x) == whole
    monkeypatch.setattr(recomputing, "available", lambda device: 2 * whole)
    assert bytes_of(module, x) < whole // 4
    monkeypatch.setattr(recomputing, "available", lambda device: 0)  # nobody's budget: it does what it can
    assert bytes_of(module, x) < whole // 4


def test_memory_that_is_available(tmp_path, monkeypatch):
    memory = recomputing.available(torch.device("cpu"))
    assert 1 << 20 < memory < 1 << 50
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable: 70 kB\n")
    monkeypatch.setattr(recomputing, "_MEMINFO", meminfo)
    monkeypatch.setattr(recomputing, "_CGROUP", tmp_path)
    assert recomputing.available(torch.device("cpu")) == 70 << 10
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert recomputing.available(torch.device("cpu")) == 70 << 10
    (tmp_path / "memory.max").write_text("5000\n")
    assert recomputing.available(torch.device("cpu")) == 4995
    (tmp_path / "memory.current").write_text("4000\n")  # most of it of files, which the system drops when asked
    (tmp_path / "memory.stat").write_text("anon 900\nfile 3100\ninactive_file 3000\nactive_file 100\n")
    assert recomputing.available(torch.device("cpu")) == 4000
    meminfo.unlink()
    assert recomputing.available(torch.device("cpu")) == 4000


@pytest.mark.parametrize("segment", [1 << 31, (1 << 52) + 5, (1 << 63) - 1, 10**30])
def test_a_segment_longer_than_any_sequence(segment):
    module, x = lstmcore.LSTM(I, H, backend="numba", recompute=T), torch.randn(T, B, I)
    expected = results(module, x)
    module.recompute = segment
    assert_the_same(results(module, x), expected)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"recompute": 0}, ValueError, "recompute should be None, 'auto' or a number of steps, at least 1, got: 0"),
        ({"recompute": -5}, ValueError, "at least 1, got: -5"),
        ({"recompute": 2.0}, TypeError, "recompute should be None, 'auto' or a number of steps, got: 2.0"),
        ({"recompute": True}, TypeError, "got: True"),
        ({"recompute": "always"}, TypeError, "got: 'always'"),
        ({"memory_budget": 5}, ValueError, "memory_budget goes with recompute='auto', got recompute=None"),
        ({"recompute": 5, "memory_budget": 5}, ValueError, "goes with recompute='auto', got recompute=5"),
        ({"recompute": "auto", "memory_budget": 0}, ValueError, "a number of bytes, at least 1, got: 0"),
        ({"recompute": "auto", "memory_budget": "1 GiB"}, TypeError, "a number of bytes, got: '1 GiB'"),
    ],
    ids=str,
)
def test_bad_values(given, error, message):
    with pytest.raises(error, match=message):
        lstmcore.LSTM(I, H, **given)
    module = lstmcore.LSTM(I, H)
    for name, value in given.items():
        setattr(module, name, value)
    with pytest.raises(error, match=message):
        module(torch.randn(T, B, I))


def test_numbers_of_numpy():
    module = lstmcore.LSTM(I, H, backend="numba", recompute=np.int64(5))
    x = torch.randn(T, B, I)
    got = bytes_of(module, x)
    module.recompute = 5
    assert got == bytes_of(module, x) > 0
    module.recompute, module.memory_budget = "auto", np.int32(1 << 30)
    assert bytes_of(module, x) > got


def test_a_budget_too_small():
    module = lstmcore.LSTM(I, H, 2, recompute="auto", memory_budget=1000)
    with pytest.raises(
        RuntimeError, match="memory_budget of 1000 bytes is too small: with recomputing, 2 layers of 23"
    ):
        module(torch.randn(T, B, I))
    with torch.no_grad():
        module(torch.randn(T, B, I))  # nothing is kept


def test_a_backend_without_it():
    module = lstmcore.LSTM(I, H, backend="torch", recompute=5)
    with pytest.raises(RuntimeError, match=r"backend 'torch' cannot run this call: it has no .* recompute"):
        module(torch.randn(T, B, I))
    with torch.no_grad():
        module(torch.randn(T, B, I))
    module.backend = "auto"
    short = torch.randn(1, 1, I)
    assert lstmcore.explain(module, short).name == "numba"
    assert module(short)[0].grad_fn is not None


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, torch.OutOfMemoryError], ids=lambda e: e.__name__)
def test_out_of_memory_names_the_option(error, monkeypatch):
    kernels = backends.load("numba")

    def forward(*args, **kwargs):
        raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(kernels, "forward", forward)
    module = lstmcore.LSTM(I, H, backend="numba")
    with pytest.raises(error, match=r"(?s)tried to allocate 8 bytes.*4 rows.*recompute='auto'"):
        module(torch.randn(T, B, I))
    module.recompute = 4  # it does already
    with pytest.raises(error) as raised:
        module(torch.randn(T, B, I))
    assert "recompute" not in str(raised.value)


def test_another_error_stays_as_it_is(monkeypatch):
    def forward(*args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(backends.load("numba"), "forward", forward)
    with pytest.raises(RuntimeError, match=r"^something else$") as raised:
        lstmcore.LSTM(I, H, backend="numba")(torch.randn(T, B, I))
    assert raised.value.__cause__ is None


def test_recorded():
    records = []
    for segment in (None, 5):
        torch.manual_seed(1)
        module = lstmcore.LSTM(I, H, bidirectional=True, backend="numba", recompute=segment)
        with lstmcore.record_gradient_flow(module) as flow:
            module(torch.randn(T, B, I))[0].square().sum().backward()
        records.append(flow.records[0])
    one, other = records
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(other, name)), name


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_differentiated_again(backend):
    module = lstmcore.LSTM(2, 3, dtype=torch.float64, backend=backend, recompute=2)
    x = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x)[0], x)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], x)
    y = module(x)[0]
    basis = torch.randn(4, *y.shape, dtype=torch.float64)
    (batched,) = torch.autograd.grad(y, x, basis, is_grads_batched=True, retain_graph=True)
    for row, seed in zip(batched, basis, strict=True):
        assert error(row, torch.autograd.grad(y, x, seed, retain_graph=True)[0]) <= ORDER_OF_SUMS


@pytest.mark.slow
@pytest.mark.parametrize("given", [(0, None), (2, [0, 0])], ids=["no rows", "no steps"])
def test_compiled_without_a_token(given):
    rows, lengths = given
    module = torch.compile(lstmcore.LSTM(I, H, backend="numba", recompute=5), backend="aot_eager", fullgraph=True)
    x = torch.randn(T, rows, I)
    more = {} if lengths is None else {"lengths": torch.tensor(lengths)}
    assert not any(grad.any() for grad in results(module, x, **more))


@pytest.mark.slow
def test_compiled_and_transformed():
    module = lstmcore.LSTM(I, H, backend="numba")
    x = torch.randn(T, B, I)
    expected = results(module, x)
    module.recompute = 5
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_the_same(results(compiled, x), expected)
    assert_the_same(results(compiled, x[:11]), results(module, x[:11]))
    module.recompute, module.memory_budget = "auto", 4000
    assert_the_same(results(torch.compile(module, backend="aot_eager", fullgraph=True), x), expected)

    parameters = dict(module.named_parameters())
    module.recompute, module.memory_budget = 5, None

    def loss(parameters, row):
        return torch.func.functional_call(module, parameters, (row,))[0].square().sum()

    each = torch.vmap(torch.func.grad(loss), (None, 1))(parameters, x)
    module.recompute = None
    whole = torch.vmap(torch.func.grad(loss), (None, 1))(parameters, x)
    for name, value in whole.items():
        assert torch.equal(each[name], value), name


def test_shown_copied_and_loaded():
    module = lstmcore.LSTM(I, H, recompute="auto", memory_budget=10**9)
    assert "recompute='auto', memory_budget=1000000000" in repr(module)
    again = pickle.loads(pickle.dumps(module))
    assert (again.recompute, again.memory_budget) == ("auto", 10**9)
    assert "recompute" not in repr(lstmcore.LSTM(I, H))
    assert lstmcore.LSTM(I, H).state_dict().keys() == module.state_dict().keys()

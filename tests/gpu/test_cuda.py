"""The Triton backend on a CUDA device: against float64 and cuDNN, for races, and in what only a GPU has.

The interpreted tests beside this file check what the kernels compute; here it is the compiled code, at the sizes that
the designs are for.  What matters most comes first, and each test is short: a visit to a GPU may be, too.

T time, B batch, I input, H hidden, D directions.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
import time
import warnings

import pytest
import torch
from lstmcore.kernels.contract import Layer
from torch import nn

import lstmcore
from lstmcore import backends
from lstmcore.backends import Situation, rules, self_check

from ..support import contract_checks as checks
from ..support import gpu_problems
from ..support.cases import BY_NAME
from ..support.gpu_designs import use
from ..support.gpu_lengths import Changed, on_device
from ..support.gpu_problems import DEVICE, DTYPES, JITTERS, Layers, OnDevice, draw, ours, precision, run
from ..support.mistakes import assert_same_mistake, raised_by
from ..support.oracle import assert_parity
from ..support.tolerances import NORMS, ORDER_OF_SUMS_F32, assert_library, bound, error

pytestmark = pytest.mark.gpu

WORKERS = 12
COMPILE_S = 70.0  # for the kernels of this file on WORKERS cores; what is not ready then is compiled by its test
RACES_S = 40.0  # for all repetitions
REPETITIONS = 1000  # of a training pass, over all designs


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    """Kernels on disk before the first test; without that, each test compiles its own, one after the other."""
    workers = min(WORKERS, max(1, (os.cpu_count() or 1) - 1))
    if workers > 1:
        root = pathlib.Path(__file__).parents[2]
        commands = [[sys.executable, "-m", "tests.support.gpu_problems", str(i), str(workers)] for i in range(workers)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        processes = [subprocess.Popen(command, cwd=root, **quiet) for command in commands]
        end = time.monotonic() + COMPILE_S
        try:
            for process in processes:
                process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in processes:
                process.kill()
                process.wait()


@pytest.fixture(autouse=True)
def _nobody_gave_up():
    """No test leaves behind that a wait ran out, for another to stumble on."""
    yield
    torch.cuda.synchronize()
    backends.load("triton").status.raise_pending(torch.device("cuda", torch.cuda.current_device()))


def assert_within(p: Layers, got, expected, peer) -> None:
    """No further from float64 than twice cuDNN's own error, and a floor."""
    assert got.keys() == expected.keys()
    wrong = []
    for name, value in expected.items():
        theirs = error(peer[name], value)
        allowed = bound(DTYPES[p.dtype], value, theirs, tf32=p.dtype == "tf32")
        off = error(got[name], value)
        if not off <= allowed:
            wrong.append(f"{name} {tuple(value.shape)}: error {off:.3g}, allowed {allowed:.3g}, torch's {theirs:.3g}")
    assert not wrong, "\n".join([f"{p}:", *wrong])


@pytest.mark.parametrize("p", gpu_problems.PROBLEMS, ids=str)
def test_against_float64_and_cudnn(p):
    """Outputs and every gradient.  What torch's module does not have, the step loop of the reference computes."""
    if p.kind == "wide" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the wide design needs the tensor cores of compute capability 9.0")
    data = draw(p)
    backend = "reference" if p.extended else None
    expected = run(p, data, backend, torch.float64, "cpu")
    peer = run(p, data, backend, DTYPES[p.dtype], DEVICE)
    assert_within(p, ours(p, data), expected, peer)


@pytest.mark.parametrize(("kind", "setup"), gpu_problems.CONTRACT, ids=str)
def test_contract_against_oracle(kind, setup, monkeypatch):
    """Every mask against the row-by-row oracle, cells and norms included, by both designs."""
    use(monkeypatch, kind)
    with precision("fp32"):
        checks.check_against_oracle(OnDevice(), setup, torch.float32)


@pytest.mark.parametrize(("kind", "setup"), gpu_problems.SEGMENTED, ids=str)
def test_segments_against_oracle(kind, setup, monkeypatch):
    """Backward computes again what forward did not keep, with the same results."""
    use(monkeypatch, kind)
    with precision("fp32"):
        checks.check_against_oracle(OnDevice(), setup, torch.float32)
        checks.check_segments(OnDevice(), setup, ORDER_OF_SUMS_F32)


@pytest.mark.parametrize(
    ("kind", "setup"), [(kind, s) for kind, s in gpu_problems.CONTRACT if s.name.startswith("lengths")], ids=str
)
def test_lengths_on_the_device_against_oracle(kind, setup, monkeypatch):
    use(monkeypatch, kind)
    there = Changed(OnDevice(), lambda rows: on_device(rows, torch.device(DEVICE)))
    with precision("fp32"):
        checks.check_against_oracle(there, setup, torch.float32)


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("recompute", [None, 16], ids=["whole", "segments"])
@pytest.mark.parametrize(("H", "P"), [(128, 0), (512, 64)], ids=["resident", "split-proj"])
def test_nothing_waits_for_lengths(H, P, recompute, where):
    """Wherever the lengths are, the host goes on: it would be told otherwise, and its results are the same."""
    torch.manual_seed(0)
    B, T, dtype = 16, 40, torch.bfloat16
    options = {"proj_size": P, "bidirectional": True, "batch_first": True, "recompute": recompute}
    module = lstmcore.LSTM(64, H, **options, device=DEVICE, dtype=dtype, backend="triton")
    x = torch.randn(B, T, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    hx = tuple(torch.randn(2, B, width, device=DEVICE, dtype=dtype, requires_grad=True) for width in (P or H, H))
    seeds = [torch.randn(B, T, 2 * (P or H), device=DEVICE, dtype=dtype), *(torch.randn_like(state) for state in hx)]
    reset = torch.rand(B, T, device=DEVICE) < 0.1
    lengths = torch.arange(B) * 7 % (T + 1)
    wanted = [x, *hx, *module.parameters()]

    def train(lengths: torch.Tensor) -> list[torch.Tensor]:
        output, states = module(x, hx, lengths=lengths, reset=reset)
        return [output, *states, *torch.autograd.grad((output, *states), wanted, seeds)]

    expected = train(lengths)
    given = lengths.to(DEVICE) if where == "device" else lengths
    train(given)  # loads kernels and fills caches, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            seeds[0].sum().item()
        got = train(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    names = ["output", "h_n", "c_n", "input", "h_0", "c_0", *(name for name, _ in module.named_parameters())]
    for name, one, other in zip(names, got, expected, strict=True):
        assert error(one.double(), other.double()) <= 8 * torch.finfo(dtype).eps * other.abs().max(), name
    assert not got[0][lengths == 0].any()


def test_lengths_out_of_range_are_told_later():
    module = lstmcore.LSTM(8, 32, device=DEVICE, backend="triton")
    x = torch.randn(5, 3, 8, device=DEVICE)
    output, _ = module(x, lengths=torch.tensor([5, 6, -1], device=DEVICE))
    assert output[:, 0].isfinite().all()
    assert output[:, 1:].isnan().all()
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="lengths should be from 0 to T"):
        module(x)
    assert module(x)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["resident", "split"])
def test_recorded_gradient_flow(kind, monkeypatch):
    """Norms and gates of a stack, against the step loop in float64 on the CPU."""
    use(monkeypatch, kind)
    oracle = lstmcore.LSTM(9, 48, 2, bidirectional=True, dtype=torch.float64, backend="reference")
    module = lstmcore.LSTM(9, 48, 2, bidirectional=True, device=DEVICE, backend="triton")
    module.load_state_dict(oracle.state_dict())
    oracle.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
    x, lengths = torch.randn(40, 5, 9, dtype=torch.float64), [40, 3, 0, 17, 40]
    flows = []
    with precision("fp32"):
        for each, given in ((oracle, x.float().double()), (module, x.float().to(DEVICE))):
            with lstmcore.record_gradient_flow(each, rows=True) as flow:
                each(given, lengths=lengths)[0].sum().backward()
            flows.append(flow.records)
    for expected, got in zip(*flows, strict=True):
        for name in ("h", "c"):
            wanted = getattr(expected, name).rows
            torch.testing.assert_close(
                getattr(got, name).rows, wanted, rtol=NORMS[torch.float32], atol=0, equal_nan=True
            )
        torch.testing.assert_close(got.gates.mean, expected.gates.mean, rtol=1e-5, atol=0, equal_nan=True)
        torch.testing.assert_close(got.gates.horizon, expected.gates.horizon, rtol=1e-4, atol=0)
        torch.testing.assert_close(got.entering, expected.entering, rtol=1e-5, atol=0, equal_nan=True)


def test_races():
    """The same bits whatever the programs' timing: they sleep in every step, each for a time of its own.

    What is freed between two repetitions is full of NaN, so that a value read before it is written shows.
    """
    designs = [(p, jitter) for p in gpu_problems.RACES for jitter in JITTERS]
    end = time.monotonic() + RACES_S
    done = 0
    for index, (p, jitter) in enumerate(designs):
        data = draw(p)
        expected = gpu_problems.race(p, data, jitter)
        assert_within(p, expected, gpu_problems.race(p, data, 0), expected)
        repeat = Repeat(p, data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backends.load("triton").launch, "JITTER", jitter)
            first = [t.clone() for t in repeat()]
            for name, value in zip(expected, first, strict=True):
                assert_library(value.cpu(), expected[name], name, DTYPES[p.dtype])
            wanted = -(-REPETITIONS * (index + 1) // len(designs))
            while done < wanted:
                patch.setattr(backends.load("triton").launch, "PATIENCE", 4_000_000 + done)  # seeds the delays
                results = repeat()
                same = torch.stack([(a == b).all() for a, b in zip(results, first, strict=True)])
                assert same.all(), (
                    f"{p}, repetition {done}: {[n for n, s in zip(expected, same, strict=True) if not s]}"
                )
                for t in results:
                    t.fill_(torch.nan)
                done += 1
                assert time.monotonic() < end, f"{done} of {REPETITIONS} repetitions in {RACES_S} s"


class Repeat:
    """A training pass of ``p`` on the GPU, again and again."""

    def __init__(self, p: Layers, data, recompute: int | None = None) -> None:
        options = {"dtype": DTYPES[p.dtype], "device": DEVICE, "backend": "triton", "recompute": recompute}
        dtype, self.module = options["dtype"], lstmcore.LSTM(**p.arguments(), **options)
        self.module.load_state_dict(data.state_dict)
        self.x = data.input.to(DEVICE, dtype).requires_grad_()
        self.hx = tuple(s.to(DEVICE, dtype).requires_grad_() for s in data.hx)
        self.seeds = [s.to(DEVICE, dtype) for s in data.seeds]

    def __call__(self) -> list[torch.Tensor]:
        output, states = self.module(self.x, self.hx)
        wanted = [self.x, *self.hx, *self.module.parameters()]
        grads = torch.autograd.grad((output, *states), wanted, self.seeds)
        return [output.detach(), *(s.detach() for s in states), *grads]


@pytest.mark.parametrize("p", gpu_problems.INFERENCE, ids=str)
def test_inference_gives_the_results_of_training(p):
    data = draw(p)
    trained, inferred = ours(p, data), ours(p, data, grad=False)
    for name, value in inferred.items():
        assert_library(value, trained[name], name, DTYPES[p.dtype])


@pytest.mark.parametrize("recompute", [None, 16], ids=["whole", "segments"])
@pytest.mark.parametrize("H", [128, 512], ids=["resident", "split"])
def test_cuda_graph(H, recompute):
    """A captured training step gives what an eager one does, on new data too."""
    p = Layers(H, 16, 40, "bf16")
    repeat = Repeat(p, draw(p), recompute)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            repeat()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = repeat()
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            repeat.x.copy_(torch.randn_like(repeat.x))
        for t in captured:
            t.fill_(torch.nan)
        graph.replay()
        got = [t.clone() for t in captured]
        for index, (one, other) in enumerate(zip(got, repeat(), strict=True)):
            assert_library(one, other, str(index))


def test_two_streams_at_once():
    """Two layers whose programs do not fit the device together, each on a stream of its own."""
    repeats = [Repeat(p, draw(p)) for p in (Layers(1024, 16, 400, "bf16"), Layers(256, 17, 400, "bf16"))]
    expected = [[t.clone() for t in repeat()] for repeat in repeats]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in repeats]
    for _ in range(10):
        results = []
        for stream, repeat in zip(streams, repeats, strict=True):
            with torch.cuda.stream(stream):
                results.append(repeat())
        torch.cuda.synchronize()
        for got, wanted in zip(results, expected, strict=True):
            for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
                assert_library(one, other, str(index))  # cuBLAS promises no bits across streams


@pytest.mark.parametrize(("kind", "setup"), gpu_problems.POISONED, ids=str)
def test_garbage_in_fresh_memory(kind, setup, request, monkeypatch):
    """Nothing that was allocated is read before it is written."""
    use(monkeypatch, kind)
    with precision("fp32"):
        checks.check_garbage_in_fresh_memory(OnDevice(), setup, torch.float32, request)


def test_more_steps_than_16_bits_count():
    """Through two calls as through one: the second starts where the first ended."""
    T, half = 70_001, 40_000
    module = lstmcore.LSTM(8, 64, backend="triton", device=DEVICE)
    x = torch.randn(T, 1, 8, device=DEVICE)
    with torch.no_grad():
        whole, (h_n, c_n) = module(x)
        first, states = module(x[:half])
        second, (h, c) = module(x[half:], states)
    for got, expected in ((torch.cat([first, second]), whole), (h, h_n), (c, c_n)):
        assert error(got, expected) <= 1e-3  # of TF32, whose errors a state forgets within some steps


@pytest.mark.parametrize("name", gpu_problems.CASES)
def test_layouts_and_stacks(name):
    """Cases of the suite's grid: transposed, sliced and expanded tensors, several layers, what has no batch."""
    with precision("fp32"):
        assert_parity(BY_NAME[name], torch.float32, "triton", DEVICE)


@pytest.mark.parametrize(("H", "design"), [(128, "resident"), (512, "split"), (2048, "streamed")])
def test_explain_names_the_design(H, design):
    module = lstmcore.LSTM(64, H, device=DEVICE, dtype=torch.bfloat16, backend="triton")
    x = torch.zeros(10, 16, 64, device=DEVICE, dtype=torch.bfloat16)
    assert design in str(lstmcore.explain(module, x))


def test_auto_runs_the_kernels_where_they_were_measured():
    module = lstmcore.LSTM(64, 512, device=DEVICE, dtype=torch.bfloat16)
    x = torch.zeros(200, 16, 64, device=DEVICE, dtype=torch.bfloat16)
    found = torch.cuda.get_device_properties(DEVICE)
    expected = "triton" if (found.name, found.multi_processor_count) == rules.CUDNN_MEASURED_ON else "torch"
    assert f"backend {expected!r} runs this call" in str(lstmcore.explain(module, x))


@pytest.mark.parametrize("H", [128, 512], ids=["resident", "split"])
def test_autocast(H):
    """Float32 parameters under autocast: outputs in its dtype, gradients in float32; cuDNN's outputs are float16."""
    torch.manual_seed(0)
    theirs = nn.LSTM(64, H, device=DEVICE)
    module = lstmcore.LSTM(64, H, device=DEVICE, backend="triton")
    module.load_state_dict(theirs.state_dict())
    x = torch.randn(40, 16, 64, device=DEVICE)
    results = []
    for m in (module, theirs):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output, states = m(x)
        output.float().square().sum().backward()  # a mean's gradients underflow in cuDNN's float16
        results.append((output, *states, *(q.grad for q in m.parameters())))
    for index, (got, expected) in enumerate(zip(*results, strict=True)):
        assert got.dtype == (torch.bfloat16 if index < 3 else torch.float32)
        assert error(got.double(), expected.double()) <= 8 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


def peak_of_a_training_step(p: Layers, module: nn.Module) -> float:
    """MiB, beyond inputs and parameters."""
    x = torch.randn(p.T, p.B, p.I, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    peak = 0
    for _ in range(2):  # the first one fills what is kept for good: handles, workspaces
        module.zero_grad(set_to_none=True)
        x.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        module(x)[0].sum().backward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    return peak / 2**20


def test_memory_of_a_training_step():
    """No more than cuDNN's."""
    p = Layers(512, 64, 256, "bf16", I=512)
    peaks = []
    for make, options in ((lstmcore.LSTM, {"backend": "triton"}), (nn.LSTM, {})):
        module = make(**p.arguments(), device=DEVICE, dtype=torch.bfloat16, **options)
        peaks.append(peak_of_a_training_step(p, module))
    assert peaks[0] <= peaks[1], f"{peaks[0]:.1f} MiB, cuDNN {peaks[1]:.1f} MiB"


@pytest.mark.parametrize("bidirectional", [False, True])
def test_memory_of_segments(bidirectional):
    """Gates, their gradients and cells are ten hidden sizes a token, of which segments keep next to nothing."""
    p = Layers(512, 64, 256, "bf16", bidirectional=bidirectional)
    module = lstmcore.LSTM(**p.arguments(), device=DEVICE, dtype=torch.bfloat16, backend="triton")
    whole = peak_of_a_training_step(p, module)
    module.recompute = 16
    peak = peak_of_a_training_step(p, module)
    assert peak <= whole / 3, f"{peak:.1f} MiB, without segments {whole:.1f} MiB"


@pytest.mark.parametrize("p", gpu_problems.RECOMPUTED, ids=str)
def test_segments_against_float64_and_cudnn(p):
    """In 16 bits, over many segments."""
    data = draw(p)
    expected, peer = run(p, data, None, torch.float64, "cpu"), run(p, data, None, DTYPES[p.dtype], DEVICE)
    assert_within(p, ours(p, data, recompute=32), expected, peer)


X = torch.zeros(5, 2, 3)
STATES = (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
ELSEWHERE = {
    "input": lambda: (X,),
    "states": lambda: (X.cuda(), STATES),
    "c_0": lambda: (X.cuda(), (STATES[0].cuda(), STATES[1])),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_tensors_on_different_devices(name):
    arguments = ELSEWHERE[name]()
    theirs = raised_by(nn.LSTM(3, 4, device=DEVICE), *arguments)
    error = raised_by(lstmcore.LSTM(3, 4, device=DEVICE, backend="triton"), *arguments)
    assert_same_mistake(error, theirs, ("cuda", "cpu"))


def test_another_device():
    """Kernels run where the tensors are, whatever the current device is."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second CUDA device")
    for H in (128, 256):
        module = lstmcore.LSTM(8, H, backend="triton", device="cuda:1")
        x = torch.randn(9, 4, 8, device="cuda:1")
        output, _ = module(x)
        with torch.cuda.device(1):
            same, _ = module(x)
        assert_library(output, same)
        output.sum().backward()
        assert module.weight_hh_l0.grad.device == x.device
        assert torch.cuda.current_device() == 0


def test_the_same_again():
    """Two modules of the same parameters."""
    p = Layers(512, 16, 60, "bf16")
    data = draw(p)
    one, two = ours(p, data), ours(p, data)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert_library(value, two[name], name, torch.bfloat16)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
def test_double_backward_of_cudnn(options):
    """``backend="torch"``: cuDNN's gradient cannot be differentiated, and the hook on its node can."""
    module = lstmcore.LSTM(5, 17, **options, dtype=torch.float32, device=DEVICE, backend="torch")
    judge = nn.LSTM(5, 17, **options, dtype=torch.float64)
    judge.load_state_dict(module.state_dict())
    data, results = torch.randn(6, 6, 5), []
    with precision("fp32"):
        for each, x in ((module, data.to(DEVICE)), (judge, data.double())):
            leaves = [x.requires_grad_(), *each.parameters()]
            output, (h_n, c_n) = each(x)
            loss = output.square().sum() + h_n.sum() + c_n.square().sum()
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            results.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)))
    for got, expected in zip(*results, strict=True):
        # float32 in two passes, of which the second sums squares of the first: ten times the order of one's sums
        assert error(got.cpu().double(), expected) <= 10 * ORDER_OF_SUMS_F32 * max(1.0, expected.abs().max().item())


@pytest.fixture
def unchecked(fresh_choices, monkeypatch):
    """No kernel has been checked on this device, and none was refused."""
    monkeypatch.setattr(self_check, "_verdicts", {})
    monkeypatch.setattr(self_check, "_warned", set())
    kernels = backends.load("triton")
    monkeypatch.setattr(kernels.launch, "_refused", {})
    return kernels


def extended_call(H: int, backend: str = "auto") -> list[torch.Tensor]:
    """What a call with lengths and resets returns, and its gradients."""
    torch.manual_seed(0)
    module = lstmcore.LSTM(16, H, bidirectional=True, device=DEVICE, dtype=torch.bfloat16, backend=backend)
    x = torch.randn(12, 9, 16, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    reset = torch.rand(12, 9, device=DEVICE) < 0.1
    output, states = module(x, lengths=[12, 3, 0, 7, 12, 1, 5, 9, 2], reset=reset)
    loss = output.float().square().sum() + sum(state.float().sum() for state in states)
    return [output, *states, *torch.autograd.grad(loss, [x, *module.parameters()])]


def assert_as_the_reference(H: int) -> None:
    for index, (got, other) in enumerate(zip(extended_call(H), extended_call(H, "reference"), strict=True)):
        assert error(got.double(), other.double()) <= 8 * torch.finfo(torch.bfloat16).eps * other.abs().max(), index


@pytest.mark.parametrize("H", [48, 512], ids=["resident", "split"])
@pytest.mark.parametrize("surroundings", [None, "inference_mode", "default_device", "stream"])
def test_extended_calls_run_the_kernels_after_a_check(unchecked, H, surroundings):
    """On whatever GPU this is, without a warning, and where the caller's modes are not those of a check."""
    module = lstmcore.LSTM(16, H, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(12, 9, 16, device=DEVICE, dtype=torch.bfloat16)
    mode = {
        None: contextlib.nullcontext,
        "inference_mode": torch.inference_mode,
        "default_device": lambda: torch.device(DEVICE),
        "stream": lambda: torch.cuda.stream(torch.cuda.Stream()),
    }[surroundings]
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    with warnings.catch_warnings(), mode():
        warnings.simplefilter("error", RuntimeWarning)
        choice = lstmcore.explain(module, x, extended=True)
    assert choice.name == "triton", choice
    assert "checked here against the reference" in str(choice)
    for one, other in zip(before, (torch.get_rng_state(), torch.cuda.get_rng_state()), strict=True):
        assert torch.equal(one, other)
    if surroundings is None:
        assert_as_the_reference(H)


@pytest.mark.parametrize(("dtype", "precise"), [("bf16", "tf32"), ("fp16", "tf32"), ("tf32", "tf32"), ("fp32", "fp32")])
@pytest.mark.parametrize(("H", "B"), [(64, 16), (128, 5), (512, 17), (1024, 64)])
def test_right_kernels_pass_their_check(unchecked, dtype, precise, H, B):
    layer = Layer(torch.device(DEVICE, 0), DTYPES[dtype], 100, B, 64, H, training=True)
    with precision(precise):
        assert self_check.refusal("triton", layer, extended=True) is None


def test_a_wrong_kernel_is_refused_and_the_call_is_right(unchecked, monkeypatch):
    forward = unchecked.forward

    def wrong(call, **options):
        result = forward(call, **options)
        result.output[..., 0] *= 1.5
        return result

    monkeypatch.setattr(unchecked, "forward", wrong)
    with pytest.warns(RuntimeWarning, match="output is off by") as caught:
        assert_as_the_reference(64)
    assert len([each for each in caught if "failed their check" in str(each.message)]) == 1


def test_no_check_while_a_graph_is_captured(unchecked):
    layer = Layer(torch.device(DEVICE, 0), torch.bfloat16, 20, 9, 16, 64, ragged=True)
    x, graph = torch.ones(3, device=DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x + 1
        passing = backends.choose("auto", (layer,), Situation(extended=True))
    assert passing.name == "reference"
    assert "make one such call before the capture" in str(passing)
    graph.replay()
    assert y.tolist() == [2, 2, 2]
    assert backends.choose("auto", (layer,), Situation(extended=True)).name == "triton"


def test_more_programs_than_fit_are_launched_step_by_step(unchecked, monkeypatch):
    """The device refuses a cooperative launch; the results are right, and the user is told once."""
    H, B = 256, 4096
    few, many = (lstmcore.LSTM(8, H, device=DEVICE, dtype=torch.bfloat16, backend="triton") for _ in range(2))
    many.load_state_dict(few.state_dict())
    x = torch.randn(3, B, 8, device=DEVICE, dtype=torch.bfloat16)
    expected = few(x)[0]
    monkeypatch.setattr(unchecked.launch, "sms", lambda device: 100_000)
    with pytest.warns(RuntimeWarning, match="at the same time") as caught:
        results = [many(x)[0], many(x)[0]]
    assert len(caught) == 1
    assert "one launch per step" in str(lstmcore.explain(many, x))
    for got in results:
        assert error(got.double(), expected.double()) <= 4 * torch.finfo(torch.bfloat16).eps

"""Before ``"auto"`` takes the Triton kernels on a device, they are checked there against the reference.

Interpreted kernels, made wrong in several ways, on a device whose kernels nobody knows: the CPU.  A wrong kernel is
refused, and the call is right all the same.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from lstmcore.kernels.contract import Layer
from torch.utils._python_dispatch import TorchDispatchMode

import lstmcore
from lstmcore import backends
from lstmcore.backends import Situation, choice, self_check

from ..support import gpu_designs
from ..support.gpu_designs import Share
from ..support.tolerances import ORDER_OF_SUMS_F32, error

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LAYER = Layer(CPU, torch.float32, 4, 2, 3, 9)
TRAINING = LAYER._replace(training=True)
EXTENDED = Situation(extended=True)


@pytest.fixture
def unknown(triton_kernels, fresh_choices, monkeypatch):
    """The Triton backend, first in line on the CPU, where nothing has been checked yet."""
    monkeypatch.setitem(backends.REGISTRY, "triton", replace(backends.REGISTRY["triton"], device="cpu"))
    monkeypatch.setattr(self_check, "_verdicts", {})
    monkeypatch.setattr(self_check, "_warned", set())
    return triton_kernels


def train(backend: str = "auto", H: int = 9) -> list[torch.Tensor]:
    """What a call with lengths and resets returns, and its gradients."""
    torch.manual_seed(3)
    module = lstmcore.LSTM(3, H, backend=backend)
    x, reset = torch.randn(4, 2, 3, requires_grad=True), torch.tensor([[0, 1], [0, 0], [1, 0], [0, 0]]).bool()
    output, (h_n, c_n) = module(x, lengths=[4, 2], reset=reset)
    loss = output.square().sum() + h_n.sum() + c_n.square().sum()
    return [output, h_n, c_n, *torch.autograd.grad(loss, [x, *module.parameters()])]


def assert_right(got: list[torch.Tensor]) -> None:
    for one, other in zip(got, train("reference"), strict=True):
        assert error(one, other) <= ORDER_OF_SUMS_F32 * max(1.0, other.abs().max().item())


def explained() -> lstmcore.Choice:
    module = lstmcore.LSTM(3, 9)
    return lstmcore.explain(module, torch.randn(4, 2, 3), extended=True)


# Kernels that are right


@pytest.mark.parametrize("kind", ["resident", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_right_kernels_pass(unknown, monkeypatch, kind, dtype):
    """In every dtype, also where the interpreter cuts bfloat16 off, with twice the error of a GPU's rounding."""
    gpu_designs.use(monkeypatch, kind if kind == "resident" else None, None if kind == "resident" else Share(units=16))
    layers = [TRAINING._replace(dtype=dtype, directions=2, proj_size=4), TRAINING._replace(dtype=dtype, segment=3)]
    for layer in layers:
        assert self_check.refusal("triton", layer, extended=True) is None
    assert len(self_check._verdicts) == 4


def test_they_run_and_explain_tells(unknown, monkeypatch):
    ran, forward = [], unknown.forward
    monkeypatch.setattr(unknown, "forward", lambda *args, **options: ran.append(1) or forward(*args, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(train())
    assert len(ran) == 3, "the check's two problems, without resets and with them; and the call"
    train()
    assert len(ran) == 4, "the check is made once"
    choice = explained()
    assert choice.name == "triton"
    assert "checked here against the reference: forward resident" in str(choice)


def test_layers_that_run_the_same_kernels_share_a_check(unknown):
    asked = (LAYER, LAYER._replace(steps=99, input_size=7, batch=3), LAYER._replace(directions=2))
    verdicts = []
    for layer in asked:
        assert self_check.refusal("triton", layer, extended=False) is None
        verdicts.append(len(self_check._verdicts))
    assert verdicts == [1, 1, 2]


@pytest.mark.parametrize(("B", "expected"), [(3, 3), (8, 5), (100, 5), (129, 129), (5000, 129)])
def test_a_check_takes_few_rows(unknown, B, expected):
    """As few as have tiles of the same size: 16 rows from 129 on, on a device of 16 multiprocessors."""
    few = self_check._with_few_rows(unknown, LAYER._replace(batch=B))
    assert few == LAYER._replace(batch=expected)
    assert unknown.kernels(few) == unknown.kernels(LAYER._replace(batch=B))


def test_the_check_runs_the_kernels_of_the_call(unknown, monkeypatch):
    """Those of rows that end early, or those of rows that do not; with resets and without."""
    seen = []
    of = unknown.launch.recurrence_of
    monkeypatch.setattr(
        unknown.launch,
        "recurrence_of",
        lambda layer, rows, *rest: seen.append((rows.ragged, rows.reset)) or of(layer, rows, *rest),
    )
    for ragged in (False, True):
        seen.clear()
        assert self_check.refusal("triton", LAYER._replace(ragged=ragged), extended=True) is None
        assert [(each, reset is not None) for each, reset in seen] == [(ragged, False), (ragged, True)]


def test_a_call_without_rows_says_nothing_about_kernels(unknown):
    module = lstmcore.LSTM(3, 9)
    for rows in (0, 2):
        output, _ = module(torch.randn(4, rows, 3), reset=torch.zeros(4, rows, dtype=torch.bool))
        assert output.shape == (4, rows, 9)
    assert set(self_check._verdicts.values()) == {None}
    assert not self_check._warned


def test_dense_calls_are_not_checked_where_another_backend_is_taken(unknown, monkeypatch):
    monkeypatch.setattr(self_check, "_checked", lambda *asked: pytest.fail("nobody needs to know"))
    assert backends.choose("auto", (LAYER,)).name != "triton"
    assert backends.choose("triton", (LAYER,), EXTENDED).name == "triton", "asked for by name, it is not checked"


# Kernels that are wrong


def one_gate(kernels, patch):
    """The gradient of the forget gate's weights, a tenth too large."""
    backward = kernels.backward

    def wrong(call, *rest):
        found = backward(call, *rest)
        found.weights[0].weight_hh[9:18] *= 1.1
        return found

    patch.setattr(kernels, "backward", wrong)


def nan(kernels, patch):
    forward = kernels.forward

    def wrong(*args, **options):
        result = forward(*args, **options)
        result.c_n[..., -1] = torch.nan
        return result

    patch.setattr(kernels, "forward", wrong)


def compiler(kernels, patch):
    def wrong(*args, **options):
        raise RuntimeError("PassManager::run failed\n(a page of assembler)")

    patch.setattr(kernels, "forward", wrong)


def resets(kernels, patch):
    """They are not heard of."""
    forward = kernels.forward
    patch.setattr(kernels, "forward", lambda call, **options: forward(call._replace(reset=None), **options))


def back_in_time(kernels, patch):
    """The gradient of what enters, of another step."""
    backward = kernels.backward
    patch.setattr(
        kernels,
        "backward",
        lambda call, *rest: (found := backward(call, *rest))._replace(input=found.input.roll(1, 0)),
    )


def gives_up(kernels, patch):
    forward = kernels.forward

    def wrong(call, **options):
        result = forward(call, **options)
        kernels.status.word(call.layer.device).fill_(1)
        return result

    patch.setattr(kernels, "forward", wrong)


def missing(kernels, patch):
    backward = kernels.backward
    patch.setattr(kernels, "backward", lambda *given: backward(*given)._replace(norms=None))


SABOTAGE = {
    one_gate: "the gradient of weight_hh is off by",
    nan: "c_n is off by nan",
    compiler: "RuntimeError: PassManager::run failed",
    resets: "is off by",
    back_in_time: "the gradient of input is off by",
    gives_up: "gave up waiting",
    missing: "norms is missing",
}


@pytest.mark.parametrize("sabotage", SABOTAGE, ids=lambda each: each.__name__)
def test_a_wrong_kernel_is_refused_and_the_call_is_right(unknown, monkeypatch, sabotage):
    sabotage(unknown, monkeypatch)
    with pytest.warns(RuntimeWarning, match="failed their check against the reference on cpu") as caught:
        results = [train(), train(), explained().name]
    assert len(caught) == 1
    assert_right(results[0])
    assert_right(results[1])
    assert results[2] != "triton"
    assert SABOTAGE[sabotage] in str(caught[0].message)
    assert "assembler" not in str(caught[0].message)
    module = lstmcore.LSTM(3, 9)
    reason = dict(lstmcore.explain(module, torch.randn(4, 2, 3), extended=True).reasons)["triton"]
    assert "failed its check against the reference on cpu" in reason
    assert SABOTAGE[sabotage] in reason
    unknown.status.raise_pending(CPU)  # nothing of the check is left for a call to stumble on


def test_wrong_in_backward_only(unknown, monkeypatch):
    """Inference has nothing to fear."""
    one_gate(unknown, monkeypatch)
    assert backends.choose("auto", (LAYER,), EXTENDED).name == "triton"
    with pytest.warns(RuntimeWarning):
        assert backends.choose("auto", (TRAINING,), EXTENDED).name != "triton"


def test_wrong_with_resets_only(unknown, monkeypatch):
    """Calls of dense rows without them are left to what was measured."""
    resets(unknown, monkeypatch)
    assert self_check.refusal("triton", LAYER, extended=False) is None
    with pytest.warns(RuntimeWarning):
        assert "off by" in self_check.refusal("triton", LAYER, extended=True)


def test_a_wrong_design_is_refused_alone(unknown, monkeypatch):
    forward = unknown.forward

    def wrong(call, **options):
        result = forward(call, **options)
        if call.layer.hidden_size == 9:
            result.output.mul_(1.5)
        return result

    monkeypatch.setattr(unknown, "forward", wrong)
    with pytest.warns(RuntimeWarning):
        names = [backends.choose("auto", (LAYER._replace(hidden_size=H),), EXTENDED).name for H in (9, 8)]
    assert names[0] != "triton"
    assert names[1] == "triton"


def test_a_warning_that_is_an_error_is_raised_once(unknown, monkeypatch):
    nan(unknown, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="c_n is off by nan"):
            train()
        assert_right(train())


def test_in_a_graph_the_very_call_counts(unknown, monkeypatch):
    """A graph's backend is chosen for any number of rows; kernels that are wrong for these are not run."""
    ran, forward = [], unknown.forward
    monkeypatch.setattr(unknown, "forward", lambda call, **rest: ran.append(call.layer.batch) or forward(call, **rest))
    monkeypatch.setattr(
        self_check, "refusal", lambda name, layer, extended: "wrong for two rows" if layer.batch == 2 else None
    )
    module = lstmcore.LSTM(3, 9)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for rows in (2, 3):
        x, lengths = torch.randn(4, rows, 3), torch.tensor([4, 2, 1][:rows])
        output, _ = compiled(x, lengths=lengths)
        output.sum().backward()
        grads = [param.grad.clone() for param in module.parameters()]
        module.zero_grad()
        module.backend = "reference"
        expected, _ = module(x, lengths=lengths)
        expected.sum().backward()
        for got, other in zip([output, *grads], [expected, *(p.grad for p in module.parameters())], strict=True):
            assert error(got, other) <= ORDER_OF_SUMS_F32 * max(1.0, other.abs().max().item())
        module.zero_grad()
        module.backend = "auto"
    assert set(ran) == {3}


# When no check can be made


def test_what_cannot_be_known_now_is_not_remembered(unknown, monkeypatch):
    real, graph = self_check._checked, {"in_graph": None}

    def not_now(*asked):
        raise self_check.Undecided("not now")

    monkeypatch.setattr(self_check, "_checked", not_now)
    ragged = LAYER._replace(ragged=True)
    for _ in range(2):
        passing = backends.chosen("auto", ragged, 1, EXTENDED)
        assert passing.name != "triton"
        assert dict(passing.reasons)["triton"] == "not now"
        graph["in_graph"] = backends.in_graph("auto", ragged, True)
    assert not backends.runs_in_graph("auto", "triton", ragged, True)
    monkeypatch.setattr(self_check, "_checked", real)
    assert backends.chosen("auto", ragged, 1, EXTENDED).name == "triton"
    assert backends.choose("auto", (ragged,), EXTENDED).name == "triton"
    # what a graph's forward was told, its backward is told too
    assert backends.in_graph("auto", ragged, True) == graph["in_graph"] != "triton"
    assert not backends.runs_in_graph("auto", "triton", ragged, True)


def test_no_memory_is_no_verdict(unknown, monkeypatch):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(unknown, "forward", fail)
        passing = backends.choose("auto", (LAYER,), EXTENDED)
        assert passing.name != "triton"
        assert "no memory to check its kernels: CUDA out of memory" in dict(passing.reasons)["triton"]
    assert backends.choose("auto", (LAYER,), EXTENDED).name == "triton"


def test_not_while_a_graph_is_captured(unknown, monkeypatch):
    there = LAYER._replace(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(unknown, "settle", lambda device: pytest.fail("waiting ends a capture"))
    with pytest.raises(self_check.Undecided, match="one such call before the capture"):
        self_check._checked(unknown, there, True, 0.0)


def test_what_a_compiler_says():
    """Triton's errors begin with a place, show the source, and end with what is wrong."""
    said = {
        "at 3:7:\n    x = y\n        ^\nthe shapes differ": "at 3:7: the shapes differ",
        "a\nb": "a",
        "": "no message",
    }
    for text, expected in said.items():
        assert self_check._first_line(RuntimeError(text)) == expected


def test_a_lost_device_is_told(unknown, monkeypatch):
    """Not that of a design that is refused: nothing else will run there either."""

    def lost(*device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    there = LAYER._replace(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(unknown, "settle", lambda device: None)  # before the check it was well
    monkeypatch.setattr(self_check, "_difference", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        self_check._in_a_thread(lambda: self_check._wrong(unknown, there, True, 0.0))


def test_the_error_of_an_earlier_call_is_the_callers(unknown):
    unknown.status.word(CPU).fill_(1)
    with pytest.raises(RuntimeError, match="an earlier call on cpu gave up waiting"):
        train()
    assert not self_check._verdicts
    assert_right(train())
    assert explained().name == "triton"


# The caller's surroundings


class NothingRuns(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        pytest.fail(f"{func} ran where the caller would see it")


def unsaved(tensor):
    pytest.fail("a tensor was saved where the caller would see it")


@contextlib.contextmanager
def defaults():
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def strict():
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.detect_anomaly(check_nan=True):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "defaults": defaults,
    "dispatch_mode": NothingRuns,
    "saved_tensors": lambda: torch.autograd.graph.saved_tensors_hooks(unsaved, unsaved),
    "deterministic": strict,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_the_callers_surroundings(unknown, name):
    """They do not reach the check, nor does it touch them."""
    before = torch.get_rng_state()
    with SURROUNDINGS[name]():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        assert self_check.refusal("triton", TRAINING, extended=True) is None
        assert modes == (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_under_a_transform(unknown):
    """The choice is made inside of it."""
    module = lstmcore.LSTM(3, 9)
    x = torch.randn(2, 4, 3)
    got = torch.vmap(lambda row: module(row, reset=torch.tensor([0, 0, 1, 0]).bool())[0])(x)
    module.backend = "reference"
    expected = torch.stack([module(row, reset=torch.tensor([0, 0, 1, 0]).bool())[0] for row in x])
    assert error(got, expected) <= ORDER_OF_SUMS_F32
    assert self_check._verdicts
    assert not any(self_check._verdicts.values())


def test_two_threads_ask_at_once(unknown, monkeypatch):
    checked, real, ready = [], self_check._checked, threading.Barrier(2)

    def count(*asked):
        checked.append(asked)
        return real(*asked)

    monkeypatch.setattr(self_check, "_checked", count)
    names = []

    def ask():
        ready.wait()
        names.append(backends.choose("auto", (LAYER._replace(ragged=True),), EXTENDED).name)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == ["triton", "triton"]
    assert len(checked) == 2, "one check of each problem, for both"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_during_a_check(unknown, monkeypatch):
    """The child does not wait for a check that only the parent makes."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # the child could not use others

    def fork(*asked):
        child = os.fork()
        if child == 0:
            free = self_check._lock.acquire(blocking=False)
            os._exit(0 if free else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        return None

    held = threading.Thread(target=self_check.refusal, args=("triton", LAYER, False))
    monkeypatch.setattr(self_check, "_checked", fork)
    held.start()
    held.join()
    assert list(self_check._verdicts.values()) == [None]


def test_no_thread_to_be_had(unknown, monkeypatch):
    def fail(*given):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(self_check.process, "start_thread", fail)
    passing = backends.choose("auto", (LAYER,), EXTENDED)
    assert "can't start new thread" in dict(passing.reasons)["triton"]
    assert choice.CHECKED not in str(passing)

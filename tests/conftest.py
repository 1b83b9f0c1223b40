"""Fixtures of the whole suite."""

from __future__ import annotations

import faulthandler
import os
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import settings
from lstmcore.kernels.cpu import threads as kernel_threads

from lstmcore import backends
from lstmcore.backends import self_check, tuning

pytest.register_assert_rewrite("tests.support")  # its checks tell as much as a test's own lines

# Triton decides when it is imported whether kernels are compiled or interpreted, so this comes before any test.  Where
# there is no CUDA device nothing else could run them; where there is one they are compiled: tests/gpu/test_cuda.py.
INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


HANG = 240.0  # seconds for one test, compilation included; a kernel that spins cannot be interrupted otherwise
MOST_WORKERS = 8  # of pytest-xdist: beyond, a run takes as long as its tests that are marked serial
WORKER = "PYTEST_XDIST_WORKER" in os.environ
USUAL_THREADS = torch.get_num_threads()
_watchdog_output = []


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What ``-n auto`` starts: a worker a core, and where there is one core, none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS) if cores > 1 else 0


def pytest_configure() -> None:
    _watchdog_output.append(os.fdopen(os.dup(2), "w"))  # the real stderr: capturing is suspended here


def pytest_unconfigure() -> None:
    _watchdog_output.pop().close()


@pytest.fixture(autouse=True)
def _watchdog():
    """A test that hangs ends the run with the tracebacks of all threads, instead of hanging it.

    A worker of pytest-xdist ends; that its loss ends the run is an option of the command line, which the Makefile has.
    """
    faulthandler.dump_traceback_later(HANG, exit=True, file=_watchdog_output[0])
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True, scope="session")
def _not_tuned():
    """What was tuned on this machine, or is committed for it, does not decide what runs in a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "directory", lambda: pathlib.Path("nothing was tuned"))
        patch.setattr(tuning, "COMMITTED", pathlib.Path("nothing is committed"))
        yield


@pytest.fixture
def tuned_here(monkeypatch, fresh_choices, tmp_path):
    """An empty directory of tables of this machine, and one of the package's; returns the first."""
    here = tmp_path / "kernels" / "tuned"
    monkeypatch.setattr(tuning, "directory", lambda: here)
    monkeypatch.setattr(tuning, "COMMITTED", tmp_path / "measured")
    return here


@pytest.fixture(autouse=True)
def _torchs_threads(request: pytest.FixtureRequest) -> None:
    """Workers of pytest-xdist share the cores, so torch has one thread in each; tests marked serial have the usual.

    Of the small problems of most tests hardly one is worth a second thread to the kernels (17 of 3,000 in contract/,
    module/ and flow/ were), while torch's own threads spin for each other; beside another worker the tests took ten
    times as long on two.  That work is shared out rightly is for tests that set the number themselves:
    cpu/test_shared_out.py, cpu/test_determinism.py, module/test_fuzz.py.
    """
    if not WORKER:
        return
    serial = request.node.get_closest_marker("serial") is not None
    if serial and "@serial" not in request.node.nodeid:  # as with pytest 9.2, where pytest-xdist 3.8 is silent
        pytest.fail("tests marked serial would run beside each other: use --dist loadgroup, and constraints.txt")
    torch.set_num_threads(USUAL_THREADS if serial else 1)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker("serial")
            if not torch.cuda.is_available():
                reason = f"needs an NVIDIA GPU: torch {torch.__version__} finds no CUDA device here"
                item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("serial"):
            item.add_marker(pytest.mark.xdist_group("serial"))


@pytest.fixture(params=["numba", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """The backends whose arithmetic is ours."""
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def triton_kernels(monkeypatch):
    """The module of the Triton backend, its kernels interpreted on the CPU; no test hears what another left behind."""
    if not INTERPRETED:
        pytest.skip("Triton compiles its kernels here, for the CUDA device: tests/gpu/test_cuda.py runs them")
    try:
        kernels = backends.load("triton")
    except ImportError as error:
        pytest.skip(f"Triton cannot be used here: {error}")
    for name in ("_words", "_wrong_lengths", "_reported"):
        monkeypatch.setattr(kernels.status, name, {})
    monkeypatch.setattr(kernels.launch, "_refused", {})
    return kernels


@pytest.fixture
def fresh_choices():
    """No choice of a backend is remembered from before, nor will be after: for tests that change what machine it is."""

    def forget() -> None:
        backends.load.cache_clear()
        backends.forget()

    forget()
    yield forget
    forget()


@pytest.fixture
def compiled_triton(monkeypatch, fresh_choices):
    """The Triton backend as users have it, where it says that it is not interpreted (so that it refuses the CPU).

    Its kernels are taken for right on a device that is made up.
    """
    try:
        kernels = backends.load("triton")
    except ImportError as error:
        pytest.skip(f"Triton cannot be used here: {error}")
    for module in (kernels, kernels.launch):
        monkeypatch.setattr(module, "INTERPRETED", SimpleNamespace(value=False))
    monkeypatch.setattr(self_check, "_verdicts", {})
    monkeypatch.setattr(self_check, "_checked", lambda *asked: None)
    return kernels


@pytest.fixture
def gpu_here(compiled_triton, tuned_here, monkeypatch):
    """A made-up GPU that nobody has measured: what is chosen for it, and what its tables say; no kernel runs."""
    found = SimpleNamespace(
        name="NVIDIA Made Up", multi_processor_count=132, major=9, minor=0, shared_memory_per_block_optin=232448
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(compiled_triton.launch, "sms", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def fill_with_nan(x):
    """Fills fresh memory with NaN, and with the bytes of NaN where it is not of a floating type."""
    if isinstance(x, np.ndarray):
        x.view(np.uint8).fill(0xFF) if x.ndim and x.dtype != object else None
    elif x.is_floating_point():
        x.fill_(torch.nan)
    elif x.dtype == torch.uint8:
        x.fill_(0xFF)
    return x


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Every way to allocate without initialising gives NaN."""
    places = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (np, "empty"), (np, "empty_like")]
    places += [(torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided")]
    for owner, name in places:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, _f=original, **kwargs: fill_with_nan(_f(*args, **kwargs)))
    for fresh in (torch.empty(3), torch.ones(1).new_empty(2)):
        assert fresh.isnan().all(), "the poison does not work"


@pytest.fixture
def fresh_plans():
    """What the CPU kernels are told is laid out anew: for tests that change how, or what machine it is."""
    from lstmcore.kernels.cpu import prepare, problem, tiling, wavefront

    forget_each = (
        prepare.forget,
        *(each.cache_clear for each in (wavefront._wavefront, wavefront._worth, wavefront._range)),
        problem.kernels_of.cache_clear,
        tiling.plan.cache_clear,
        tiling.this_core.cache_clear,
    )  # before a test changes them

    def forget() -> None:
        for each in forget_each:
            each()

    forget()
    yield forget
    forget()


@pytest.fixture
def threads(monkeypatch):
    """Sets the number of threads, torch's and the kernels', for the duration of a test.

    More than there are cores, too: the kernels would not use them, but how they share work among so many has to be
    right wherever there are the cores.
    """

    def set_threads(n: int) -> None:
        torch.set_num_threads(n)
        monkeypatch.setattr(kernel_threads, "_cores", lambda: n)

    before = torch.get_num_threads()
    yield set_threads
    torch.set_num_threads(before)

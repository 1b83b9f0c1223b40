"""Fixtures of the whole suite."""

from __future__ import annotations

import faulthandler
import os

import pytest
import torch
from hypothesis import settings
from lstmcore.kernels import threads as kernel_threads

settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


HANG = 240.0  # seconds for one test, compilation included; a kernel that spins cannot be interrupted otherwise
_watchdog_output = []


def pytest_configure() -> None:
    _watchdog_output.append(os.fdopen(os.dup(2), "w"))  # the real stderr: capturing is suspended here


def pytest_unconfigure() -> None:
    _watchdog_output.pop().close()


@pytest.fixture(autouse=True)
def _watchdog():
    """A test that hangs ends the run with the tracebacks of all threads, instead of hanging it."""
    faulthandler.dump_traceback_later(HANG, exit=True, file=_watchdog_output[0])
    yield
    faulthandler.cancel_dump_traceback_later()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=f"needs an NVIDIA GPU: torch {torch.__version__} finds no CUDA device here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(params=["numba", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """The backends whose arithmetic is ours."""
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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

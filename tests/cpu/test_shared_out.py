"""The contract where every call is shared out among threads, however small, as only large ones are of themselves."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from lstmcore.kernels.cpu import threads as kernel_threads
from lstmcore.kernels.cpu import tiling

from ..support import contract_checks as checks
from ..support.contract import SETUPS


@pytest.fixture(params=[2, 5])
def kernels(request, threads, monkeypatch, fresh_plans):
    """The module of the Numba backend; afterwards it is asserted that there were launches of several members."""
    monkeypatch.setattr(tiling, "WORTH_A_THREAD", 1)
    threads(request.param)
    launched, run = [], kernel_threads.run
    monkeypatch.setattr(kernel_threads, "run", lambda *given: launched.append(given[1].members) or run(*given))
    yield importlib.import_module("lstmcore.kernels.cpu.backend")
    assert max(launched) > 1, "nothing was shared out"


SEVERAL_ROWS = [setup for setup in SETUPS if setup.B > 1]  # what lies in one row is shared out at larger sizes


@pytest.mark.parametrize("setup", SEVERAL_ROWS, ids=str)
def test_against_oracle(kernels, setup):
    checks.check_against_oracle(kernels, setup, torch.float32)


@pytest.mark.parametrize("setup", SEVERAL_ROWS, ids=str)
def test_gate_statistics(kernels, setup):
    checks.check_gates(kernels, replace(setup, dtype=torch.float64), 3, 1e-12)


@pytest.mark.parametrize("setup", SEVERAL_ROWS, ids=str)
def test_garbage_in_fresh_memory(kernels, setup, request):
    checks.check_garbage_in_fresh_memory(kernels, setup, torch.float32, request)

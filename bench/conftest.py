"""Options of ``pytest bench/``."""

from __future__ import annotations

import pytest

from bench.cases import select
from bench.providers import PROVIDERS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-all", action="store_true", help="every case of the registry, not only the quick ones")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark for each case, mode and provider, which make its name: dense-h64-b8-t1000-training-torch."""
    if not {"case", "mode", "provider"} <= set(metafunc.fixturenames):
        return

    parameters = [
        pytest.param(case, mode, provider, id=f"{case.name}-{mode}-{provider}")
        for case in select(quick=not metafunc.config.getoption("--bench-all"))
        for mode in case.modes
        for provider in PROVIDERS
    ]
    metafunc.parametrize(("case", "mode", "provider"), parameters)

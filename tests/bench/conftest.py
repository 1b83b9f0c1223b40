"""Fixtures of the benchmark's tests."""

from __future__ import annotations

from unittest import mock

import pytest

from bench import cases, measure, timing
from bench.cases import Case


@pytest.fixture
def short_samples(monkeypatch):
    """What is timed is of no interest."""
    monkeypatch.setattr(timing, "SAMPLE_S", 0.0)
    monkeypatch.setattr(timing, "PAUSE_S", 0.0)


@pytest.fixture
def registry():
    """Makes the registry hold the given cases, and nothing else."""
    with mock.patch.dict(cases.CASES):

        def only(*these: Case) -> None:
            cases.CASES.clear()
            cases.CASES.update({case.name: case for case in these})

        yield only
    measure.forget()

"""The cases as pytest-benchmark entries, for tracking regressions: ``pytest bench/ --benchmark-json=out/bench.json``.

Providers run one after the other here; for a ratio between them use ``python -m bench``, which alternates.
"""

from __future__ import annotations

from functools import lru_cache

from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import Case
from bench.providers import OURS, PEER, Problem, Runner, algorithm, build, draw
from bench.verify import Verdict, check


@lru_cache(maxsize=1)  # the modes and providers of a case follow each other; keeping more would keep their memory
def checked(case: Case) -> tuple[Problem, dict[str, Runner], dict[str, Verdict]]:
    """Both providers on a case, after a check that they agree: no figure for a wrong result."""
    problem = draw(case)
    runners = {OURS: build(OURS, problem), PEER: build(PEER, problem)}
    return problem, runners, check(problem, runners[OURS], runners[PEER], case.modes)


def test_case(benchmark: BenchmarkFixture, case: Case, mode: str, provider: str) -> None:
    _, runners, verdicts = checked(case)
    benchmark.group = f"{case.name} {mode}"
    benchmark.extra_info.update(
        backend=algorithm(provider, case, mode), gflop=case.flops(mode) / 1e9, max_error=verdicts[mode].max_error
    )
    # Three rounds at most for long cases: the entries track regressions, they do not judge a ratio.
    benchmark.pedantic(getattr(runners[provider], mode), rounds=5 if case.flops(mode) < 2e10 else 3, warmup_rounds=1)

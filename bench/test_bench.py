"""The cases as pytest-benchmark entries, for tracking regressions: ``pytest bench/ --benchmark-json=out/bench.json``.

Providers run one after the other here; for a ratio between them use ``python -m bench``, which alternates.
"""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import Case
from bench.measure import checked
from bench.providers import OURS, algorithm


def test_case(benchmark: BenchmarkFixture, case: Case, mode: str, provider: str) -> None:
    both = checked(case, case.modes)
    benchmark.group = f"{case.name} {mode}"
    benchmark.extra_info.update(
        backend=algorithm(provider, case, mode), gflop=case.flops(mode) / 1e9, max_error=both.verdicts[mode].max_error
    )
    runner = both.ours if provider == OURS else both.peer
    # Three rounds at most for long cases: the entries track regressions, they do not judge a ratio.
    benchmark.pedantic(getattr(runner, mode), rounds=5 if case.flops(mode) < 2e10 else 3, warmup_rounds=1)

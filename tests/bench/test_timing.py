"""The timer of the benchmark: in what order things run, and what counts."""

from __future__ import annotations

from bench import timing


def test_behind_an_operation(monkeypatch):
    """Each timed call stands right behind one of ``before``, whose time does not count; who goes first is drawn."""
    clock, seen = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def does(name: str, seconds: float):
        def call() -> None:
            seen.append(name)
            clock[0] += seconds

        return call

    samples = timing.interleave(
        does("ours", 0.02), does("peer", 0.03), min_pairs=20, budget_s=0.0, before=does("before", 5.0)
    )
    timed = seen[seen.index("before") :]
    assert timed[::2] == ["before"] * 40
    assert sorted(timed[1::2]) == ["ours"] * 20 + ["peer"] * 20
    assert {tuple(timed[at : at + 4 : 2]) for at in range(1, 80, 4)} == {("ours", "peer"), ("peer", "ours")}
    assert all(abs(seconds - 0.02) < 1e-9 for seconds in samples.ours)
    assert all(abs(seconds - 0.03) < 1e-9 for seconds in samples.peer)

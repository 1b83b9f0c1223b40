"""The timer of the benchmark: in what order things run, and what counts."""

from __future__ import annotations

import csv

from bench import results, timing


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


def test_rows_from_before_there_were_settings(tmp_path):
    """Files without the later columns are read as what they were: timed alone."""
    kept = (results.RESULTS / "intel-xeon-processor-avx512-2t.csv").read_text(encoding="utf-8").splitlines()
    columns = kept[0].split(",").index("memory_mib") + 1  # the last of the first files
    old = tmp_path / "old.csv"
    with old.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(line[:columns] for line in csv.reader(kept))
    rows = results.read(old)
    assert rows
    assert {row.setting for row in rows} == {"alone"}
    assert all(row.alone_ms is None for row in rows)
    results.write(tmp_path / "again.csv", rows)
    assert results.read(tmp_path / "again.csv") == rows
